"""What the agreed table sees of each board: its record, rounded, so that noise does not change the table.

Owns ``BoardFacts``, the rounding, and the digests of facts and rules.  Rules: integers only; the rounding is a function of the
record alone, never of what was rounded before (no hysteresis: that would make two boards differ that heard the same); costs are
rounded up and headroom and memory down, so that a rounded board is never better than it is; what waits at this moment is no
fact: the table is a plan, and the live choice looks at queues; one board, one entry: who joins two records of a board is
gossip's affair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from operator import attrgetter

from edge_agent.core.cbor import encode
from edge_agent.core.config import PolicySection
from edge_agent.core.kv import MAX_SPEED_TOK_S, KvState
from edge_agent.core.values import BOARD_ID, MAX_COST, ModelOffer, TrustTier, checked
from edge_agent.core.wanted import MAX_RATE_MHZ, Demand
from edge_agent.placement.options import Rules

COST_BITS, SPEED_BITS, RATE_BITS = 4, 4, 3
"""Significant bits: a step is at most 1/8 of a cost or a speed, 1/4 of a rate."""
HEADROOM_STEP_MDEGC, COOL_STEP_MDEGC = 1_000, 8_000
"""Near the trip point, and from ``COOL_STEP_MDEGC`` away from it on."""
MEMORY_STEP_BYTES = 16 * 2**20

_OFFER = attrgetter("model", "task", "digest", "quality_permille", "busy_us", "energy_uj", "parallel")
_SHAPE = attrgetter("shape", "busy_us", "energy_uj")
_KV = attrgetter(
    "model", "fingerprint", "parked_bytes", "hot_bytes", "free_bytes", "window_tokens", "prefill_tok_s", "ram_tok_s", "disk_tok_s"
)
_WANTED = attrgetter(
    "task", "model", "shape", "size_bytes", "deadline_us", "quality_permille", "energy_uj", "trust", "data"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BoardFacts:
    """A board as the table sees it.

    Each of ``offers``, ``kv`` and ``demand`` is ascending, each model and class once.  Raises ``ValueError`` otherwise.
    """

    board: str
    up: bool = True
    trust: TrustTier = TrustTier.NONE
    headroom_mdegc: int | None = None
    offers: tuple[ModelOffer, ...] = ()
    kv: tuple[KvState, ...] = ()
    demand: tuple[Demand, ...] = ()
    supply_bytes: bytes = field(init=False, repr=False, compare=False)
    """The canonical encoding of all but the demand."""
    demand_bytes: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checked(BOARD_ID, "facts of board", self.board)
        _ascending(f"offers of {self.board}", [offer.model for offer in self.offers])
        _ascending(f"KV states of {self.board}", [state.model for state in self.kv])
        _ascending(f"demand of {self.board}", [each.wanted for each in self.demand])
        supply = {
            1: self.board, 2: self.up, 3: int(self.trust), 4: self.headroom_mdegc,
            5: list(map(_plain_offer, self.offers)), 6: list(map(_KV, self.kv)),
        }  # fmt: skip
        object.__setattr__(self, "supply_bytes", encode(supply))
        object.__setattr__(self, "demand_bytes", encode(list(map(_plain_demand, self.demand))))

    @classmethod
    def rounded(
        cls,
        board: str,
        *,
        up: bool,
        trust: TrustTier,
        headroom_mdegc: int | None,
        offers: Iterable[ModelOffer],
        kv: Iterable[KvState],
        demand: Iterable[Demand],
    ) -> BoardFacts:
        """What is left of a board's record for the table: no sessions, no queues, no offers of the cloud."""
        return cls(
            board,
            up,
            trust,
            None if headroom_mdegc is None else _headroom(headroom_mdegc),
            tuple(sorted((_offer(offer) for offer in offers if not offer.cloud), key=lambda offer: offer.model)),
            tuple(sorted(map(_kv, kv), key=lambda state: state.model)),
            tuple(sorted(replace(each, rate_mhz=min(nearest(each.rate_mhz, RATE_BITS), MAX_RATE_MHZ)) for each in demand)),
        )


def facts_digest(facts: Iterable[BoardFacts]) -> bytes:
    """SHA-256 of the facts, in whichever order they come. Raises ``ValueError`` for a board that is there twice."""
    ordered = by_board(facts)
    return sha256(encode([part for each in ordered for part in (each.supply_bytes, each.demand_bytes)])).digest()


def rules_digest(rules: Rules) -> bytes:
    """SHA-256 of what every board of a fleet places by: the policy by the names of its settings, and the signed releases."""
    policy = [[each.name, getattr(rules.policy, each.name)] for each in sorted(fields(PolicySection), key=lambda each: each.name)]
    return sha256(encode([policy, sorted(rules.releases)])).digest()


def by_board(facts: Iterable[BoardFacts]) -> list[BoardFacts]:
    """The facts in the order of their boards. Raises ``ValueError`` for a board that is there twice."""
    ordered = sorted(facts, key=lambda each: each.board)
    _ascending("facts", [each.board for each in ordered])
    return ordered


def nearest(number: int, bits: int) -> int:
    """``number`` to so many significant bits, the half up."""
    shift = max(0, number.bit_length() - bits)
    return (number + (1 << shift >> 1)) >> shift << shift


def above(number: int, bits: int) -> int:
    """The smallest number of so many significant bits that is not under ``number``."""
    shift = max(0, number.bit_length() - bits)
    return -(-number >> shift) << shift


def _cost(number: int) -> int:
    return min(above(number, COST_BITS), MAX_COST)


def _speed(number: int) -> int:
    return min(nearest(number, SPEED_BITS), MAX_SPEED_TOK_S)


def _headroom(number_mdegc: int) -> int:
    step_mdegc = HEADROOM_STEP_MDEGC if number_mdegc < COOL_STEP_MDEGC else COOL_STEP_MDEGC
    return number_mdegc - number_mdegc % step_mdegc


def _offer(offer: ModelOffer) -> ModelOffer:
    shapes = tuple(
        replace(each, busy_us=_cost(each.busy_us), energy_uj=_cost(each.energy_uj), measured=0) for each in offer.shapes
    )
    return replace(offer, busy_us=_cost(offer.busy_us), energy_uj=_cost(offer.energy_uj), shapes=shapes, measured=0)


def _kv(state: KvState) -> KvState:
    return replace(
        state,
        free_bytes=state.free_bytes - state.free_bytes % MEMORY_STEP_BYTES,
        queue_us=0,
        waits_us=(),
        running=0,
        prefill_tok_s=_speed(state.prefill_tok_s),
        ram_tok_s=_speed(state.ram_tok_s),
        disk_tok_s=_speed(state.disk_tok_s),
        homes=(),
    )


def _plain_offer(offer: ModelOffer) -> list[object]:
    return [*_OFFER(offer), list(map(_SHAPE, offer.shapes))]


def _plain_demand(demand: Demand) -> list[object]:
    *known, trust, data = _WANTED(demand.wanted)
    return [*known, int(trust), data.value, demand.rate_mhz]


def _ascending(subject: str, keys: list[object]) -> None:
    if any(not one < other for one, other in zip(keys, keys[1:], strict=False)):  # type: ignore[operator]
        raise ValueError(f"{subject}: {keys} are not ascending, or one is there twice")
