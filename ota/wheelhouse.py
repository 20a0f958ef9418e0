"""An agent's release: wheels and one sheet of facts, and the virtual environment that is built from them without a network.

Owns ``FACTS`` (what a release says of itself besides its wheels) and the build.  Rules: what is installed are copies whose
SHA-256 was checked while they were made; nothing comes from an index, a cache or a configuration of pip, and no wheel brings
another; what was built has imported the agent, and is durable, before it is called whole; children build it, at low priority.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.printable import on_one_line
from edge_agent.core.values import bounded
from edge_agent.store.files import READ_CHUNK_BYTES, Disk, fsync_file, reaching, read_bounded
from ota.launcher import PROBED
from ota.manifest import Kind, Release, ReleasedFile

FACTS = "wheelhouse.json"
WHEEL_SUFFIX = ".whl"
WHEELS_FOLDER = ".wheels"
MAX_FACTS_BYTES = 16_384
MAX_SCHEMA = 2**15
MAX_OUTPUT_BYTES = 256 * 2**10
MAX_WORDS_CHARS = 300
BUILD_LIMIT_S = 3600.0
"""A Raspberry Pi on a slow card unpacks and compiles for minutes."""
NICE = 10

Progress = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""


def silent(what: str, done: int, whole: int) -> None:
    """Progress that nobody asked for."""


@dataclass(frozen=True, slots=True)
class Facts:
    """``python`` ("3.11") and ``machine`` ("aarch64"): what the wheels were chosen for; ``probe``: the module that must be
    importable; ``reads``, ``needs``: of the ledger, see ``ota.launcher.Environment``."""

    agent: str
    python: str
    machine: str
    reads: int
    needs: int
    probe: str = PROBED

    def __post_init__(self) -> None:
        for name in ("agent", "python", "machine", "probe"):
            value = getattr(self, name)
            if not isinstance(value, str) or not 0 < len(value) <= 100 or not value.isprintable():
                raise RefusedError(f"{FACTS}: {name}", value, "a short text")
        if not all(part.isidentifier() for part in self.probe.split(".")):
            raise RefusedError(f"{FACTS}: probe", self.probe, "the name of a module")
        for name, value in (("reads", self.reads), ("needs", self.needs)):
            if type(value) is not int:
                raise RefusedError(f"{FACTS}: {name}", value, "a number")
            bounded(f"{FACTS}: {name}", value, 1, MAX_SCHEMA)
        if self.needs > self.reads:
            raise RefusedError(f"{FACTS}: needs", self.needs, f"at most what it reads, {self.reads}")

    def check_platform(self) -> None:
        """Raises ``RefusedError`` if the wheels are for another Python or machine than this."""
        here = (".".join(platform.python_version_tuple()[:2]), platform.machine())
        if (self.python, self.machine) != here:
            got = f"wheels for Python {self.python} on {self.machine}"
            remedy = "pack one for it: sly ota pack-agent --python ... --machine ..."
            raise RefusedError(self.agent, got, f"for Python {here[0]} on {here[1]}, which this board has", remedy)


def encode_facts(facts: Facts) -> bytes:
    return json.dumps({name: getattr(facts, name) for name in Facts.__slots__}, indent=2).encode() + b"\n"


def decode_facts(data: bytes) -> Facts:
    """Raises ``RefusedError`` for anything else. Unknown names are passed over: an older agent takes a newer release."""
    bounded(f"{FACTS}, length", len(data), 1, MAX_FACTS_BYTES, "bytes")
    try:
        told = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RefusedError(FACTS, str(error), "JSON, as sly ota pack-agent writes it") from error
    missing = [name for name in Facts.__slots__ if not isinstance(told, dict) or name not in told]
    if missing:
        raise RefusedError(FACTS, f"without {', '.join(missing)}", "JSON, as sly ota pack-agent writes it")
    return Facts(**{name: told[name] for name in Facts.__slots__})


def facts_of(release: Release, files: Mapping[str, Path]) -> Facts:
    """What an agent's release says of itself; ``files``: where each of its files lies.

    Raises ``RefusedError`` for a release of a model, files that are not the release's, or facts that are not what was signed.
    """
    if release.kind is not Kind.AGENT:
        raise RefusedError(f"release {release.number} of {release.model}", release.kind.value, "an agent's")
    named = {each.name: each for each in release.files}
    if set(named) != set(files):
        odd = ", ".join(sorted(set(named) ^ set(files)))
        raise RefusedError(f"files of agent release {release.number}", f"one side only has {odd}"[:200], "those of the release")
    strange = [name for name in named if name != FACTS and not name.endswith(WHEEL_SUFFIX)]
    if strange or FACTS not in named:
        got = ", ".join(strange)[:200] or f"no {FACTS}"
        raise RefusedError(f"files of agent release {release.number}", got, f"wheels and {FACTS}")
    data = read_bounded(Disk(), files[FACTS], MAX_FACTS_BYTES)
    _check(named[FACTS], len(data), hashlib.sha256(data).digest())
    return decode_facts(data)


async def build(
    target: Path, release: Release, wheels: Mapping[str, Path], python: str, disk: Disk, progress: Progress = silent
) -> None:
    """Make the virtual environment ``target``, a folder that must not exist, of exactly the wheels of ``release``.

    ``python``: what makes it; it must have pip. Raises ``RefusedError`` for a file that is not the release's, or wheels that
    do not make a whole agent here; ``UnavailableError`` for a full disk or a build that did not end within ``BUILD_LIMIT_S``.
    """
    facts = facts_of(release, wheels)
    subject = f"agent release {release.number}"
    try:
        async with asyncio.timeout(BUILD_LIMIT_S):
            progress("environment", 0, 1)
            await _child(subject, [python, "-I", "-m", "venv", "--without-pip", str(target)])
            copies = await asyncio.to_thread(_copies, target / WHEELS_FOLDER, release, wheels, progress)
            progress("unpacking", 0, 1)
            await _pip(subject, python, target, "install", *_HERMETIC, *map(str, copies))
            await _pip(subject, python, target, "check")
            progress("trying it", 0, 1)
            await _child(subject, [str(target / "bin" / "python"), "-I", "-c", f"import {facts.probe}"])
            await asyncio.to_thread(_settle, target, disk, progress)
    except TimeoutError as error:
        raise UnavailableError(
            subject, f"it was not built within {BUILD_LIMIT_S:g} s", "is the disk failing? see dmesg"
        ) from error


_HERMETIC = ("--no-index", "--no-deps", "--no-cache-dir", "--no-warn-script-location", "--root-user-action=ignore", "--quiet")


def _copies(folder: Path, release: Release, wheels: Mapping[str, Path], progress: Progress) -> list[Path]:
    """The wheels under their own names; what is checked is what is copied."""
    folder.mkdir(0o700)
    done, copies = 0, []
    for each in release.files:
        if each.name != FACTS:
            copies.append(folder / each.name)
            with reaching(each.name):
                _copy(each, wheels[each.name], copies[-1])
        done += each.size_bytes
        progress("checking wheels", done, release.size_bytes)
    return copies


def _copy(file: ReleasedFile, source: Path, target: Path) -> None:
    digest, size_bytes = hashlib.sha256(), 0
    with source.open("rb") as read, target.open("xb") as written:
        while part := read.read(READ_CHUNK_BYTES):
            size_bytes += len(part)
            digest.update(part)
            written.write(part)
    _check(file, size_bytes, digest.digest())


def _check(file: ReleasedFile, size_bytes: int, digest: bytes) -> None:
    if (size_bytes, digest) != (file.size_bytes, file.digest):
        got = f"{size_bytes} bytes, SHA-256 {digest.hex()[:16]}..."
        raise RefusedError(file.name, got, f"{file.size_bytes} bytes, {file.digest.hex()[:16]}...", "fetch the release again")


async def _pip(subject: str, python: str, target: Path, *words: str) -> None:
    await _child(subject, [python, "-I", "-m", "pip", "--python", str(target / "bin" / "python"), *words])


async def _child(subject: str, command: list[str]) -> None:
    """Run ``command`` to its end, in a session of its own so that all of it is ended with this task."""
    environment = {
        "PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent", "LANG": "C.UTF-8",
        "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1",
    }  # fmt: skip
    with reaching(command[0]):
        child = await asyncio.create_subprocess_exec(
            *_nice(), *command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=environment, cwd="/", start_new_session=True
        )
    try:
        said = await _output(child)
        code = await child.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()
    if code:
        raise _failure(subject, command, code, said)


def _nice() -> list[str]:
    path = shutil.which("nice")
    return [path, "-n", str(NICE)] if path else []


async def _output(child: asyncio.subprocess.Process) -> str:
    assert child.stdout is not None
    said = b""
    while part := await child.stdout.read(READ_CHUNK_BYTES):
        said = (said + part)[-MAX_OUTPUT_BYTES:]
    return said.decode("utf-8", "replace")


def _failure(subject: str, command: list[str], code: int, said: str) -> Exception:
    """A full or failing disk may be better later; what pip or the agent does not want will not."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("ERROR")] or lines
    words = on_one_line(telling[-1] if telling else f"code {code}")[:MAX_WORDS_CHARS]
    for error in ("No space left on device", "Input/output error", "Read-only file system", "Disk quota exceeded"):
        if error in said:
            return UnavailableError(subject, words, "see to the disk; the agent that runs is unchanged")
    if code < 0:
        return UnavailableError(subject, f"its build was ended by {signal.Signals(-code).name}", "it is tried again")
    step = "pip" if "pip" in command else "venv" if "venv" in command else "the new agent"
    return RefusedError(subject, f"{step}: {words}", "wheels that make a whole agent on this board")


def _settle(target: Path, disk: Disk, progress: Progress) -> None:
    """Take the copies away, then make every file and folder durable, and the name of the whole at last."""
    with reaching(target):
        shutil.rmtree(target / WHEELS_FOLDER)
        os.sync()
        folders = [(Path(folder), files) for folder, _, files in os.walk(target)]
        for done, (folder, files) in enumerate(folders):
            for name in files:
                if not (folder / name).is_symlink():
                    fsync_file(disk, folder / name)
            disk.fsync_folder(folder)
            progress("making it durable", done + 1, len(folders))
        disk.fsync_folder(target.parent)


def wheelhouse_files(folder: Path) -> dict[str, Path]:
    """The files of a packed agent, by name, as a release takes them. Raises ``RefusedError`` if it is none."""
    with reaching(folder):
        found = {path.name: path for path in sorted(folder.iterdir()) if path.name == FACTS or path.suffix == WHEEL_SUFFIX}
    if FACTS not in found or len(found) < 2:
        raise RefusedError(str(folder), f"{len(found)} files", f"wheels and {FACTS}", "pack one: sly ota pack-agent")
    decode_facts(read_bounded(Disk(), found[FACTS], MAX_FACTS_BYTES))
    return found
