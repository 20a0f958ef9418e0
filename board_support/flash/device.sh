# shellcheck shell=sh disable=SC2015,SC2034
# --device /dev/sdX: a card or a disk of this machine; with --image the image is made first and then written onto it.
#
# Rules: what this machine runs from, or has mounted or in use, is never touched, however it is stacked (partition, LVM, LUKS, RAID,
# loop); its name is typed before anything is written.  The first 4 MiB are zeros from the first write on and get their bytes as
# the last, so that a card whose writing was interrupted has no partition table and boots nowhere; what is read back comes from the card
# (O_DIRECT), not from this machine's memory.

DEVICE_SYS=/sys
DEVICE_PROC=/proc
DEVICE_CHUNK=4194304
DEVICE_NODE='' DEVICE_NUMBERS='' DEVICE_ROOM=''

# device_look DEV
device_look() {
    device_judge_kind "$1"
    device_judge_use "$1"
    device_judge_rights "$1"
    [ -n "$DRY_RUN" ] || folder_lock "$DEVICE_NODE" || refuse_second '--device' "$1"
    if [ -n "$IMAGE" ]; then
        device_look_with_image "$1"
    else
        [ -z "$GROW" ] || refuse '--grow' "$GROW" 'only with --image' 'a system grows onto its card by itself, or by resize2fs'
        medium_take "$DEVICE_NODE"
        medium_look "$1"
        ROOT_KIND=debugfs
    fi
}

device_judge_kind() {
    [ -e "$1" ] || refuse '--device' "$1, which is not there" 'a card or disk, as lsblk lists them'
    DEVICE_NODE=$(readlink -f -- "$1")
    [ -b "$DEVICE_NODE" ] || refuse '--device' "$1, which is no block device" 'a card or disk, as lsblk lists them' 'an image file is --image'
    numbers=$(stat -c '%t %T' -- "$DEVICE_NODE")
    DEVICE_NUMBERS=$((0x${numbers% *})):$((0x${numbers#* }))
    [ ! -e "$DEVICE_SYS/dev/block/$DEVICE_NUMBERS/partition" ] ||
        refuse '--device' "$1, which is a partition" 'a whole card or disk' 'name what it is a part of, as lsblk shows it'
}

# Mounts of all that may be seen, not of this process alone: another may be in a namespace of its own.
device_judge_use() {
    uses=$(device_uses | sort -u)
    case "
$uses
" in
        *'
system '*) refuse '--device' "$1, the disk that this machine runs from (it holds $(device_told "$uses" system))" 'another card or disk' 'see lsblk' ;;
        *'
mounted '*) refuse '--device' "$1, which is mounted on $(device_told "$uses" mounted)" 'one that is not in use' 'unmount it first' ;;
        *'
held '*) refuse '--device' "$1, which is in use by $(device_told "$uses" held)" 'one that is not in use' 'close that first (cryptsetup, vgchange, mdadm)' ;;
    esac
}

device_told() {
    printf '%s\n' "$1" | sed -n "s/^$2 //p" | tr '\n' ' ' | sed 's/ $//' | cut -c -200
}

# Lines of "system WHAT", "mounted WHERE" or "held BY" for everything that uses the device.
device_uses() {
    device_mounts | while read -r numbers where; do
        device_stands_on "$numbers" "$DEVICE_NUMBERS" 0 || continue
        case $where in
            / | /boot | /boot/* | /usr | /usr/* | /var | /var/* | /etc | /home | swap) printf 'system %s\n' "$where" ;;
            *) printf 'mounted %s\n' "$where" ;;
        esac
    done
    for holder in "$DEVICE_SYS/dev/block/$DEVICE_NUMBERS/holders/"* "$DEVICE_SYS/dev/block/$DEVICE_NUMBERS/"*/holders/*; do
        [ ! -e "$holder" ] || echo "held ${holder##*/}"
    done
}

# Lines of "major:minor mountpoint". A file system of many devices (btrfs) has a number of its own: its source says one of them.
device_mounts() {
    cat "$DEVICE_PROC"/self/mountinfo "$DEVICE_PROC"/[0-9]*/mountinfo 2>/dev/null | awk '
        { for (i = 7; i < NF; i++) if ($i == "-") { print $3, $5, $(i + 2); break } }' | sort -u | while read -r numbers where source; do
        case $numbers in 0:*) numbers=$(device_numbers_of "$source") || continue ;; esac
        printf '%s %s\n' "$numbers" "$where"
    done
    [ ! -r "$DEVICE_PROC/swaps" ] || sed 1d "$DEVICE_PROC/swaps" | while read -r source kind _; do
        case $kind in
            file) numbers=$(device_numbers_below "$source") || continue ;;
            *) numbers=$(device_numbers_of "$source") || continue ;;
        esac
        echo "$numbers swap"
    done
}

