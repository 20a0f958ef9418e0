# shellcheck shell=sh disable=SC2015,SC2030,SC2031,SC2034
# The root kind `debugfs`: an ext file system in an image, read and written without mounting it and without rights.  The contract is
# in roots.sh; which image and where in it is in partitions.sh.
#
# Rules: debugfs follows links inside the file system and nowhere else (ext2fs_namei starts at its root); DIR/. is the folder that
# DIR leads to.  It ends with 0 whatever happens, so all that it says on stderr besides its version is a failure.

# debugfs_quote TEXT: one word for debugfs, whose quote inside quotes is doubled.
debugfs_quote() {
    case $1 in
        *'
'*) refuse 'a name on the target' "$1" 'names of one line' ;;
        *\"*) printf '"%s"' "$(printf '%s' "$1" | sed 's/"/""/g')" ;;
        *) printf '"%s"' "$1" ;;
    esac
}

# debugfs_ask COMMAND WORD: what debugfs prints; the file system is opened for reading.
debugfs_ask() (
    cd "$MEDIUM_ROOM" && debugfs -R "$1 ${2:+$(debugfs_quote "$2")}" "medium?offset=$MEDIUM_START" 2>debugfs.said
)

# debugfs_went_well: whether the last debugfs said nothing but its version.
debugfs_went_well() {
    ! grep -qv '^debugfs [0-9]' "$MEDIUM_ROOM/debugfs.said"
}

debugfs_complaint() {
    grep -v '^debugfs [0-9]' "$MEDIUM_ROOM/debugfs.said" | head -n 1
}

# debugfs_do COMMANDS: a file of commands, one a line; the file system is opened for writing.
debugfs_do() {
    at_medium debugfs -w -f "$1" "medium?offset=$MEDIUM_START" >"$MEDIUM_ROOM/debugfs.told" 2>"$MEDIUM_ROOM/debugfs.said" || return 1
    debugfs_went_well
}

debugfs_type() (
    told=$(debugfs_ask stat "$1" | sed -n 's/^Inode: [0-9]* *Type: \([a-z]*\).*/\1/p;q')
    case $told in
        regular) echo f ;;
        directory) echo d ;;
        symlink) echo l ;;
        ?*) echo o ;;
        *) debugfs_absent "$1" && echo none ;;
    esac
)

debugfs_absent() {
    case $(debugfs_complaint) in
        *'File not found'* | *'not a directory'*) ;;
        *'Too many symbolic links'*) refuse "$1 on the target" 'links that never end' 'at most 40 links on the way' ;;
        *) fail "$1 on the target" "$(debugfs_complaint)" 'the file system is damaged: fetch the image again' ;;
    esac
}

debugfs_cat() (
    [ "$(debugfs_type "$1")" = f ] && debugfs_ask cat "$1" && debugfs_went_well
)

debugfs_link() (
    told=$(debugfs_ask stat "$1")
    case $told in 'Inode: '*'Type: symlink '*) ;; *) return 1 ;; esac
    case $told in
        *'Fast link dest: "'*) told=${told##*'Fast link dest: "'} && printf '%s\n' "${told%\"*}" ;;
        *) debugfs_ask cat "$1" && echo ;;
    esac
)

# Lines of "type name"; names cannot hold a slash, which ls -p puts between its fields.
debugfs_entries() {
    debugfs_ask 'ls -p' "${1%/}/." | awk -F/ '
        NF == 0 { next }
        NF < 7 { exit 1 }
        $2 != 0 && $6 != "." && $6 != ".." { print ($3 ~ /^04/ ? "d" : "f") " " $6 }' && debugfs_went_well
}

debugfs_list() (
    [ "$(debugfs_type "$1")" = d ] && debugfs_entries "$1" | cut -c 3-
)

debugfs_meta() (
    debugfs_ask stat "$1" | awk '
        NR == 1 { for (i = 1; i < NF; i++) if ($i == "Mode:") mode = $(i + 1) }
        NR == 3 { user = $2; group = $4; found = 1; exit }
        END { if (!found) exit 1; printf "%s %s %s\n", mode, user, group }'
)

debugfs_hash() (
    [ "$(debugfs_type "$1")" = f ] || return 1
    told=$(debugfs_ask cat "$1" | sha256sum) && debugfs_went_well && printf '%s\n' "${told%% *}"
)

# What df calls available: without the blocks that are reserved.
debugfs_free_kib() {
    debugfs_available_kib || fail 'the image' "$(debugfs_complaint)" 'the file system is damaged: fetch the image again'
}

# Fails if the file system cannot be opened.
debugfs_available_kib() {
    debugfs_ask 'stats -h' | awk '
        /^Free blocks: / { free = $3 }
        /^Reserved block count: / { reserved = $4 }
        /^Block size: / { size = $3 }
        END { if (size == "") exit 1; printf "%.0f\n", (free > reserved ? (free - reserved) * size / 1024 : 0) }'
}

debugfs_file_system_size() {
    debugfs_ask 'stats -h' | awk '/^Block count: / { count = $3 } /^Block size: / { size = $3 } END { printf "%.0f\n", count * size }'
}

debugfs_needs_recovery() {
    debugfs_ask 'stats -h' | grep -q '^Filesystem features: .*needs_recovery'
}

