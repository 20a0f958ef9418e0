"""``flash.sh --image BASE --out OUT``: by mount and by debugfs, onto whole images and hostile ones, and cut off at any line."""

from __future__ import annotations

import fcntl
import gzip
import lzma
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.needs import needs
from tests.passable import passable
from tests.small_images import (
    BOOT_START,
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
    needs_image_tools,
    needs_loops,
    run,
    small_image,
    small_system,
    tree_of,
    write,
)

AS_NOBODY = passable([CHECKOUT], ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"])
PATIENCE_S = 20.0
OWN_MOUNTS = ["unshare", "--mount", "--propagation", "slave", "--"]


class Images(Flasher):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for each in folder.rglob("*"):
            each.chmod(0o755 if each.is_dir() else 0o644)
        self.system = small_system(folder / "system")
        self.base = small_image(folder / "base.img", self.system)


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    """In a folder that anybody may pass, for those without rights."""
    needs_image_tools()
    folder = Path(tempfile.mkdtemp(prefix="sly-images-", dir=in_memory()))
    folder.chmod(0o755)
    try:
        yield Images(folder)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def place(images: Images) -> Iterator[Path]:
    """A folder that anybody may write."""
    place = Path(tempfile.mkdtemp(dir=images.folder))
    place.chmod(0o777)
    yield place
    shutil.rmtree(place)


def test_by_mount_and_by_debugfs_the_same_system_comes_of_it(images: Images, place: Path) -> None:
    needs_loops()
    before = digest(images.base)
    by_mount, by_debugfs = place / "mount.img", place / "debugfs.img"
    for out, shell, who in ((by_mount, "sh", []), (by_debugfs, "busybox", AS_NOBODY)):
        done = images.flash("--image", images.base, "--out", out, shell=shell, before=who)
        assert done.returncode == 0, done.stderr
        assert "verified" in done.stderr
        fsck(out)
        assert out.stat().st_mode & 0o777 == 0o600, "there are keys in it"
    with mounted(by_mount, place / "a") as one, mounted(by_debugfs, place / "b") as other:
        trees = tree_of(one), tree_of(other)
    assert trees[0] == trees[1]
    assert trees[0]["var/lib/sly/kitchen/identity.key"][0] == "-rw-------"
    assert trees[0]["etc/shadow"][0] == "-rw-r-----", "what was there stays"
    assert all(entry[2:4] == (0, 0) for path, entry in trees[0].items() if "sly" in path)
    assert digest(images.base) == before
    assert images.left_behind() == []
    assert not list(place.glob("*.part"))


FACTS = """
set -eu; cd "$1"; ROOMS=$PWD/board_support/flash; TAB=$(printf '\\t'); YES= DRY_RUN= PARTITION= GROW= OUT=
for room in say roots folder partitions debugfs image; do . "$ROOMS/$room.sh"; done
medium_take "$2"; medium_look "$2"
ROOT_KIND=$3 ROOT=$4
for path in / /etc/os-release /lib/systemd/systemd /bin/python3 /etc/shadow /nothing /etc/nothing/at/all /etc/shadow/below \\
    /long /there/x /out/x; do
    echo "$path $(root_type $path) $(root_meta $path || echo no) $(root_hash $path || echo no) $(root_link $path || echo no)"
    echo "$(root_cat $path | sha256sum) $(root_list $path | sort | tr '\\n' ' ')"
done
"""


@pytest.mark.parametrize("shell", ["sh", pytest.param("busybox", marks=pytest.mark.long)])
def test_both_kinds_of_root_say_the_same_of_an_image(images: Images, place: Path, shell: str) -> None:
    needs_loops()
    system = small_system(place / "system")
    (system / "long").symlink_to("l" * 200)
    (system / "there").symlink_to("/opt/here")
    (system / "out").symlink_to("../../../../opt/here")
    write(system / "opt/here/x", b"inside")
    image = small_image(place / "base.img", system)
    with mounted(image, place / "root") as root:
        told = [
            run(*SHELLS[shell], "-c", FACTS, "facts", CHECKOUT, image, kind, root, env={**os.environ, "LC_ALL": "C"})
            for kind in ("folder", "debugfs")
        ]
    assert told[0] == told[1]
    assert digest(system / "opt/here/x") in told[0]


@pytest.mark.long
def test_flashed_again_the_state_stays_and_by_wipe_it_goes(images: Images, place: Path) -> None:
    """Without rights: removing what is deep is debugfs' work as well."""
    first, again, wiped = place / "first.img", place / "again.img", place / "wiped.img"
    system = small_system(place / "system")
    write(system / "var/lib/sly/kitchen/ledger.db", b"what the board did")
    write(system / 'var/lib/sly/kitchen/blobs/a "b" c/deep/er', b"model")
    write(system / "opt/sly/old/file", b"of an earlier flashing")
    small_image(first, system)
    for image, options in ((again, []), (wiped, ["--wipe", "--yes"])):
        done = images.flash("--image", first, "--out", image, *options, before=AS_NOBODY)
        assert done.returncode == 0, done.stderr
        fsck(image)
    needs_loops()
    with mounted(again, place / "a") as root:
        assert (root / "var/lib/sly/kitchen/ledger.db").read_bytes() == b"what the board did"
    with mounted(wiped, place / "a") as root:
        assert not (root / "var/lib/sly/kitchen/ledger.db").exists()
        assert not (root / "var/lib/sly/kitchen/blobs").exists()
        assert not (root / "opt/sly/old").exists()
        assert (root / "var/lib/sly/kitchen/identity.key").exists()


@pytest.mark.parametrize(
    ("table", "shell", "who"),
    [pytest.param("dos", "busybox", [], marks=pytest.mark.long), ("gpt", "sh", AS_NOBODY)],
    ids=["dos", "gpt-without-rights"],
)
def test_an_image_that_is_grown_has_the_room_and_all_else_as_before(
    images: Images, place: Path, table: str, shell: str, who: list[str]
) -> None:
    base, out = small_image(place / "base.img", images.system, table, size_mib=16), place / "out.img"
    small = images.flash("--image", base, "--out", out, before=who)
    assert small.returncode == 1
    assert "--grow" in small.stderr, small.stderr
    named = small.stderr.split("--grow ")[1].split()[0]
    assert images.flash("--image", base, "--out", out, "--grow", named, before=who).returncode == 0, "what was named is enough"
    done = images.flash("--image", base, "--out", out, "--grow", "24M", "--yes", shell=shell, before=who)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size == (16 + 24) * MIB
    fsck(out)
    told = subprocess.run(["/usr/sbin/sfdisk", "--verify", out], capture_output=True, text=True, check=True)
    assert "backup GPT" not in told.stderr, "the second header of a GPT is at the end again"
    assert (table == "dos") or "No errors detected" in told.stdout
    size = int(run("/usr/sbin/dumpe2fs", "-h", f"{out}?offset={ROOT_START}").split("Block count:")[1].split()[0])
    assert size * 1024 > (16 + 24 - 6) * MIB - 64 * 1024 or size * 4096 > 33 * MIB
    for start, length in ((0, 440), (BOOT_START, 4 * MIB)):
        assert base.read_bytes()[start : start + length] == out.read_bytes()[start : start + length], "what boots is as it was"


GROWN = """
set -eu; cd "$1"; ROOMS=$PWD/board_support/flash; TAB=$(printf '\\t'); YES= DRY_RUN= PARTITION= GROW= OUT= TMPDIR=$3
for room in say roots folder partitions debugfs image; do . "$ROOMS/$room.sh"; done
medium_take "$2"; medium_look "$2"
IMAGE_PART=$2 IMAGE_GROW_KIB=2048
image_grow "$2"
medium_check "$2"
"""


def test_grown_by_less_than_lies_before_the_system_nothing_of_it_is_cut_off(images: Images, place: Path) -> None:
    """resize2fs would cut the file where the file system ends if it began at 0."""
    needs_loops()
    system = small_system(place / "system")
    write(system / "full", os.urandom(14 * MIB))
    image = small_image(place / "base.img", system, "gpt", size_mib=24)
    run("sh", "-c", GROWN, "grown", CHECKOUT, image, place, env={**os.environ, "LC_ALL": "C"})
    assert image.stat().st_size == 26 * MIB
    fsck(image)
    with mounted(image, place / "a") as root:
        assert digest(root / "full") == digest(system / "full")


def zeros(path: Path, images: Images) -> None:
    path.write_bytes(bytes(8 * MIB))


def bare(path: Path, images: Images) -> None:
    path.write_bytes(images.base.read_bytes()[ROOT_START:])


def cut(path: Path, images: Images) -> None:
    path.write_bytes(images.base.read_bytes()[: 20 * MIB])


def half_a_sector(path: Path, images: Images) -> None:
    path.write_bytes(images.base.read_bytes()[:-100])


def damaged_superblock(path: Path, images: Images) -> None:
    image = bytearray(images.base.read_bytes())
    image[ROOT_START + 1024 : ROOT_START + 2048] = os.urandom(1024)
    path.write_bytes(image)


def flipped_superblock(path: Path, images: Images) -> None:
    image = bytearray(images.base.read_bytes())
    image[ROOT_START + 1024 + 4] ^= 0xFF
    path.write_bytes(image)


def begins_with(magic: bytes) -> Callable[[Path, Images], None]:
    return lambda path, images: write(path, magic + bytes(MIB))


def without_system(path: Path, images: Images) -> None:
    small_image(path, None)


def two_systems(path: Path, images: Images) -> None:
    small_image(path, images.system, second=images.system)


def wrong_machine(path: Path, images: Images) -> None:
    small_image(path, small_system(path.parent / "riscv", "riscv64"))


def whole(path: Path, images: Images) -> None:
    shutil.copy(images.base, path)


def nothing(path: Path, images: Images) -> None:
    """There is no base."""


def a_folder(path: Path, images: Images) -> None:
    path.mkdir()


def cut_xz(path: Path, images: Images) -> None:
    path.write_bytes(lzma.compress(images.base.read_bytes(), preset=0)[:-5000])


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (lambda path, images: write(path), [], "which is empty"),
        (nothing, [], "which is not there"),
        (a_folder, [], "which is no file"),
        (zeros, [], "no partition table"),
        (bare, [], "a bare ext file system"),
        (cut, [], "it is cut off"),
        (half_a_sector, [], "not whole sectors"),
        (damaged_superblock, [], "2: a Linux file system that is damaged"),
        (flipped_superblock, [], "2: a Linux file system that is damaged"),
        (begins_with(bytes.fromhex("3aff26ed")), [], "simg2img"),
        (begins_with(b"QFI\xfb"), [], "qemu-img convert"),
        (without_system, [], "no system on it"),
        (two_systems, [], "choose: --partition N"),
        (wrong_machine, [], "riscv64"),
        (whole, ["--partition", "1"], "something else"),
        (whole, ["--partition", "9"], "allowed: 1, 2"),
        (whole, ["--grow", "plenty"], "as in 512M"),
        (whole, ["--grow", "-1G"], "as in 512M"),
        (cut_xz, [], "fetch it again"),
    ],
)
def test_what_is_no_image_of_a_system_is_refused_and_nothing_is_made(
    images: Images, place: Path, make: Callable[[Path, Images], None], options: list[str], said: str
) -> None:
    base, out = place / "base.img", place / "out.img"
    make(base, images)
    before = digest(base) if base.is_file() else ""
    done = images.flash("--image", base, "--out", out, *options, shell=random.choice(list(SHELLS)))
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert done.stderr.count("\n") <= 3, done.stderr
    assert not out.exists() and not Path(f"{out}.part").exists()
    assert before == (digest(base) if base.is_file() else "")
    assert images.left_behind() == []


