# shellcheck shell=sh disable=SC2015,SC2034
# The root kind `remote`: the system of a machine that runs, over one SSH connection (--ssh).  The contract is in roots.sh.
#
# Rules: whom to trust is the user's own SSH configuration, nothing of it is changed; it asks only where a terminal is, and once; every
# later command goes through that connection or not at all.  What runs there is folder.sh, sent along, with / as its root, as root
# or by sudo -n.  A lost connection ends this; flashing again goes on from there.  $SLY_SSH names another ssh.

REMOTE_SSH=${SLY_SSH:-ssh}
REMOTE_ROOM='' REMOTE_HOST='' REMOTE_SUDO='' REMOTE_SCRIPT='' REMOTE_AGENT='' REMOTE_STOPPED='' REMOTE_HOLDER='' REMOTE_HELD=''

# remote_look USER@HOST
remote_look() {
    case $1 in
        -* | *[!A-Za-z0-9@._:/%+-]*) refuse '--ssh' "$1" 'USER@HOST, or ssh://USER@HOST:PORT, or a name in your ~/.ssh/config' ;;
    esac
    command -v "$REMOTE_SSH" >/dev/null || fail "$REMOTE_SSH" 'it is not installed here' 'install it: apt-get install openssh-client'
    REMOTE_HOST=$1
    remote_connect
    REMOTE_SCRIPT=$(remote_script)
    case $(remote_shell 'id -u') in
        0) ;;
        *)
            REMOTE_SUDO='sudo -n '
            [ "$(remote_shell 'sudo -n id -u' 2>/dev/null)" = 0 ] || refuse '--ssh' "a user of $1 who is not root there, and whom sudo -n refuses" \
                'root, or a user with sudo that asks for no password' 'log in as root@..., or allow it there (visudo: NOPASSWD)'
            ;;
    esac
    ROOT_KIND=remote
    [ -n "$DRY_RUN" ] || remote_hold || refuse_second '--ssh' "$1"
    remote_judged_paths >"$REMOTE_ROOM/judged"
    remote_ahead "$REMOTE_ROOM/judged"
}

# What is looked at before anything is written, asked in one go: each command costs a process there, and its start.
remote_judged_paths() {
    for minor in 10 11 12 13 14; do
        printf -- '-\t-\t%s\t-\n' "/usr/bin/python3.$minor" "/usr/lib/python3.$minor/venv/__init__.py"
    done
    for path in /etc/os-release /usr/lib/os-release /usr/lib/systemd/systemd /lib/systemd/systemd /usr/bin/python3 "$SOFTWARE" "$SOFTWARE/wheels" "$SOFTWARE/models" /etc/sly "$STATES" "$STATE" \
        "$STATE/identity.key" "$STATE/device_root.key" "$FLASHED" "$FLASHING"; do
        printf -- '-\t-\t%s\t-\n' "$path"
    done
}

# The path of a socket is short (unix(7): 108 bytes): TMPDIR may be long.
remote_connect() {
    at_exit remote_leave
    REMOTE_ROOM=$(mktemp -d /tmp/sly-ssh.XXXXXX) || fail '/tmp' 'no folder could be made in it' 'is it full?'
    trap 'exit 1' USR1
    asks=no
    [ -t 0 ] || asks=yes
    "$REMOTE_SSH" -f -N -M -S "$REMOTE_ROOM/ssh" -o BatchMode="$asks" -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 \
        -- "$REMOTE_HOST" </dev/null >/dev/null ||
        fail "$REMOTE_HOST" 'no SSH connection, see above' "does this work: $REMOTE_SSH $REMOTE_HOST true"
}

# One command there lasts as long as this: it has the lock, and ends when descriptor 8, its stdin, is closed.
remote_hold() {
    mkfifo -- "$REMOTE_ROOM/hold" "$REMOTE_ROOM/held"
    remote_do end_hold <"$REMOTE_ROOM/hold" >"$REMOTE_ROOM/held" &
    REMOTE_HOLDER=$!
    exec 8>"$REMOTE_ROOM/hold"
    REMOTE_HELD=yes
    read -r held <"$REMOTE_ROOM/held" && [ "$held" = held ]
}

remote_let_go() {
    [ -n "$REMOTE_HOLDER" ] || return 0
    if [ -n "$REMOTE_HELD" ]; then exec 8>&-; else kill "$REMOTE_HOLDER" 2>/dev/null || :; fi
    wait "$REMOTE_HOLDER" || :
}

remote_leave() {
    [ -n "$REMOTE_ROOM" ] || return 0
    trap '' USR1
    remote_let_go
    [ -z "$REMOTE_STOPPED" ] || say "flash.sh: the agent on $REMOTE_HOST is stopped, and what is there is not whole; flash it again"
    "$REMOTE_SSH" -S "$REMOTE_ROOM/ssh" -O exit -- "$REMOTE_HOST" 2>/dev/null || :
    rm -rf -- "$REMOTE_ROOM"
}

