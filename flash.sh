#!/bin/sh
# flash.sh puts the agent of a board onto a system: a folder, an image, a card, or a machine that runs.  docs/flashing.md
#
# Owns the options and the order in which things are done; the rooms in board_support/flash/ do them.  Rules: nothing of the
# target is touched before everything that can be judged was judged; flashed.list goes first and comes last, so that a board that
# was flashed half is never taken for a good one; what was written is read back before it is called done.
# Exit codes: 0 done, 1 the world would not (no room, no network, a command failed), 2 bad input, or refused.
# shellcheck disable=SC2015,SC2034
set -eu
umask 022
export LC_ALL=C

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
ROOMS=$HERE/board_support/flash
BUILD=${SLY_BUILD:-$HERE/build}
TAB=$(printf '\t')
# shellcheck source=board_support/flash/say.sh
. "$ROOMS/say.sh"
# shellcheck source=board_support/flash/boards.sh
. "$ROOMS/boards.sh"
# shellcheck source=board_support/flash/enrolment.sh
. "$ROOMS/enrolment.sh"
# shellcheck source=board_support/flash/roots.sh
. "$ROOMS/roots.sh"
# shellcheck source=board_support/flash/targets.sh
. "$ROOMS/targets.sh"
# shellcheck source=board_support/flash/system.sh
. "$ROOMS/system.sh"
# shellcheck source=board_support/flash/wheels.sh
. "$ROOMS/wheels.sh"
# shellcheck source=board_support/flash/network.sh
. "$ROOMS/network.sh"
# shellcheck source=board_support/flash/tree.sh
. "$ROOMS/tree.sh"
# shellcheck source=board_support/flash/apply.sh
. "$ROOMS/apply.sh"
# shellcheck source=board_support/flash/verify.sh
. "$ROOMS/verify.sh"

usage() {
    cat <<'TEXT'
flash.sh makes a system for a board into a board of your fleet: agent, models, identity, services.
The board then needs no keyboard and no network but its own broker's.

  sly fleet init ~/fleet --broker-host 192.168.1.10
  sly fleet enroll kitchen --fleet ~/fleet --backend raspberry_pi
  ./flash.sh --board raspberry_pi --enrolled ~/fleet/boards/kitchen --image raspios.img --out kitchen.img

What is flashed:
  --board KIND          jetson, coral, raspberry_pi or jalapeno (an emulated one)
  --enrolled DIR        what sly fleet enroll made for this board

Onto what, one of:
  --image BASE --out OUT    BASE is copied to OUT, and OUT is flashed; BASE stays as it is
  --device /dev/sdX         a card or disk with a system on it; with --image, BASE is written onto it first
  --ssh USER@HOST           a machine that runs
  --rootfs DIR              the root folder of a system, mounted here

Besides:
  --wheels DIR          the agent's wheels, as sly ota pack-agent made them (default: packed here, for the Python and the
                        machine of the target, and kept in build/ for the next board)
  --models DIR          models to start with: a folder that sly models fetch filled
  --wifi SSID           a wireless network to join, and
  --wifi-password-file FILE   the file that holds its password
  --ssh-key FILE.pub    who may log in as root by this key
  --hostname NAME       the name of the machine (default: as it is)
  --partition N         the partition of the image or device with the system on it (default: it is found)
  --grow SIZE           make OUT this much larger, e.g. 2G
  --wipe                remove identity, ledger and models of a board that was there before
  --yes                 do not ask
  --dry-run             look, judge and say what would be done; write nothing
  --help                this

Flashing again keeps the board's identity, ledger and models. More: docs/flashing.md
TEXT
}

read_options() {
    BOARD='' ENROLLED='' ROOTFS='' IMAGE='' OUT='' DEVICE='' SSH_TO='' WHEELS='' MODELS=''
    WIFI='' WIFI_PASSWORD_FILE='' SSH_KEY='' HOSTNAME_WANTED='' PARTITION='' GROW='' WIPE='' YES='' DRY_RUN=''
    [ $# -gt 0 ] || { usage; exit 2; }
    while [ $# -gt 0 ]; do
        case $1 in
            --help | -h) usage; exit 0 ;;
            --wipe) WIPE=yes ;;
            --yes) YES=yes ;;
            --dry-run) DRY_RUN=yes ;;
            --*=*) option=$1; shift; set -- "${option%%=*}" "${option#*=}" "$@"; continue ;;
            --*) read_value "$@"; shift ;;
            *) refuse 'option' "$1" 'options, which begin with --' 'see ./flash.sh --help' ;;
        esac
        shift
    done
}

