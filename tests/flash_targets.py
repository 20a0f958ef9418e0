"""Small systems to flash, and boards and wheels to flash them with: made here, in a second, real in all that flash.sh looks at.

``flash`` runs flash.sh as a person does.  ``everything`` is all that can be told of a folder, to compare before and after.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_agent import cli
from ota.wheelhouse import FACTS, encode_facts
from tests import wheels
from tests.needs import needs_program, needs_root
from tests.small_images import in_memory

ROOT = Path(__file__).resolve().parents[1]
FLASH = ROOT / "flash.sh"
SHELLS = {"dash": ["dash"], "busybox ash": ["busybox", "ash"]}
MACHINES = {"aarch64": (2, 183), "x86_64": (2, 62), "armv7l": (1, 40)}
"""Class and machine in the head of an ELF file (elf(5))."""
PATIENCE_S = 120.0
BOARD = "kitchen"


def system(folder: Path, machine: str = "aarch64", python: str = "3.11") -> Path:
    """What flash.sh takes for a system: Debian's links and names, and programs that are a head and nothing else."""
    for name in (
        "usr/bin",
        "usr/sbin",
        "usr/lib/systemd",
        f"usr/lib/python{python}/venv",
        "etc/systemd/system",
        "var/lib",
        "opt",
        "root",
        "home/me",
    ):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib"):
        (folder / name).symlink_to(f"usr/{name}")
    (folder / "usr/lib/os-release").write_text('PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n')
    (folder / "etc/os-release").symlink_to("../usr/lib/os-release")
    for name in (f"usr/bin/python{python}", "usr/lib/systemd/systemd"):
        (folder / name).write_bytes(program(machine))
    (folder / "usr/bin/python3").symlink_to(f"python{python}")
    (folder / f"usr/lib/python{python}/venv/__init__.py").write_text("")
    (folder / "etc/hostname").write_text("debian\n")
    (folder / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    return folder


def program(machine: str) -> bytes:
    kind, number = MACHINES[machine]
    return b"\x7fELF" + bytes([kind, 1, 1]) + bytes(9) + struct.pack("<HHI", 3, number, 1) + bytes(40)


def wheelhouse(folder: Path, machine: str = "aarch64", python: str = "3.11", version: str = "1.0") -> Path:
    """Valid wheels of an agent that is one module, and what stands for pip's."""
    folder.mkdir(parents=True)
    wheels.wheel(folder, "tiny", version, {"tiny.py": f"VERSION = {version!r}\n"})
    wheels.wheel(folder, "pip", "26.0", {"pip/__init__.py": ""})
    facts = wheels.facts(agent=f"tiny-{version}", python=python, machine=machine)
    (folder / FACTS).write_bytes(encode_facts(facts))
    return folder


def fleet(folder: Path, boards: Mapping[str, str]) -> Path:
    """A fleet by the operator's own commands; ``boards``: the backend of each. Its broker is away, which keeps nobody waiting."""
    if not folder.exists():
        assert cli.main(["fleet", "init", str(folder), "--name", "home", "--broker-host", "127.0.0.1", "--port", "1"]) == 0
    for board, backend in boards.items():
        assert cli.main(["fleet", "enroll", board, "--fleet", str(folder), "--backend", backend]) == 0
    return folder


@dataclass(frozen=True, slots=True)
class Flashed:
    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


def command(*options: object, shell: str = "dash") -> list[str]:
    return [*SHELLS[shell], str(FLASH), *map(str, options)]


def flash(*options: object, shell: str = "dash", before: Sequence[str] = (), **environment: str) -> Flashed:
    """``before``: a command that runs it, e.g. setpriv."""
    done = subprocess.run(
        [*before, *command(*options, shell=shell)], capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )  # fmt: skip
    return Flashed(done.returncode, done.stdout, done.stderr)


def everything(folder: Path, times: bool = False) -> dict[str, tuple[object, ...]]:
    """Type, mode, owner and content of all that is in it, by path; with ``times`` also when it was written, and its inode."""
    return {str(path.relative_to(folder)): _about(path, times) for path in [folder, *sorted(folder.rglob("*"))]}


def _about(path: Path, times: bool) -> tuple[object, ...]:
    facts = path.lstat()
    content = ""
    if stat.S_ISLNK(facts.st_mode):
        content = str(path.readlink())
    elif stat.S_ISREG(facts.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    told = (oct(facts.st_mode), facts.st_uid, facts.st_gid, content)
    return (*told, facts.st_mtime_ns, facts.st_ino) if times else told


KINDS = {BOARD: "jalapeno", "gate": "raspberry_pi", "barn": "coral", "yard": "jetson"}
"""Boards that are enrolled in a workshop, and what they are."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """Boards that were enrolled, wheels, and a place for systems; every path has a space in it."""

    room: Path
    boards: Path
    wheels: Path

    def system(self, machine: str = "aarch64", python: str = "3.11") -> Path:
        """A new one."""
        return system(Path(tempfile.mkdtemp(prefix="system ", dir=self.room)) / "root", machine, python)

    def flash(
        self,
        target: Path,
        *more: object,
        shell: str = "dash",
        before: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        **options: object,
    ) -> Flashed:
        """``options``: instead of what they should be; one that is None is left out."""
        words = self.words(target, **options)
        return flash(*words, *more, shell=shell, before=before, **(variables or {}))

    def words(self, target: Path, **options: object) -> list[object]:
        usual = {"board": KINDS[BOARD], "enrolled": self.boards / BOARD, "rootfs": target, "wheels": self.wheels}
        chosen = {**usual, **options}
        return [word for name, value in chosen.items() if value is not None for word in (f"--{name.replace('_', '-')}", value)]


@contextmanager
def workshop() -> Iterator[Workshop]:
    needs_root()
    for name in SHELLS.values():
        needs_program(name[0], name[0])
    with tempfile.TemporaryDirectory(prefix="sly flash ", dir=in_memory()) as folder:
        room = Path(folder)
        yield Workshop(room, fleet(room / "fleet", KINDS) / "boards", wheelhouse(room / "wheels"))
