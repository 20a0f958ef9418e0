# shellcheck shell=sh disable=SC2015,SC2030,SC2031,SC2034
# An image or a card: its partition table, which partition holds a system, and that partition mounted.
#
# Rules: a table and a file system that come from outside are looked at without mounting them (sfdisk, debugfs); no number of
# theirs is believed before it was held against the size of the medium; names in them are never printed nor given to a command.
# Every tool works in $MEDIUM_ROOM, where `medium` is a link to the image, so that no character of a path means anything to a tool.

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
MEDIUM_ROOM='' MEDIUM_START='' MEDIUM_SIZE='' MEDIUM_NUMBER=''

# real NAME ARGS...: the program of that name; busybox would take an applet of its own, which knows fewer options.
real() {
    real_name=$1
    shift
    "$(program "$real_name")" "$@"
}

program() (
    IFS=:
    for folder in $PATH; do
        [ ! -x "$folder/$1" ] || { printf '%s\n' "$folder/$1"; return 0; }
    done
    printf '%s\n' "$1"
)

# needs_program NAME PACKAGE
needs_program() {
    [ -x "$(program "$1")" ] || fail "$1" 'it is not installed here' "install it: apt-get install $2"
}

absolute() {
    case $1 in /*) printf '%s\n' "$1" ;; *) printf '%s/%s\n' "$PWD" "$1" ;; esac
}

# medium_take PATH: from here on `medium` is this file or device.
medium_take() {
    needs_program sfdisk fdisk
    needs_program debugfs e2fsprogs
    needs_program e2fsck e2fsprogs
    if [ -z "$MEDIUM_ROOM" ]; then
        at_exit medium_leave
        MEDIUM_ROOM=$(mktemp -d "${TMPDIR:-/tmp}/sly-flash.XXXXXX") || fail 'a folder to work in' 'none could be made' 'set TMPDIR'
        mkdir -- "$MEDIUM_ROOM/root"
    fi
    case $1 in /*) medium=$1 ;; *) medium=$PWD/$1 ;; esac
    rm -f -- "$MEDIUM_ROOM/medium"
    ln -s -- "$medium" "$MEDIUM_ROOM/medium"
}

medium_leave() {
    [ -n "$MEDIUM_ROOM" ] || return 0
    medium_let_go || return 1 # what may still be mounted there is not ours to remove
    [ ! -d "$MEDIUM_ROOM/root" ] || rmdir -- "$MEDIUM_ROOM/root" || return 1
    rm -rf -- "$MEDIUM_ROOM"
    MEDIUM_ROOM=
}

# at_medium COMMAND...: run where `medium` is.
at_medium() (
    cd "$MEDIUM_ROOM" && "$@"
)

# medium_bytes FIRST COUNT: so many bytes as hexadecimal digits.
medium_bytes() {
    at_medium od -An -tx1 -j "$1" -N "$2" medium | tr -d ' \n'
}

medium_size() {
    if [ -b "$MEDIUM_ROOM/medium" ]; then
        at_medium blockdev --getsize64 medium
    else
        at_medium stat -L -c %s medium
    fi
}

# Lines of "number start size type", in bytes; nothing if there is no table.  1 MiB of table is the most that is read of it.
medium_table() {
    at_medium sfdisk --dump medium 2>/dev/null | head -c 1048576 | awk '
        /^sector-size: [0-9]+$/ { sector = $2 }
        /^medium[0-9]+ : start= *[0-9]+, size= *[0-9]+, type=[0-9A-Fa-f-]+/ {
            number = $1; sub(/^medium/, "", number)
            split($0, field, /[=,] */)
            printf "%d %.0f %.0f %s\n", number, field[2] * (sector ? sector : 512), field[4] * (sector ? sector : 512), field[6]
        }'
}

# medium_look WHAT: finds the partition with the system, or refuses; WHAT names the medium in what is said.
medium_look() {
    case $(medium_bytes 0 4) in
        3aff26ed) refuse "$1" 'an Android sparse image' 'a raw image' 'turn it into one: simg2img IMAGE RAW.img' ;;
        514649fb) refuse "$1" 'a QEMU image' 'a raw image' 'turn it into one: qemu-img convert -O raw IMAGE RAW.img' ;;
    esac
    medium_table >"$MEDIUM_ROOM/table"
    [ -s "$MEDIUM_ROOM/table" ] || medium_without_table "$1"
    medium_judge_ends "$1"
    medium_find_root "$1"
}