# read_value OPTION [VALUE] ...
read_value() {
    case $1 in
        --board | --enrolled | --rootfs | --image | --out | --device | --ssh | --wheels | --models | --wifi | --wifi-password-file | \
            --ssh-key | --hostname | --partition | --grow) ;;
        *) refuse 'option' "$1" 'what ./flash.sh --help lists' ;;
    esac
    [ $# -gt 1 ] && [ -n "$2" ] || refuse "$1" 'no value' 'a value after it' 'see ./flash.sh --help'
    case $1 in
        --board) BOARD=$2 ;;
        --enrolled) ENROLLED=$2 ;;
        --rootfs) ROOTFS=$2 ;;
        --image) IMAGE=$2 ;;
        --out) OUT=$2 ;;
        --device) DEVICE=$2 ;;
        --ssh) SSH_TO=$2 ;;
        --wheels) WHEELS=$2 ;;
        --models) MODELS=$2 ;;
        --wifi) WIFI=$2 ;;
        --wifi-password-file) WIFI_PASSWORD_FILE=$2 ;;
        --ssh-key) SSH_KEY=$2 ;;
        --hostname) HOSTNAME_WANTED=$2 ;;
        --partition) PARTITION=$2 ;;
        --grow) GROW=$2 ;;
    esac
}

# load_target OPTIONS: the rooms of this target alone.  An image is looked at, and without loop devices written, as debugfs.
load_target() {
    # shellcheck source=board_support/flash/folder.sh
    . "$ROOMS/folder.sh"
    case $TARGET in
        image | device)
            # shellcheck source=board_support/flash/debugfs.sh
            . "$ROOMS/debugfs.sh"
            # shellcheck source=board_support/flash/partitions.sh
            . "$ROOMS/partitions.sh"
            # shellcheck source=board_support/flash/image.sh
            . "$ROOMS/image.sh"
            # shellcheck source=board_support/flash/device.sh
            . "$ROOMS/device.sh"
            own_mounts "$0" "$@"
            ;;
        remote)
            # shellcheck source=board_support/flash/remote.sh
            . "$ROOMS/remote.sh"
            ;;
    esac
}

judge_options() {
    [ -n "$BOARD" ] || refuse '--board' 'nothing' "$BOARDS"
    board_machines "$BOARD" >/dev/null || refuse '--board' "$BOARD" "$BOARDS"
    [ -n "$ENROLLED" ] || refuse '--enrolled' 'nothing' "the board's folder" 'make one: sly fleet enroll'
    case ${ROOTFS:+rootfs}${DEVICE:+device}${SSH_TO:+ssh}${IMAGE:+image} in
        rootfs) TARGET=folder ;;
        image) TARGET=image ;;
        device | deviceimage) TARGET=device ;;
        ssh) TARGET=remote ;;
        '') refuse 'target' 'none' '--image BASE --out OUT, --device, --ssh or --rootfs' 'see ./flash.sh --help' ;;
        *) refuse 'target' 'more than one' 'one of --image, --device (with or without --image), --ssh and --rootfs' ;;
    esac
    [ "$TARGET" != image ] || [ -n "$OUT" ] || refuse '--out' 'nothing' 'the image that is made' 'name it: --out OUT.img'
    [ "$TARGET" = image ] || [ -z "$OUT" ] || refuse '--out' "$OUT" 'only with --image'
    [ -z "$PARTITION$GROW" ] || [ "$TARGET" = image ] || [ "$TARGET" = device ] ||
        refuse '--partition, --grow' "$PARTITION$GROW" 'only with --image or --device'
    case $PARTITION in *[!0-9]*) refuse '--partition' "$PARTITION" 'a number, as in sfdisk --list' ;; esac
}

main() {
    read_options "$@"
    judge_options
    load_target "$@"
    judge_enrolment
    judge_network_options
    target_look
    judge_system
    judge_identity
    judge_network_of_target
    take_wheels
    stage_tree
    judge_room
    show_plan
    [ -z "$DRY_RUN" ] || { say 'nothing was written: --dry-run'; exit 0; }
    target_ask
    target_open
    apply_tree
    verify_tree
    finish_tree
    target_keep
    tell_next
}

main "$@"
