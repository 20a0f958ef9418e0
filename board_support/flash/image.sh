# shellcheck shell=sh disable=SC2015,SC2017,SC2030,SC2031,SC2034
# --image BASE --out OUT: a copy of BASE that is flashed.
#
# Rules: BASE is only read.  Everything happens in OUT.part, which only its owner can read (there are keys in it), is locked while it
# is worked on, and goes when this ends; what a kill left of it is begun anew.  OUT is there only when everything was read back and
# the file system is whole.  As root the partition is mounted; without rights, or where nothing can be mounted, debugfs writes it.

IMAGE_OUT='' IMAGE_PART='' IMAGE_FILE='' IMAGE_PACKING='' IMAGE_GROW_KIB=0
IMAGE_UNPACKED=

# image_look BASE [OUT]
image_look() {
    IMAGE_OUT=$(absolute "${2:-$OUT}.") && IMAGE_OUT=${IMAGE_OUT%.}
    image_judge_base "$1"
    image_judge_out "$1"
    image_judge_grow
    image_judge_packing "$1"
    IMAGE_FILE=$1
    if [ -n "$IMAGE_PACKING" ]; then image_unpack "$1"; fi
    medium_take "$IMAGE_FILE"
    medium_look "$1"
    image_judge_room "$((IMAGE_GROW_KIB / 32))"
    ROOT_KIND=debugfs
}

image_judge_base() {
    [ -e "$1" ] || refuse '--image' "$1, which is not there" 'an image of a card'
    [ -f "$1" ] || refuse '--image' "$1, which is no file" 'an image of a card' 'a card itself is flashed by --device'
    [ -r "$1" ] || refuse '--image' "$1, which user $(id -un) may not read" 'an image that you may read'
    [ -s "$1" ] || refuse '--image' "$1, which is empty" 'an image of a card' 'fetch it again'
}

