"""What the fleet trusts, as one signed document: who belongs to it, who may operate it, what it should measure, how it places.

Owns ``Charter`` and its bytes.  Rules: no I/O; one encoding; a key that is not known is refused; a board that is not in it is
none of the fleet's, and one that is revoked in it stays out whatever it shows; no key belongs to two.  It travels as the TUF
target ``CHARTER_PATH``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from dataclasses import fields as fields_of
from typing import Any

from edge_agent.core.cbor import decode, encode, fields, list_of, map_of
from edge_agent.core.config import PolicySection
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import BOARD_ID, DIGEST_BYTES, MAX_BOARDS, bounded, checked

CHARTER_PATH = "fleet/charter.cbor"
MAX_CHARTER_BYTES = 2 * 2**20
MAX_CHARTER_ITEMS = 65_536
MAX_SERIAL = 2**53
MAX_GROUPS = 16
"""Of one board."""
MAX_OPERATORS = 64
MAX_REFERENCES = 4096
"""Of one kind."""
MAX_GOLDEN_ANSWERS = 16
"""To one golden input with one library: CPUs differ."""
MAX_LIBRARY_CHARS = 128
MAX_REVOKED_CHARS = 256
KEY_BYTES = 32
MAX_ENDORSER_BYTES = 256


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A board: its Ed25519 public key (32 bytes), the class (backend) of its hardware, its groups, the key that endorses its
    quotes (empty for none), and why it was revoked (empty while it is not)."""

    key: bytes
    backend: str = ""
    groups: tuple[str, ...] = ()
    endorser: bytes = b""
    revoked: str = ""

    def __post_init__(self) -> None:
        _check_key("board's key", self.key)
        if self.backend:
            checked(BOARD_ID, "board's backend", self.backend)
        bounded("board's groups, count", len(self.groups), 0, MAX_GROUPS)
        for each in self.groups:
            checked(BOARD_ID, "board's group", each)
        if list(self.groups) != sorted(set(self.groups)):
            raise RefusedError("board's groups", shown(", ".join(self.groups)), "each once, in the order of the alphabet")
        if self.endorser:
            bounded("endorser's key, length", len(self.endorser), KEY_BYTES, MAX_ENDORSER_BYTES, "bytes")
        _check_text("reason of a revocation", self.revoked, 0, MAX_REVOKED_CHARS)