debugfs_remove() {
    case $1 in / | /. | '') refuse 'what is removed' "$1" 'something below the root' ;; esac
    (debugfs_plan_removal "$1" "$(debugfs_type "$1")") >"$MEDIUM_ROOM/commands" || debugfs_failed "$1" 'removed'
    debugfs_do commands || debugfs_failed "$1" 'removed'
}

# debugfs_plan_removal PATH TYPE: the commands that remove it, what is deepest first.
debugfs_plan_removal() {
    case $2 in
        none) return 0 ;;
        d)
            entries=$(debugfs_entries "$1") || return 1
            printf '%s\n' "$entries" | while IFS= read -r entry; do
                [ -z "$entry" ] || debugfs_plan_removal "$1/${entry#* }" "${entry%% *}" || exit 1
            done || return 1
            printf 'rmdir %s\n' "$(debugfs_quote "$1")"
            ;;
        *) printf 'rm %s\n' "$(debugfs_quote "$1")" ;;
    esac
}

debugfs_remove_empty() (
    [ "$(debugfs_type "$1")" = d ] && [ -z "$(debugfs_list "$1")" ] || return 0
    printf 'rmdir %s\n' "$(debugfs_quote "$1")" >"$MEDIUM_ROOM/commands"
    debugfs_do commands || debugfs_failed "$1" 'removed'
)

# debugfs_apply LIST TREE: one list of commands, one run of debugfs.
debugfs_apply() {
    rm -f -- "$MEDIUM_ROOM/tree"
    ln -s -- "$(absolute "$2")" "$MEDIUM_ROOM/tree"
    DEBUGFS_FOLDERS=' / '
    while IFS="$TAB" read -r kind mode path digest; do
        case $kind in '#'*) continue ;; esac
        debugfs_plan_folder "${path%/*}"
        "debugfs_plan_$kind" "$mode" "$path" "$digest"
    done <"$1" >"$MEDIUM_ROOM/commands"
    debugfs_do commands || debugfs_failed 'the image' 'written'
    entries=$(grep -vc '^#' "$1" || :)
    progress 'written' "$entries" "$entries"
}

debugfs_failed() {
    case $(cat -- "$MEDIUM_ROOM/debugfs.said") in
        *'allocate'* | *'o space'* | *'No free'*) fail "$1 on the target" 'there is no room in the image' 'make it larger: --grow 1G' ;;
    esac
    fail "$1 on the target" "it could not be $2: $(debugfs_complaint)" 'nothing was made; is the image whole?'
}

# debugfs_plan_folder FOLDER: it and those above it are there, or will be; a link leads to where they will be.
debugfs_plan_folder() {
    case $DEBUGFS_FOLDERS in *" ${1:-/} "*) return 0 ;; esac
    if [ "$(debugfs_type "$1/.")" != d ]; then
        debugfs_plan_folder "${1%/*}"
        case $(debugfs_type "$1") in
            none)
                debugfs_in "$1" mkdir
                debugfs_plan_owner "$1" 040755
                ;;
            l) debugfs_plan_folder "$(debugfs_leads_to "$1")" ;;
            *) fail "$1 on the target" 'it is no folder' 'remove it from the image' ;;
        esac
    fi
    DEBUGFS_FOLDERS="$DEBUGFS_FOLDERS$1 "
}

debugfs_leads_to() (
    link=$(debugfs_link "$1")
    case $link in /*) ;; *) link=${1%/*}/$link ;; esac
    case $link in *[!A-Za-z0-9/._@+-]*) refuse "$1 on the target" 'a link to a name with other characters' 'letters, digits and /._@+-' ;; esac
    printf '%s\n' "${link%/}"
)

# debugfs_in PATH COMMAND [WORD]: commands that do it in the folder of PATH, with its last part.
debugfs_in() {
    printf 'cd %s\n' "$(debugfs_quote "${1%/*}/.")"
    printf '%s %s%s\n' "$2" "${3:+$(debugfs_quote "$3") }" "$(debugfs_quote "${1##*/}")"
}

debugfs_plan_owner() {
    for field in "mode $2" 'uid 0' 'gid 0'; do
        printf 'set_inode_field %s %s\n' "$(debugfs_quote "${1##*/}")" "$field"
    done
}

debugfs_plan_d() {
    debugfs_plan_folder "$2"
    printf 'cd %s\n' "$(debugfs_quote "$2/.")"
    debugfs_plan_owner /. "04$1"
}

debugfs_plan_f() {
    debugfs_plan_gone "$2"
    debugfs_in "$2" write "tree$2"
    debugfs_plan_owner "$2" "010$1"
}

debugfs_plan_l() {
    debugfs_plan_gone "$2"
    printf 'cd %s\nsymlink %s %s\n' "$(debugfs_quote "${2%/*}/.")" "$(debugfs_quote "${2##*/}")" "$(debugfs_quote "$3")"
    debugfs_plan_owner "$2" 0120777
}

debugfs_plan_gone() {
    case $(debugfs_type "$1") in
        none) ;;
        d) fail "$1 on the target" 'a folder where a file belongs' 'remove it from the image' ;;
        *) printf 'rm %s\n' "$(debugfs_quote "$1")" ;;
    esac
}

debugfs_sync() {
    real sync "$MEDIUM_ROOM/medium"
}
