"""What a board says of itself: a signed record with one writer.

Owns ``BoardRecord``, its bytes and its signature.  Rules: the version is ``(boot_epoch, sequence)``; only the board itself
can sign its record; every list in it is bounded; what has its default is left out, and refused when it is not, so that a record
has one encoding; what runs outside the fleet (a cloud) is never in a record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import MAX_HOMES, KvHome, KvState, Place
from edge_agent.core.values import (
    BOARD_ID,
    MAX_COST,
    MAX_SHAPES,
    DataClass,
    ModelOffer,
    ShapeCost,
    TrustTier,
    bounded,
    checked,
)
from edge_agent.core.waits import SLACKS_US, checked_waits
from edge_agent.core.wanted import MAX_DEMANDS, Demand, Wanted
from edge_agent.core.wire import data_in, trust_in

AAD = b"sly/1/record"
MAX_RECORD_BYTES = 64 * 2**10
MAX_OFFERS = 64
MAX_KV_STATES = 4
MAX_HARDWARE_CHARS = 128
MAX_COUNT = 2**53
MAX_MDEGC = 1_000_000
FORECASTS = 3
"""Of the temperature: in 10, 30 and 60 s."""

_RECORD = {
    1: ("board", str), 2: ("boot_epoch", int), 3: ("sequence", int), 4: ("hardware", str), 5: ("emulated", bool),
    6: ("serving", bool), 7: ("queue_us", int), 10: ("offers", list),
}  # fmt: skip
_RECORD_OPTIONAL = {
    8: ("temperature_mdegc", int), 9: ("trip_mdegc", int), 11: ("kv", list), 12: ("demand", list), 13: ("forecast_mdegc", list),
    14: ("waits_us", list),
}  # fmt: skip
_OFFER = {
    1: ("model", str), 2: ("task", str), 3: ("digest", bytes), 4: ("quality_permille", int), 5: ("busy_us", int),
    6: ("energy_uj", int),
}  # fmt: skip
_KV = {
    1: ("model", str), 2: ("fingerprint", bytes), 3: ("parked_bytes", int), 4: ("hot_bytes", int), 5: ("free_bytes", int),
    6: ("window_tokens", int), 7: ("queue_us", int), 8: ("prefill_tok_s", int), 9: ("ram_tok_s", int), 10: ("disk_tok_s", int),
    11: ("homes", list),
}  # fmt: skip
_KV_OPTIONAL = {12: ("waits_us", list), 13: ("running", int)}
_OFFER_OPTIONAL = {7: ("parallel", int), 8: ("shapes", list), 9: ("measured", int)}
_OFFER_DEFAULTS: dict[str, object] = {"parallel": 1, "shapes": [], "measured": 0}
_DEMAND = {1: ("task", str), 3: ("shape", int), 4: ("size_bytes", int), 5: ("deadline_us", int), 10: ("rate_mhz", int)}
_DEMAND_OPTIONAL = {
    2: ("model", str), 6: ("quality_permille", int), 7: ("energy_uj", int), 8: ("trust", int), 9: ("data", str),
}  # fmt: skip
_DEMAND_DEFAULTS: dict[str, object] = {
    "model": "", "quality_permille": 0, "energy_uj": 0, "trust": TrustTier.NONE.value, "data": DataClass.PRIVATE.value,
}  # fmt: skip


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
    demand: tuple[Demand, ...] = ()
    """What comes in there, by request class, ascending."""
    forecast_mdegc: tuple[int, int, int] | None = None
    """Its own forecast of its temperature in 10, 30 and 60 s; ``None`` before it has one."""
    waits_us: tuple[int, ...] = ()
    """What urgent requests for pictures wait (``core.waits``); ``queue_us`` is for those that may take their time."""

    def __post_init__(self) -> None:
        checked(BOARD_ID, "record board", self.board)
        bounded("record boot_epoch", self.boot_epoch, 0, MAX_COUNT)
        bounded("record sequence", self.sequence, 0, MAX_COUNT)
        bounded("record queue_us", self.queue_us, 0, MAX_COST, "µs")
        checked_waits("record waits_us", self.waits_us, self.queue_us)
        if len(self.hardware) > MAX_HARDWARE_CHARS:
            raise RefusedError("record hardware", self.hardware, f"at most {MAX_HARDWARE_CHARS} characters")
        if len(self.offers) > MAX_OFFERS or len({offer.model for offer in self.offers}) != len(self.offers):
            raise RefusedError("record offers", f"{len(self.offers)} offers", f"at most {MAX_OFFERS}, one a model")
        if cloud := [offer.model for offer in self.offers if offer.cloud or offer.price_us]:
            raise RefusedError("record offers", f"{cloud[0]!r}, which runs in a cloud", "what runs on the board itself")
        if len(self.kv) > MAX_KV_STATES or len({state.model for state in self.kv}) != len(self.kv):
            raise RefusedError("record kv", f"{len(self.kv)} states", f"at most {MAX_KV_STATES}, one a model")
        classes = [each.wanted for each in self.demand]
        if len(classes) > MAX_DEMANDS or any(one >= next_one for one, next_one in pairwise(classes)):
            raise RefusedError("record demand", f"{len(classes)} classes", f"at most {MAX_DEMANDS}, each once, ascending")
        if self.forecast_mdegc is not None and len(self.forecast_mdegc) != FORECASTS:
            raise RefusedError("record forecast_mdegc", self.forecast_mdegc, f"{FORECASTS} temperatures")
        for name, value in (
            ("temperature_mdegc", self.temperature_mdegc), ("trip_mdegc", self.trip_mdegc),
            *(("forecast_mdegc", each) for each in self.forecast_mdegc or ()),
        ):  # fmt: skip
            if value is not None:
                bounded(f"record {name}", value, -MAX_MDEGC, MAX_MDEGC, "m°C")

    @property
    def version(self) -> tuple[int, int]:
        return (self.boot_epoch, self.sequence)

    @property
    def headroom_mdegc(self) -> int | None:
        """How far the board is from its trip point, now or as forecast, whichever is less; ``None`` if it has no such sensor."""
        if self.temperature_mdegc is None or self.trip_mdegc is None:
            return None
        hottest_mdegc: int = max((self.temperature_mdegc, *(self.forecast_mdegc or ())))
        return self.trip_mdegc - hottest_mdegc

    def to_map(self) -> dict[int, object]:
        known: dict[int, object] = {
            1: self.board, 2: self.boot_epoch, 3: self.sequence, 4: self.hardware, 5: self.emulated, 6: self.serving,
            7: self.queue_us, 8: self.temperature_mdegc, 9: self.trip_mdegc, 10: [_offer_out(o) for o in self.offers],
            11: [_kv_out(state) for state in self.kv] or None, 12: [_demand_out(each) for each in self.demand] or None,
            13: list(self.forecast_mdegc) if self.forecast_mdegc else None, 14: list(self.waits_us) or None,
        }  # fmt: skip
        return {key: value for key, value in known.items() if value is not None}

    @classmethod
    def from_map(cls, value: object) -> BoardRecord:
        """The record in a decoded map. Raises ``RefusedError`` naming the field."""
        entry = fields(value, "record", _RECORD, _RECORD_OPTIONAL)
        offers = list_of(entry.pop("offers"), "record offers", dict, MAX_OFFERS)
        _without_defaults("record", entry, {"kv": [], "demand": [], "waits_us": []})
        states = list_of(entry.pop("kv", []), "record kv", dict, MAX_KV_STATES)
        demand = list_of(entry.pop("demand", []), "record demand", dict, MAX_DEMANDS)
        if "forecast_mdegc" in entry:
            entry["forecast_mdegc"] = tuple(list_of(entry["forecast_mdegc"], "record forecast_mdegc", int, FORECASTS))
        entry["waits_us"] = tuple(list_of(entry.pop("waits_us", []), "record waits_us", int, len(SLACKS_US)))
        entry["offers"], entry["kv"] = tuple(map(_offer_in, offers)), tuple(map(_kv_in, states))
        return cls(demand=tuple(map(_demand_in, demand)), **entry)


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
    if offer.parallel > 1:
        known[7] = offer.parallel
    if offer.shapes:
        known[8] = [[each.shape, each.busy_us, each.energy_uj, each.measured] for each in offer.shapes]
    if offer.measured:
        known[9] = offer.measured
    return known


def _offer_in(value: dict[Any, Any]) -> ModelOffer:
    entry = fields(value, "record offer", _OFFER, _OFFER_OPTIONAL)
    _without_defaults("record offer", entry, _OFFER_DEFAULTS)
    shapes = list_of(entry.pop("shapes", []), "record offer shapes", list, MAX_SHAPES)
    return ModelOffer(shapes=tuple(map(_shape_in, shapes)), **entry)


def _shape_in(value: list[Any]) -> ShapeCost:
    if len(value) != 4:
        raise RefusedError("record offer shape", value, "[shape, busy µs, energy µJ, measurements]")
    return ShapeCost(*value)


def _demand_out(demand: Demand) -> dict[int, object]:
    wanted = demand.wanted
    known = {key: getattr(wanted, name) for key, (name, _) in (_DEMAND | _DEMAND_OPTIONAL).items() if name != "rate_mhz"}
    known |= {8: wanted.trust.value, 9: wanted.data.value, 10: demand.rate_mhz}
    defaults = {key: _DEMAND_DEFAULTS[name] for key, (name, _) in _DEMAND_OPTIONAL.items()}
    return {key: value for key, value in known.items() if value != defaults.get(key, ...)}


def _demand_in(value: dict[Any, Any]) -> Demand:
    entry = fields(value, "record demand", _DEMAND, _DEMAND_OPTIONAL)
    _without_defaults("record demand", entry, _DEMAND_DEFAULTS)
    rate_mhz = entry.pop("rate_mhz")
    entry["trust"] = trust_in("record demand trust", entry.get("trust"))
    entry["data"] = data_in("record demand data", entry.get("data"))
    return Demand(Wanted(**{"model": "", **entry}), rate_mhz)


def _without_defaults(subject: str, entry: dict[str, Any], defaults: dict[str, object]) -> None:
    for name, default in defaults.items():
        if entry.get(name, ...) == default:
            raise RefusedError(f"{subject} {name}", default, "nothing, where it is the default")


def _kv_out(state: KvState) -> dict[int, object]:
    known: dict[int, object] = {key: getattr(state, name) for key, (name, _) in _KV.items()}
    known[11] = [[home.session, home.tokens, home.place.value] for home in state.homes]
    if state.waits_us:
        known[12] = list(state.waits_us)
    return {**known, 13: state.running} if state.running else known


def _kv_in(value: dict[Any, Any]) -> KvState:
    entry = fields(value, "record kv", _KV, _KV_OPTIONAL)
    _without_defaults("record kv", entry, {"waits_us": [], "running": 0})
    entry["waits_us"] = tuple(list_of(entry.pop("waits_us", []), "record kv waits_us", int, len(SLACKS_US)))
    homes = list_of(entry.pop("homes"), "record kv homes", list, MAX_HOMES)
    return KvState(homes=tuple(map(_home_in, homes)), **entry)


def _home_in(value: list[Any]) -> KvHome:
    match value:
        case [bytes(session), int(tokens), int(place)] if place in Place.__members__.values() and type(place) is int:
            return KvHome(session, tokens, Place(place))
    raise RefusedError("record kv home", value, "[session hash, tokens, 0 hot, 1 in memory or 2 on disk]")
