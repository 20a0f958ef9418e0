"""A board joins the fleet: its keys, its certificate, its configuration, its place in the charter.

Owns ``Enrolment`` and what lies in a board's folder, which is copied as it is into the state folder of the board.  Rules: the
board is in the charter when everything else is on disk; a board that is there is not enrolled again unless it is to be replaced;
what is secret is 0600 in a folder of 0700; nothing here needs the broker.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from board_support.device_root import DeviceRoot
from board_support.registry import board_classes
from edge_agent.attest.keys import kind_of_key
from edge_agent.attest.words import MAX_WORD_REASON_CHARS
from edge_agent.core.config import AgentConfig
from edge_agent.core.cose import Signer, check_public_key
from edge_agent.core.errors import ConfigError, RefusedError
from edge_agent.core.values import BOARD_ID, checked
from edge_agent.steward.folder import OperatorFolder
from edge_agent.steward.mosquitto import BROKER_CA
from edge_agent.store.files import Disk, reaching, write_atomically
from edge_agent.store.identity import load_or_make_seed
from ota.charter import Charter, Enrolled

AUTO = "auto"
AGENT_FILE, IDENTITY_KEY, DEVICE_ROOT_KEY, ROOT_FILE = "agent.toml", "identity.key", "device_root.key", "root.json"
CLIENT_CERTIFICATE, CLIENT_KEY = "client.pem", "client.key"
STATE = Path("/var/lib/sly")
PUBLIC_FILE = 0o644


@dataclass(frozen=True, slots=True)
class Enrolment:
    """A board to be enrolled.

    ``state``: the folder on the board that the files will lie in; ``public_key`` and ``endorser``: of a board that made its own
    keys, 32 bytes and a TPM's point or an emulated root's key, else empty; ``serve``, ``models``, ``profile``: as in its
    configuration.
    """

    board: str
    backend: str = AUTO
    groups: tuple[str, ...] = ()
    state: Path = STATE
    public_key: bytes = b""
    endorser: bytes = b""
    serve: tuple[str, ...] = ()
    models: str = ""
    profile: str = ""

    def __post_init__(self) -> None:
        checked(BOARD_ID, "board", self.board)
        backends = [AUTO, *sorted(kind.backend for kind in board_classes())]
        if self.backend not in backends:
            raise ConfigError("--backend", self.backend, ", ".join(backends))
        for group in self.groups:
            checked_group(group)
        if not self.state.is_absolute():
            raise ConfigError("--state", str(self.state), "an absolute path on the board")
        if self.public_key:
            check_public_key(self.public_key)
        if self.endorser:
            kind_of_key(self.endorser)

    @property
    def emulated(self) -> bool:
        return self.backend in {kind.backend for kind in board_classes() if kind.emulated}


def checked_group(group: str) -> str:
    """Raises ``ConfigError`` for a name that is no group's; ``all`` is every board and is given to none."""
    checked(BOARD_ID, "group", group)
    if group == "all":
        raise ConfigError("group", group, "another name: every board is in it anyway")
    return group


def enroll(folder: OperatorFolder, wanted: Enrolment, out: Path | None = None, again: bool = False) -> Charter:
    """Make what the board needs in ``out`` (by default in the operator's folder) and put it into the charter, which is returned.

    ``again``: new keys for a board that is enrolled; its old certificates are taken back.

    Raises ``RefusedError`` for a board that is there already, or that has an operator's name.
    """
    charter, disk = folder.charter, Disk()
    _must_be_new(charter, wanted.board, again)
    check_agent_toml(agent_toml(folder, wanted, charter))
    target = (out or folder.board_folder(wanted.board)).absolute()
    with reaching(target):
        disk.make_folder(target)
        target.chmod(0o700)
    if again:
        for name in (IDENTITY_KEY, DEVICE_ROOT_KEY):
            with reaching(target):
                (target / name).unlink(missing_ok=True)
    enrolled = _enrolled(wanted, target, disk)
    after = replace(charter, boards={**charter.boards, wanted.board: enrolled})
    text = agent_toml(folder, wanted, after)
    issued = folder.authority.issue_client(wanted.board)
    if again:
        folder.authority.revoke(wanted.board, besides=[issued.certificate])
    files = {
        CLIENT_KEY: (issued.key, 0o600),
        CLIENT_CERTIFICATE: (issued.certificate, PUBLIC_FILE),
        BROKER_CA: (folder.authority.certificate_pem, PUBLIC_FILE),
        ROOT_FILE: (folder.repository.root(), PUBLIC_FILE),
        AGENT_FILE: (text.encode(), 0o600),
    }
    for name, (data, mode) in files.items():
        write_atomically(disk, target / name, data, mode)
    return folder.put_charter(after)


