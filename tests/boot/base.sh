# shellcheck shell=sh
# The operating system that a board comes with: a Debian root file system, and a partitioned image of it with no SlyOS on it.
#
# Sourced by run.sh.  Rules: everything lies in $WORK (build/boot/) under a name that holds what it is made of, is made as .part
# and renamed when it is whole, and is taken from there the next time; nothing of this machine is changed but binfmt_misc, which
# runs another machine's programs while its root file system is made.

SUITE=bookworm
MIRROR=${MIRROR:-http://deb.debian.org/debian}
PACKAGES=systemd,systemd-sysv,udev,dbus,python3-venv,python3-minimal,iproute2,ca-certificates,systemd-resolved,kmod,openssh-server
IMAGE_MIB=1100
FIRST_SECTOR=2048

digest_of() { printf '%s\n' "$@" | sha256sum | cut -c 1-12; }

# base_names ARCH: sets $BASE_TAR, $BASE_IMAGE, $KERNEL, $INITRD.
base_names() {
  made_of=$(digest_of "$SUITE" "$1" "$PACKAGES")
  BASE_TAR=$WORK/debian-$1-$made_of.tar
  BASE_IMAGE=$WORK/debian-$1-$(digest_of "$made_of" "$IMAGE_MIB" "$(cat "$HERE/base.sh")").img
  KERNEL=${BASE_IMAGE%.img}.vmlinuz
  INITRD=${BASE_IMAGE%.img}.initrd
}

# Programs of arm64 run here through qemu-user while its packages are set up.
allow_foreign() {
  [ "$1" != "$(dpkg --print-architecture)" ] || return 0
  [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc \
    || stop "binfmt_misc cannot be mounted" "mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc"
  [ -e "/proc/sys/fs/binfmt_misc/qemu-$2" ] || update-binfmts --enable "qemu-$2" \
    || stop "programs for $2 cannot run here" "apt-get install qemu-user-static binfmt-support"
}

# make_tar ARCH MACHINE
make_tar() {
  [ ! -e "$BASE_TAR" ] || return 0
  allow_foreign "$1" "$2"
  nice mmdebstrap --quiet --architectures="$1" --variant=minbase --format=tar --aptopt='Acquire::Retries "3"' \
    --include="linux-image-cloud-$1,$PACKAGES" "$SUITE" "$BASE_TAR.part" "$MIRROR" >"$BASE_TAR.log" 2>&1 \
    || { tail -n 5 "$BASE_TAR.log" >&2; stop "mmdebstrap failed" "read $BASE_TAR.log"; }
  mv "$BASE_TAR.part" "$BASE_TAR"
}

# What an image of a maker brings: an address by DHCP, its root found by its label, programs of the console that nobody needs off.
furnish() {
  printf 'LABEL=root / ext4 errors=remount-ro 0 1\n' >"$1/etc/fstab"
  printf 'debian\n' >"$1/etc/hostname"
  printf '[Match]\nType=ether\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=no\nLinkLocalAddressing=no\n' \
    >"$1/etc/systemd/network/20-wired.network"
  chroot_units "$1"
  : >"$1/etc/machine-id"
}

# Links as systemctl enable makes them, without running a program of the other machine.
chroot_units() {
  wants=$1/etc/systemd/system/multi-user.target.wants
  mkdir -p "$wants"
  ln -sf /lib/systemd/system/systemd-networkd.service "$wants/systemd-networkd.service"
}

# make_image: the tar, in the one partition of a disk.
make_image() {
  [ ! -e "$BASE_IMAGE" ] || return 0
  TREE=$WORK/tree.$$
  mkdir "$TREE"
  tar -C "$TREE" --numeric-owner --exclude='./dev/*' -xf "$BASE_TAR"
  furnish "$TREE"
  cp "$TREE"/boot/vmlinuz-* "$KERNEL"
  cp "$TREE"/boot/initrd.img-* "$INITRD"
  rm -f "$BASE_IMAGE.part"
  truncate -s "${IMAGE_MIB}M" "$BASE_IMAGE.part"
  printf 'label: gpt\nstart=%s, type=linux\n' "$FIRST_SECTOR" | sfdisk --quiet "$BASE_IMAGE.part"
  mke2fs -q -F -t ext4 -L root -d "$TREE" -E "offset=$((FIRST_SECTOR * 512))" "$BASE_IMAGE.part" "$((IMAGE_MIB - 2))M"
  clean
  mv "$BASE_IMAGE.part" "$BASE_IMAGE"
}
