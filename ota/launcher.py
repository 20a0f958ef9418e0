"""What the service manager starts: picks the agent that runs, counts the start, and becomes it.

    python3 -I launcher.py --folder SLOTS --factory PYTHON -- agent --config FILE

Owns the record of the agent's slots (its bytes, and what a start does to it), the choice, and the guard of a trial.  Rules:

* The standard library only, in this one file: it may be copied to where no update reaches, and a Python of the system starts it.
* It is never updated over the air, so the record is a contract: fields are added, never changed, and unknown ones are kept.
* Two copies of the record alternate, each with a counter and a checksum; the newest whole one counts.  Without any, the factory's
  agent runs, and it is said.
* A start within a trial is durable before the agent runs; a start that cannot be counted is none of the trial's.
* What is started has shown first that its Python can import it; else the next best is: confirmed, previous, factory.
* A trial that is not confirmed in time is rolled back by a guard, a process apart, whatever the agent on trial does.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import NoReturn, Protocol

FORMAT = 1
FACTORY = ""
"""The folder of the environment that set-up made: it lies elsewhere, and no update touches it."""
FOLDER = re.compile(r"env-[0-9]{1,10}-[0-9a-f]{8}")
MANIFEST = re.compile(r"([0-9a-f]{64})?")
RECORDS = ("record-0.json", "record-1.json")
PART = ".part-record"
LOCK = "lock"
SLOTS_VARIABLE = "SLY_AGENT_SLOTS"
"""Tells an agent where the slots are that it was started from."""
MODULE = "edge_agent.cli"
PROBED = "edge_agent.agent"

MAX_RECORD_BYTES = 16_384
MAX_WHY_CHARS = 240
MAX_NUMBER = 2**31 - 1
MAX_BOOTS = 100
MAX_TRIAL_S = 7 * 86_400
PROBE_LIMIT_S = 60.0
LOCK_LIMIT_S = 10.0
LOCK_RETRY_S = 0.02
GRACE_S = 30.0
"""Between the guard's SIGTERM and its SIGKILL: longer than an agent drains."""
MISCONFIGURED = 2


def _must(holds: object, what: str) -> None:
    if not holds:
        raise ValueError(what)


