"""The operator's folder: who the fleet is, and every key that it rests on.

Owns the layout of DIR and ``OperatorFolder``::

    fleet.toml              the fleet's name, its broker, its operator
    operator.key            what rollouts and words on boards are signed with
    operator.pem            its client certificate at the broker, with operator-tls.key
    repository/             the TUF repository: metadata, targets, keys (the root's belong offline: take them out)
    ca/                     the certificate authority
    broker/                 all that Mosquitto needs: its configuration, access list and certificate
    boards/BOARD/           what enrolment made for a board: secret, for its card only
    words/BOARD             what the operator said last of a board, as it was signed

Rules: folders are 0700 and keys 0600; a folder that holds anything is not taken for a new fleet; what the fleet trusts is the
charter in the repository, and the access list is written from that; what the broker lost is said again from here.
"""

from __future__ import annotations

import getpass
import json
import os
import signal
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from edge_agent.attest.words import Action, OperatorWord, sign_word
from edge_agent.core.cose import Signer
from edge_agent.core.errors import ConfigError, RefusedError
from edge_agent.core.values import BOARD_ID, bounded, checked
from edge_agent.steward import mosquitto
from edge_agent.steward.authority import CA_FILE, Authority
from edge_agent.steward.session import OperatorSession
from edge_agent.store.files import Disk, reaching, read_bounded, write_atomically
from edge_agent.store.identity import load_or_make_seed, load_seed
from edge_agent.transport.endpoint import BrokerAddress
from edge_agent.transport.link import Message
from edge_agent.transport.tls import TlsFiles
from edge_agent.transport.topics import DIGEST_HEX, FLEET_ID, Topics
from ota.charter import Charter, encode_charter
from ota.chunks import encode_chunk
from ota.repository import Repository

FLEET_FILE, OPERATOR_KEY = "fleet.toml", "operator.key"
OPERATOR_CERTIFICATE, OPERATOR_TLS_KEY = "operator.pem", "operator-tls.key"
MAX_FLEET_FILE_BYTES = 64 * 2**10
MAX_WORD_BYTES = 4096
PUBLIC_FILE = 0o644


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """``names``: under which the broker's certificate holds; ``host`` is what boards dial."""

    name: str
    operator: str
    host: str
    port: int = 8883
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked(FLEET_ID, "fleet's name", self.name)
        if len(self.name) > 24:
            raise ConfigError("fleet's name", self.name, "at most 24 characters")
        checked(BOARD_ID, "operator's name", self.operator)
        bounded("broker's port", self.port, 1, 65535)

    def toml(self) -> str:
        return (
            f"name = {json.dumps(self.name)}\noperator = {json.dumps(self.operator)}\n\n"
            f"[broker]\nhost = {json.dumps(self.host)}\nport = {self.port}\nnames = {json.dumps(list(self.names))}\n"
        )


