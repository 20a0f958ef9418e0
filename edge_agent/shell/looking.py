"""What a board's self-test sees of the machine: its clock, disk, keys, certificate and user.

Rules: everything is read, nothing is made or changed (but ``takes_a_write``, which cleans up after itself), so that anybody may
look beside an agent that runs; below an injected root where it is the system's; what cannot be read is a reason where it can be.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import stat
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from board_support.sysfs import Absent, Tree
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import RefusedError, SlyError
from edge_agent.shell.state_disk import LEDGER_NAME
from edge_agent.store.database import RESERVE_BYTES, WAL_LIMIT_BYTES
from edge_agent.store.files import PART_PREFIX
from edge_agent.store.identity import SEED_BYTES
from edge_agent.transport.certificate import MAX_PEM_BYTES, Validity, validity

WRITTEN_AFTER_S = 1_795_392_000
"""2026-11-23: this file was not written before."""
AGENT_ENVIRONMENT_BYTES = 300 * 2**20
"""What one release of the agent takes: measured on x86-64, 213 MiB unpacked beside 55 MiB of wheels."""
ENVIRONMENTS = 2
"""The one that is confirmed lies there already; a new one, and the one before it, come beside it."""
MAX_TIMESTAMP_BYTES = 64 * 2**10
WRITTEN_BYTES = 64 * 2**10
SYNCHRONISED_FILE = "run/systemd/timesync/synchronized"
_STA_UNSYNC = 0x0040
_TIMEX_BYTES = 256
_STATUS_AT = 8 + 4 * struct.calcsize("l")
"""Of ``struct timex`` (adjtimex(2)): ``status`` follows ``modes``, padded, and four longs."""
_CAPABILITIES = re.compile(r"^CapEff:\s*([0-9a-f]{1,16})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Floor:
    """A time that has passed for sure, in seconds since 1970, and how that is known."""

    time_s: int
    why: str


@dataclass(frozen=True, slots=True)
class Room:
    """Of the file system of ``folder``; ``needed_bytes``: what updates may take at most, and ``about`` what that is."""

    folder: Path
    free_bytes: int
    reserve_bytes: int
    needed_bytes: int
    about: str


@dataclass(frozen=True, slots=True)
class KeyFile:
    """``why``: what is wrong with it, empty if nothing is; ``expected``: that it is so before the first start."""

    path: Path
    why: str = ""
    remedy: str = ""
    expected: bool = False


@dataclass(frozen=True, slots=True)
class User:
    """``why``: the capabilities cannot be read."""

    uid: int
    capabilities: int
    why: str = ""


def clock_floor(config: AgentConfig) -> Floor:
    """The latest of: this code was written, the fleet made this board's certificate, its publisher signed what is kept here."""
    floors = [Floor(WRITTEN_AFTER_S, "this agent is younger")]
    found = certificate(config)
    if isinstance(found, Validity):
        floors.append(Floor(found.not_before_s, "this board's certificate was made then"))
    floors.append(Floor(_signed_s(config.state.folder / "ota" / "metadata" / "timestamp.json"), "its fleet signed updates then"))
    return max(floors, key=lambda floor: floor.time_s)


def synchronised(tree: Tree) -> bool | None:
    """Whether the time service has set the clock since the start; ``None`` if nobody can be asked."""
    if tree.is_file(SYNCHRONISED_FILE):
        return True
    if not tree.is_this_machine:
        return None
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    except (OSError, AttributeError):
        return None
    if state < 0:
        return None
    return not struct.unpack_from("i", timex.raw, _STATUS_AT)[0] & _STA_UNSYNC