# device_numbers_of NODE
device_numbers_of() {
    case $1 in /*) ;; *) return 1 ;; esac
    [ -b "$1" ] || return 1
    numbers=$(stat -L -c '%t %T' -- "$1") && echo "$((0x${numbers% *})):$((0x${numbers#* }))"
}

# device_numbers_below FILE: of the device that holds it, from the one number of makedev(3).
device_numbers_below() (
    number=$(stat -L -c %d -- "$1" 2>/dev/null) || return 1
    # shellcheck disable=SC2017
    echo "$((number / 256 % 4096)):$((number % 256 + number / 1048576 * 256))"
)

# device_stands_on UPPER LOWER HOPS: whether it is the same device, or made of it: its partition, or mapped from it, or a loop on it.
device_stands_on() (
    [ "$1" != "$2" ] || return 0
    [ "$3" -lt 16 ] && [ -e "$DEVICE_SYS/dev/block/$1" ] || return 1
    for lower in $(device_below "$1"); do
        device_stands_on "$lower" "$2" $(($3 + 1)) && return 0
    done
    return 1
)

device_below() (
    place=$(readlink -f -- "$DEVICE_SYS/dev/block/$1") || return 1
    [ ! -e "$place/partition" ] || cat -- "${place%/*}/dev"
    for lower in "$place"/slaves/*; do
        [ ! -e "$lower/dev" ] || cat -- "$lower/dev"
    done
    [ ! -e "$place/loop/backing_file" ] || device_of_file "$(cat -- "$place/loop/backing_file")"
)

device_of_file() {
    if [ -b "$1" ]; then device_numbers_of "$1"; elif [ -e "$1" ]; then device_numbers_below "$1"; fi
}

device_judge_rights() {
    [ "$(id -u)" = 0 ] || refuse '--device' "user $(id -un)" 'root, who may write devices' 'run it with sudo; --image with --out needs no rights'
    [ "$(cat -- "$DEVICE_SYS/dev/block/$DEVICE_NUMBERS/ro")" = 0 ] ||
        refuse '--device' "$1, which is read-only" 'one that can be written' 'is the little switch of the card at its side locked?'
    DEVICE_BYTES=$(($(cat -- "$DEVICE_SYS/dev/block/$DEVICE_NUMBERS/size") * 512))
    [ "$DEVICE_BYTES" -ge $((4 * DEVICE_CHUNK)) ] || refuse '--device' "$1 with $DEVICE_BYTES bytes" "at least $((4 * DEVICE_CHUNK))" 'is a card in the reader?'
}

device_look_with_image() {
    at_exit device_leave
    DEVICE_ROOM=$(mktemp -d "${TMPDIR:-/tmp}/sly-card.XXXXXX") || fail 'a folder to work in' 'none could be made' 'set TMPDIR'
    image_look "$IMAGE" "$DEVICE_ROOM/card.img"
    wanted=$(($(medium_size) + IMAGE_GROW_KIB * 1024))
    [ "$wanted" -le "$DEVICE_BYTES" ] || refuse '--device' "$1 with $DEVICE_BYTES bytes" "at least $wanted, which the image has" 'take a larger card'
}

device_leave() {
    [ -z "$DEVICE_ROOM" ] || rm -rf -- "$DEVICE_ROOM"
}

# device_ask DEV
device_ask() {
    place=$(readlink -f -- "$DEVICE_SYS/dev/block/$DEVICE_NUMBERS")
    say "$DEVICE_NODE: $(device_model "$place"), $((DEVICE_BYTES / 1000000)) MB"
    real lsblk -o NAME,SIZE,FSTYPE,LABEL "$DEVICE_NODE" >&2 2>/dev/null || :
    if [ -n "$IMAGE" ]; then
        ask_for "${DEVICE_NODE##*/}" "Everything on $DEVICE_NODE is overwritten by $IMAGE."
    else
        ask_for "${DEVICE_NODE##*/}" "The system on partition $MEDIUM_NUMBER of $DEVICE_NODE becomes a board${WIPE:+, and the board that was there is removed}."
    fi
}

