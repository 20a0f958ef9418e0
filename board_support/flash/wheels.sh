# shellcheck shell=sh disable=SC2015,SC2034
# The agent's wheels for the target: taken from --wheels, or packed by `sly ota pack-agent` and kept in build/.
#
# Rules: only a whole folder has its name; what is kept is packed again when the agent's source changed; a folder is judged by what
# it says of itself and by the names of its wheels, before any of it is copied.

FACTS=wheelhouse.json

# take_wheels: sets $WHEELHOUSE, or leaves it empty in a dry run that would have to pack.
take_wheels() {
    WHEELHOUSE='' PACK_PART='' WATCH_PID=''
    if [ -n "$WHEELS" ]; then
        judge_wheels "$WHEELS" '--wheels'
        WHEELHOUSE=$(CDPATH='' cd -- "$WHEELS" && pwd -P)
        return
    fi
    kept=$BUILD/wheels-$PYTHON-$MACHINE
    source=$(digest_of_source)
    if [ ! -f "$kept/$FACTS" ] || [ "$(cat "$kept.source" 2>/dev/null)" != "$source" ]; then
        [ -z "$DRY_RUN" ] || { say "wheels for Python $PYTHON on $MACHINE would be packed into $kept"; return 0; }
        pack_wheels "$kept"
        printf '%s\n' "$source" >"$kept.source"
    fi
    judge_wheels "$kept" "$kept"
    WHEELHOUSE=$kept
}

fact() {
    sed -n "s/^ *\"$2\": *\"\\([A-Za-z0-9._-]*\\)\".*/\\1/p" "$1/$FACTS" | head -n 1
}

# judge_wheels FOLDER SUBJECT
judge_wheels() {
    [ -f "$1/$FACTS" ] || refuse "$2" "$1 without $FACTS" 'a folder as sly ota pack-agent makes it' 'leave --wheels out to have one packed'
    AGENT=$(fact "$1" agent)
    got="$(fact "$1" python) on $(fact "$1" machine)"
    [ "$got" = "$PYTHON on $MACHINE" ] || refuse "$2" "wheels for Python $got" "Python $PYTHON on $MACHINE, which the target has" \
        "pack them: sly ota pack-agent DIR --board $BOARD --python $PYTHON --machine $MACHINE"
    own='' pip=''
    for wheel in "$1"/*.whl; do
        name=${wheel##*/}
        case $name in *[!A-Za-z0-9._+-]*) refuse "$2" "a file $name" 'wheels with names of letters, digits and ._+-' ;; esac
        [ "$(head -c 2 -- "$wheel" 2>/dev/null)" = PK ] || refuse "$2" "$name, which is no wheel" 'whole wheels' 'pack them again'
        case $name in
            *-any.whl | *"_$MACHINE.whl") ;;
            *) refuse "$2" "$name" "wheels for $MACHINE, which --board $BOARD has here" 'pack them again' ;;
        esac
        case $name in
            "$AGENT"-*) own=yes ;;
            pip-*) pip=yes ;;
        esac
    done
    [ -n "$own" ] || refuse "$2" "no wheel of ${AGENT:-the agent}" "the one that $FACTS names" 'pack them again'
    [ -n "$pip" ] || refuse "$2" 'no wheel of pip' 'one: the board has no other' 'pack them again'
}

# What the agent's own wheel is built from: the same list of folders as setup.cfg.
digest_of_source() {
    (cd "$HERE" && find edge_agent board_support models ota setup.cfg pyproject.toml -type f ! -name '*.pyc' ! -name '.*' \
        ! -path 'board_support/flash/*' -exec sha256sum {} + | sort | sha256sum | cut -c -64)
}

# pack_wheels FOLDER: under another name until it is whole; versions that are kept already stay.
pack_wheels() {
    PACK_PART=$1.part$$
    at_exit forget_packing
    mkdir -p -- "$BUILD"
    forget_packs_of_the_dead "$1"
    sly=$(which_sly)
    say "packing the agent for Python $PYTHON on $MACHINE, once for all such boards ..."
    watch_packing &
    WATCH_PID=$!
    like=
    [ ! -f "$1/$FACTS" ] || like=$1
    "$sly" ota pack-agent "$PACK_PART" --board "$BOARD" --python "$PYTHON" --machine "$MACHINE" ${like:+--like "$like"} >/dev/null ||
        fail "wheels for --board $BOARD (Python $PYTHON, $MACHINE)" 'they could not be packed, see above' \
            'give a folder that has them: --wheels; docs/boards.md says what there is for which Python'
    stop_watching
    rm -rf -- "$1"
    mv -T -- "$PACK_PART" "$1"
}

# Where a person looks, how many there are so far.
watch_packing() {
    trap 'exit 0' TERM
    while [ -t 2 ] && sleep 1; do
        printf '\r\033[K%s wheels so far ' "$(find "$PACK_PART" -name '*.whl' 2>/dev/null | wc -l)" >&2
    done
}

stop_watching() {
    [ -z "$WATCH_PID" ] || { kill "$WATCH_PID" 2>/dev/null || :; wait "$WATCH_PID" 2>/dev/null || :; }
    WATCH_PID=
    [ ! -t 2 ] || printf '\r\033[K' >&2
}

forget_packing() {
    stop_watching
    rm -rf -- "$PACK_PART"
}

# Of flashings that were killed while they packed.
forget_packs_of_the_dead() {
    for each in "$1".part*; do
        kill -0 "${each##*.part}" 2>/dev/null || rm -rf -- "$each"
    done
}

# which_sly: $SLY, this checkout's (make renews one that is older than setup.cfg), the one on PATH, else what make makes.
which_sly() {
    if [ -n "${SLY:-}" ]; then
        command -v -- "$SLY" || refuse 'SLY' "$SLY" 'a program sly that can be run'
    elif [ -x "$HERE/.venv/bin/sly" ]; then
        ! command -v make >/dev/null || make -s -C "$HERE" .venv/demo.made >&2 || say 'make could not renew .venv; it is taken as it is'
        printf '%s\n' "$HERE/.venv/bin/sly"
    elif ! command -v sly; then
        say 'there is no sly yet: making it (make .venv/demo.made) ...'
        make -C "$HERE" .venv/demo.made >&2 || fail 'sly' 'make could not make it, see above' 'or name one: SLY=/path/to/sly ./flash.sh ...'
        printf '%s\n' "$HERE/.venv/bin/sly"
    fi
}
