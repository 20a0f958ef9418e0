"""What the rows of the placement benchmark say of the goals.

Definitions.  *Attainment*: the share of requests within all their limits.  *Goodput*: those requests a second.  A placer
*sustains* a load when its attainment is at least a share (99 %, or 90 % as DistServe defines goodput, arXiv 2401.09670) there
and at every lower load of the sweep; between two loads of the sweep attainment is taken to be straight.  The *load where a
placer begins to miss deadlines* is the highest that it sustains at 99 %.  Rules: figures are made for each seed alone, then
meant.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.placement_cases import Case, Row

SHARES = (0.99, 0.90)
GOODPUT_GOAL = 1.3
ENERGY_GOAL = 0.20


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one figure over the seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> Spread:
        """Raises ``ValueError`` for none."""
        seen = list(figures)
        if not seen:
            raise ValueError("no figure")
        return cls(statistics.fmean(seen), min(seen), max(seen))

    def text(self, digits: int = 2) -> str:
        if round(self.low, digits) == round(self.high, digits):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True, slots=True)
class Sweep:
    """One placer on one workload with one seed: its rows by load."""

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Sweep:
        return cls(tuple(sorted(rows, key=lambda row: row.case.load_permille)))

    def sustained_per_s(self, share: float) -> float:
        """The highest offered load that is sustained, in requests a second; 0 if none of the sweep is, its last if all are."""
        below: Row | None = None
        for row in self.rows:
            if row.attainment_steady < share:
                return _crossing(below, row, share) if below else 0.0
            below = row
        return below.offered_per_s if below else 0.0

    def holds_to_the_end(self, share: float) -> bool:
        """Is it sustained at every load of the sweep, so that the true load is higher than what is said?"""
        return all(row.attainment_steady >= share for row in self.rows)

    def at(self, offered_per_s: float, figure: Callable[[Row], float]) -> float:
        """A figure at an offered load, straight between the loads of the sweep, its end beyond them."""
        pairs = [(row.offered_per_s, figure(row)) for row in self.rows]
        for (x0, y0), (x1, y1) in zip(pairs, pairs[1:], strict=False):
            if offered_per_s <= x1:
                share = min(1.0, max(0.0, (offered_per_s - x0) / (x1 - x0)))
                return y0 + (y1 - y0) * share
        return pairs[-1][1]


def _crossing(above: Row, under: Row, share: float) -> float:
    part = (above.attainment_steady - share) / (above.attainment_steady - under.attainment_steady)
    return above.offered_per_s + (under.offered_per_s - above.offered_per_s) * part


@dataclass(frozen=True, slots=True)
class Contest:
    """All sweeps of one fleet and workload: by placer's name, then by seed."""

    sweeps: Mapping[str, Mapping[int, Sweep]]

    @classmethod
    def of(cls, rows: Mapping[Case, Row], fleet: str, workload: str) -> Contest:
        grouped: dict[str, dict[int, list[Row]]] = {}
        for case, row in rows.items():
            if (case.fleet, case.workload) == (fleet, workload):
                grouped.setdefault(case.name, {}).setdefault(case.seed, []).append(row)
        return cls({name: {seed: Sweep.of(of_seed) for seed, of_seed in seeds.items()} for name, seeds in grouped.items()})

    @property
    def seeds(self) -> list[int]:
        return sorted(next(iter(self.sweeps.values()), {}))

    def swept(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that were run at every load, so that what they sustain can be compared."""
        runs = {name: {seed: len(sweep.rows) for seed, sweep in seeds.items()} for name, seeds in self.sweeps.items()}
        most = max(runs.values(), key=lambda counts: sum(counts.values()), default={})
        return [name for name in names if runs.get(name) == most]

    def sustained(self, name: str, share: float) -> Spread:
        return Spread.of(sweep.sustained_per_s(share) for sweep in self.sweeps[name].values())

    def best(self, names: Sequence[str], share: float) -> str:
        """Of ``names`` the one that sustains the highest load; among equals the one with the most goodput at the highest load."""
        return max(names, key=lambda name: (self.sustained(name, share).mean, self._most(name), name))

    def _most(self, name: str) -> float:
        return statistics.fmean(sweep.rows[-1].goodput_per_s for sweep in self.sweeps[name].values())

    def load_ratio(self, ours: str, other: str, share: float) -> Spread | None:
        """By how much more load ours sustains; ``None`` where the other sustains none."""
        pairs = [self._both(ours, other, seed, share) for seed in self.seeds]
        if any(not theirs for _, theirs in pairs):
            return None
        return Spread.of(mine / theirs for mine, theirs in pairs)

    def _both(self, ours: str, other: str, seed: int, share: float) -> tuple[float, float]:
        return self.sweeps[ours][seed].sustained_per_s(share), self.sweeps[other][seed].sustained_per_s(share)

    def goodput_beyond(self, ours: str, other: str, share: float, factor: float = GOODPUT_GOAL) -> Spread | None:
        """Goodput of ours at ``factor`` times the load that the other sustains, over the other's goodput at that load."""
        ratios = []
        for seed in self.seeds:
            load_per_s = self.sweeps[other][seed].sustained_per_s(share)
            theirs = self.sweeps[other][seed].at(load_per_s, _goodput)
            if not load_per_s or not theirs:
                return None
            ratios.append(self.sweeps[ours][seed].at(load_per_s * factor, _goodput) / theirs)
        return Spread.of(ratios)

    def goodput_beside(self, ours: str, other: str, share: float, factor: float = GOODPUT_GOAL) -> Spread | None:
        """Goodput of ours over that of the other, both at ``factor`` times the load that the other sustains."""
        ratios = []
        for seed in self.seeds:
            load_per_s = self.sweeps[other][seed].sustained_per_s(share) * factor
            theirs = self.sweeps[other][seed].at(load_per_s, _goodput)
            if not load_per_s or not theirs:
                return None
            ratios.append(self.sweeps[ours][seed].at(load_per_s, _goodput) / theirs)
        return Spread.of(ratios)

    def energy_saved(self, ours: str, other: str, share: float, *, with_idle: bool) -> Spread | None:
        """The share of the other's energy a request that ours does without, at the highest load of the other's own where both
        sustain ``share``: so goodput is equal to within ``1 - share``."""
        figure: Callable[[Row], float] = _all_mj if with_idle else _dynamic_mj
        saved = []
        for seed in self.seeds:
            load_per_s = min(self._both(ours, other, seed, share))
            theirs = self.sweeps[other][seed].at(load_per_s, figure)
            if not load_per_s or not theirs:
                return None
            saved.append(1 - self.sweeps[ours][seed].at(load_per_s, figure) / theirs)
        return Spread.of(saved)


def _goodput(row: Row) -> float:
    return row.goodput_per_s


def _dynamic_mj(row: Row) -> float:
    return row.mj


def _all_mj(row: Row) -> float:
    return row.mj_all
