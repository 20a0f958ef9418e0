"""What a turn may cost and how far it may travel, besides what it says.

Owns ``Terms`` and its two forms: the object ``slyos`` in the body of an HTTP request, for people (milliseconds, millijoules), and
a list on the local socket (microseconds, microjoules).  Rules: what is absent has its default; a name that is not known is
refused, for a limit that is not kept is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import MAX_DEADLINE_US, DataClass, Limits, TrustTier, bounded

TALK_DEADLINE_US = 600_000_000
"""From a turn's arrival to its end, waiting and reading its prompt included."""
FIELD = "slyos"
TIERS = {tier.name.lower(): tier for tier in (TrustTier.NONE, TrustTier.WARNING, TrustTier.AFFIRMING)}
MAX_ENERGY_MJ = 10**9
_KNOWN = ("data", "trust", "deadline_ms", "quality", "energy_mj")


@dataclass(frozen=True, slots=True)
class Terms:
    limits: Limits = Limits(TALK_DEADLINE_US)
    data: DataClass = DataClass.PRIVATE

    @classmethod
    def from_json(cls, value: object) -> Terms:
        """The terms in the object ``slyos``. Raises ``RefusedError`` whose subject is the field at fault."""
        if not isinstance(value, Mapping):
            raise RefusedError(FIELD, shown(value), f"an object with any of {', '.join(_KNOWN)}")
        if unknown := next((name for name in value if name not in _KNOWN), None):
            raise RefusedError(f"{FIELD}.{unknown}", "an unknown name", ", ".join(_KNOWN))
        limits = Limits(
            deadline_us=_whole(value, "deadline_ms", TALK_DEADLINE_US // 1000, 1, MAX_DEADLINE_US // 1000, "ms") * 1000,
            energy_uj=_whole(value, "energy_mj", 1, 1, MAX_ENERGY_MJ, "mJ") * 1000 if "energy_mj" in value else None,
            quality_permille=_whole(value, "quality", 0, 0, 1000, "per mille"),
            trust=TIERS[_one_of(value, "trust", "none", tuple(TIERS))],
        )
        return cls(limits, DataClass(_one_of(value, "data", DataClass.PRIVATE.value, tuple(DataClass))))

    def as_json(self) -> dict[str, object]:
        """What differs from the default; limits rounded down, but not to nothing."""
        limits, told = self.limits, dict[str, object]()
        if self.data is not DataClass.PRIVATE:
            told["data"] = self.data.value
        if limits.trust is not TrustTier.NONE:
            told["trust"] = limits.trust.name.lower()
        if limits.deadline_us != TALK_DEADLINE_US:
            told["deadline_ms"] = max(1, limits.deadline_us // 1000)
        if limits.quality_permille:
            told["quality"] = limits.quality_permille
        if limits.energy_uj is not None:
            told["energy_mj"] = max(1, limits.energy_uj // 1000)
        return told

    def as_list(self) -> list[object]:
        limits = self.limits
        return [self.data.value, limits.trust.value, limits.deadline_us, limits.quality_permille, limits.energy_uj or 0]

    @classmethod
    def from_list(cls, value: object) -> Terms:
        """Inverse of ``as_list``. Raises ``RefusedError`` for anything else."""
        match value:
            case [str(data), int(trust), int(deadline_us), int(quality_permille), int(energy_uj)]:
                if data in tuple(DataClass) and trust in tuple(TIERS.values()):
                    limits = Limits(deadline_us, energy_uj or None, quality_permille, TrustTier(trust))
                    return cls(limits, DataClass(data))
        raise RefusedError("terms of a turn", value, "[data, trust, deadline_us, quality_permille, energy_uj]")


def _whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int, unit: str) -> int:
    return bounded(f"{FIELD}.{name}", given.get(name, default), low, high, unit)


def _one_of(given: Mapping[str, Any], name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = given.get(name, default)
    if value in allowed:
        return str(value)
    raise RefusedError(f"{FIELD}.{name}", shown(value), ", ".join(allowed))
