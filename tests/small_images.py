"""Small images of cards with a fabricated little system on them, and ``flash.sh`` run onto them.

A system is what flash.sh looks at: os-release, systemd, a Python 3.11 with its ``venv``; programs are the head of an ELF file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edge_agent.cli import main as sly
from tests.needs import needs

CHECKOUT = Path(__file__).resolve().parents[1]
SHELLS = {"sh": ["sh"], "busybox": ["busybox", "ash"]}
MIB = 1 << 20
BOOT_START, ROOT_START = 1 * MIB, 5 * MIB
NOBODY = 65534
LINUX, FAT = {"dos": "83", "gpt": "L"}, {"dos": "c", "gpt": "U"}
MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243}


def needs_image_tools() -> None:
    for tool, package in (("sfdisk", "fdisk"), ("debugfs", "e2fsprogs"), ("mkfs.vfat", "dosfstools"), ("mcopy", "mtools")):
        needs(
            shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"),
            f"{tool} is not installed (apt-get install {package})",
        )


def needs_loops() -> None:
    needs_image_tools()
    needs(os.geteuid() == 0 and Path("/dev/loop-control").exists(), "loop devices need root")


def in_memory() -> Path | None:
    """A folder of a file system in memory, where there is one: nothing here is about disks, and a sync of one takes seconds."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**29 else None


def run(*command: object, **options: object) -> str:
    return subprocess.run([str(each) for each in command], check=True, capture_output=True, text=True, **options).stdout  # type: ignore[call-overload,no-any-return]


def elf(machine: str) -> bytes:
    return b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + MACHINES[machine].to_bytes(2, "little") + bytes(44)


def write(path: Path, content: bytes = b"", mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)


def small_system(folder: Path, machine: str = "x86_64") -> Path:
    """Merged /usr, as Debian has it, with links that lead about in it."""
    write(folder / "usr/lib/os-release", b'PRETTY_NAME="Small Linux 12"\nID=debian\n')
    write(folder / "usr/lib/systemd/systemd", elf(machine), 0o755)
    write(folder / "usr/bin/python3.11", elf(machine), 0o755)
    write(folder / "usr/lib/python3.11/venv/__init__.py")
    for link, to in {
        "lib": "usr/lib",
        "lib64": "usr/lib64",
        "bin": "usr/bin",
        "etc/os-release": "../usr/lib/os-release",
        "usr/bin/python3": "python3.11",
    }.items():
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        (folder / link).symlink_to(to)
    for each in ("etc/systemd/system", "var/lib", "opt", "root", "tmp", "usr/lib64"):
        (folder / each).mkdir(parents=True)
    write(folder / "etc/shadow", b"root:*::\n", 0o640)
    return folder


def small_image(path: Path, system: Path | None, table: str = "dos", size_mib: int = 48, second: Path | None = None) -> Path:
    """A FAT partition to boot from at 1 MiB, then ``system`` on ext4 (without one: an empty ext4), then perhaps another."""
    needs_image_tools()
    with path.open("wb") as file:
        file.truncate(size_mib * MIB)
    root_mib = (size_mib - 6) // (2 if second else 1)
    lines = [f"label: {table}", f"start={BOOT_START // 512}, size={4 * MIB // 512}, type={FAT[table]}"]
    starts = [ROOT_START + index * root_mib * MIB for index in range(2 if second else 1)]
    lines += [f"start={start // 512}, size={root_mib * MIB // 512}, type={LINUX[table]}" for start in starts]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    run("sfdisk", "-q", path, input="\n".join(lines) + "\n", env=environment)
    run("mkfs.vfat", "--offset", BOOT_START // 512, path, 4 * 1024, env=environment)
    for start, tree in zip(starts, (system, second), strict=False):
        content = ["-d", tree] if tree else []
        run("mke2fs", "-q", "-t", "ext4", "-E", f"offset={start},root_owner=0:0", *content, path, f"{root_mib}M", env=environment)
    return path


def enrolled_board(folder: Path, board: str = "kitchen") -> Path:
    sly(["fleet", "init", str(folder), "--broker-host", "127.0.0.1"])
    sly(["fleet", "enroll", board, "--fleet", str(folder), "--backend", "jalapeno"])
    return folder / "boards" / board


def small_wheels(folder: Path, machine: str = "x86_64") -> Path:
    folder.mkdir()
    for name in ("slyos_edge-0.1.0-py3-none-any.whl", "pip-24.0-py3-none-any.whl"):
        write(folder / name, b"PK" + name.encode() * 1000)
    facts = {"agent": "slyos_edge-0.1.0", "python": "3.11", "machine": machine}
    (folder / "wheelhouse.json").write_text(json.dumps(facts, indent=1))
    return folder


class Flasher:
    """``flash.sh`` of this checkout with a board's folder and its wheels; everything it makes lies below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.enrolled, self.wheels = folder, enrolled_board(folder / "fleet"), small_wheels(folder / "wheels")

    def command(self, *options: object, shell: str = "sh") -> list[str]:
        given = ["--board", "jalapeno", "--enrolled", self.enrolled, "--wheels", self.wheels, *options]
        return [*SHELLS[shell], str(CHECKOUT / "flash.sh"), *map(str, given)]

    def flash(
        self, *options: object, shell: str = "sh", before: Sequence[str] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        scratch = self.folder / "scratch"
        scratch.mkdir(mode=0o777, exist_ok=True)
        scratch.chmod(0o777)
        return subprocess.run(
            [*before, *self.command(*options, shell=shell)],
            env={**os.environ, "TMPDIR": str(scratch), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def left_behind(self) -> list[str]:
        return sorted(each.name for each in (self.folder / "scratch").iterdir())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def mounted(image: Path, at: Path, start: int = ROOT_START) -> Iterator[Path]:
    """The file system at ``start``, read only."""
    at.mkdir(exist_ok=True)
    run("mount", "-o", f"loop,ro,noload,offset={start}", image, at)
    try:
        yield at
    finally:
        run("umount", at)


Entry = tuple[str, str, int, int]


def tree_of(root: Path) -> dict[str, Entry]:
    """Everything below ``root``: type and mode, owner, group, and the digest or the link's target."""
    found = {}
    for path in sorted(root.rglob("*")):
        told = path.lstat()
        content = str(path.readlink()) if path.is_symlink() else digest(path) if path.is_file() else ""
        found[str(path.relative_to(root))] = (stat.filemode(told.st_mode), content, told.st_uid, told.st_gid)
    return found


def fsck(image: Path, start: int = ROOT_START) -> str:
    return run("e2fsck", "-fn", f"{image}?offset={start}", env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})
