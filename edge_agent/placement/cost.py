"""What an option costs, in integer microseconds-equivalents, and how a board learns what its models cost there.

Owns ``option_cost`` and the ``CostBook``.  Rules: integers only, so that every board computes the same bits; no clocks; a cost
begins as the prior of the offer (the roofline) and is corrected by what was measured, each shape of request by itself and all of
a model by one common factor, so that a shape which was never seen profits; one wild measurement moves an estimate by an eighth
at most, three in a row are a new state of things and are believed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from edge_agent.core.chat import CHAT
from edge_agent.core.config import PolicySection
from edge_agent.core.values import MAX_COST, MAX_MEASURED, MAX_SHAPES, ModelOffer, ShapeCost
from edge_agent.core.wanted import TALK_SHAPE, TYPICAL_ANSWER_TOKENS, answer_tokens_of

TYPICAL_SHAPE = TALK_SHAPE + TYPICAL_ANSWER_TOKENS.bit_length()
"""Of a turn that does not say how long its answer may be: what the prior of a language model is for."""
FRACTION_BITS = 8
"""Estimates are kept in 1/256 µs and µJ, so that small steps are not lost."""
FACTOR_BITS = 20
WILD = 4
"""A measurement beyond so many times the estimate, or under so small a part of it, is an outlier until others agree."""
AGREEING = 3
"""So many wild measurements in a row, all on one side, are no outliers."""
GAIN_SHIFTS = ((4, 1), (16, 2))
"""The first 4 measurements each move an estimate half the way, up to the 16th a quarter, later ones an eighth."""
LAST_SHIFT = 3


JOINING = 5
"""One more inference of a language model beside others slows each by a fifth of what it takes alone: they share every reading of
the weights (four at once say 2.5 times the tokens of one; docs/performance.md)."""


def stretched(alone_us: int, beside: int, other_models: int = 0) -> int:
    """How long a job takes that takes ``alone_us`` alone, with ``beside`` of the same model and ``other_models`` at work."""
    return alone_us * (JOINING * (1 + other_models) + beside) // JOINING


def shared(alone: int, together: int) -> int:
    """What each of ``together`` jobs of one model takes of the board, in time or energy, if one alone takes ``alone``."""
    return alone * (JOINING + together - 1) // (JOINING * together)


@dataclass(frozen=True, slots=True)
class CostParts:
    """One option's cost, taken apart for ``sly explain``; ``total_us`` is what is compared."""

    busy_us: int
    wait_us: int
    transfer_us: int
    energy_us: int
    lateness_us: int
    quality_us: int
    kv_us: int = 0
    """Bringing the past of a session to where its next turn runs."""
    congestion_us: int = 0
    """What its busy time takes from others, on a board that is booked by the agreed table."""
    price_us: int = 0
    """Of the cloud."""
    work_us: int = 0
    """What it takes of the board's time: less than ``busy_us`` where several run at once. No cost by itself."""

    @property
    def latency_us(self) -> int:
        return self.busy_us + self.wait_us + self.transfer_us + self.kv_us

    @property
    def total_us(self) -> int:
        return self.latency_us + self.energy_us + self.lateness_us + self.quality_us + self.congestion_us + self.price_us


def option_cost(
    policy: PolicySection,
    *,
    busy_us: int,
    energy_uj: int,
    queue_us: int,
    payload_bytes: int,
    remote: bool,
    budget_us: int,
    quality_permille: int,
    kv_us: int = 0,
    booked_us: int = 0,
    price_us: int = 0,
    work_us: int | None = None,
) -> CostParts:
    """The cost of one (model, board) option: its work, the work before it, the way there, the way of its session's KV
    (``kv_us``), and what it falls short in.

    ``payload_bytes`` travel only when ``remote``; ``budget_us`` is what is left of the deadline; ``booked_us`` is the work that
    the board is booked for within the policy's horizon; ``work_us`` is what this takes of the board's time, if not ``busy_us``.
    """
    transfer_us = policy.link_latency_us + payload_bytes * 1000 // policy.link_bytes_per_ms if remote else 0
    work_us = busy_us if work_us is None else work_us
    late_us = max(0, busy_us + queue_us + transfer_us + kv_us - budget_us)
    return CostParts(
        busy_us=busy_us,
        wait_us=queue_us,
        transfer_us=transfer_us,
        energy_us=energy_uj * policy.energy_us_per_mj // 1000,
        lateness_us=late_us * policy.lateness_factor,
        quality_us=(1000 - quality_permille) * policy.quality_us_per_permille,
        kv_us=kv_us,
        congestion_us=policy.congestion_factor * work_us * booked_us // policy.horizon_us,
        price_us=price_us,
        work_us=work_us,
    )


