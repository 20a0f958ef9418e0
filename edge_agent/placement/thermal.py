"""How warm a board will be: a two-node RC model, fitted on line to what its sensors say.

Owns ``ThermalModel`` and ``Heat``.  Rules: integers only, so that the same samples give the same forecast anywhere; no clock but
the samples' own times; nothing that a sensor may say raises.  A model is believed only while it has beaten "it stays as it is"
on samples that came after it was fitted; until then there is no forecast.

The network (die -> sink -> ambient) is linear, so the die is, in modal form,
``T(t) = A + R1 (P * h1)(t) + R2 (P * h2)(t) + c exp(-t / tau2)``; ``P * h`` is the power behind a first-order low pass with one
of the two time constants, the last term what the sink was warmer or colder at the first sample.  For a pair of time constants
the rest is linear least squares.  So a small grid of time constants shares one table of sums of products, and every few samples
the pair with the least error is taken (separable least squares: Golub and Pereyra, 1973).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

HORIZONS_S = (10, 30, 60)
FAST_MS = (4_000, 7_000, 12_000, 20_000, 34_000)
SLOW_MS = (70_000, 130_000, 240_000, 440_000, 800_000)
"""Time constants that are tried, of the die and of the sink."""
RECENT = 2
"""Of ``FAST_MS``: over about 12 s, what the board draws lately."""
MIN_MDEGC, MAX_MDEGC = -60_000, 250_000
MAX_POWER_MW = 10_000_000
MAX_GAP_US = 60_000_000
"""After so long without a sample nobody knows what the board drew: the model begins anew."""
FIRST_FIT, FIT_EVERY = 16, 8
"""Samples."""
HALVED_EVERY = 1024
"""Samples after which what was seen before counts half: the air and the fan change."""
REFERENCE_MDEGC = 30_000
"""Where ambient is thought to be before anything is known."""
FRACTION_BITS = 16
"""Of low passes, decays and resistances."""
TRANSIENT = 1024
"""``exp(-t / tau2)`` is kept in so many parts: coarse, since it is one number for all of the past."""
WEIGHT = 1024
PRIORS = (WEIGHT // 1024, WEIGHT, WEIGHT, WEIGHT // 4)
"""How firmly A is held to ``REFERENCE_MDEGC`` and R1, R2, c to 0: about a sample's worth, which matters only where the samples
say nothing."""
JUDGED_AFTER_US = 25_000_000
LEAST_CHANGE_MDEGC = 400
"""Smaller changes say nothing about a model: a sensor counts in steps."""
LEAST_JUDGED = 6
FORGETTING_SHIFT = 5
MAX_RISE_MDEGC = 60_000
"""A forecast further than this from now is no forecast."""


@dataclass(frozen=True, slots=True)
class _Fit:
    """``fast`` and ``slow`` number the time constants; resistances in 1/65536 m°C a mW; ``left`` in m°C a part of ``TRANSIENT``,
    in 1/65536."""

    fast: int
    slow: int
    r1: int
    r2: int
    left: int

    def change_mdegc(self, before: _State, after: _State) -> int:
        """What the temperature changes by between two states."""
        rise = self.r1 * (after.fast[self.fast] - before.fast[self.fast])
        rise += self.r2 * (after.slow[self.slow] - before.slow[self.slow])
        return (rise >> 2 * FRACTION_BITS) + (self.left * (after.left[self.slow] - before.left[self.slow]) >> 2 * FRACTION_BITS)


@dataclass(frozen=True, slots=True)
class _State:
    """The power behind each low pass in 1/65536 mW, and what is left of the first moment for each slow one in
    1/65536 of a part of ``TRANSIENT``."""

    fast: tuple[int, ...]
    slow: tuple[int, ...]
    left: tuple[int, ...]

    @classmethod
    def settled(cls, power_mw: int) -> _State:
        power = power_mw << FRACTION_BITS
        return cls((power,) * len(FAST_MS), (power,) * len(SLOW_MS), (TRANSIENT << FRACTION_BITS,) * len(SLOW_MS))

    def after(self, interval_ms: int, power_mw: int) -> _State:
        """So much later, if ``power_mw`` was drawn all the while: exact for any interval."""
        power = power_mw << FRACTION_BITS
        fast = [decay(interval_ms, constant_ms) for constant_ms in FAST_MS]
        slow = [decay(interval_ms, constant_ms) for constant_ms in SLOW_MS]
        return _State(
            tuple(power + ((value - power) * kept >> FRACTION_BITS) for value, kept in zip(self.fast, fast, strict=True)),
            tuple(power + ((value - power) * kept >> FRACTION_BITS) for value, kept in zip(self.slow, slow, strict=True)),
            tuple(value * kept >> FRACTION_BITS for value, kept in zip(self.left, slow, strict=True)),
        )

    def columns(self, temperature_mdegc: int) -> list[int]:
        """What least squares sums the products of: 1, T, the low passes in mW, the transients."""
        values = (*self.fast, *self.slow, *self.left)
        return [1, temperature_mdegc - REFERENCE_MDEGC, *(value >> FRACTION_BITS for value in values)]


COLUMNS = 2 + len(FAST_MS) + 2 * len(SLOW_MS)


@dataclass(frozen=True, slots=True)
class _Judged:
    """A sample that a fit will be judged by, with that fit."""

    at_us: int
    temperature_mdegc: int
    state: _State
    fit: _Fit


class ThermalModel:
    """``observe`` about every two seconds; ``forecast`` is ``None`` until the model is fit and has proved itself.

    Power may be in any unit that heat is proportional to (busy per mille, say, where nothing measures mW), always the same one.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._at_us = self._temperature_mdegc = self._power_mw = self._samples = 0
        self._state: _State | None = None
        self._sums = [[0] * COLUMNS for _ in range(COLUMNS)]
        self._fit: _Fit | None = None
        self._judged: deque[_Judged] = deque()
        self._errors_mdegc = self._naive_errors_mdegc = self._judgements = 0

    @property
    def recent_mw(self) -> int | None:
        """What the board drew over the last twelve seconds or so."""
        return None if self._state is None else self._state.fast[RECENT] >> FRACTION_BITS

    def observe(self, now_us: int, temperature_mdegc: int | None, power_mw: int | None) -> None:
        """One reading. One without a temperature or a power says nothing, nor does one that no board can have."""
        if temperature_mdegc is None or not MIN_MDEGC <= temperature_mdegc <= MAX_MDEGC:
            return
        if power_mw is None or not 0 <= power_mw <= MAX_POWER_MW:
            return
        if self._state is None or not 0 <= now_us - self._at_us <= MAX_GAP_US:
            self._begin()
            self._state = _State.settled(power_mw)
        elif (interval_ms := (now_us - self._at_us) // 1000) > 0:
            self._state = self._state.after(interval_ms, (self._power_mw + power_mw) // 2)
        else:
            return
        self._at_us, self._temperature_mdegc, self._power_mw = now_us, temperature_mdegc, power_mw
        self._take(self._state)

    def forecast(self, power_mw: int) -> tuple[int, int, int] | None:
        """The temperature in 10, 30 and 60 s, in m°C, if the board draws ``power_mw`` from now on."""
        if self._fit is None or self._state is None or not self.proven:
            return None
        power_mw = min(max(0, power_mw), MAX_POWER_MW)
        near, middle, far = (self._at(self._fit, self._state, 1000 * seconds, power_mw) for seconds in HORIZONS_S)
        return near, middle, far

    @property
    def proven(self) -> bool:
        """Has the model been nearer to what came than "it stays as it is", by a quarter?"""
        return self._judgements >= LEAST_JUDGED and 4 * self._errors_mdegc < 3 * self._naive_errors_mdegc

    def _at(self, fit: _Fit, state: _State, interval_ms: int, power_mw: int) -> int:
        change = fit.change_mdegc(state, state.after(interval_ms, power_mw))
        return self._temperature_mdegc + min(max(-MAX_RISE_MDEGC, change), MAX_RISE_MDEGC)

    def _take(self, state: _State) -> None:
        columns = state.columns(self._temperature_mdegc)
        for number, (row, value) in enumerate(zip(self._sums, columns, strict=True)):
            for other in range(number, COLUMNS):
                row[other] += value * columns[other]
        self._samples += 1
        self._judge(state)
        if self._samples % HALVED_EVERY == 0:
            self._sums = [[each >> 1 for each in row] for row in self._sums]
        if self._samples >= FIRST_FIT and self._samples % FIT_EVERY == 0:
            self._fit = best_fit(self._sums)

    def _judge(self, state: _State) -> None:
        """Hold what fits of a while ago say of the time since, by the power that was drawn, against what came."""
        while self._judged and self._at_us - self._judged[0].at_us >= JUDGED_AFTER_US:
            then = self._judged.popleft()
            change = self._temperature_mdegc - then.temperature_mdegc
            expected = then.fit.change_mdegc(then.state, state)
            if max(abs(change), abs(expected)) < LEAST_CHANGE_MDEGC:
                continue
            self._judgements += 1
            self._errors_mdegc += abs(change - expected) - (self._errors_mdegc >> FORGETTING_SHIFT)
            self._naive_errors_mdegc += abs(change) - (self._naive_errors_mdegc >> FORGETTING_SHIFT)
        if self._fit is not None:
            self._judged.append(_Judged(self._at_us, self._temperature_mdegc, state, self._fit))


def best_fit(sums: list[list[int]]) -> _Fit | None:
    """The pair of time constants with the least squared error whose resistances no physics forbids; ``None`` if there is none.

    ``sums``: the upper triangle of the sums of products of the columns.
    """
    best: tuple[int, _Fit] | None = None
    for slow in range(len(SLOW_MS)):
        for fast in range(len(FAST_MS)):
            chosen = [0, 2 + fast, 2 + len(FAST_MS) + slow, 2 + len(FAST_MS) + len(SLOW_MS) + slow]
            solved = _least_squares(sums, chosen)
            if solved is None:
                continue
            (_, r1, r2, left), error = solved
            if r1 >= 0 and r2 >= 0 and (best is None or error < best[0]):
                best = error, _Fit(fast, slow, r1, r2, left)
    return best[1] if best else None


def _least_squares(sums: list[list[int]], chosen: list[int]) -> tuple[list[int], int] | None:
    """The coefficients of ``chosen`` columns in 1/65536, and the squared error that they leave; ``None`` if singular."""
    matrix = [[WEIGHT * sums[min(i, j)][max(i, j)] for j in chosen] for i in chosen]
    for number, prior in enumerate(PRIORS):
        matrix[number][number] += prior
    right = [WEIGHT * sums[min(1, i)][max(1, i)] for i in chosen]
    solved = solve(matrix, right)
    if solved is None:
        return None
    error = (WEIGHT * sums[1][1] << FRACTION_BITS) - sum(each * side for each, side in zip(solved, right, strict=True))
    return solved, error


def solve(matrix: list[list[int]], right: list[int]) -> list[int] | None:
    """The solution in 1/65536 of a system of whole numbers, ``None`` if it has not one: elimination without fractions
    (Bareiss, 1968), so that nothing is rounded before the end."""
    size = len(right)
    rows = [[*row, side] for row, side in zip(matrix, right, strict=True)]
    previous = 1
    for pivot in range(size):
        if rows[pivot][pivot] == 0:
            return None
        for row in range(pivot + 1, size):
            factor = rows[row][pivot]
            rows[row] = [
                (rows[pivot][pivot] * each - factor * above) // previous
                for each, above in zip(rows[row], rows[pivot], strict=True)
            ]
        previous = rows[pivot][pivot]
    solution = [0] * size
    for row in reversed(range(size)):
        known = sum(rows[row][other] * solution[other] for other in range(row + 1, size))
        solution[row] = ((rows[row][size] << FRACTION_BITS) - known) // rows[row][row]
    return solution


def decay(interval_ms: int, constant_ms: int) -> int:
    """``exp(-interval / constant)`` in 1/65536, to within 2 parts."""
    halvings = max(0, (interval_ms // constant_ms).bit_length() + 3)
    if halvings > 8:
        return 0
    one = 1 << 32
    exponent = (interval_ms << 32) // constant_ms >> halvings
    series = one - exponent + (exponent * exponent >> 33) - (exponent * exponent * exponent // 6 >> 64)
    for _ in range(halvings):
        series = series * series >> 32
    return series >> 16


class Heat:
    """The heat of this board: what its sensors say, and how near it comes to its trip point within a minute if it goes on so."""

    def __init__(self) -> None:
        self.model = ThermalModel()
        self.forecast_mdegc: tuple[int, int, int] | None = None
        self.headroom_mdegc: int | None = None
        """From the warmest of now and the forecasts to the trip point; ``None`` where nothing is known of either."""
        self._measures_power = False

    def observe(
        self,
        now_us: int,
        temperature_mdegc: int | None,
        trip_mdegc: int | None,
        power_mw: int | None,
        busy_permille: int | None = None,
    ) -> None:
        """One reading of the sensors, ``None`` for what the board has no sensor for.

        ``busy_permille``: how busy it was since the last one; it stands for the power where nothing has ever measured that.
        """
        if power_mw is not None and not self._measures_power:
            self._measures_power, self.model = True, ThermalModel()
        heating = power_mw if self._measures_power else busy_permille
        self.model.observe(now_us, temperature_mdegc, heating)
        recent = self.model.recent_mw
        known = temperature_mdegc is not None and heating is not None and recent is not None
        self.forecast_mdegc = self.model.forecast(recent) if known and recent is not None else None
        if temperature_mdegc is None or trip_mdegc is None:
            self.headroom_mdegc = None
        else:
            self.headroom_mdegc = trip_mdegc - max((temperature_mdegc, *(self.forecast_mdegc or ())))
