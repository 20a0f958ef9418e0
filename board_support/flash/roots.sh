# shellcheck shell=sh
# The root of a system that files go to: a folder, an image without a mount, or another machine.  One contract, three kinds.
#
# ROOT_KIND is folder | debugfs | remote; a kind K is the functions K_type ... K_sync.  Rules for all of them:
# * Every PATH is absolute on the target.  Links in folders on the way (/bin -> usr/bin, /etc -> /home/me) are followed INSIDE the
#   target, never out of it, `..` too; the last part of a PATH is never followed.  More than 40 links is refused.
# * What is not there: K_type prints none; the others fail (return 1) and print nothing.
# * Functions that only look write nothing at all, not even an access time that matters.
#
#   K_type PATH         prints f (a file), d (a folder), l (a link), o (anything else) or none
#   K_cat PATH          the bytes of a file
#   K_link PATH         where a link points, as it is written
#   K_list DIR          names in it, hidden ones too, one a line, without . and ..
#   K_meta PATH         "mode uid gid": the mode octal with 4 digits
#   K_hash PATH         SHA-256 of a file, 64 digits
#   K_free_kib          what is free for root, in KiB
#   K_remove PATH       file, link or whole folder; none is no error; a folder that cannot be emptied fails
#   K_remove_empty DIR  a folder if it is empty; anything else stays and is no error
#   K_apply LIST TREE   writes every entry of LIST (type, mode, path, digest by tabs; lines with # are passed over) from TREE,
#                       as root:root.  d: made if it is not there, mode and owner set.  f: written beside (a hidden name that ends
#                       in .sly-part), then renamed over whatever is there.  l: likewise.  Folders on the way that are missing are
#                       made 0755 root:root.  Ends with fail() when the target is full or cannot be written.
#   K_sync              everything written is durable when it returns
#
# What a target (--rootfs, --image, --device, --ssh) does is in targets.sh.

root_type() { "${ROOT_KIND}_type" "$@"; }
root_cat() { "${ROOT_KIND}_cat" "$@"; }
root_link() { "${ROOT_KIND}_link" "$@"; }
root_list() { "${ROOT_KIND}_list" "$@"; }
root_meta() { "${ROOT_KIND}_meta" "$@"; }
root_hash() { "${ROOT_KIND}_hash" "$@"; }
root_free_kib() { "${ROOT_KIND}_free_kib" "$@"; }
root_remove() { "${ROOT_KIND}_remove" "$@"; }
root_remove_empty() { "${ROOT_KIND}_remove_empty" "$@"; }
root_apply() { "${ROOT_KIND}_apply" "$@"; }
root_sync() { "${ROOT_KIND}_sync" "$@"; }

# root_real PATH: the path with its last part followed as well, as the target itself would; fails if there is nothing.
root_real() (
    path=$1 hops=0
    while kind=$(root_type "$path") && [ "$kind" = l ]; do
        hops=$((hops + 1))
        [ "$hops" -le 40 ] || return 1
        link=$(root_link "$path")
        case $link in
            /*) path=$link ;;
            *) path=${path%/*}/$link ;;
        esac
    done
    [ "$kind" != none ] || return 1
    printf '%s\n' "$path"
)

# root_has TYPE PATH: whether it is one, links followed.
root_has() (
    real=$(root_real "$2") && [ "$(root_type "$real")" = "$1" ]
)