def change_groups(charter: Charter, board: str, add: Iterable[str] = (), remove: Iterable[str] = ()) -> Charter:
    """The charter with another list of groups for one board. Raises ``RefusedError`` for a group that it is not in."""
    held = known(charter, board)
    gone = set(remove)
    if strange := sorted(gone - set(held.groups)):
        raise RefusedError(f"groups of {board}", strange[0], ", ".join(held.groups) or "none: it is in no group")
    groups = tuple(sorted((set(held.groups) | {checked_group(each) for each in add}) - gone))
    return replace(charter, boards={**charter.boards, board: replace(held, groups=groups)})


def revoke(folder: OperatorFolder, board: str, reason: str) -> Charter:
    """Put a board out of the fleet: charter, certificates, access list. Raises ``RefusedError`` for one that is out."""
    charter = folder.charter
    held = known(charter, board)
    if not reason:
        raise ConfigError("--reason", "nothing", "why, for whoever asks later")
    if held.revoked:
        raise RefusedError(f"board {board}", f"revoked: {held.revoked}", "a board that is not revoked yet")
    folder.authority.revoke(board)
    return folder.put_charter(replace(charter, boards={**charter.boards, board: replace(held, revoked=reason)}))


def check_reason(reason: str, most: int = MAX_WORD_REASON_CHARS) -> str:
    """Raises ``ConfigError`` for a reason that a word, a charter or, with its ``most`` characters, a rollout cannot hold."""
    if len(reason) > most or not reason.isprintable():
        raise ConfigError("--reason", reason, f"at most {most} printable characters on one line")
    return reason


def known(charter: Charter, board: str) -> Enrolled:
    """Raises ``RefusedError`` naming the boards that there are."""
    if board not in charter.boards:
        there = ", ".join(sorted(charter.boards)) or "none yet: see sly fleet enroll"
        raise RefusedError(f"board of fleet {charter.fleet}", board, there)
    return charter.boards[board]


def agent_toml(folder: OperatorFolder, wanted: Enrolment, charter: Charter) -> str:
    """The board's configuration, with the members of ``charter``; those who come later it hears of by the charter."""
    settings, state = folder.settings, wanted.state
    members = {board: key.hex() for board, key in charter.members.items()}
    endorsers = {board: e.endorser.hex() for board, e in charter.boards.items() if e.endorser and not e.revoked}
    sections: dict[str, Mapping[str, object]] = {
        "board": {"id": wanted.board, "backend": wanted.backend} | ({"profile": wanted.profile} if wanted.profile else {}),
        "state": {"folder": str(state)},
        "broker": {
            "host": settings.host, "port": settings.port, "ca_file": str(state / BROKER_CA),
            "certificate_file": str(state / CLIENT_CERTIFICATE), "key_file": str(state / CLIENT_KEY),
        },
        "models": {"serve": list(wanted.serve), "folder": wanted.models},
        "ota": {"root": str(state / ROOT_FILE)},
        "fleet": {"name": settings.name},
        "fleet.members": members,
        "fleet.operators": {name: key.hex() for name, key in charter.operators.items()},
        "fleet.endorsers": endorsers,
    }  # fmt: skip
    head = f"# {wanted.board} of the fleet {settings.name}, written by: sly fleet enroll. Every setting: sly settings\n"
    return f"{head}\n" + "\n".join(_section(name, entries) for name, entries in sections.items() if entries)


def check_agent_toml(text: str) -> AgentConfig:
    """What an agent makes of it. Raises ``ConfigError`` naming the setting."""
    try:
        return AgentConfig.from_mapping(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(AGENT_FILE, str(error), "printable text in every setting") from error


def _must_be_new(charter: Charter, board: str, again: bool) -> None:
    if board in charter.operators:
        raise RefusedError(f"board {board}", "an operator's name", "a name that no operator has")
    if board in charter.boards and not again:
        remedy = "take another name, or give it new keys: --again"
        raise RefusedError(f"board {board}", f"enrolled in the fleet {charter.fleet} already", "a new board", remedy)


def _enrolled(wanted: Enrolment, target: Path, disk: Disk) -> Enrolled:
    key, endorser = wanted.public_key, wanted.endorser
    if not key:
        key = Signer(wanted.board.encode(), load_or_make_seed(target / IDENTITY_KEY, disk)).public_key
    if not endorser and wanted.emulated and not wanted.public_key:
        endorser = DeviceRoot(load_or_make_seed(target / DEVICE_ROOT_KEY, disk)).public_key
    backend = "" if wanted.backend == AUTO else wanted.backend
    return Enrolled(key, backend, tuple(sorted(set(wanted.groups))), endorser)


def _section(name: str, entries: Mapping[str, object]) -> str:
    """TOML's basic strings, whole numbers and lists of them are written as JSON has them."""
    lines = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items())
    return f"[{name}]\n{lines}"