def expected_cost(offer: ModelOffer, shape: int) -> ShapeCost:
    """What a request of ``shape`` costs by an offer: as told, or else as the offer's figure for no known shape; for talk that is
    of an answer of typical length, and others are in proportion."""
    if offer.task != CHAT or shape < TALK_SHAPE or any(each.shape == shape for each in offer.shapes):
        return offer.cost_of(shape)
    return ShapeCost(shape, max(1, _in_proportion(offer.busy_us, shape)), _in_proportion(offer.energy_uj, shape))


class CostBook:
    """What this board has learned: busy time and energy by (model, shape), with confidence and spread.

    Bounded by the models that are hosted and the number of shapes there are.
    """

    def __init__(self) -> None:
        self.offers: dict[str, ModelOffer] = {}
        """The hosted models at what they cost now."""
        self._pages: dict[str, _Page] = {}

    def host(self, offer: ModelOffer) -> None:
        """A model is hosted at this prior. What was learned of it is kept if the prior is the same as before."""
        page = self._pages.get(offer.model)
        if page is None or page.prior != offer:
            page = self._pages[offer.model] = _Page(offer)
        self.offers[offer.model] = page.offer()

    def withdraw(self, model: str) -> None:
        self.offers.pop(model, None)
        self._pages.pop(model, None)

    def learn(self, model: str, shape: int, busy_us: int, energy_uj: int) -> None:
        """One inference has taken the board up for ``busy_us``. Of a model that is not hosted nothing is learned."""
        page = self._pages.get(model)
        if page is not None:
            page.learn(shape, min(max(1, busy_us), MAX_COST), min(max(0, energy_uj), MAX_COST))
            self.offers[model] = page.offer()

    def offer(self, model: str) -> ModelOffer:
        """The prior corrected, with the shapes that were measured most. Raises ``KeyError`` for what is not hosted."""
        return self.offers[model]

    def cost(self, model: str, shape: int) -> ShapeCost:
        """What an inference of this shape is expected to cost. Raises ``KeyError`` for a model that is not hosted."""
        return self._pages[model].cost(shape)

    def spread_us(self, model: str, shape: int) -> int:
        """The mean absolute deviation of the busy time of one shape; as much as the cost itself while it was never measured.

        Raises ``KeyError`` for a model that is not hosted.
        """
        page = self._pages[model]
        known = page.shapes.get(shape)
        return known.busy.spread >> FRACTION_BITS if known else page.cost(shape).busy_us


@dataclass(slots=True)
class _Estimate:
    """An exponential average in integers, in any unit, with its mean absolute deviation."""

    value: int
    spread: int = 0
    measured: int = 0
    _wild: int = 0
    """How many wild ones came in a row: above the estimate when positive, under it when negative."""
    _mildest: int = 0

    def learn(self, sample: int) -> None:
        if self._is_new_state(sample):
            self.spread = max(self.spread, abs(self._mildest - self.value))
            self.value, self.measured, self._wild = self._mildest, AGREEING, 0
            return
        shift = next((shift for below, shift in GAIN_SHIFTS if self.measured < below), LAST_SHIFT)
        difference = min(sample, 2 * self.value) - self.value
        self.spread += (abs(difference) - self.spread) >> shift
        self.value += difference >> shift
        self.measured = min(self.measured + 1, MAX_MEASURED)

    def _is_new_state(self, sample: int) -> bool:
        """Is ``sample`` wild, and the last of enough that agree?"""
        side = (sample > WILD * self.value) - (WILD * sample < self.value)
        if side == 0:
            self._wild = 0
        elif side * self._wild > 0:
            self._wild += side
            self._mildest = min(self._mildest, sample) if side > 0 else max(self._mildest, sample)
        else:
            self._wild, self._mildest = side, sample
        return abs(self._wild) == AGREEING