medium_without_table() {
    if [ "$(medium_bytes 1080 2)" = 53ef ]; then
        refuse "$1" 'a bare ext file system without a partition table' 'an image of a whole card' \
            'mount it and flash the folder: mount -o loop IMAGE /mnt, ./flash.sh --rootfs /mnt'
    fi
    refuse "$1" 'no partition table' 'an image of a whole card (MBR or GPT)' 'is it the right file, and whole? see sfdisk --list'
}

medium_judge_ends() {
    medium_all=$(medium_size)
    [ "$((medium_all % 512))" = 0 ] || refuse "$1" "$medium_all bytes, not whole sectors" 'a multiple of 512 bytes' 'it is cut off: fetch it again'
    while read -r number start size _; do
        [ "$((start + size))" -le "$medium_all" ] && [ "$start" -ge 512 ] ||
            refuse "$1" "partition $number ends at byte $((start + size)), there are $medium_all" 'partitions that lie within it' \
                'it is cut off: fetch or copy it again'
    done <"$MEDIUM_ROOM/table"
}

# What each partition is goes to $MEDIUM_ROOM/seen, one line each: "number system|ext|damaged|other".
medium_find_root() {
    while read -r number start size kind; do
        printf '%s %s %s %s\n' "$number" "$(medium_partition_holds "$start" "$size" "$kind")" "$start" "$size"
    done <"$MEDIUM_ROOM/table" >"$MEDIUM_ROOM/seen"
    if [ -n "$PARTITION" ]; then
        grep "^$PARTITION " "$MEDIUM_ROOM/seen" >"$MEDIUM_ROOM/chosen" ||
            refuse '--partition' "$PARTITION" "$(awk '{ printf "%s%s", sep, $1; sep = ", " }' "$MEDIUM_ROOM/seen")"
        grep -q "^$PARTITION system " "$MEDIUM_ROOM/seen" ||
            refuse '--partition' "$PARTITION of $1, which is $(medium_seen "$MEDIUM_ROOM/chosen")" 'a partition with a system on ext4'
    else
        grep ' system ' "$MEDIUM_ROOM/seen" >"$MEDIUM_ROOM/chosen" ||
            refuse "$1" "no system on it (partitions $(medium_seen "$MEDIUM_ROOM/seen"))" \
                'ext4 with /etc/os-release and systemd or /sbin/init' 'is it whole, and an image of a system?'
        [ "$(wc -l <"$MEDIUM_ROOM/chosen")" -eq 1 ] ||
            refuse "$1" "more than one system on it (partitions $(medium_seen "$MEDIUM_ROOM/seen"))" 'one' 'choose: --partition N'
    fi
    read -r MEDIUM_NUMBER _ MEDIUM_START MEDIUM_SIZE <"$MEDIUM_ROOM/chosen"
}

medium_seen() {
    awk '{
        is["system"] = "a system"; is["ext"] = "ext4 without a system"; is["damaged"] = "a Linux file system that is damaged"; is["other"] = "something else"
        printf "%s%s: %s", sep, $1, is[$2]; sep = ", "
    }' "$1"
}

# medium_partition_holds START SIZE TYPE
medium_partition_holds() (
    MEDIUM_START=$1
    case $3 in 83 | 0FC63DAF-8483-4772-8E79-3D69D8477DE4) otherwise=damaged ;; *) otherwise=other ;; esac
    [ "$2" -ge 65536 ] || { echo other; return; }
    [ "$(medium_bytes "$(($1 + 1080))" 2)" = 53ef ] || { echo "$otherwise"; return; }
    debugfs_available_kib >/dev/null 2>&1 && [ "$(debugfs_file_system_size)" -le "$2" ] || { echo damaged; return; }
    medium_has_system && echo system || echo ext
)

medium_has_system() {
    [ "$(debugfs_type /etc/os-release)" != none ] || return 1
    for init in /usr/lib/systemd/systemd /lib/systemd/systemd /sbin/init; do
        [ "$(debugfs_type $init)" = none ] || return 0
    done
    return 1
}

# medium_mount: the partition at $MEDIUM_ROOM/root; fails where there are no rights or no loop devices.  mount(8) makes the loop
# device so that it goes with the mount, and the mount goes with the namespace of own_mounts, even if this is killed.
medium_mount() {
    [ "$(id -u)" = 0 ] || return 1
    real mount -t ext4 -o "nosuid,nodev,noexec,loop,offset=$MEDIUM_START,sizelimit=$MEDIUM_SIZE" "$MEDIUM_ROOM/medium" "$MEDIUM_ROOM/root" 2>/dev/null
}