class State(StrEnum):
    """Of the slot beside the confirmed one."""

    EMPTY = "empty"
    STAGING = "staging"
    """Being built: what is there may be torn."""
    READY = "ready"
    """Whole and durable; not to be started yet."""
    TRIAL = "trial"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment below the folder of the slots, or the factory's.

    ``number``, ``manifest``: the release (SHA-256 in hex) that it was built from; ``reads``: the newest schema of the ledger that
    its agent knows; ``needs``: the oldest that an agent must know to use a ledger which this one has written. 0: not known.
    """

    folder: str = FACTORY
    number: int = 0
    manifest: str = ""
    reads: int = 0
    needs: int = 0

    def __post_init__(self) -> None:
        _must(self.folder == FACTORY or FOLDER.fullmatch(self.folder), f"folder {self.folder!r}")
        _must(MANIFEST.fullmatch(self.manifest), f"manifest {self.manifest!r}")
        for name, value in (("number", self.number), ("reads", self.reads), ("needs", self.needs)):
            _must(type(value) is int and 0 <= value <= MAX_NUMBER, f"{name} {value!r}")

    def __str__(self) -> str:
        return f"release {self.number}" if self.folder else "the factory's agent"


@dataclass(frozen=True, slots=True)
class Record:
    """``candidate`` lies beside ``confirmed``, ``None`` while ``state`` is EMPTY; ``previous`` was confirmed before.

    ``boots`` of ``max_boots`` starts were made within this trial, each of which may last ``trial_s``; ``why``: what rolled the
    candidate back; ``needs``: the oldest schema that an agent must know to use the ledger, by what has ever been tried here.
    Raises ``ValueError`` for what is no record.
    """

    confirmed: Environment = Environment()
    previous: Environment | None = None
    candidate: Environment | None = None
    state: State = State.EMPTY
    boots: int = 0
    max_boots: int = 3
    trial_s: int = 1800
    why: str = ""
    needs: int = 0
    counter: int = 0
    unknown: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _must((self.candidate is None) == (self.state is State.EMPTY), f"{self.state.value} with candidate {self.candidate}")
        _must(self.candidate is None or self.candidate.folder != FACTORY, "the factory's agent as candidate")
        _must(self.candidate is None or self.candidate.folder != self.confirmed.folder, "one environment in two slots")
        _must(isinstance(self.why, str) and len(self.why) <= MAX_WHY_CHARS, "reason")
        for name, value, low, high in (
            ("boots", self.boots, 0, MAX_BOOTS), ("max_boots", self.max_boots, 1, MAX_BOOTS),
            ("trial_s", self.trial_s, 1, MAX_TRIAL_S), ("needs", self.needs, 0, MAX_NUMBER), ("counter", self.counter, 0, 2**62),
        ):  # fmt: skip
            _must(type(value) is int and low <= value <= high, f"{name} {value!r}")

    @property
    def folders(self) -> set[str]:
        """The environments that must stay."""
        return {each.folder for each in (self.confirmed, self.previous, self.candidate) if each and each.folder}

    def begun(self) -> Record:
        """After one more start: counted within a trial, which too many end."""
        if self.state is not State.TRIAL:
            return self
        if self.boots >= self.max_boots:
            return self.rolled_back(f"{self.boots} starts without confirmation")
        return replace(self, boots=self.boots + 1)

    def rolled_back(self, why: str) -> Record:
        return replace(self, state=State.ROLLED_BACK, why=why[:MAX_WHY_CHARS])

    def order(self) -> list[Environment]:
        """What to start, the best first; each once."""
        tried = self.candidate if self.state is State.TRIAL else None
        found = [each for each in (tried, self.confirmed, self.previous, Environment()) if each is not None]
        return [each for at, each in enumerate(found) if each.folder not in {one.folder for one in found[:at]}]


# the record's bytes

_ENVIRONMENTS = ("confirmed", "previous", "candidate")
_ENVIRONMENT_FIELDS = ("folder", "number", "manifest", "reads", "needs")
_FIELDS = ("state", "boots", "max_boots", "trial_s", "why", "needs", "counter")


def encode(record: Record) -> bytes:
    body: dict[str, object] = {**record.unknown, "format": FORMAT}
    body |= {name: getattr(record, name) for name in _FIELDS}
    for name in _ENVIRONMENTS:
        each: Environment | None = getattr(record, name)
        body[name] = each and {key: getattr(each, key) for key in _ENVIRONMENT_FIELDS}
    return json.dumps({"record": body, "sha256": _checksum(body)}, sort_keys=True).encode() + b"\n"


def decode(data: bytes) -> Record:
    """Raises ``ValueError`` for anything but a whole record of this format."""
    whole = json.loads(data)
    _must(isinstance(whole, dict) and isinstance(whole.get("record"), dict), "no record")
    body: dict[str, object] = whole["record"]
    _must(whole.get("sha256") == _checksum(body), "its checksum is wrong")
    _must(body.get("format") == FORMAT, f"format {body.get('format')!r}; allowed: {FORMAT}")
    missing = [name for name in (*_ENVIRONMENTS, *_FIELDS) if name not in body]
    _must(not missing, f"without {', '.join(missing)}")
    values: dict[str, object] = {name: body[name] for name in _FIELDS}
    values["state"] = State(str(body["state"]))
    environments = {name: _environment(body[name]) for name in _ENVIRONMENTS}
    _must(environments["confirmed"] is not None, "nothing confirmed")
    unknown = {name: value for name, value in body.items() if name not in (*_FIELDS, *_ENVIRONMENTS, "format")}
    return Record(**values, **environments, unknown=unknown)  # type: ignore[arg-type]


def _environment(value: object) -> Environment | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not set(_ENVIRONMENT_FIELDS) <= set(value):
        raise ValueError("no environment")
    _must(isinstance(value["folder"], str) and isinstance(value["manifest"], str), "environment")
    return Environment(**{name: value[name] for name in _ENVIRONMENT_FIELDS})


def _checksum(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# the record on the disk


class Disk(Protocol):
    """What is done to a disk here; ``edge_agent.store.files.Disk`` is one, and so is what tests cut the power of."""

    def create(self, path: Path) -> int: ...
    def open_read(self, path: Path) -> int: ...
    def read(self, fd: int, max_bytes: int) -> bytes: ...
    def write(self, fd: int, data: bytes) -> None: ...
    def fsync(self, fd: int) -> None: ...
    def close(self, fd: int) -> None: ...
    def rename(self, source: Path, target: Path) -> None: ...
    def unlink(self, path: Path) -> None: ...
    def fsync_folder(self, folder: Path) -> None: ...


class SystemDisk:
    """The real disk, over ``os``."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def open_read(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    def read(self, fd: int, max_bytes: int) -> bytes:
        return os.read(fd, max_bytes)

    def write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def fsync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def read_record(disk: Disk, folder: Path) -> tuple[Record, str]:
    """The newest whole copy, and what is wrong with the others ("": nothing). The factory's, where there is none."""
    found: list[Record] = []
    complaints = []
    for name in RECORDS:
        try:
            found.append(decode(_read(disk, folder / name)))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            complaints.append(f"{name}: {error}")
    if complaints and not found:
        complaints.append("no record is whole: the factory's agent counts as confirmed")
    return max(found, key=lambda each: each.counter, default=Record()), "; ".join(complaints)


