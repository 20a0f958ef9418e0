"""``flash.sh --device``: loop devices of our own stand for cards; disks in use stand in a fabricated /sys and /proc."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.small_images import (
    CHECKOUT,
    MIB,
    NOBODY,
    ROOT_START,
    SHELLS,
    Flasher,
    digest,
    fsck,
    in_memory,
    mounted,
    needs_loops,
    run,
    small_image,
    small_system,
)


@pytest.fixture(scope="module")
def flasher() -> Iterator[Flasher]:
    needs_loops()
    folder = Path(tempfile.mkdtemp(prefix="sly-cards-", dir=in_memory()))
    try:
        flasher = Flasher(folder)
        small_image(folder / "base.img", small_system(folder / "system"))
        yield flasher
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def card(flasher: Flasher) -> Iterator[Path]:
    """The file behind a card with old things on it."""
    card = flasher.folder / "card"
    card.write_bytes(os.urandom(MIB) * 64)
    yield card
    card.unlink()


@contextmanager
def looped(file: Path, *options: str, partitions: bool = False) -> Iterator[str]:
    device = run("losetup", "--find", "--show", *options, file).strip()
    try:
        if partitions:
            run("partx", "--add", device)
        yield device
    finally:
        if partitions:
            subprocess.run(["partx", "--delete", device], check=False)
        run("losetup", "--detach", device)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("shell", ["sh", pytest.param("busybox", marks=pytest.mark.long)])
def test_an_image_is_written_onto_a_card_and_read_back(flasher: Flasher, card: Path, shell: str) -> None:
    base, out = flasher.folder / "base.img", flasher.folder / "out.img"
    with looped(card) as device:
        done = flasher.flash("--device", device, "--image", base, "--yes", shell=shell)
        assert done.returncode == 0, done.stderr
    fsck(card)
    with mounted(card, flasher.folder / "a") as root:
        assert (root / "opt/sly/flashed.list").exists()
    assert card.read_bytes()[-MIB:] == bytes(MIB), "no second GPT of an earlier life"
    assert not out.exists()
    assert flasher.left_behind() == [], "the image was made in a folder of its own, and went"


def test_a_card_with_a_system_is_flashed_where_it_is(flasher: Flasher, card: Path) -> None:
    shutil.copy(flasher.folder / "base.img", card)
    with looped(card) as device:
        done = flasher.flash("--device", device, "--yes", shell="busybox")
    assert done.returncode == 0, done.stderr
    fsck(card)
    with mounted(card, flasher.folder / "a") as root:
        assert (root / "opt/sly/flashed.list").exists()


REFUSED_CARDS = {
    "folder": "no block device",
    "file": "no block device",
    "nothing": "not there",
    "partition": "which is a partition",
    "small": "at least",
    "read-only": "which is read-only",
    "no rights": "run it with sudo",
    "nobody to ask": "stdin is no terminal",
    "another at it": "another flash.sh is at work",
    "smaller than the image": "take a larger card",
}


@pytest.mark.parametrize("what", REFUSED_CARDS)
def test_what_is_no_card_to_write_is_refused_and_untouched(flasher: Flasher, card: Path, what: str) -> None:
    before, options, who = digest(card), ["--image", flasher.folder / "base.img", "--yes"], []
    said = REFUSED_CARDS[what]
    loop_options = {"small": ["--sizelimit", str(MIB)], "read-only": ["--read-only"]}.get(what, [])
    if what == "smaller than the image":
        loop_options = ["--sizelimit", str(32 * MIB)]
    if what == "partition":
        shutil.copy(flasher.folder / "base.img", card)
        before = digest(card)
    if what == "nobody to ask":
        options = options[:2]
    if what == "no rights":
        who = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        flasher.folder.chmod(0o755)
        for path in flasher.folder.glob("fleet/**/*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (flasher.folder / "fleet").chmod(0o755)
    with looped(card, *loop_options, partitions=what == "partition") as device:
        given = {
            "folder": str(flasher.folder),
            "file": str(card),
            "nothing": "/dev/no-such-card",
            "partition": f"{device}p1",
        }.get(what, device)
        with locked(device if what == "another at it" else flasher.folder):
            done = flasher.flash("--device", given, *options, before=who, shell="sh" if what != "small" else "busybox")
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert digest(card) == before


def test_a_card_that_is_mounted_anywhere_is_refused(flasher: Flasher, card: Path) -> None:
    shutil.copy(flasher.folder / "base.img", card)
    at = flasher.folder / "at"
    at.mkdir(exist_ok=True)
    with looped(card, partitions=True) as device:
        run("mount", f"{device}p2", at)
        try:
            done = flasher.flash("--device", device, "--image", flasher.folder / "base.img", "--yes")
            assert (done.returncode, f"mounted on {at}" in done.stderr) == (2, True), done.stderr
        finally:
            run("umount", at)
        script = f"mount {device}p2 {at} && echo mounted && read -r line; umount {at}"
        with subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout and other.stdout.readline() == "mounted\n"
            done = flasher.flash("--device", device, "--image", flasher.folder / "base.img", "--yes", shell="busybox")
            other.communicate("end\n")
        assert (done.returncode, "mounted on" in done.stderr) == (2, True), done.stderr


USES = """
set -eu; ROOMS=$1/board_support/flash; YES= DRY_RUN= IMAGE=
. "$ROOMS/say.sh"; . "$ROOMS/device.sh"
DEVICE_SYS=$2/sys DEVICE_PROC=$2/proc DEVICE_NUMBERS=$3
device_judge_use /dev/sdz
echo free
"""


class Disks:
    """A /sys and a /proc: disks, their partitions, what is made of them, what is mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sys/dev/block").mkdir(parents=True)
        (folder / "proc/self").mkdir(parents=True)
        (folder / "proc/self/mountinfo").write_text("")
        (folder / "proc/swaps").write_text("Filename Type Size Used Priority\n")

    def _device(self, place: str, numbers: str) -> Path:
        path = self.folder / "sys/devices" / place
        (path / "holders").mkdir(parents=True)
        (path / "slaves").mkdir()
        (path / "dev").write_text(f"{numbers}\n")
        (self.folder / "sys/dev/block" / numbers).symlink_to(path)
        return path

    def disk(self, numbers: str, partitions: int = 2) -> None:
        major, minor = numbers.split(":")
        self._device(f"disk{major}_{minor}", numbers)
        for number in range(1, partitions + 1):
            path = self._device(f"disk{major}_{minor}/p{number}", f"{major}:{int(minor) + number}")
            (path / "partition").write_text(f"{number}\n")

    def made_of(self, numbers: str, *below: str) -> None:
        upper = self._device(f"virtual/dm-{numbers.replace(':', '_')}", numbers)
        for each in below:
            lower = (self.folder / "sys/dev/block" / each).resolve()
            (upper / "slaves" / lower.name).symlink_to(lower)
            (lower / "holders" / upper.name).symlink_to(upper)

    def mount(self, numbers: str, where: str) -> None:
        with (self.folder / "proc/self/mountinfo").open("a") as file:
            file.write(f"36 35 {numbers} / {where} rw,noatime shared:1 - ext4 /dev/root rw\n")

    def judge(self, numbers: str, shell: str = "sh") -> str:
        done = subprocess.run(
            [*SHELLS[shell], "-c", USES, "uses", CHECKOUT, self.folder, numbers], capture_output=True, text=True
        )
        assert done.returncode == (0 if done.stdout == "free\n" else 2), done.stderr
        return done.stdout or done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_the_disk_of_this_machine_is_known_through_partition_luks_lvm_and_raid(tmp_path: Path, shell: str) -> None:
    disks = Disks(tmp_path)
    for numbers in ("8:0", "8:16", "8:32", "8:48"):
        disks.disk(numbers)
    disks.mount("8:1", "/boot/efi")
    disks.made_of("9:0", "8:2", "8:17")
    disks.made_of("253:0", "9:0")
    disks.made_of("253:1", "253:0")
    disks.mount("253:1", "/")
    disks.made_of("253:7", "8:33")
    for numbers in ("8:0", "8:16"):
        assert "the disk that this machine runs from" in disks.judge(numbers, shell), numbers
    assert "/boot/efi" in disks.judge("8:0", shell)
    assert "in use by dm-253_7" in disks.judge("8:32", shell), "open, though nothing is mounted"
    assert disks.judge("8:48", shell) == "free\n"
    disks.mount("8:49", r"/media/me/my\040card")
    assert r"mounted on /media/me/my\040card" in disks.judge("8:48", shell)