# A signal may come between any two steps: what is there is looked at, not remembered.
medium_is_mounted() {
    [ -n "$MEDIUM_ROOM" ] && [ -d "$MEDIUM_ROOM/root" ] && [ "$(stat -c %d -- "$MEDIUM_ROOM/root")" != "$(stat -c %d -- "$MEDIUM_ROOM")" ]
}

medium_let_go() {
    ! medium_is_mounted || real umount "$MEDIUM_ROOM/root"
}

medium_unmount() {
    medium_let_go || fail "$MEDIUM_ROOM/root" 'it cannot be unmounted' 'what holds it? see fuser -m'
}

medium_is_whole() {
    at_medium e2fsck -fn "medium?offset=$MEDIUM_START" >"$MEDIUM_ROOM/fsck" 2>&1 && ! grep -q '? no$' "$MEDIUM_ROOM/fsck"
}

medium_complaint() {
    printf 'partition %s: %s\n' "$MEDIUM_NUMBER" "$(grep -v '^e2fsck \|^Pass ' "$MEDIUM_ROOM/fsck" | head -n 1)"
}

# medium_check WHAT: the file system of the partition is whole as it came, or this ends.
medium_check() {
    medium_is_whole ||
        refuse "$1" "$(medium_complaint)" 'an ext4 file system that is whole' 'fetch it again, or let e2fsck -f repair a copy'
}

# medium_check_written WHAT: it is whole as it was left.
medium_check_written() {
    medium_is_whole || fail "$1" "$(medium_complaint)" 'is the disk or the card failing? flash again, or take another'
}

# medium_replay WHAT: what is in the journal goes where it belongs.  e2fsck cannot do it at an offset ("Bad magic number ... while
# trying to re-open", e2fsprogs 1.47.0), so the partition is taken out, replayed and put back.
medium_replay() {
    debugfs_needs_recovery || return 0
    say "$1: it was not unmounted: its journal is replayed"
    medium_out
    at_medium e2fsck -p partition >"$MEDIUM_ROOM/fsck" 2>&1 || [ $? -eq 1 ] ||
        refuse "$1" "a journal that cannot be replayed: $(head -n 1 "$MEDIUM_ROOM/fsck")" 'an ext4 file system that is whole' 'run e2fsck on a copy'
    medium_in
}

# medium_out, medium_in: the partition as a file of its own, and back.
medium_out() {
    partition_kib=$(((MEDIUM_SIZE + 1023) / 1024))
    has_room "$MEDIUM_ROOM" "$partition_kib" || fail "$MEDIUM_ROOM" "no room for $partition_kib KiB" 'set TMPDIR to where there is'
    at_medium real dd if=medium of=partition bs=64K iflag=skip_bytes,count_bytes skip="$MEDIUM_START" count="$MEDIUM_SIZE" \
        conv=sparse status=none || fail 'the image' "partition $MEDIUM_NUMBER could not be read" 'is the medium whole?'
}

medium_in() {
    at_medium real dd if=partition of=medium bs=64K oflag=seek_bytes seek="$MEDIUM_START" conv=notrunc status=none ||
        fail 'the image' "partition $MEDIUM_NUMBER could not be put back" 'is there room?'
    at_medium rm -f partition
}

# has_room FOLDER KIB
has_room() {
    [ "$(df -Pk -- "$1" | awk 'NR == 2 { print $4 }')" -ge "$2" ]
}

# own_mounts "$0" OPTIONS...: goes on in a mount namespace of its own, if there may be one: what is mounted here is unmounted also
# if this is killed, and nobody else sees it.
own_mounts() {
    [ "$(id -u)" = 0 ] && [ -z "${SLY_OWN_MOUNTS:-}" ] && real unshare --mount --propagation slave true 2>/dev/null || return 0
    shell=$(readlink "/proc/$$/exe") || return 0
    export SLY_OWN_MOUNTS=yes
    case $shell in
        */busybox) exec "$(program unshare)" --mount --propagation slave -- "$shell" sh "$@" ;;
        *) exec "$(program unshare)" --mount --propagation slave -- "$shell" "$@" ;;
    esac
}
