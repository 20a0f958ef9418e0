"""What a board tells of its costs, its memory and its heat: what was told stays until it is off by more than chance.

Rules: this is the writer's own affair, like what ``node.arrivals`` tells of demand, so that measurements which step over a
rounding do not make all boards plan anew; the board itself decides by what it measured last.  A cost stays until it is off by a
fifth, a shape until another was measured twice as often; and small changes go out together with everybody's (``Waves``).  Of free
memory never more is told than there is, and never a lower temperature: that goes up at once, and down when it is 1.5 K off;
near the trip point it is told as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from edge_agent.core.kv import KvState
from edge_agent.core.values import MAX_SHAPES, ModelOffer, ShapeCost
from edge_agent.placement.cost import CostBook
from edge_agent.placement.facts import COOL_STEP_MDEGC

WAVE_PERIOD_US = 10_000_000
WAVE_US = 2_500_000
"""A record a second, heard by all, and their records of the next second."""
BAND_PERMILLE, MAX_BAND_PERMILLE = 200, 500
"""What is off by so much is told anew, or by as much more as the measurements scatter."""
CHANCE_PERMILLE = 700
"""An average that moves by an eighth deviates by a third of what single measurements do (their mean absolute deviation); twice
that is chance."""
URGENT_PERMILLE = 1000
"""What is off by so much does not wait for the next wave."""
ROOM_STEPS = 8
"""Free memory is told in steps of such a part of the most that was ever free."""
HEAT_STEP_MDEGC, HEAT_BAND_MDEGC = 500, 1_500
"""Temperatures are told in such steps, and what was told stays while it is warmer than the board by less than the band: what
trembles by two steps is soon said no more.  (A Raspberry Pi 4's sensor counts by 487 m°C: ``coefficients`` in Linux's
bcm2711.dtsi.)  Within ``COOL_STEP_MDEGC`` of the trip point they are told as they are, for there a degree decides."""
Forecast = tuple[int, int, int]


class Waves:
    """When small changes may be told: at the same time as everybody's, so that all tables change together and then hold still.

    The first change in ``WAVE_PERIOD_US``, whoever makes it, begins a wave; who has something to say says it within ``WAVE_US``.
    """

    def __init__(self) -> None:
        self._began_us: int | None = None

    def moved(self, now_us: int) -> None:
        """The facts that this board reckons from have changed."""
        if self._began_us is None or now_us - self._began_us >= WAVE_PERIOD_US:
            self._began_us = now_us

    def are_open(self, now_us: int) -> bool:
        return self._began_us is None or not WAVE_US <= now_us - self._began_us < WAVE_PERIOD_US


@dataclass(slots=True)
class _Room:
    """What is told of one model's free memory: less at once, more when there was more throughout a wave's period."""

    told_bytes: int = 0
    _most_bytes: int = 0
    _least_bytes: int = 0
    """Since ``_since_us``."""
    _since_us: int = 0

    def told(self, free_bytes: int, now_us: int, may_change: bool) -> int:
        self._most_bytes = max(self._most_bytes, free_bytes)
        self._least_bytes = min(self._least_bytes, free_bytes)
        if free_bytes < self.told_bytes or not self.told_bytes:
            self.told_bytes = self._step(free_bytes)
        elif may_change and now_us - self._since_us >= WAVE_PERIOD_US:
            self.told_bytes = max(self.told_bytes, self._step(self._least_bytes))
            self._least_bytes, self._since_us = free_bytes, now_us
        return self.told_bytes

    def _step(self, free_bytes: int) -> int:
        """Whole steps; the last one by powers of two, down to nothing."""
        return free_bytes - free_bytes % max(1, self._most_bytes // ROOM_STEPS) or _power_below(free_bytes)


class Told:
    """Between what a board has learned (``costs``) and its records; what is told depends on what was told before.

    ``may_change``: small changes are told too (``Waves``).
    """

    def __init__(self, costs: CostBook) -> None:
        self._costs = costs
        self._offers: dict[str, ModelOffer] = {}
        self._states: dict[str, KvState] = {}
        self._rooms: dict[str, _Room] = {}
        self._heat: tuple[int, ...] = ()

    def offers(self, models: Iterable[str], may_change: bool = True) -> tuple[ModelOffer, ...]:
        """The offers of these models as they are told now. Raises ``KeyError`` for what is not hosted."""
        self._offers = {model: self._offer(self._costs.offer(model), may_change) for model in models}
        return tuple(self._offers.values())

    def states(self, states: Iterable[KvState], now_us: int, may_change: bool = True) -> tuple[KvState, ...]:
        """The KV states as they are told now: queues and sessions are what they are, the rest is seldom told anew."""
        self._states = {state.model: self._state(state, now_us, may_change) for state in states}
        self._rooms = {model: room for model, room in self._rooms.items() if model in self._states}
        return tuple(self._states.values())

    def heat(
        self, temperature_mdegc: int | None, forecast_mdegc: Forecast | None, trip_mdegc: int | None
    ) -> tuple[int | None, Forecast | None]:
        """The temperature and its forecast as they are told now: never cooler than they are, and warmer at once."""
        if temperature_mdegc is None:
            self._heat = ()
            return None, forecast_mdegc
        now = (temperature_mdegc, *(forecast_mdegc or ()))
        told = (*self._heat, *[None] * len(now))
        self._heat = tuple(_settled_heat(*each, trip_mdegc) for each in zip(told, now, strict=False))
        return self._heat[0], (self._heat[1], self._heat[2], self._heat[3]) if forecast_mdegc else None

    def _offer(self, now: ModelOffer, may_change: bool) -> ModelOffer:
        told = self._offers.get(now.model)
        if told is None or _named(told) != _named(now) or not now.measured or now.measured < told.measured:
            return self._settled_offer(replace(now, shapes=()), now)
        return self._settled_offer(told, now) if may_change or self._is_urgent(told, now) else told

    def _is_urgent(self, told: ModelOffer, now: ModelOffer) -> bool:
        """Is anything that was told off by twice?"""
        costs = [(each, self._costs.cost(now.model, each.shape)) for each in told.shapes]
        pairs = [(told.busy_us, now.busy_us), *((one.busy_us, other.busy_us) for one, other in costs)]
        return any(_settled(before, after, URGENT_PERMILLE) != before for before, after in pairs)

    def _settled_offer(self, told: ModelOffer, now: ModelOffer) -> ModelOffer:
        shapes, before = self._shapes(told, now), {each.shape: each for each in told.shapes}
        bands = {each.shape: self._band_permille(now.model, each) for each in shapes}
        widest = max(bands.values(), default=BAND_PERMILLE)
        return replace(
            now,
            busy_us=_settled(told.busy_us, now.busy_us, widest),
            energy_uj=_settled(told.energy_uj, now.energy_uj, widest),
            shapes=tuple(_settled_cost(before.get(each.shape, each), each, bands[each.shape]) for each in shapes),
            measured=_power_below(now.measured),
        )

    def _band_permille(self, model: str, cost: ShapeCost) -> int:
        """By how much a cost may be off what is told: what measurements scatter by chance, within bounds."""
        chance_permille = CHANCE_PERMILLE * self._costs.spread_us(model, cost.shape) // cost.busy_us
        return min(max(BAND_PERMILLE, chance_permille), MAX_BAND_PERMILLE)

    def _shapes(self, told: ModelOffer, now: ModelOffer) -> list[ShapeCost]:
        """What the shapes cost that are to be told, ascending: those that were told, with those that are new or used far more."""
        costs = [self._costs.cost(now.model, each.shape) for each in told.shapes]
        kept = sorted((each for each in costs if each.measured), key=_by_use)
        known = {each.shape for each in kept}
        for new in sorted((each for each in now.shapes if each.shape not in known), key=_by_use, reverse=True):
            if len(kept) < MAX_SHAPES:
                kept.append(new)
            elif new.measured >= 2 * kept[0].measured:
                kept[0] = new
            kept.sort(key=_by_use)
        return sorted(kept, key=lambda each: each.shape)

    def _state(self, now: KvState, now_us: int, may_change: bool) -> KvState:
        told = self._states.get(now.model)
        if told is None or told.fingerprint != now.fingerprint:
            told = now
            self._rooms[now.model] = _Room()
        return replace(
            now,
            free_bytes=self._rooms[now.model].told(now.free_bytes, now_us, may_change),
            prefill_tok_s=_speed(told.prefill_tok_s, now.prefill_tok_s, may_change),
            ram_tok_s=_speed(told.ram_tok_s, now.ram_tok_s, may_change),
            disk_tok_s=_speed(told.disk_tok_s, now.disk_tok_s, may_change),
        )


def _named(offer: ModelOffer) -> tuple[object, ...]:
    """What is the model's own, and is not learned."""
    return offer.task, offer.digest, offer.quality_permille, offer.parallel