class OperatorFolder:
    """An opened folder. ``create`` makes a fleet. Raises ``SlyError`` for what is no folder of a fleet, or cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._disk = folder.absolute(), Disk()
        self.settings = _read_settings(self.folder / FLEET_FILE, self._disk)
        self.signer = Signer(self.settings.operator.encode(), load_seed(self.folder / OPERATOR_KEY))
        self.topics = Topics(self.settings.name)

    @classmethod
    def create(
        cls, folder: Path, settings: FleetSettings, *, root_keys: int = 3, threshold: int = 2, timestamp_days: int = 7
    ) -> OperatorFolder:
        """A new fleet in a folder that is empty or not there: TUF keys, CA, broker, operator, and a charter without boards."""
        folder, disk = folder.absolute(), Disk()
        with reaching(folder):
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                remedy = "choose another: the keys of a fleet are never overwritten"
                raise RefusedError(f"folder {folder}", "something that is there already", "an empty folder, or a new one", remedy)
            BrokerAddress(settings.host, settings.port)
            disk.make_folder(folder)
            folder.chmod(0o700)
            for part in ("boards", "words", "repository", f"{BROKER}/{mosquitto.DATA_FOLDER}"):
                disk.make_folder(folder / part)
        seed = load_or_make_seed(folder / OPERATOR_KEY, disk)
        authority = Authority.create(folder / "ca", settings.name)
        _write_pair(disk, folder / OPERATOR_CERTIFICATE, folder / OPERATOR_TLS_KEY, authority, settings.operator)
        repository = Repository.create(
            folder / "repository", settings.name, root_keys=root_keys, threshold=threshold, timestamp_days=timestamp_days
        )
        key = Signer(settings.operator.encode(), seed).public_key
        first = repository.charter()
        repository.put_charter(replace(first, serial=first.serial + 1, operators={settings.operator: key}))
        repository.commit()
        write_atomically(disk, folder / FLEET_FILE, settings.toml().encode())
        made = cls(folder)
        made.issue_broker()
        made.write_broker()
        return made

    @cached_property
    def authority(self) -> Authority:
        return Authority(self.folder / "ca")

    @cached_property
    def repository(self) -> Repository:
        return Repository(self.folder / "repository")

    @property
    def charter(self) -> Charter:
        return self.repository.charter()

    @property
    def broker_folder(self) -> Path:
        return self.folder / BROKER

    @property
    def address(self) -> BrokerAddress:
        """The broker, as the operator reaches it."""
        files = (self.folder / "ca" / CA_FILE, self.folder / OPERATOR_CERTIFICATE, self.folder / OPERATOR_TLS_KEY)
        return BrokerAddress(self.settings.host, self.settings.port, TlsFiles(*files))

    @property
    def client_certificate(self) -> bytes:
        return read_bounded(self._disk, self.folder / OPERATOR_CERTIFICATE, MAX_FLEET_FILE_BYTES)

    @property
    def broker_certificate(self) -> bytes:
        return read_bounded(self._disk, self.broker_folder / mosquitto.BROKER_CERTIFICATE, MAX_FLEET_FILE_BYTES)

    def board_folder(self, board: str) -> Path:
        return self.folder / "boards" / checked(BOARD_ID, "board", board)

    def session(self, **options: object) -> OperatorSession:
        """A connection of this operator, not open yet; ``options`` as ``OperatorSession`` takes them."""
        return OperatorSession(self.address, self.charter, self.signer, **options)  # type: ignore[arg-type]

    def put_charter(self, charter: Charter) -> Charter:
        """Sign a charter with the next serial into the repository, and write the access list from it."""
        after = replace(charter, serial=self.charter.serial + 1)
        self.repository.put_charter(after)
        self.repository.commit()
        self.write_broker()
        return after

    # The broker.

    def issue_broker(self, host: str = "", names: Sequence[str] = ()) -> None:
        """A new certificate and key for the broker; with ``host`` or ``names`` for another place."""
        host = host or self.settings.host
        every = tuple(dict.fromkeys((host, *(names or self.settings.names))))
        BrokerAddress(host, self.settings.port)
        issued = self.authority.issue_broker(every)
        if (host, every) != (self.settings.host, self.settings.names):
            self.settings = replace(self.settings, host=host, names=every)
            write_atomically(self._disk, self.folder / FLEET_FILE, self.settings.toml().encode())
        write_atomically(self._disk, self.broker_folder / mosquitto.BROKER_KEY, issued.key)
        write_atomically(self._disk, self.broker_folder / mosquitto.BROKER_CERTIFICATE, issued.certificate, PUBLIC_FILE)

    def configuration(self, at: Path | None = None) -> str:
        """Of a broker whose files lie in ``at`` on its machine; by default in this folder."""
        return mosquitto.configuration(self.settings.port, at or self.broker_folder, getpass.getuser())

    def write_broker(self) -> None:
        """The configuration, the access list by the charter, the CA and what it revoked."""
        charter = self.charter
        revoked = [board for board, each in charter.boards.items() if each.revoked]
        files = {
            mosquitto.CONFIGURATION: self.configuration().encode(),
            mosquitto.ACCESS_LIST: mosquitto.access_list(charter.fleet, charter.operators, revoked).encode(),
            mosquitto.BROKER_CA: self.authority.certificate_pem,
            mosquitto.BROKER_CRL: self.authority.crl_pem,
        }
        for name, data in files.items():
            path = self.broker_folder / name
            if not path.exists() or path.read_bytes() != data:
                write_atomically(self._disk, path, data)

    def reload_broker(self) -> bool:
        """Have a Mosquitto that runs here with this configuration read its lists again; ``False`` if none does."""
        try:
            pid = int((self.broker_folder / mosquitto.DATA_FOLDER / mosquitto.PID_FILE).read_text())
            process = Path(f"/proc/{pid}")
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            files = {(process / "cwd").resolve() / os.fsdecode(each) for each in arguments}
            if (self.broker_folder / mosquitto.CONFIGURATION).resolve() not in {each.resolve() for each in files}:
                return False
            os.kill(pid, signal.SIGHUP)
        except (OSError, ValueError):
            return False
        return True

    # What the operator says of boards.

    def say_of(self, board: str, action: Action, reason: str) -> OperatorWord:
        """Sign a word on ``board`` and keep it here; ``publish`` brings it to the broker."""
        word = OperatorWord(self.settings.operator, board, time.time_ns() // 1000, action, reason)
        write_atomically(self._disk, self.folder / "words" / board, sign_word(word, self.signer))
        return word

    def words(self) -> dict[str, bytes]:
        """The last word on every board, as it was signed."""
        folder = self.folder / "words"
        names = [name for name in self._disk.names(folder) if BOARD_ID.fullmatch(name)]
        return {name: read_bounded(self._disk, folder / name, MAX_WORD_BYTES) for name in sorted(names)}

    async def publish(self, session: OperatorSession, over: bool = False) -> int:
        """Bring the broker what it lacks of this fleet: words on boards, metadata and the charter. How many messages that took.

        The charter is small, and boards need it when no operator is there to give it: it is the one artefact that is kept on the
        broker, and the one before it is taken away.
        """
        session.admit(self.charter)
        lacking = {board: word for board, word in self.words().items() if session.words.get(board) != word}
        for board, word in lacking.items():
            await session.say(Message(self.topics.word(board), word, retain=True))
            session.words[board] = word
        session.must_not_be_ahead(self.repository, over)
        data = encode_charter(self.charter)
        await session.say(Message(self.topics.ota_chunk(sha256(data).hexdigest()), encode_chunk(0, data), retain=True))
        published = await session.publish_repository(self.repository, over)
        for digest in self._old_charters(data):
            await session.say(Message(self.topics.ota_chunk(digest), b"", retain=True))
        return len(lacking) + published

    def _old_charters(self, data: bytes) -> list[str]:
        """SHA-256 of the charters before this one whose files the repository still has."""
        names = self._disk.names(self.repository.folder / "targets" / "fleet")
        digests = {name.split(".")[0] for name in names} - {sha256(data).hexdigest()}
        return sorted(each for each in digests if DIGEST_HEX.fullmatch(each))


BROKER = "broker"


def _read_settings(path: Path, disk: Disk) -> FleetSettings:
    if not path.exists():
        raise ConfigError(
            f"fleet's folder {path.parent}", f"no {path.name}", "a folder that sly fleet init made", "see --fleet DIR"
        )
    try:
        mapping = tomllib.loads(read_bounded(disk, path, MAX_FLEET_FILE_BYTES).decode())
        broker = mapping.pop("broker")
        return FleetSettings(**{**mapping, **broker, "names": tuple(broker["names"])})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}", str(error), "what sly fleet init wrote: name, operator, [broker] host, port, names"
        ) from error


def _write_pair(disk: Disk, certificate: Path, key: Path, authority: Authority, operator: str) -> None:
    issued = authority.issue_client(mosquitto.OPERATOR_PREFIX + operator)
    write_atomically(disk, key, issued.key)
    write_atomically(disk, certificate, issued.certificate, PUBLIC_FILE)