# remote_shell COMMAND: a line for the shell there.  Without the one connection there is none: ProxyCommand=false.
remote_shell() {
    "$REMOTE_SSH" -S "$REMOTE_ROOM/ssh" -o ControlMaster=no -o BatchMode=yes -o ProxyCommand=false -- "$REMOTE_HOST" "$1" && return 0
    remote_status=$?
    [ "$remote_status" = 255 ] || return "$remote_status"
    remote_lost
}

# Said once, and the end also where a function's output is taken.
remote_lost() {
    mkdir -- "$REMOTE_ROOM/lost" 2>/dev/null &&
        printf 'flash.sh: %s: the connection was lost; what is there may be half; flash it again, which goes on from there\n' "$REMOTE_HOST" >&2
    kill -USR1 $$
    exit 1
}

# remote_quote WORD: as one word for a POSIX shell.
remote_quote() {
    case $1 in
        *\'*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
        *) printf "'%s'" "$1" ;;
    esac
}

# remote_do FUNCTION ARGS...: a function of what is sent along, run there as root.
remote_do() {
    line="${REMOTE_SUDO}sh -c $REMOTE_SCRIPT sh"
    for word in "$@"; do
        line="$line $(remote_quote "$word")"
    done
    remote_shell "$line"
}

remote_script() {
    remote_quote "set -eu; umask 022; export LC_ALL=C; ROOT=/; DRY_RUN=; YES=yes; TAB=\$(printf '\\t')
$(cat -- "$ROOMS/say.sh" "$ROOMS/folder.sh" "$ROOMS/remote_end.sh")
\"\$@\""
}

# remote_ahead LIST: what is there of every entry, asked in one go; told until something is written.
remote_ahead() {
    remote_do end_facts <"$1" >"$REMOTE_ROOM/facts" || exit 1
}

# remote_fact COLUMN FUNCTION PATH: as it was told ahead, else asked now.
remote_fact() {
    if told=$(remote_told "$1" "$3"); then
        [ "$told" != - ] && printf '%s\n' "$told"
    else
        remote_do "$2" "$3" </dev/null
    fi
}

# remote_told COLUMN PATH: - for what is not there; fails for what was not asked ahead.
remote_told() {
    [ -s "$REMOTE_ROOM/facts" ] || return 1
    awk -F "$TAB" -v column="$1" -v path="$2" '
        $1 == path && $column != "" { found = 1; print $column; exit }
        END { exit !found }' "$REMOTE_ROOM/facts"
}

remote_type() { remote_fact 2 folder_type "$1"; }
remote_meta() { remote_fact 3 folder_meta "$1"; }
remote_hash() { remote_fact 4 folder_hash "$1"; }
remote_link() { remote_fact 5 folder_link "$1"; }
remote_cat() { remote_do folder_cat "$1" </dev/null; }
remote_list() { remote_do folder_list "$1" </dev/null; }
remote_free_kib() { remote_do folder_free_kib </dev/null; }
remote_remove() { rm -f "$REMOTE_ROOM/facts" && remote_do folder_remove "$1" </dev/null; }
remote_remove_empty() { rm -f "$REMOTE_ROOM/facts" && remote_do folder_remove_empty "$1" </dev/null; }
remote_sync() { remote_do folder_sync </dev/null; }

# remote_apply LIST TREE: the list, then the tree as a tar stream, into a folder of root's alone; from there as folder_apply does.
remote_apply() {
    rm -f "$REMOTE_ROOM/facts"
    list_bytes=$(wc -c <"$1")
    { cat -- "$1" && tar -C "$2" -cf - .; } | remote_do end_receive "$((list_bytes))" || exit 1
}

# remote_ask USER@HOST
remote_ask() {
    say "$1: $(remote_do end_name </dev/null)"
    ask_for flash "The system that runs there becomes a board${WIPE:+, and the board that was there is removed}."
}

# remote_open USER@HOST: flashing.list comes before the agent is stopped, and so tells the next one who stopped it.
remote_open() {
    REMOTE_AGENT=$(remote_do end_agent </dev/null)
    unfinished=$(root_type "$FLASHING")
    if [ "$REMOTE_AGENT" = active ]; then
        say "the agent on $1 is stopped while it is written"
        [ "$unfinished" = f ] || put_one "$FLASHING" /dev/null
        remote_do end_stop </dev/null
        REMOTE_STOPPED=yes
    elif [ "$REMOTE_AGENT" = inactive ] && [ "$unfinished" = f ]; then
        say "the agent on $1 was stopped by a flashing that did not end: it is started again after this one"
        REMOTE_AGENT=stopped
    fi
}

# Who ran runs again, and so does who is new; who was stopped by hand stays stopped.
remote_keep() {
    remote_sync
    if [ "$REMOTE_AGENT" = inactive ]; then
        remote_do end_reload </dev/null
        say "the agent on $REMOTE_HOST was stopped, and stays so: systemctl start sly-agent"
    else
        remote_do end_start </dev/null
    fi
    REMOTE_STOPPED=
}