device_model() {
    told=$(cat -- "$1/device/vendor" "$1/device/model" "$1/device/name" 2>/dev/null | tr -cd 'A-Za-z0-9 ._\n-' | tr -s ' \n' '  ')
    printf '%s\n' "${told:-a device that does not say its model}"
}

# device_open DEV: what may have changed while somebody was asked is judged again.
device_open() {
    device_judge_use "$1"
    if [ -n "$IMAGE" ]; then
        image_open "$IMAGE" "$DEVICE_ROOM/card.img"
    else
        medium_mount || fail "$1" "partition $MEDIUM_NUMBER cannot be mounted" 'see dmesg; repair it by e2fsck -f'
        ROOT_KIND=folder ROOT=$MEDIUM_ROOM/root
    fi
}

device_keep() {
    if [ -n "$IMAGE" ]; then
        image_finish
        device_judge_use "$DEVICE"
        device_write "$IMAGE_PART"
    else
        medium_unmount
        medium_check_written "$DEVICE"
        real blockdev --flushbufs "$DEVICE_NODE"
    fi
}

# device_write IMAGE: zeros at both ends (a GPT keeps its second header at the end), all but the first 4 MiB, read back, the first.
device_write() {
    bytes=$(stat -c %s -- "$1")
    chunks=$(((bytes + DEVICE_CHUNK - 1) / DEVICE_CHUNK))
    device_zero 0 $((DEVICE_CHUNK / 512))
    device_zero $((DEVICE_BYTES / 512 - 2048)) 2048
    device_write_rest "$1"
    device_compare "$1" "$DEVICE_CHUNK" "$((bytes - DEVICE_CHUNK))"
    device_put "$1" 0 1
    device_compare "$1" 0 "$DEVICE_CHUNK"
    real blockdev --rereadpt "$DEVICE_NODE" 2>/dev/null || :
}

device_write_rest() {
    done=1 stride=16
    while [ "$done" -lt "$chunks" ]; do
        device_put "$1" "$done" "$stride"
        done=$((done + stride))
        [ "$done" -le "$chunks" ] || done=$chunks
        progress "onto $DEVICE_NODE, of $DEVICE_CHUNK bytes" "$done" "$chunks"
    done
}

# device_put IMAGE CHUNK COUNT
device_put() {
    real dd if="$1" of="$DEVICE_NODE" bs="$DEVICE_CHUNK" skip="$2" seek="$2" count="$3" oflag=direct conv=notrunc,fsync status=none ||
        device_failed 'written'
}

# device_zero SECTOR COUNT
device_zero() {
    real dd if=/dev/zero of="$DEVICE_NODE" bs=512 seek="$1" count="$2" conv=notrunc,fsync status=none || device_failed 'written'
}

# device_compare IMAGE FIRST BYTES
device_compare() {
    real blockdev --flushbufs "$DEVICE_NODE"
    meant=$(device_hash "$1" "$2" "$3")
    read_back=$(device_hash "$DEVICE_NODE" "$2" "$3" direct) || device_failed 'read'
    [ "$read_back" = "$meant" ] || {
        device_zero 0 $((DEVICE_CHUNK / 512))
        fail "$DEVICE_NODE" "what it gives back is not what was written (from byte $2)" 'it does not boot; take another card'
    }
}

device_hash() {
    told=$(real dd if="$1" bs="$DEVICE_CHUNK" skip="$2" count="$3" iflag="${4:+$4,}skip_bytes,count_bytes" status=none | sha256sum) &&
        printf '%s\n' "${told%% *}"
}

device_failed() {
    fail "$DEVICE_NODE" "it cannot be $1" 'it does not boot as it is: flash it again, or take another card'
}