def room(config: AgentConfig, updates_itself: bool) -> Room:
    """``updates_itself``: environments of the agent are made beside this one. Raises ``OSError``."""
    folder = config.state.folder
    facts = os.statvfs(folder)
    cached = _size_bytes(folder / "models")
    reserve = WAL_LIMIT_BYTES + RESERVE_BYTES
    cache = max(0, config.state.cache_bytes - cached) if config.ota.root else 0
    agents = ENVIRONMENTS * AGENT_ENVIRONMENT_BYTES if updates_itself else 0
    parts = [f"model cache {cache // 2**20}"] * bool(cache) + [f"agents {agents // 2**20}"] * bool(agents)
    about = ", ".join([*parts, f"ledger {reserve // 2**20}"])
    return Room(folder, facts.f_bavail * facts.f_frsize, reserve, reserve + cache + agents, about)


def takes_a_write(folder: Path) -> str:
    """Why ``folder`` does not keep what is written to it; empty if it does. The file has a name of its own."""
    try:
        with tempfile.NamedTemporaryFile(prefix=f"{PART_PREFIX}self-test-", dir=folder) as file:
            file.write(bytes(WRITTEN_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    return ""


def key_files(config: AgentConfig) -> list[KeyFile]:
    """The board's identity key, and the key of its client certificate where one is configured."""
    files = [_key_file(config, config.state.folder / "identity.key", identity=True)]
    if config.broker.key_file:
        files.append(_key_file(config, Path(config.broker.key_file)))
    return files


def certificate(config: AgentConfig) -> Validity | str:
    """From when until when the client certificate is good, or why that cannot be read; "" where none is configured."""
    if not config.broker.certificate_file:
        return ""
    try:
        return validity(_bounded(Path(config.broker.certificate_file), MAX_PEM_BYTES))
    except OSError as error:
        return error.strerror or str(error)
    except RefusedError as error:
        return str(error)


def user(tree: Tree) -> User:
    """Who runs this, and what it may besides what everybody may."""
    status = tree.text("proc/self/status")
    if isinstance(status, Absent):
        return User(os.geteuid(), 0, status.reason)
    found = _CAPABILITIES.search(status)
    return User(os.geteuid(), int(found[1], 16)) if found else User(os.geteuid(), 0, "/proc/self/status: no CapEff")


def _key_file(config: AgentConfig, path: Path, identity: bool = False) -> KeyFile:
    """A client key may also be root's, for the agent's group to read."""
    folder = config.state.folder
    again = "enroll this board anew, for the key is lost: sly fleet enroll BOARD --again"
    try:
        facts, owner = path.stat(), folder.stat().st_uid
    except FileNotFoundError:
        if identity and not (folder / LEDGER_NAME).exists():
            return KeyFile(path, "it is not there yet", "start the agent, or bring what sly fleet enroll wrote", expected=True)
        return KeyFile(path, "it is not there", again)
    except OSError as error:
        return KeyFile(path, error.strerror or str(error), f"run as the user that owns {folder}")
    mode = stat.S_IMODE(facts.st_mode)
    if not stat.S_ISREG(facts.st_mode) or not facts.st_size or (identity and facts.st_size != SEED_BYTES):
        return KeyFile(path, f"no key: {facts.st_size} bytes", again)
    if facts.st_uid != owner and (identity or facts.st_uid):
        return KeyFile(path, f"of user {facts.st_uid}, the state folder is of {owner}", f"run: chown {owner} {path}")
    if mode & (0o077 if identity or facts.st_uid else 0o027):
        return KeyFile(path, f"mode {mode:04o}: others may use it", f"run: chmod 600 {path}; if others were here, enroll anew")
    return KeyFile(path)


def _signed_s(path: Path) -> int:
    """When the publisher signed the update metadata that this board verified and keeps; 0 if that is not told."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, SlyError):
        said = json.loads(_bounded(path, MAX_TIMESTAMP_BYTES))["signed"]["sly_signed_at"]
        return said if type(said) is int and 0 < said < 2**33 else 0
    return 0


def _bounded(path: Path, most_bytes: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise RefusedError(str(path), f"more than {most_bytes} bytes", f"at most {most_bytes}")
    return data


def _size_bytes(folder: Path) -> int:
    """Of the files right in it; 0 where it is not there."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    except OSError:
        return 0
