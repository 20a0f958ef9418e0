"""The kernel's thermal zones, read and not assumed.

Rule: the trip point that throttles is a ``passive`` one (Linux Documentation/driver-api/thermal/sysfs-api.rst: active
trips drive fans, passive ones slow the processor, hot and critical ones end it).  A zone that gives no reading says why.
"""

from __future__ import annotations

from dataclasses import dataclass

from board_support.board import Reading
from board_support.sysfs import HIGHEST_MDEGC, LOWEST_MDEGC, Absent, Tree, known

ZONE_FOLDERS = ("sys/devices/virtual/thermal/thermal_zone[0-9]*", "sys/class/thermal/thermal_zone[0-9]*")


@dataclass(frozen=True, slots=True)
class Zone:
    """One thermal zone. ``passive_mdegc`` is its lowest trip that throttles."""

    name: str
    temperature_mdegc: int | Absent
    passive_mdegc: int | None

    @property
    def reading(self) -> Reading:
        note = self.temperature_mdegc.reason if isinstance(self.temperature_mdegc, Absent) else ""
        return Reading(f"temperature {self.name}", known(self.temperature_mdegc), "mdegC", note)

    @property
    def throttles(self) -> bool:
        temperature = known(self.temperature_mdegc)
        return temperature is not None and self.passive_mdegc is not None and temperature >= self.passive_mdegc


def thermal_zones(tree: Tree) -> list[Zone]:
    """Every zone of the first folder that has any."""
    for pattern in ZONE_FOLDERS:
        if folders := tree.matches(pattern):
            return [_zone(tree, folder) for folder in folders]
    return []


def _zone(tree: Tree, folder: str) -> Zone:
    kind = tree.text(f"{folder}/type")
    name = folder.rsplit("/", 1)[-1] if isinstance(kind, Absent) else kind[:64]
    trips = [_passive_trip(tree, path) for path in tree.matches(f"{folder}/trip_point_[0-9]*_temp")]
    lowest = min((trip for trip in trips if trip is not None), default=None)
    return Zone(name, tree.number(f"{folder}/temp", LOWEST_MDEGC, HIGHEST_MDEGC, "m°C"), lowest)


def _passive_trip(tree: Tree, path: str) -> int | None:
    """A trip without a readable type may throttle, so it counts; a trip at or below zero is an unused slot."""
    kind = tree.text(path.removesuffix("_temp") + "_type")
    if not isinstance(kind, Absent) and kind != "passive":
        return None
    return known(tree.number(path, 1, HIGHEST_MDEGC, "m°C"))


def hottest(zones: list[Zone]) -> int | None:
    return max((zone.temperature_mdegc for zone in zones if not isinstance(zone.temperature_mdegc, Absent)), default=None)


def lowest_trip(zones: list[Zone]) -> int | None:
    return min((zone.passive_mdegc for zone in zones if zone.passive_mdegc is not None), default=None)


def throttling(zones: list[Zone]) -> tuple[str, ...]:
    """In words, which zones are at or over the trip that slows the processor."""
    return tuple(f"{zone.name} is at its passive trip of {zone.passive_mdegc} m°C" for zone in zones if zone.throttles)