def write_record(disk: Disk, folder: Path, record: Record) -> Record:
    """Make ``record`` durable over the older copy, all or nothing; as it was written. Raises ``OSError``."""
    counted = replace(record, counter=record.counter + 1)
    part = folder / PART
    with suppress(FileNotFoundError):
        disk.unlink(part)
    fd = disk.create(part)
    try:
        disk.write(fd, encode(counted))
        disk.fsync(fd)
    finally:
        disk.close(fd)
    disk.rename(part, folder / RECORDS[counted.counter % 2])
    disk.fsync_folder(folder)
    return counted


def _read(disk: Disk, path: Path) -> bytes:
    fd = disk.open_read(path)
    try:
        parts = []
        while part := disk.read(fd, MAX_RECORD_BYTES + 1):
            parts.append(part)
            _must(sum(map(len, parts)) <= MAX_RECORD_BYTES, f"more than {MAX_RECORD_BYTES} bytes")
        return b"".join(parts)
    finally:
        disk.close(fd)


@contextmanager
def locked(folder: Path, limit_s: float = LOCK_LIMIT_S) -> Iterator[None]:
    """Nobody else changes the record meanwhile. Raises ``OSError``, ``TimeoutError`` after ``limit_s``."""
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        until_s = time.monotonic() + limit_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise TimeoutError(f"{folder / LOCK} is held by another process") from None
                time.sleep(LOCK_RETRY_S)
        yield
    finally:
        os.close(fd)


# a start


@dataclass(frozen=True, slots=True)
class Start:
    """``python``: of the agent that is to run; ``guarded``: it is on trial; ``said``: what a person should know."""

    environment: Environment
    python: Path
    guarded: bool
    said: tuple[str, ...]


class Launcher:
    """Decides one start. ``factory``: the Python of the environment that set-up made."""

    def __init__(self, folder: Path, factory: Path, probed: str = PROBED, disk: Disk | None = None) -> None:
        self._folder, self._factory, self._probed = folder, factory, probed
        self._disk = disk or SystemDisk()
        self._said: list[str] = []

    def decide(self) -> Start | None:
        """Count this start and find who can run; ``None`` (and ``said``) if nobody can."""
        self._said = []
        record = self._counted()
        existing: list[Environment] = []
        for each in record.order():
            python = self._python(each)
            why = why_not(python, self._probed)
            if not why:
                return self._start(record, each)
            self._said.append(f"{each} cannot run: {why}")
            if record.state is State.TRIAL and each == record.candidate:
                record = self._changed(partial(Record.rolled_back, why=why))
            elif os.access(python, os.X_OK):
                existing.append(each)
        return self._start(record, existing[0]) if existing else None

    @property
    def said(self) -> tuple[str, ...]:
        return tuple(self._said)

    def _start(self, record: Record, chosen: Environment) -> Start:
        guarded = record.state is State.TRIAL and chosen == record.candidate
        return Start(chosen, self._python(chosen), guarded, self.said)

    def _counted(self) -> Record:
        with suppress(OSError):
            self._folder.mkdir(0o700, parents=True, exist_ok=True)
        complaint = read_record(self._disk, self._folder)[1]
        if complaint:
            self._said.append(complaint)
        return self._changed(Record.begun)

    def _changed(self, change: Callable[[Record], Record]) -> Record:
        """The record after ``change``. Where that cannot be kept, one in which nothing is on trial: a start that is not
        counted could be repeated for ever."""
        record, _ = read_record(self._disk, self._folder)
        if change(record) == record:
            return record
        try:
            with locked(self._folder):
                record, _ = read_record(self._disk, self._folder)
                return write_record(self._disk, self._folder, change(record))
        except OSError as error:
            self._said.append(f"the start cannot be counted, so nothing is tried: {error}")
            return record.rolled_back(str(error)) if record.state is State.TRIAL else record

    def _python(self, environment: Environment) -> Path:
        return self._folder / environment.folder / "bin" / "python" if environment.folder else self._factory


