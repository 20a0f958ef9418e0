# shellcheck shell=sh
# What can be flashed: a folder, an image, a device, another machine.  One order for all of them, kept by flash.sh.
#
# Rules:
# * target_look only reads.  After it $ROOT_KIND is a root that can be read (an image: its base, as debugfs), and everything that
#   can be judged of the target was judged.  It never asks.
# * target_ask asks for a word, for targets on which something is overwritten.
# * target_open makes the root writable; nothing was written before it.  Who opens tells at_exit what must be closed.
# * target_keep runs only when everything was read back and was right: what was made is closed, durable and gets its name.

target_look() {
    case $TARGET in
        folder) folder_look "$ROOTFS" ;;
        image) image_look "$IMAGE" ;;
        device) device_look "$DEVICE" ;;
        remote) remote_look "$SSH_TO" ;;
    esac
}

target_ask() {
    [ "$TARGET" != image ] || image_ask
    case $TARGET in
        device) device_ask "$DEVICE" ;;
        remote) remote_ask "$SSH_TO" ;;
        *) [ -z "$WIPE" ] || [ "$(root_type "$STATES")" = none ] ||
            ask_for wipe "The identity, the ledger and the models of the board in $(target_name) are removed." ;;
    esac
}

target_open() {
    case $TARGET in
        folder) ;;
        image) image_open "$IMAGE" "$OUT" ;;
        device) device_open "$DEVICE" ;;
        remote) remote_open "$SSH_TO" ;;
    esac
}

target_keep() {
    case $TARGET in
        folder) root_sync ;;
        image) image_keep ;;
        device) device_keep ;;
        remote) remote_keep ;;
    esac
}

target_name() {
    case $TARGET in
        folder) printf '%s\n' "$ROOT" ;;
        image) printf '%s\n' "$OUT" ;;
        device) printf '%s\n' "$DEVICE" ;;
        remote) printf '%s\n' "$SSH_TO" ;;
    esac
}
