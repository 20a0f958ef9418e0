# shellcheck shell=sh disable=SC2015,SC2034
# What the target is: whether a system, for which machine, with which Python.  Only reads, by the root.
#
# Rules: what is judged are the target's own files (the head of its ELF files, the names of its Python), never what it says of
# itself; what it says is shown printable and short.

judge_system() {
    judge_own_folders
    { root_has f /etc/os-release || root_has f /usr/lib/os-release; } &&
        { root_has f /usr/lib/systemd/systemd || root_has f /lib/systemd/systemd; } ||
        refuse "$(target_looked_at)" 'no system with systemd (no os-release, or no /usr/lib/systemd/systemd)' \
            'the root of a Linux system with systemd' "take $(board_system "$BOARD")"
    SYSTEM=$({ root_cat "$(root_real /etc/os-release || root_real /usr/lib/os-release)" || :; } |
        sed -n 's/^PRETTY_NAME=//p' | tr -cd 'A-Za-z0-9 ()./_+-' | cut -c -80)
    judge_machine
    judge_python
}

# What is flashed must lie where it is said to lie: a link in its place would lead elsewhere.
judge_own_folders() {
    for path in /opt/sly /opt/sly/wheels /opt/sly/models /etc/sly "$STATES" "$STATE"; do
        judge_kind "$path" d 'a folder, or nothing: see what it is, and remove it'
    done
}

# judge_kind PATH TYPE ALLOWED
judge_kind() {
    kind=$(root_type "$1")
    [ "$kind" = "$2" ] || [ "$kind" = none ] || refuse "$1 on the target" "$(type_name "$kind")" "$3"
}

type_name() {
    case $1 in
        f) echo 'a file' ;;
        d) echo 'a folder' ;;
        l) echo 'a link' ;;
        none) echo 'nothing' ;;
        *) echo 'something that is neither file, folder nor link' ;;
    esac
}

judge_machine() {
    MACHINE=$(elf_machine /usr/bin/python3 || elf_machine /usr/lib/systemd/systemd || elf_machine /lib/systemd/systemd || :)
    allowed=$(board_machines "$BOARD")
    case " $allowed " in
        *" ${MACHINE:-?} "*) ;;
        *) refuse "machine of $(target_looked_at)" "${MACHINE:-no program that Linux runs}" "$allowed for --board $BOARD" \
            "take $(board_system "$BOARD")" ;;
    esac
}

# elf_machine PATH: for which machine a program is (ELF-64 Object File Format, the header; elf(5)).
elf_machine() (
    real=$(root_real "$1") || return 1
    head=$({ root_cat "$real" 2>/dev/null || :; } | head -c 20 | od -An -v -tu1)
    # shellcheck disable=SC2086
    set -- $head
    [ "$#" = 20 ] && [ "$1 $2 $3 $4" = '127 69 76 70' ] || return 1
    case "$5 $6 ${19} ${20}" in
        '2 1 183 0') echo aarch64 ;;
        '2 1 62 0') echo x86_64 ;;
        '1 1 40 0') echo 'armv7l (32-bit)' ;;
        '1 1 3 0') echo 'i686 (32-bit)' ;;
        '2 1 243 0') echo riscv64 ;;
        *) echo "ELF machine ${19}.${20}" ;;
    esac
)

# judge_python: sets $PYTHON and $INTERPRETER, what starts first_boot.py and launcher.py: the system's own if it is new enough, else
# the newest beside it.  /usr/bin/python3 stays what the system's own programs take it for.
judge_python() {
    INTERPRETER='' PYTHON='' PYTHON_FOUND='none in /usr/bin/python3'
    if real=$(root_real /usr/bin/python3); then judge_own_python "$real"; fi
    [ -n "$INTERPRETER" ] || take_other_python
    [ -n "$INTERPRETER" ] || refuse "Python of $(target_looked_at)" "$PYTHON_FOUND" \
        "3.$OLDEST_PYTHON_MINOR or later with its module venv, as /usr/bin/python3 or beside it" \
        "$(python_remedy)"
}

# judge_own_python REAL: what /usr/bin/python3 leads to.
judge_own_python() {
    own=$(python_of_name "${1##*/}" || python_of_folders)
    PYTHON_FOUND=${own:-"$1, which does not say its version"}
    [ -n "$own" ] && [ "${own#3.}" -ge "$OLDEST_PYTHON_MINOR" ] || return 0
    PYTHON_FOUND="$own without its module venv"
    python_is_whole "$own" || return 0
    PYTHON=$own INTERPRETER=/usr/bin/python$own
    root_has f "$INTERPRETER" || INTERPRETER=/usr/bin/python3
}

take_other_python() {
    for own in $(root_list /usr/bin | sed -n 's/^python\(3\.[1-9][0-9]\)$/\1/p' | sort -t . -k 2 -rn); do
        [ "${own#3.}" -ge "$OLDEST_PYTHON_MINOR" ] && python_is_whole "$own" &&
            [ "$(elf_machine "/usr/bin/python$own" || :)" = "$MACHINE" ] || continue
        PYTHON=$own INTERPRETER=/usr/bin/python$own
        return
    done
}

# python_is_whole VERSION: Debian's python3-minimal is not.
python_is_whole() {
    root_has f "/usr/lib/python$1/venv/__init__.py"
}

# Which package it is depends on the system.
python_remedy() {
    case $SYSTEM in
        'Ubuntu 22.04'*) echo 'install it there (apt-get install python3.11; it is in universe), beside its own' ;;
        *)
            case $PYTHON_FOUND in
                none*) echo "install it there first (apt-get install python3), or take $(board_system "$BOARD")" ;;
                *venv) echo 'install python3 there, not python3-minimal alone' ;;
                *) echo "take $(board_system "$BOARD")" ;;
            esac
            ;;
    esac
}

python_of_name() {
    case $1 in
        python3.[0-9] | python3.[0-9][0-9]) printf '%s\n' "${1#python}" ;;
        *) return 1 ;;
    esac
}

# The one python3.N that has a standard library; nothing if there are several.
python_of_folders() (
    found=$(root_list /usr/lib 2>/dev/null | grep -x 'python3\.[0-9]\{1,2\}' || :)
    case $found in
        *"
"*) ;;
        *) printf '%s\n' "${found#python}" ;;
    esac
)

# What the user named, and what was looked at: the base of an image.
target_looked_at() {
    case $TARGET in
        folder) printf '%s\n' "$ROOTFS" ;;
        image) printf '%s\n' "$IMAGE" ;;
        device) printf '%s\n' "${IMAGE:-$DEVICE}" ;;
        remote) printf '%s\n' "$SSH_TO" ;;
    esac
}
