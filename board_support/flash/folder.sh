# shellcheck shell=sh disable=SC2015,SC2034
# The root kind `folder`: $ROOT is a folder of this machine, also where an image or a device is mounted.  The contract is in roots.sh.
#
# Rules: no path of the target is given to a command before folder_place has said where it lies below $ROOT; a file is whole under
# its name or not there.

# folder_place PATH: where it lies on this machine; links on the way are followed below $ROOT, as the target itself would.
folder_place() (
    left=${1#/} done='' hops=0
    while [ -n "$left" ]; do
        part=${left%%/*}
        case $left in */*) left=${left#*/} ;; *) left= ;; esac
        case $part in
            '' | .) continue ;;
            ..) done=${done%/*}; continue ;;
        esac
        if [ -n "$left" ] && [ -L "$ROOT$done/$part" ]; then
            hops=$((hops + 1))
            [ "$hops" -le 40 ] || refuse "$1 on the target" 'links that never end' 'at most 40 links on the way'
            link=$(readlink -- "$ROOT$done/$part")
            case $link in /*) done='' ;; esac
            left=$link/$left
        else
            done=$done/$part
        fi
    done
    printf '%s\n' "$ROOT$done"
)

folder_type() (
    place=$(folder_place "$1") || return
    if [ -L "$place" ]; then echo l
    elif [ -f "$place" ]; then echo f
    elif [ -d "$place" ]; then echo d
    elif [ -e "$place" ]; then echo o
    else echo none
    fi
)

folder_cat() (
    place=$(folder_place "$1") || return
    [ -f "$place" ] && [ ! -L "$place" ] && cat -- "$place"
)

folder_link() (
    place=$(folder_place "$1") || return
    [ -L "$place" ] && readlink -- "$place"
)

folder_list() (
    place=$(folder_place "$1") || return
    [ -d "$place" ] && [ ! -L "$place" ] && ls -A -- "$place"
)

folder_meta() (
    place=$(folder_place "$1") || return
    told=$(stat -c '%a %u %g' -- "$place" 2>/dev/null) || return 1
    printf '%04d %s\n' "${told%% *}" "${told#* }"
)

folder_hash() (
    place=$(folder_place "$1") || return
    [ -f "$place" ] && [ ! -L "$place" ] || return 1
    told=$(sha256sum <"$place") && printf '%s\n' "${told%% *}"
)

folder_free_kib() {
    df -Pk -- "$ROOT" | awk 'NR == 2 { print $4 }'
}

folder_remove() (
    place=$(folder_place "$1") || return
    [ "$place" != "$ROOT" ] || refuse 'what is removed' "$1" 'something below the root'
    rm -rf -- "$place" || fail "$1 on the target" 'it could not be removed' 'is the file system read-only?'
)

folder_remove_empty() (
    place=$(folder_place "$1") || return
    [ -L "$place" ] || rmdir -- "$place" 2>/dev/null || :
)

folder_apply() {
    applied=0 entries=$(grep -vc '^#' "$1" || :)
    while IFS="$TAB" read -r kind mode path digest; do
        case $kind in '#'*) continue ;; esac
        "folder_put_$kind" "$mode" "$path" "$digest" "$2" ||
            fail "$path on the target" 'it could not be written' 'is there room, and is it writable? flash again: it goes on from there'
        applied=$((applied + 1))
        progress 'written' "$applied" "$entries"
    done <"$1"
}

folder_put_d() (
    place=$(folder_place "$2") || return
    folder_make_parents "$place" && { [ -d "$place" ] || mkdir -- "$place"; } && chown 0:0 "$place" && chmod "0$1" "$place"
)

folder_put_f() (
    place=$(folder_place "$2") || return
    part=${place%/*}/.${place##*/}.sly-part
    folder_make_parents "$place" && folder_clear "$part" && install -o 0 -g 0 -m "$1" -- "$4$2" "$part" && mv -fT -- "$part" "$place" || { rm -f -- "$part"; return 1; }
)

folder_put_l() (
    place=$(folder_place "$2") || return
    part=${place%/*}/.${place##*/}.sly-part
    folder_make_parents "$place" && folder_clear "$part" && ln -s -- "$3" "$part" && chown -h 0:0 "$part" && mv -fT -- "$part" "$place"
)

# What a flashing that was killed left under the name of a part.
folder_clear() {
    { [ ! -e "$1" ] && [ ! -L "$1" ]; } || rm -rf -- "$1"
}

# Only below $ROOT, and only folders that folder_place has resolved: mkdir -p never meets a link.
folder_make_parents() (
    umask 022
    [ -d "${1%/*}" ] || mkdir -p -- "${1%/*}"
)

folder_sync() {
    sync -f "$ROOT" 2>/dev/null || sync
}

# folder_lock WHERE: for as long as this runs, or who has its descriptor 8; fails if another has it.
folder_lock() {
    exec 8<"$1" && flock -n 8
}

# --rootfs: the folder is looked at here; there is nothing to open or to close.
folder_look() {
    [ -d "$1" ] || refuse '--rootfs' "$1, which is no folder" 'the root folder of a system' 'mount it first, or name an image with --image'
    ROOT=$(CDPATH='' cd -- "$1" && pwd -P) || refuse '--rootfs' "$1, which cannot be entered" 'a folder that you may read'
    ROOT_KIND=folder
    [ "$(stat -c %d:%i -- "$ROOT")" != "$(stat -c %d:%i /)" ] ||
        refuse '--rootfs' "$1, the system of this machine" 'the root of another system' 'a system that runs is flashed by --ssh USER@HOST'
    [ "$(id -u)" = 0 ] || [ -n "$DRY_RUN" ] ||
        refuse '--rootfs' "user $(id -un)" 'root, whom the files on the board belong to' 'run it with sudo; --image with --out needs no rights'
    [ -n "$DRY_RUN" ] || folder_lock "$ROOT" || refuse_second '--rootfs' "$ROOT"
}