def test_of_two_systems_the_one_that_is_named_is_flashed(images: Images, place: Path) -> None:
    needs_loops()
    base, out = small_image(place / "base.img", images.system, size_mib=64, second=images.system), place / "out.img"
    done = images.flash("--image", base, "--out", out, "--partition", "3")
    assert done.returncode == 0, done.stderr
    with mounted(out, place / "a", ROOT_START + 29 * MIB) as root:
        assert (root / "opt/sly/flashed.list").exists()
    with mounted(out, place / "a") as root:
        assert not (root / "opt/sly").exists()


@pytest.mark.parametrize("shell", ["sh", pytest.param("busybox", marks=pytest.mark.long)])
def test_out_is_never_the_base_nor_where_nothing_can_be(images: Images, place: Path, shell: str) -> None:
    base = place / "base.img"
    shutil.copy(images.base, base)
    os.link(base, place / "other.img")
    (place / "link.img").symlink_to("base.img")
    shutil.copy(base, place / "part.img.part")
    (place / "folder.img").mkdir()
    before = digest(base)
    for source, out, said in (
        (base, base, "written over"),
        (base, place / "other.img", "written over"),
        (base, place / "link.img", "written over"),
        (place / "part.img.part", place / "part.img", "written over"),
        (base, place / "missing" / "out.img", "a folder that is not there"),
        (base, place / "folder.img", "which is no file"),
    ):
        done = images.flash("--image", source, "--out", out, "--yes", shell=shell)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert digest(base) == before == digest(place / "part.img.part")