def _by_use(cost: ShapeCost) -> tuple[int, int]:
    return cost.measured, -cost.shape


def _settled_cost(told: ShapeCost, now: ShapeCost, band_permille: int) -> ShapeCost:
    busy_us, energy_uj = (
        _settled(told.busy_us, now.busy_us, band_permille),
        _settled(told.energy_uj, now.energy_uj, band_permille),
    )
    return ShapeCost(now.shape, busy_us, energy_uj, _power_below(now.measured))


def _speed(told: int, now: int, may_change: bool) -> int:
    return _settled(told, now) if may_change or not told else told


def _settled(told: int, now: int, band_permille: int = BAND_PERMILLE) -> int:
    """What was told, while the larger of the two is over the smaller by no more than ``band_permille``."""
    return told if 1000 * max(told, now) <= (1000 + band_permille) * min(told, now) else now


def _settled_heat(told_mdegc: int | None, now_mdegc: int, trip_mdegc: int | None) -> int:
    if trip_mdegc is not None and trip_mdegc - now_mdegc < COOL_STEP_MDEGC:
        return now_mdegc
    if told_mdegc is not None and 0 <= told_mdegc - now_mdegc < HEAT_BAND_MDEGC:
        return told_mdegc
    return -(-now_mdegc // HEAT_STEP_MDEGC) * HEAT_STEP_MDEGC


def _power_below(number: int) -> int:
    return 1 << number.bit_length() - 1 if number else 0