def why_not(python: Path, module: str, limit_s: float = PROBE_LIMIT_S) -> str:
    """Why ``python`` cannot run ``module``, found by letting it import it; "" if it can.

    After an upgrade of the distribution an environment's Python may be gone, or be another that does not see its packages.
    """
    command = [str(python), "-I", "-c", f"import {module}"]
    try:
        done = subprocess.run(command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"{python} did not import {module} within {limit_s:g} s"
    except OSError as error:
        return f"{python}: {error.strerror or error}"
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    words = lines[-1] if lines else f"code {done.returncode}"
    return f"{python}: {words}"[:MAX_WHY_CHARS]


# the guard of a trial


def guard(folder: Path, environment: Environment, limit_s: float, grace_s: float = GRACE_S) -> None:
    """Fork a process that ends this one, and rolls its trial back, unless it is confirmed within ``limit_s``.

    It is no child of this process (which will be the agent, and knows nothing of it), and ends when this one does.
    """
    watched = os.pidfd_open(os.getpid())
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(watched)
        return
    try:
        if not os.fork():
            _watch(watched, folder, environment, limit_s, grace_s)
    finally:
        os._exit(0)


def _watch(watched: int, folder: Path, environment: Environment, limit_s: float, grace_s: float) -> None:
    if _ended(watched, limit_s) or not _late(folder, environment, limit_s):
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(watched, number)
        if _ended(watched, grace_s):
            return


def _late(folder: Path, environment: Environment, limit_s: float) -> bool:
    """Whether it is on trial still; it is not afterwards. What cannot be kept is left to the count of starts."""
    disk = SystemDisk()
    try:
        with locked(folder):
            record, _ = read_record(disk, folder)
            if record.state is not State.TRIAL or record.candidate != environment:
                return False
            _say(f"{environment} was not confirmed within {limit_s:g} s: it is ended and rolled back")
            write_record(disk, folder, record.rolled_back(f"not confirmed within {limit_s:g} s"))
    except OSError as error:
        _say(f"the roll back of {environment} cannot be kept: {error}")
    return True


def _ended(watched: int, limit_s: float) -> bool:
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    return bool(poll.poll(int(limit_s * 1000)))


# the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Become the agent. Returns, with 2, only when no agent could be started."""
    args = _parser().parse_args(arguments)
    launcher = Launcher(args.folder, args.factory, args.probe)
    start = launcher.decide()
    for line in launcher.said:
        _say(line)
    if start is None:
        _say("no agent can be started here; install one with flash.sh, or name its Python with --factory")
        return MISCONFIGURED
    if start.environment.folder:
        _say(f"starting {start.environment}{', on trial' if start.guarded else ''}")
    return _become(start, args.folder, args.module, args.words)


def _become(start: Start, folder: Path, module: str, words: Sequence[str]) -> NoReturn:
    if start.guarded:
        record, _ = read_record(SystemDisk(), folder)
        guard(folder, start.environment, record.trial_s)
    words = words[1:] if words[:1] == ["--"] else words
    command = [str(start.python), "-I", "-m", module, *words]
    sys.stderr.flush()
    os.execve(start.python, command, {**os.environ, SLOTS_VARIABLE: str(folder)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launcher", description="Start the agent that is confirmed, or on trial.")
    parser.add_argument("--folder", type=_absolute, required=True, help="where the agent's slots are")
    parser.add_argument("--factory", type=_absolute, default=Path(sys.executable), help="the Python that set-up gave the agent")
    parser.add_argument("--module", default=MODULE, help="what is run (default: %(default)s)")
    parser.add_argument("--probe", default=PROBED, help="what must be importable before (default: %(default)s)")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="for the agent: agent --config FILE")
    return parser


def _absolute(text: str) -> Path:
    """Without following links: the Python of a virtual environment is one."""
    return Path(os.path.abspath(text))  # noqa: PTH100


def _say(text: str) -> None:
    print(f"sly launcher: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