def test_an_image_that_is_there_is_not_replaced_unasked(images: Images, place: Path) -> None:
    out = place / "out.img"
    out.write_bytes(b"dear to me")
    done = images.flash("--image", images.base, "--out", out)
    assert done.returncode == 2
    assert "is there already" in done.stderr
    assert out.read_bytes() == b"dear to me"
    with out.open("rb") as _, Path(f"{out}.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = images.flash("--image", images.base, "--out", out, "--yes")
    assert done.returncode == 2
    assert "another flash.sh" in done.stderr


@pytest.mark.parametrize("packing", ["xz", pytest.param("gz", marks=pytest.mark.long), "zip"])
def test_a_packed_image_is_unpacked(images: Images, place: Path, packing: str) -> None:
    packed, out, content = place / "base.img.packed", place / "out.img", images.base.read_bytes()
    if packing == "zip":
        needs(shutil.which("unzip"), "unzip is not installed (apt-get install unzip)")
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("2026-raspios.img", content)
    else:
        packed.write_bytes(lzma.compress(content, preset=0) if packing == "xz" else gzip.compress(content, 1))
    look = [] if packing == "xz" else ["--dry-run"]
    done = images.flash("--image", packed, "--out", out, *look)
    assert done.returncode == 0, done.stderr
    assert out.exists() == (packing == "xz")
    assert not Path(f"{out}.part").exists()


@pytest.mark.parametrize("who", [pytest.param([], marks=pytest.mark.long), AS_NOBODY], ids=["mount", "debugfs"])
def test_no_character_of_a_path_means_anything(images: Images, place: Path, who: list[str]) -> None:
    strange = place / "a \"b' $(touch x)\n?offset=1 -c;"
    strange.mkdir(mode=0o777)
    strange.chmod(0o777)
    shutil.copy(images.base, strange / "-base ?.img")
    done = images.flash("--image", strange / "-base ?.img", "--out", strange / "-o\nut\n", "--yes", before=who)
    assert done.returncode == 0, done.stderr
    (strange / "-o\nut\n").rename(place / "plain.img")
    fsck(place / "plain.img")
    assert sorted(each.name for each in strange.iterdir()) == ["-base ?.img"]


@pytest.mark.parametrize("who", [pytest.param([], marks=pytest.mark.long), AS_NOBODY], ids=["mount", "debugfs"])
def test_a_journal_that_was_not_played_is_played_in_the_copy(images: Images, place: Path, who: list[str]) -> None:
    needs_loops()
    live, base, out = place / "live.img", place / "base.img", place / "out.img"
    shutil.copy(images.base, live)
    (place / "a").mkdir()
    run("mount", "-o", f"loop,offset={ROOT_START}", live, place / "a")
    try:
        write(place / "a/etc/late", b"only in the journal")
        os.sync()
        shutil.copy(live, base)
    finally:
        run("umount", place / "a")
    base.chmod(0o644)
    before = digest(base)
    done = images.flash("--image", base, "--out", out, before=who)
    assert done.returncode == 0, done.stderr
    assert "its journal is replayed" in done.stderr
    assert digest(base) == before
    fsck(out)
    with mounted(out, place / "a") as root:
        assert (root / "etc/late").read_bytes() == b"only in the journal"


@pytest.mark.parametrize("who", [[], AS_NOBODY], ids=["mount", "debugfs"])
def test_links_in_a_hostile_base_lead_nowhere_on_this_machine(images: Images, place: Path, who: list[str]) -> None:
    needs_loops()
    canary = place / "canary"
    write(canary / "rules.d/70-sly.rules", b"the host's")
    canary.chmod(0o777)
    (canary / "rules.d").chmod(0o777)
    before = tree_of(canary)
    system, base, out = small_system(place / "system"), place / "base.img", place / "out.img"
    (system / "etc/udev").symlink_to(canary)
    (system / "etc/sysusers.d").symlink_to("../" * 12 + str(canary / "up").lstrip("/"))
    shutil.rmtree(system / "opt")
    (system / "opt").symlink_to(canary / "opt")
    small_image(base, system)
    done = images.flash("--image", base, "--out", out, before=who)
    assert tree_of(canary) == before
    assert done.returncode == 0, done.stderr
    with mounted(out, place / "a") as root:
        inside = root / str(canary).lstrip("/")
        assert (inside / "rules.d/70-sly.rules").read_bytes() != b"the host's"
        assert (inside / "opt/sly/flashed.list").exists()
        assert (inside / "up/sly.conf").exists()


def test_a_full_disk_is_told_before_anything_is_copied(images: Images, place: Path) -> None:
    needs_loops()
    small = place / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=256k", "small", small)
    try:
        done = images.flash("--image", images.base, "--out", small / "out.img")
        assert done.returncode == 1
        assert "no room" in done.stderr
        assert list(small.iterdir()) == []
    finally:
        run("umount", small)


@contextmanager
def all_ended() -> Iterator[tuple[int]]:
    """A descriptor for a process to have; leaves when no child of it is left that has it: what is killed leaves some at work."""
    reading, writing = os.pipe()
    high = fcntl.fcntl(writing, fcntl.F_DUPFD, 20)  # the script's own are lower
    os.close(writing)
    try:
        yield (high,)
    finally:
        os.close(high)
        with os.fdopen(reading, "rb") as pipe:
            pipe.read()


def interrupted_at(images: Images, out: Path, line: int, how: signal.Signals) -> list[bytes]:
    """Its trace as root, ended by ``how`` once that has so many lines.

    The namespace for its mounts is made here: flash.sh would begin anew in one, and the trace would end there.
    """
    command = images.command("--image", images.base, "--out", out, "--yes")
    environment = {**os.environ, "TMPDIR": str(images.folder / "scratch"), "SLY_OWN_MOUNTS": "yes"}
    trace = []
    with (
        all_ended() as kept,
        subprocess.Popen(
            [*OWN_MOUNTS, command[0], "-x", *command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=kept,
        ) as process,
    ):
        assert process.stderr
        for each in process.stderr:
            trace.append(each)
            if len(trace) == line:
                process.send_signal(how)
    return trace


def judge_interrupted(images: Images, out: Path, how: signal.Signals, whole: Path) -> None:
    assert not out.exists() or digest_of_tree(out) == digest_of_tree(whole)
    if how == signal.SIGTERM:
        assert not Path(f"{out}.part").exists()
        assert images.left_behind() == []
    assert str(images.folder) not in Path("/proc/self/mountinfo").read_text()
    for each in (out, Path(f"{out}.part")):
        each.unlink(missing_ok=True)
    for each in (images.folder / "scratch").iterdir():
        shutil.rmtree(each)


def digest_of_tree(image: Path) -> str:
    return run("/usr/sbin/debugfs", "-R", "cat /opt/sly/flashed.list", f"{image}?offset={ROOT_START}")


def interrupted_after(images: Images, out: Path, seconds: float, how: signal.Signals) -> None:
    """Without rights, where the tools' output is what a trace would be mixed with."""
    with (
        all_ended() as kept,
        subprocess.Popen(
            [*AS_NOBODY, *images.command("--image", images.base, "--out", out, "--yes")],
            env={**os.environ, "TMPDIR": str(images.folder / "scratch")},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=kept,
        ) as process,
    ):
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.send_signal(how)


def cut_off(images: Images, place: Path, points: int) -> None:
    whole, out = place / "whole.img", place / "out.img"
    (images.folder / "scratch").mkdir(exist_ok=True)
    (images.folder / "scratch").chmod(0o777)
    began = time.monotonic()
    done = images.flash("--image", images.base, "--out", out, before=AS_NOBODY)
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    out.unlink()
    lines = len(interrupted_at(images, whole, 0, signal.SIGTERM))
    assert whole.exists()
    for number in range(points):
        for how in (signal.SIGTERM, signal.SIGKILL):
            if number % 3:
                interrupted_at(images, out, random.randrange(1, lines), how)
            else:
                interrupted_after(images, out, random.uniform(0, took), how)
            judge_interrupted(images, out, how, whole)
    until(lambda: images.folder.name not in run("losetup", "--list", "--raw", "--output", "BACK-FILE"))


def until(holds: Callable[[], bool]) -> None:
    """The kernel takes a mount apart when it has time."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_cut_off_at_any_line_there_is_a_whole_image_or_none(images: Images, place: Path) -> None:
    needs_loops()
    cut_off(images, place, points=3)


def test_ended_while_the_part_is_made_none_is_left(images: Images, place: Path) -> None:
    """Between the file, its lock and what removes it."""
    needs_loops()
    out = place / "out.img"
    (images.folder / "scratch").mkdir(exist_ok=True)
    trace = interrupted_at(images, out, 0, signal.SIGTERM)
    out.unlink()
    made = trace.index(b"+ image_begin\n")
    for line in range(made, made + 12):
        interrupted_at(images, out, line, signal.SIGTERM)
        assert list(place.iterdir()) == []
        assert images.left_behind() == []


@pytest.mark.long
def test_cut_off_at_very_many_lines_there_is_a_whole_image_or_none(images: Images, place: Path) -> None:
    needs_loops()
    cut_off(images, place, points=40)
