# shellcheck shell=sh disable=SC2015,SC2034,SC2153
# What a flashed board holds: staged whole, with modes and hashes, before any of it goes to the target.
#
# $STAGE/tree has the files, $STAGE/list one line for each entry: type, mode, path and digest by tabs.  Everything belongs to root;
# first_boot gives to the user sly what is its own, because the number of that user is not known here.
# Rules: nothing is in the tree that is not in the list; a path has no spaces; the folder is this user's alone, for it holds keys.

SOFTWARE=/opt/sly
UNITS=/etc/systemd/system
FLASHED=$SOFTWARE/flashed.list
FLASHING=$SOFTWARE/flashing.list

stage_tree() {
    forget_stages_of_the_dead
    STAGE=
    at_exit forget_stage
    STAGE=$(mktemp -d "${TMPDIR:-/tmp}/sly-flash.$$.XXXXXX") || fail 'a folder to stage in' 'it could not be made' 'set TMPDIR to one with room'
    chmod 0700 "$STAGE"
    mkdir "$STAGE/tree"
    : >"$STAGE/list"
    say 'putting the board together ...'
    stage_software
    stage_services
    stage_identity
    stage_network
}

forget_stage() {
    [ -z "$STAGE" ] || rm -rf -- "$STAGE"
}

# Of flashings that were killed and could not tidy up: there are keys in them.
forget_stages_of_the_dead() {
    find "${TMPDIR:-/tmp}" -maxdepth 1 -type d -user "$(id -u)" -name 'sly-flash.*.*' 2>/dev/null | while read -r each; do
        number=${each##*/sly-flash.}
        number=${number%%.*}
        case $number in '' | *[!0-9]*) continue ;; esac
        kill -0 "$number" 2>/dev/null || rm -rf -- "$each"
    done
}

stage_software() {
    stage_folder 0755 "$SOFTWARE"
    stage_link "$SOFTWARE/python" "$INTERPRETER"
    stage_file 0644 "$SOFTWARE/launcher.py" "$HERE/ota/launcher.py"
    stage_file 0644 "$SOFTWARE/first_boot.py" "$HERE/board_support/first_boot.py"
    stage_folder 0755 "$SOFTWARE/wheels"
    if [ -n "$WHEELHOUSE" ]; then
        for each in "$WHEELHOUSE"/*.whl "$WHEELHOUSE/$FACTS"; do
            stage_file 0644 "$SOFTWARE/wheels/${each##*/}" "$each"
        done
    fi
    stage_folder 0755 "$SOFTWARE/models"
    [ -n "$MODELS" ] || return 0
    for each in $(model_files); do
        stage_file 0644 "$SOFTWARE/models/$each" "$MODELS/$each"
    done
}

stage_services() {
    for each in "$HERE"/board_support/systemd/*.service; do
        stage_file 0644 "$UNITS/${each##*/}" "$each"
    done
    stage_folder 0755 "$UNITS/sly-agent.service.d"
    stage_file 0644 "$UNITS/sly-agent.service.d/10-board.conf" "$HERE/board_support/systemd/boards/$BOARD.conf"
    stage_link "$UNITS/multi-user.target.wants/sly-agent.service" "$UNITS/sly-agent.service"
    stage_file 0644 /etc/udev/rules.d/70-sly.rules "$HERE/board_support/udev/70-sly.rules"
    stage_file 0644 /etc/sysusers.d/sly.conf "$HERE/board_support/sysusers/sly.conf"
}

stage_identity() {
    stage_folder 0755 /etc/sly
    stage_file 0600 /etc/sly/agent.toml "$ENROLLED/agent.toml"
    stage_folder 0700 "$STATES"
    stage_folder 0700 "$STATE"
    for each in $SECRET_FILES; do
        [ ! -e "$ENROLLED/$each" ] || stage_file 0600 "$STATE/$each" "$ENROLLED/$each"
    done
    for each in $PUBLIC_FILES; do
        stage_file 0644 "$STATE/$each" "$ENROLLED/$each"
    done
}

# stage_folder MODE PATH
stage_folder() {
    mkdir -p -- "$STAGE/tree$2"
    enlist d "$1" "$2" -
}

# stage_file MODE PATH SOURCE
stage_file() {
    [ -d "$STAGE/tree${2%/*}" ] || mkdir -p -- "$STAGE/tree${2%/*}"
    cat -- "$3" >"$STAGE/tree$2" ||
        fail "$3" 'it could not be copied to where the tree is staged' "is it there? is there room in ${TMPDIR:-/tmp}? TMPDIR may name another folder"
    digest=$(sha256sum <"$STAGE/tree$2")
    enlist f "$1" "$2" "${digest%% *}"
}

# stage_link PATH TARGET
stage_link() {
    mkdir -p -- "$STAGE/tree${1%/*}"
    ln -s -- "$2" "$STAGE/tree$1"
    enlist l 0777 "$1" "$2"
}

enlist() {
    case $3 in *[!A-Za-z0-9/._@+-]*) refuse 'a path on the board' "$3" 'letters, digits and /._@+-' ;; esac
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$STAGE/list"
}

# What is left on the board for whoever asks later: our own entries; digests where the board does not change the file.
flashed_list() {
    printf '# board %s\n# id %s\n# machine %s\n# python %s\n# agent %s\n' "$BOARD" "$BOARD_ID" "$MACHINE" "$PYTHON" "$AGENT"
    while IFS="$TAB" read -r kind mode path digest; do
        is_ours "$path" || is_state "$path" || continue
        ! is_state "$path" || digest=-
        printf '%s\t%s\t%s\t%s\n' "$kind" "$mode" "$path" "$digest"
    done <"$STAGE/list"
}

# is_ours PATH: whether a later flashing may remove it.  State is the board's; Wi-Fi, keys of people and names are the owner's.
is_ours() {
    case $1 in
        *[!A-Za-z0-9/._@+-]* | */../* | */./* | *//* | */.. | */.) return 1 ;;
        "$SOFTWARE" | "$SOFTWARE"/* | /etc/sly | /etc/sly/*) return 0 ;;
        "$UNITS"/sly-*/*/* | "$UNITS"/*.wants/*/*) return 1 ;;
        "$UNITS"/sly-* | "$UNITS"/*.wants/sly-*) return 0 ;;
        /etc/udev/rules.d/70-sly.rules | /etc/sysusers.d/sly.conf) return 0 ;;
        *) return 1 ;;
    esac
}

is_state() {
    case $1 in "$STATES" | "$STATES"/*) return 0 ;; *) return 1 ;; esac
}