@dataclass(frozen=True, slots=True)
class References:
    """SHA-256 of what boards may measure besides what they find in themselves, and of the right answers to golden inputs, by
    (model digest, library name)."""

    code: frozenset[bytes] = frozenset()
    libraries: frozenset[bytes] = frozenset()
    models: frozenset[bytes] = frozenset()
    golden: Mapping[tuple[bytes, str], frozenset[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, digests in (("code", self.code), ("libraries", self.libraries), ("models", self.models)):
            bounded(f"reference {kind}, count", len(digests), 0, MAX_REFERENCES)
            for each in digests:
                _check_digest(f"reference {kind}", each)
        bounded("reference golden, count", len(self.golden), 0, MAX_REFERENCES)
        for (model, library), answers in self.golden.items():
            _check_digest("reference golden, model", model)
            _check_text("reference golden, library", library, 1, MAX_LIBRARY_CHARS)
            bounded("reference golden, answers", len(answers), 1, MAX_GOLDEN_ANSWERS)
            for each in answers:
                _check_digest("reference golden, answer", each)


@dataclass(frozen=True, slots=True)
class Charter:
    """``serial`` grows with every charter; ``policy``: the weights of placement, ``None`` leaves each board's own."""

    fleet: str
    serial: int
    boards: Mapping[str, Enrolled]
    operators: Mapping[str, bytes]
    policy: PolicySection | None = None
    references: References = References()

    def __post_init__(self) -> None:
        checked(BOARD_ID, "charter of fleet", self.fleet)
        bounded("charter serial", self.serial, 1, MAX_SERIAL)
        bounded("charter boards, count", len(self.boards), 0, MAX_BOARDS)
        bounded("charter operators, count", len(self.operators), 0, MAX_OPERATORS)
        for board in self.boards:
            checked(BOARD_ID, "charter board", board)
        for operator, key in self.operators.items():
            checked(BOARD_ID, "charter operator", operator)
            _check_key(f"key of operator {operator}", key)
        _check_owners([*((b, each.key) for b, each in self.boards.items()), *((o, key) for o, key in self.operators.items())])
        if self.policy is not None:
            _check_policy(self.policy)

    @property
    def members(self) -> dict[str, bytes]:
        """The public keys of the boards that are not revoked."""
        return {board: each.key for board, each in self.boards.items() if not each.revoked}

    def group(self, name: str) -> tuple[str, ...]:
        """The boards of a group, sorted; ``all`` is every board. Revoked ones are in none."""
        return tuple(sorted(b for b, each in self.boards.items() if not each.revoked and (name == "all" or name in each.groups)))


def _check_key(subject: str, key: bytes) -> None:
    bounded(f"{subject}, length", len(key), KEY_BYTES, KEY_BYTES, "bytes")


def _check_digest(subject: str, digest: bytes) -> None:
    bounded(f"{subject}, length", len(digest), DIGEST_BYTES, DIGEST_BYTES, "bytes")


def _check_text(subject: str, text: str, low: int, high: int) -> None:
    bounded(f"{subject}, length", len(text), low, high, "characters")
    if not text.isprintable():
        raise RefusedError(subject, shown(text), "printable text of one line")


def _check_owners(owners: list[tuple[str, bytes]]) -> None:
    known: dict[bytes, str] = {}
    for name, key in owners:
        if key in known:
            raise RefusedError("charter", f"one key for {known[key]} and {name}", "a key of its own for each")
        known[key] = name


def _check_policy(policy: PolicySection) -> None:
    for entry in fields_of(policy):
        bounds = entry.metadata["bounds"]
        bounded(f"charter policy {entry.name}", getattr(policy, entry.name), bounds.low, bounds.high)


_CHARTER = {
    1: ("fleet", str), 2: ("serial", int), 3: ("boards", dict), 4: ("operators", dict), 5: ("policy", object),
    6: ("references", dict),
}  # fmt: skip
_ENROLLED = {1: ("key", bytes)}
_ENROLLED_OPTIONAL = {2: ("backend", str), 3: ("groups", list), 4: ("endorser", bytes), 5: ("revoked", str)}
_REFERENCES = {1: ("code", list), 2: ("libraries", list), 3: ("models", list), 4: ("golden", list)}
_GOLDEN = {1: ("model", bytes), 2: ("library", str), 3: ("answers", list)}
_POLICY = tuple(each.name for each in fields_of(PolicySection))


def encode_charter(charter: Charter) -> bytes:
    """The charter, as it is signed. Raises ``RefusedError`` for one over ``MAX_CHARTER_BYTES``."""
    data = encode(
        {
            1: charter.fleet, 2: charter.serial,
            3: {board: _enrolled_map(each) for board, each in charter.boards.items()},
            4: dict(charter.operators),
            5: None if charter.policy is None else asdict(charter.policy),
            6: _references_map(charter.references),
        }
    )  # fmt: skip
    if len(data) > MAX_CHARTER_BYTES:
        raise RefusedError("charter", f"{len(data)} bytes", f"at most {MAX_CHARTER_BYTES} bytes", "take old references out of it")
    return data


def decode_charter(data: bytes) -> Charter:
    """The charter in bytes that came from outside.

    Raises ``RefusedError`` naming the field; also for what is well-formed and not the one encoding of its charter, such as a set
    out of order.
    """
    decoded = decode(data, MAX_CHARTER_BYTES, max_items=MAX_CHARTER_ITEMS, subject="charter")
    entry = fields(decoded, "charter", _CHARTER)
    charter = Charter(
        entry["fleet"],
        entry["serial"],
        {board: _enrolled(board, each) for board, each in map_of(entry["boards"], "charter boards", dict, MAX_BOARDS).items()},
        map_of(entry["operators"], "charter operators", bytes, MAX_OPERATORS),
        None if entry["policy"] is None else _policy(entry["policy"]),
        _references(entry["references"]),
    )
    if encode_charter(charter) != data:
        raise RefusedError("charter", "another encoding of what it says", "sets in order, nothing twice, nothing empty")
    return charter


def _enrolled_map(board: Enrolled) -> dict[int, object]:
    optional = {2: board.backend, 3: list(board.groups), 4: board.endorser, 5: board.revoked}
    return {1: board.key} | {key: value for key, value in optional.items() if value}


def _enrolled(board: str, decoded: object) -> Enrolled:
    entry = fields(decoded, f"charter board {shown(board)}", _ENROLLED, _ENROLLED_OPTIONAL)
    groups = tuple(list_of(entry.pop("groups", []), f"groups of {shown(board)}", str, MAX_GROUPS))
    return Enrolled(**entry, groups=groups)


def _references_map(references: References) -> dict[int, object]:
    golden = [{1: model, 2: library, 3: sorted(answers)} for (model, library), answers in sorted(references.golden.items())]
    return {1: sorted(references.code), 2: sorted(references.libraries), 3: sorted(references.models), 4: golden}


def _references(decoded: object) -> References:
    entry = fields(decoded, "charter references", _REFERENCES)
    golden = {}
    for each in list_of(entry["golden"], "charter golden", dict, MAX_REFERENCES):
        one = fields(each, "charter golden", _GOLDEN)
        golden[one["model"], one["library"]] = _digests("golden answers", one["answers"], MAX_GOLDEN_ANSWERS)
    sets = {kind: _digests(kind, entry[kind], MAX_REFERENCES) for kind in ("code", "libraries", "models")}
    return References(**sets, golden=golden)


def _digests(kind: str, decoded: object, most: int) -> frozenset[bytes]:
    return frozenset(list_of(decoded, f"charter {kind}", bytes, most))


def _policy(decoded: object) -> PolicySection:
    """By the names of ``[policy]``, all of them: two boards that left a field to their own default would not place alike."""
    entries: dict[str, Any] = map_of(decoded, "charter policy", int, len(_POLICY))
    if odd := sorted(entries.keys() ^ set(_POLICY)):
        raise RefusedError("charter policy", f"missing or unknown: {shown(', '.join(odd))}", ", ".join(_POLICY))
    return PolicySection(**entries)