image_judge_out() {
    folder=${IMAGE_OUT%/*}/
    [ -d "$folder" ] || refuse '--out' "$IMAGE_OUT, in a folder that is not there" 'a folder that is there' "make it: mkdir -p ${folder%/}"
    [ -w "$folder" ] && [ -x "$folder" ] || refuse '--out' "$IMAGE_OUT, in a folder that user $(id -un) may not write" 'one that you may write'
    for taken in "$IMAGE_OUT" "$IMAGE_OUT.part"; do
        [ ! -e "$taken" ] || [ -f "$taken" ] || refuse '--out' "$taken, which is no file" 'the name of an image' 'a card is flashed by --device'
        [ ! -e "$taken" ] || [ "$(stat -L -c %d:%i -- "$taken")" != "$(stat -L -c %d:%i -- "$1")" ] ||
            refuse '--out' "$IMAGE_OUT, where $1 would be written over" 'another file than the base' 'the base stays as it is: name another'
    done
}

image_judge_grow() {
    [ -n "$GROW" ] || return 0
    case $GROW in
        *[!0-9]*[!0-9]* | [!0-9]* | ????????????????*) grown= ;;
        *[!0-9KkMmGg]) grown= ;;
        *[Kk]) grown=${GROW%?} ;;
        *[Mm]) grown=$((${GROW%?} * 1024)) ;;
        *[Gg]) grown=$((${GROW%?} * 1048576)) ;;
        *) grown=$((GROW / 1024)) ;;
    esac
    [ "${grown:-0}" -gt 0 ] && [ "$grown" -le 1073741824 ] || refuse '--grow' "$GROW" 'a number with K, M or G, up to 1024G, as in 512M'
    IMAGE_GROW_KIB=$(((grown + 1023) / 1024 * 1024))
    needs_program resize2fs e2fsprogs
}

# What an image came packed in is told by its first bytes, not by its name.
image_judge_packing() {
    case $(od -An -tx1 -N 6 -- "$1" 2>/dev/null | tr -d ' \n') in
        fd377a585a00) IMAGE_PACKING=xz ;;
        1f8b*) IMAGE_PACKING=gzip ;;
        28b52ffd*) IMAGE_PACKING=zstd ;;
        425a68*) IMAGE_PACKING=bzip2 ;;
        504b0304*) IMAGE_PACKING=unzip ;;
        *) IMAGE_PACKING=; return 0 ;;
    esac
    case $IMAGE_PACKING in xz) package=xz-utils ;; *) package=$IMAGE_PACKING ;; esac
    [ -x "$(program "$IMAGE_PACKING")" ] ||
        fail '--image' "$1 is packed, and $IMAGE_PACKING is not installed" "install it (apt-get install $package) or unpack the image"
}

image_unpack() {
    image_begin
    image_judge_unpacked_room "$1"
    say "$1 is unpacked"
    IMAGE_FILE=$IMAGE_PART IMAGE_UNPACKED=yes
    if [ "$IMAGE_PACKING" = unzip ]; then
        image_judge_zip "$1"
        real unzip -p "$1" >"$IMAGE_PART" || image_unpack_failed "$1"
    else
        real "$IMAGE_PACKING" -dc <"$1" >"$IMAGE_PART" || image_unpack_failed "$1"
    fi
    [ ! -x "$(program fallocate)" ] || real fallocate --dig-holes "$IMAGE_PART" 2>/dev/null || :
}

image_unpack_failed() {
    has_room "${IMAGE_OUT%/*}/" 1024 || fail "${IMAGE_OUT%/*}/" "it is full before $1 is unpacked" 'make room, or name another --out'
    refuse "$1" "$IMAGE_PACKING cannot unpack it to its end" "an archive that is whole" 'it is cut off or damaged: fetch it again'
}

image_judge_zip() {
    [ "$(real unzip -Z1 "$1" 2>/dev/null | wc -l)" -eq 1 ] || refuse "$1" 'an archive of other than one file' 'one image in it' 'unpack it, and name the image'
}

# xz says how much is in it; others are found out on the way.
image_judge_unpacked_room() {
    [ "$IMAGE_PACKING" = xz ] || return 0
    unpacked=$(real xz --robot --list -- "$1" 2>/dev/null | awk '$1 == "totals" { printf "%.0f\n", $5 / 1024 }')
    [ -z "$unpacked" ] || has_room "${IMAGE_OUT%/*}/" "$unpacked" ||
        fail "${IMAGE_OUT%/*}/" "no room for $unpacked KiB, which $1 is unpacked" 'make room, or name another --out'
}

# image_judge_room KIB: room on this machine for the copy and so much more.
image_judge_room() {
    more=$1
    [ -n "$IMAGE_UNPACKED" ] || more=$(($(du -k -- "$IMAGE_FILE" | awk 'NR == 1 { print $1 }') + more))
    has_room "${IMAGE_OUT%/*}/" "$more" || fail "${IMAGE_OUT%/*}/" "no room for $more KiB" 'make room, or name another --out'
}

image_ask() {
    [ ! -e "$IMAGE_OUT" ] || ask_for overwrite "$IMAGE_OUT is there already, and would be replaced."
}

# image_begin: OUT.part is ours.
image_begin() {
    at_exit image_drop
    IMAGE_PART=$IMAGE_OUT.part
    [ ! -L "$IMAGE_PART" ] || rm -f -- "$IMAGE_PART"
    (umask 077 && : >>"$IMAGE_PART") || fail "$IMAGE_PART" 'it cannot be written' 'name another --out'
    exec 9<>"$IMAGE_PART"
    real flock -n 9 || { IMAGE_PART=; refuse_second '--out' "$IMAGE_OUT"; }
    chmod 0600 "$IMAGE_PART"
    : >"$IMAGE_PART"
}

image_drop() {
    medium_let_go || say "flash.sh: $MEDIUM_ROOM/root cannot be unmounted"
    if [ -n "$IMAGE_PART" ] && image_part_is_ours; then rm -f -- "$IMAGE_PART"; fi
    IMAGE_PART=
}

# Locked by this, or by nobody: what was only just made, or what a kill left.
image_part_is_ours() {
    real flock -n 9 2>/dev/null || { [ -f "$IMAGE_PART" ] && real flock -n "$IMAGE_PART" true 2>/dev/null; }
}

# image_open BASE OUT
image_open() {
    image_judge_room "$((IMAGE_GROW_KIB / 32 + $(du -sk -- "$STAGE" | awk 'NR == 1 { print $1 }')))"
    if [ -z "$IMAGE_UNPACKED" ]; then
        image_begin
        image_copy "$1"
    fi
    medium_take "$IMAGE_PART"
    medium_replay "$1"
    medium_check "$1"
    image_grow "$1"
    if medium_mount; then
        ROOT_KIND=folder ROOT=$MEDIUM_ROOM/root
    else
        ROOT_KIND=debugfs
    fi
}

image_copy() {
    case $1 in /* | ./*) base=$1 ;; *) base=./$1 ;; esac
    real cp --sparse=always "$base" "$IMAGE_PART" 2>/dev/null || cat -- "$base" >"$IMAGE_PART" ||
        fail "$IMAGE_PART" "$1 could not be copied" 'is there room, and can it be read?'
    [ "$(stat -L -c %s -- "$base")" = "$(stat -c %s -- "$IMAGE_PART")" ] || fail "$1" 'it changed while it was copied' 'run this again'
}

# image_grow BASE: the file, then the table (and the second GPT header, at its end), then the partition, then its file system.
image_grow() {
    [ "$IMAGE_GROW_KIB" != 0 ] || return 0
    image_judge_last "$1"
    real truncate -s "+${IMAGE_GROW_KIB}K" "$IMAGE_PART"
    {
        image_second_header
        echo ', +' | at_medium sfdisk --no-reread --no-tell-kernel -N "$MEDIUM_NUMBER" medium
        MEDIUM_SIZE=$(medium_table | awk -v number="$MEDIUM_NUMBER" '$1 == number { print $3 }')
        image_resize
        image_second_header
    } >"$MEDIUM_ROOM/grown" 2>&1 || fail "$1" "it could not be made larger: $(tail -n 1 "$MEDIUM_ROOM/grown")" 'is there room?'
    IMAGE_GROW_KIB=0
}

image_judge_last() {
    last=$(sort -n -k 2 "$MEDIUM_ROOM/table" | awk 'END { print $1 }')
    [ "$last" = "$MEDIUM_NUMBER" ] ||
        refuse '--grow' "partition $MEDIUM_NUMBER of $1, which is not the last on it ($last is)" 'the last partition' 'make the image larger by hand'
}

# Of a GPT, at the end of the file.
image_second_header() {
    case $(at_medium sfdisk --dump medium) in 'label: gpt'*) at_medium sfdisk --relocate gpt-bak-std medium ;; esac
}

# resize2fs cuts a file off at the file system's new size, and does not add the offset (e2fsprogs 1.47.0).  Either it finds a file
# that is no longer than that size, which only grows by what it writes; or, where that would cut off what is there, the partition
# is taken out, made larger and put back.
image_resize() {
    whole=$(medium_size)
    if [ "$((whole - IMAGE_GROW_KIB * 1024))" -le "$((MEDIUM_SIZE / 4096 * 4096))" ]; then
        real truncate -s "$((MEDIUM_SIZE / 4096 * 4096))" "$IMAGE_PART"
        at_medium resize2fs "medium?offset=$MEDIUM_START" "$((MEDIUM_SIZE / 4096 * 4))K"
        real truncate -s "$whole" "$IMAGE_PART"
    else
        medium_out
        at_medium resize2fs partition "$((MEDIUM_SIZE / 4096 * 4))K"
        medium_in
    fi
}

# image_finish: closed, whole, durable.
image_finish() {
    medium_unmount
    medium_check_written "$IMAGE_OUT"
    real sync "$IMAGE_PART"
}

image_keep() {
    image_finish
    mv -f -- "$IMAGE_PART" "$IMAGE_OUT"
    IMAGE_PART=
    real sync "${IMAGE_OUT%/*}/"
}
