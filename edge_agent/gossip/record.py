"""What a board says of itself: a signed record with one writer.

Owns ``BoardRecord``, its bytes and its signature.  Rules: the version is ``(boot_epoch, sequence)``; only the board itself
can sign its record; every list in it is bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import MAX_HOMES, KvHome, KvState, Place
from edge_agent.core.values import BOARD_ID, MAX_COST, ModelOffer, bounded, checked

AAD = b"sly/1/record"
MAX_RECORD_BYTES = 64 * 2**10
MAX_OFFERS = 64
MAX_KV_STATES = 4
MAX_HARDWARE_CHARS = 128
MAX_COUNT = 2**53
MAX_MDEGC = 1_000_000

_RECORD = {
    1: ("board", str), 2: ("boot_epoch", int), 3: ("sequence", int), 4: ("hardware", str), 5: ("emulated", bool),
    6: ("serving", bool), 7: ("queue_us", int), 10: ("offers", list),
}  # fmt: skip
_RECORD_OPTIONAL = {8: ("temperature_mdegc", int), 9: ("trip_mdegc", int), 11: ("kv", list)}
_OFFER = {
    1: ("model", str), 2: ("task", str), 3: ("digest", bytes), 4: ("quality_permille", int), 5: ("busy_us", int),
    6: ("energy_uj", int),
}  # fmt: skip
_KV = {
    1: ("model", str), 2: ("fingerprint", bytes), 3: ("parked_bytes", int), 4: ("hot_bytes", int), 5: ("free_bytes", int),
    6: ("window_tokens", int), 7: ("queue_us", int), 8: ("prefill_tok_s", int), 9: ("ram_tok_s", int), 10: ("disk_tok_s", int),
    11: ("homes", list),
}  # fmt: skip
_OFFER_OPTIONAL = {7: ("parallel", int)}


@dataclass(frozen=True, slots=True)
class BoardRecord:
    """Capabilities, costs and load of one board at one moment. ``queue_us`` is the modelled work that waits there."""

    board: str
    boot_epoch: int
    sequence: int
    hardware: str = ""
    emulated: bool = False
    serving: bool = True
    queue_us: int = 0
    temperature_mdegc: int | None = None
    trip_mdegc: int | None = None
    offers: tuple[ModelOffer, ...] = ()
    kv: tuple[KvState, ...] = ()
    """Of each language model."""

    def __post_init__(self) -> None:
        checked(BOARD_ID, "record board", self.board)
        bounded("record boot_epoch", self.boot_epoch, 0, MAX_COUNT)
        bounded("record sequence", self.sequence, 0, MAX_COUNT)
        bounded("record queue_us", self.queue_us, 0, MAX_COST, "µs")
        if len(self.hardware) > MAX_HARDWARE_CHARS:
            raise RefusedError("record hardware", self.hardware, f"at most {MAX_HARDWARE_CHARS} characters")
        if len(self.offers) > MAX_OFFERS or len({offer.model for offer in self.offers}) != len(self.offers):
            raise RefusedError("record offers", f"{len(self.offers)} offers", f"at most {MAX_OFFERS}, one a model")
        if len(self.kv) > MAX_KV_STATES or len({state.model for state in self.kv}) != len(self.kv):
            raise RefusedError("record kv", f"{len(self.kv)} states", f"at most {MAX_KV_STATES}, one a model")
        for name, value in (("temperature_mdegc", self.temperature_mdegc), ("trip_mdegc", self.trip_mdegc)):
            if value is not None:
                bounded(f"record {name}", value, -MAX_MDEGC, MAX_MDEGC, "m°C")

    @property
    def version(self) -> tuple[int, int]:
        return (self.boot_epoch, self.sequence)

    @property
    def headroom_mdegc(self) -> int | None:
        """How far the board is from its trip point; ``None`` if it has no such sensor."""
        if self.temperature_mdegc is None or self.trip_mdegc is None:
            return None
        return self.trip_mdegc - self.temperature_mdegc

    def to_map(self) -> dict[int, object]:
        known: dict[int, object] = {
            1: self.board, 2: self.boot_epoch, 3: self.sequence, 4: self.hardware, 5: self.emulated, 6: self.serving,
            7: self.queue_us, 8: self.temperature_mdegc, 9: self.trip_mdegc, 10: [_offer_out(o) for o in self.offers],
            11: [_kv_out(state) for state in self.kv] or None,
        }  # fmt: skip
        return {key: value for key, value in known.items() if value is not None}

    @classmethod
    def from_map(cls, value: object) -> BoardRecord:
        """The record in a decoded map. Raises ``RefusedError`` naming the field."""
        entry = fields(value, "record", _RECORD, _RECORD_OPTIONAL)
        offers = list_of(entry.pop("offers"), "record offers", dict, MAX_OFFERS)
        if entry.get("kv") == []:
            raise RefusedError("record kv", "an empty list", "nothing, or the state of each language model")
        states = list_of(entry.pop("kv", []), "record kv", dict, MAX_KV_STATES)
        return cls(offers=tuple(map(_offer_in, offers)), kv=tuple(map(_kv_in, states)), **entry)


def sign_record(record: BoardRecord, signer: Signer) -> bytes:
    return sign1(encode(record.to_map()), signer, AAD)


def open_record(message: bytes, find_key: Callable[[bytes], bytes | None]) -> BoardRecord:
    """The record in a signed message. Raises ``RefusedError`` unless it is well-formed and signed by its own board."""
    signed = verify1(message, find_key, AAD, max_bytes=MAX_RECORD_BYTES)
    record = BoardRecord.from_map(decode(signed.payload, MAX_RECORD_BYTES, subject="record"))
    if signed.kid != record.board.encode():
        raise RefusedError("record", f"board {record.board!r} signed by {signed.kid!r}", "a board's own signature")
    return record


def _offer_out(offer: ModelOffer) -> dict[int, object]:
    known: dict[int, object] = {
        1: offer.model, 2: offer.task, 3: offer.digest, 4: offer.quality_permille, 5: offer.busy_us, 6: offer.energy_uj,
    }  # fmt: skip
    return {**known, 7: offer.parallel} if offer.parallel > 1 else known


def _offer_in(value: dict[Any, Any]) -> ModelOffer:
    return ModelOffer(**fields(value, "record offer", _OFFER, _OFFER_OPTIONAL))


def _kv_out(state: KvState) -> dict[int, object]:
    known: dict[int, object] = {key: getattr(state, name) for key, (name, _) in _KV.items()}
    return {**known, 11: [[home.session, home.tokens, home.place.value] for home in state.homes]}


def _kv_in(value: dict[Any, Any]) -> KvState:
    entry = fields(value, "record kv", _KV)
    homes = list_of(entry.pop("homes"), "record kv homes", list, MAX_HOMES)
    return KvState(homes=tuple(map(_home_in, homes)), **entry)


def _home_in(value: list[Any]) -> KvHome:
    match value:
        case [bytes(session), int(tokens), int(place)] if place in Place.__members__.values() and type(place) is int:
            return KvHome(session, tokens, Place(place))
    raise RefusedError("record kv home", value, "[session hash, tokens, 0 hot, 1 in memory or 2 on disk]")