@dataclass(slots=True)
class _Learned:
    """Busy time and energy of one shape, or as factors of the prior."""

    busy: _Estimate
    energy: _Estimate


def _unlearned_factors() -> _Learned:
    return _Learned(_Estimate(1 << FACTOR_BITS), _Estimate(1 << FACTOR_BITS))


@dataclass(slots=True)
class _Page:
    """Of one hosted model: its prior, what all its inferences are to it, and what each shape was measured at."""

    prior: ModelOffer
    shapes: dict[int, _Learned] = field(default_factory=dict)
    factors: _Learned = field(default_factory=_unlearned_factors)

    def learn(self, shape: int, busy_us: int, energy_uj: int) -> None:
        if shape not in self.shapes:
            begun = self.cost(shape)
            busy = _Estimate(begun.busy_us << FRACTION_BITS, begun.busy_us << FRACTION_BITS)
            self.shapes[shape] = _Learned(busy, _Estimate(begun.energy_uj << FRACTION_BITS))
        known = self.shapes[shape]
        known.busy.learn(busy_us << FRACTION_BITS)
        known.energy.learn(energy_uj << FRACTION_BITS)
        prior_busy_us, prior_energy_uj = self._prior(shape)
        self.factors.busy.learn((busy_us << FACTOR_BITS) // max(1, prior_busy_us))
        self.factors.energy.learn((energy_uj << FACTOR_BITS) // max(1, prior_energy_uj))

    def cost(self, shape: int) -> ShapeCost:
        if known := self.shapes.get(shape):
            return _told(shape, known.busy.value >> FRACTION_BITS, known.energy.value >> FRACTION_BITS, known.busy.measured)
        return self._by_factor(shape, *self._prior(shape))

    def offer(self) -> ModelOffer:
        most = sorted(self.shapes, key=lambda shape: (-self.shapes[shape].busy.measured, shape))[:MAX_SHAPES]
        typical = self._by_factor(0, self.prior.busy_us, self.prior.energy_uj)
        return replace(
            self.prior,
            busy_us=typical.busy_us,
            energy_uj=typical.energy_uj,
            shapes=tuple(self.cost(shape) for shape in sorted(most)),
            measured=min(sum(known.busy.measured for known in self.shapes.values()), MAX_MEASURED),
        )

    def _prior(self, shape: int) -> tuple[int, int]:
        """Busy µs and µJ before anything was measured."""
        offer = self.prior
        if offer.task != CHAT or shape < TALK_SHAPE:
            return offer.busy_us, offer.energy_uj
        return _in_proportion(offer.busy_us, shape), _in_proportion(offer.energy_uj, shape)

    def _by_factor(self, shape: int, busy_us: int, energy_uj: int) -> ShapeCost:
        busy, energy = self.factors.busy.value, self.factors.energy.value
        return _told(shape, busy_us * busy >> FACTOR_BITS, energy_uj * energy >> FACTOR_BITS)


def _told(shape: int, busy_us: int, energy_uj: int, measured: int = 0) -> ShapeCost:
    return ShapeCost(shape, min(max(1, busy_us), MAX_COST), min(energy_uj, MAX_COST), measured)


def _in_proportion(cost: int, shape: int) -> int:
    """What an answer of the length of ``shape`` costs if one of typical length costs ``cost``."""
    return min(cost * answer_tokens_of(shape) // answer_tokens_of(TYPICAL_SHAPE), MAX_COST)