def test_a_disk_without_partitions_and_one_with_swap_are_in_use(tmp_path: Path) -> None:
    needs_loops()
    disks, swap = Disks(tmp_path), tmp_path / "swap"
    disks.disk("259:0", partitions=0)
    assert disks.judge("259:0") == "free\n"
    disks.mount("259:0", "/home")
    assert "the disk that this machine runs from" in disks.judge("259:0")
    swap.write_bytes(bytes(MIB))
    with looped(swap) as device:
        numbers = f"7:{device.removeprefix('/dev/loop')}"
        disks.disk(numbers, partitions=0)
        assert disks.judge(numbers) == "free\n"
        with (tmp_path / "proc/swaps").open("a") as file:
            file.write(f"{device} partition 1024 0 -2\n")
        assert "it holds swap" in disks.judge(numbers)


def test_the_name_is_typed_or_nothing_happens(flasher: Flasher, card: Path) -> None:
    """On a terminal: what the card is was shown first."""
    before = digest(card)
    with looped(card) as device:
        master, slave = pty.openpty()
        command = flasher.command("--device", device, "--image", flasher.folder / "base.img")
        with subprocess.Popen(command, stdin=slave, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            os.write(master, b"yes\n")
            assert process.stderr
            told = process.stderr.read()
        os.close(master)
        os.close(slave)
    assert process.returncode == 2
    assert f"Everything on {device} is overwritten" in told
    assert "67 MB" in told
    assert digest(card) == before


INTERRUPTED = """
set -eu; ROOMS=$1/board_support/flash; YES= DRY_RUN= IMAGE=yes
for room in say partitions device; do . "$ROOMS/$room.sh"; done
DEVICE_NODE=$2 DEVICE_BYTES=$(blockdev --getsize64 "$2") DEVICE_CHUNK=1048576
writes=0
eval "real_put() {
$(sed -n '/^device_put() {/,/^}/p' "$ROOMS/device.sh" | sed 1d)"
cut=$4
device_put() { writes=$((writes + 1)); [ "$writes" -ne "$cut" ] || kill -KILL $$; real_put "$@"; }
device_write "$3"
"""


def test_cut_off_at_any_write_a_card_has_no_partition_table(flasher: Flasher, card: Path) -> None:
    base = flasher.folder / "base.img"
    with looped(card) as device:
        for cut in (1, 2, 3, 4, 5):
            with card.open("r+b") as file:
                file.write(base.read_bytes())
            done = subprocess.run(
                ["sh", "-c", INTERRUPTED, "cut", CHECKOUT, device, base, str(cut)], capture_output=True, text=True
            )
            os.sync()
            if done.returncode == 0:
                break
            assert card.read_bytes()[:MIB] == bytes(MIB), cut
            assert run("sfdisk", "--list", device).count("Device") == 0
        assert done.returncode == 0, done.stderr
        assert cut == 5, "three strides of 16 MiB, then the first"
    assert card.read_bytes()[: base.stat().st_size] == base.read_bytes()


WRITTEN = """
set -eu; ROOMS=$1/board_support/flash; YES= DRY_RUN= IMAGE=yes
for room in say partitions device; do . "$ROOMS/$room.sh"; done
DEVICE_NODE=$2 DEVICE_BYTES=$(blockdev --getsize64 "$2")
device_compare "$3" 0 8388608
"""


def test_a_card_that_gives_back_something_else_is_told_and_does_not_boot(flasher: Flasher, card: Path) -> None:
    base = flasher.folder / "base.img"
    shutil.copy(base, card)
    with card.open("r+b") as file:
        file.seek(ROOT_START + 5000)
        file.write(b"forgotten")
    with looped(card) as device:
        done = subprocess.run(["sh", "-c", WRITTEN, "compare", CHECKOUT, device, base], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not what was written" in done.stderr
    assert card.read_bytes()[: 4 * MIB] == bytes(4 * MIB)
