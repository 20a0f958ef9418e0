#!/bin/sh
# A board from nothing: Debian is made, flashed by flash.sh and booted in a virtual machine; its plug is pulled in updates.
#
#   tests/boot/run.sh [arm64|amd64] [--cuts N] [--accel tcg|kvm] [--keep]
#
# Rules: what is made again and again is kept in build/boot/; every process that is started is ended by its id; the virtual
# machine, its broker and its operator live in a network namespace that has nothing but a loopback, so nothing reaches out.
set -eu

HERE=$(cd "$(dirname "$0")" && pwd)
TOP=$(cd "$HERE/../.." && pwd)
WORK=$TOP/build/boot
TREE=
TOOLS='mmdebstrap fdisk e2fsprogs mosquitto openssh-client iproute2'
TOOLS="$TOOLS qemu-system-arm qemu-system-x86 qemu-user-static binfmt-support"

say() { printf 'boot: %s\n' "$*" >&2; }
stop() { printf 'boot: %s; %s\n' "$1" "$2" >&2; exit 1; }
clean() { [ -z "$TREE" ] || rm -rf "$TREE"; }
usage() {
  sed -n 's/^# \{0,1\}//; 2,4p' "$0" >&2
  exit "$1"
}

# took NAME COMMAND...: the command, and how long it took.
took() {
  name=$1 began=$(date +%s)
  shift
  "$@"
  say "$name: $(($(date +%s) - began)) s"
}

# shellcheck source=tests/boot/base.sh
. "$HERE/base.sh"

judge_options() {
  ARCH=$(dpkg --print-architecture) CUTS=5 ACCEL='' KEEP=
  while [ $# -gt 0 ]; do
    case $1 in
      arm64 | amd64) ARCH=$1 ;;
      --cuts) CUTS=${2:?--cuts takes a number} && shift ;;
      --accel) ACCEL=${2:?--accel takes tcg or kvm} && shift ;;
      --keep) KEEP=--keep ;;
      --help | -h) usage 0 ;;
      *) usage 2 ;;
    esac
    shift
  done
  case $ARCH in
    arm64) MACHINE=aarch64 QEMU=qemu-system-aarch64 ;;
    amd64) MACHINE=x86_64 QEMU=qemu-system-x86_64 ;;
    *) stop "this machine is $ARCH" "name the one to boot: arm64 or amd64" ;;
  esac
}

# A /dev/kvm that can be opened is not one that runs a kernel (in some clouds it does not): the kernel itself must say a word.
best_accel() {
  if [ "$ARCH" != "$(dpkg --print-architecture)" ] || [ ! -w /dev/kvm ]; then
    echo tcg
    return
  fi
  cpu=$("$PYTHON" -c "from tests.boot.machine import CPU; print(CPU['$ARCH', 'kvm'])")
  kind=q35
  [ "$ARCH" = amd64 ] || kind=virt
  timeout 20 "$QEMU" -nodefaults -display none -no-reboot -M "$kind" -accel kvm -cpu "$cpu" -m 512 -kernel "$KERNEL" \
    -append 'console=ttyS0 console=ttyAMA0 panic=-1' -serial "file:$WORK/kvm.log" >/dev/null 2>&1 </dev/null || true
  if grep -q 'Linux version' "$WORK/kvm.log"; then echo kvm; else
    say "/dev/kvm is here and runs no kernel: software emulation (tcg) then"
    echo tcg
  fi
}

judge_machine() {
  [ "$(id -u)" = 0 ] || stop "root is needed: for the owners in an image and a network namespace of its own" "sudo $0"
  for each in mmdebstrap sfdisk mke2fs mosquitto ssh ssh-keygen unshare ip "$QEMU"; do
    command -v "$each" >/dev/null || stop "$each is not installed" "apt-get install $TOOLS"
  done
  PYTHON=${PYTHON:-$TOP/.venv/bin/python}
  [ -x "$PYTHON" ] || stop "there is no $PYTHON" "make env"
  export SLY="${PYTHON%/*}/sly"
}

# apart COMMAND...: in a network of its own, where this machine is 10.0.2.2 as for the virtual one, and nothing else is there.
apart() {
  # shellcheck disable=SC2016
  unshare --net sh -c 'ip link set lo up && ip address add 10.0.2.2/32 dev lo && exec "$@"' sh "$@"
}

# The operator's part, with the commands of docs/fleet.md as they are.
make_fleet() {
  RUN=$WORK/run-$ARCH
  rm -rf "$RUN"
  mkdir -p "$RUN"
  "$SLY" models fetch blazeface-short grace_hopper >/dev/null
  "$SLY" models fetch blazeface-short --folder "$RUN/models" >/dev/null
  apart "$SLY" fleet init "$RUN/fleet" --name boot --broker-host 10.0.2.2 --also 127.0.0.1 >/dev/null
  apart "$SLY" fleet enroll kitchen --fleet "$RUN/fleet" --backend jalapeno --serve blazeface-short \
    --models /opt/sly/models >/dev/null
  ssh-keygen -q -t ed25519 -N '' -f "$RUN/key"
}

flash() {
  "$TOP/flash.sh" --board jalapeno --enrolled "$RUN/fleet/boards/kitchen" \
    --image "$BASE_IMAGE" --out "$RUN/board.img" --grow 2G --models "$RUN/models" --ssh-key "$RUN/key.pub" --yes
}

story() {
  [ -n "$ACCEL" ] || ACCEL=$(best_accel)
  apart "$PYTHON" -m tests.boot.story --run "$RUN" --arch "$ARCH" --accel "$ACCEL" --cuts "$CUTS" \
    --kernel "$KERNEL" --initrd "$INITRD"
}

judge_options "$@"
judge_machine
trap clean EXIT
trap 'exit 130' INT TERM HUP
mkdir -p "$WORK"
cd "$TOP"
base_names "$ARCH"
took "Debian $SUITE for $ARCH" make_tar "$ARCH" "$MACHINE"
took "its image" make_image
took "a fleet, and a board enrolled" make_fleet
took "flash.sh --image" flash
took "the story" story
[ -n "$KEEP" ] || rm -rf "$RUN"
