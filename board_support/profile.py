"""A machine as numbers: arithmetic, memory, energy, heat.

Owns ``Profile`` and the reader of ``profiles/*.toml``.  Rules: every figure is a bounded whole number with its unit in its
name; a profile file gives every figure and, for every figure, its source; a figure that nobody published has a source
that begins with "assumed".  Nothing here knows a board.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import bounded

MAX_PROFILE_BYTES = 64 * 2**10
MAX_TRIPS = 8
MAX_SOURCE_CHARS = 400
PROFILE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
FORMATS = ("int4", "int8", "int16", "float16", "float32")
ASSUMED = "assumed"

BOUNDS: Mapping[str, tuple[int, int, str]] = {
    "active_mw": (1, 10**7, "mW"),
    "idle_mw": (0, 10**7, "mW"),
    "arrays": (1, 2**16, "MAC arrays"),
    "array_rows": (1, 2**16, "MAC cells"),
    "array_columns": (1, 2**16, "MAC cells"),
    "clock_khz": (1, 10**8, "kHz"),
    "pass_cycles": (0, 10**6, "cycles"),
    "efficiency_permille": (1, 1000, "permille"),
    "int4_permille": (0, 10**5, "permille of the array's rate"),
    "int8_permille": (0, 10**5, "permille of the array's rate"),
    "int16_permille": (0, 10**5, "permille of the array's rate"),
    "float16_permille": (0, 10**5, "permille of the array's rate"),
    "float32_permille": (0, 10**5, "permille of the array's rate"),
    "host_macs_per_us": (1, 10**9, "MACs/µs"),
    "sram_bytes": (0, 2**40, "bytes"),
    "sram_bytes_per_us": (1, 10**9, "bytes/µs"),
    "memory_bytes": (1, 2**50, "bytes"),
    "memory_channels": (1, 1024, "channels"),
    "memory_bytes_per_us": (1, 10**9, "bytes/µs"),
    "memory_efficiency_permille": (1, 1000, "permille"),
    "launch_ns": (0, 10**9, "ns"),
    "mac_fj": (0, 10**9, "fJ"),
    "byte_fj": (0, 10**9, "fJ"),
    "die_r_mk_per_w": (1, 10**8, "mK/W"),
    "die_c_mj_per_k": (1, 10**9, "mJ/K"),
    "sink_r_mk_per_w": (1, 10**8, "mK/W"),
    "sink_c_mj_per_k": (1, 10**9, "mJ/K"),
    "ambient_mdegc": (-40_000, 85_000, "m°C"),
}
"""Every figure of a profile: lowest, highest, unit."""


@dataclass(frozen=True, slots=True)
class Trip:
    """From ``at_mdegc`` up the clock runs at ``clock_permille`` of its rating."""

    at_mdegc: int
    clock_permille: int

    def __post_init__(self) -> None:
        bounded("trip at_mdegc", self.at_mdegc, -40_000, 150_000, "m°C")
        bounded("trip clock_permille", self.clock_permille, 1, 1000)


@dataclass(frozen=True, slots=True)
class Profile:
    """A machine. The defaults are a small processor that nobody sells; the files in ``profiles/`` leave nothing to them.

    Arithmetic: ``arrays * array_rows * array_columns`` MACs a cycle at ``clock_khz``, times ``<format>_permille / 1000`` for a
    number format (0: the array does not take it, and the host computes it at ``host_macs_per_us``), times the sustained
    fraction ``efficiency_permille``; every pass of a tile through the array costs ``pass_cycles`` more.
    Memory: ``memory_bytes_per_us`` is the peak of the bus, ``memory_efficiency_permille`` the share of it that is sustained.
    Energy: ``mac_fj`` a MAC at permille 1000 and ``byte_fj`` a byte of memory traffic (1000 fJ = 1 pJ), over ``idle_mw``.
    Heat: die -> sink -> ambient, two resistances and two capacities.
    Raises ``RefusedError`` for a figure out of its bounds, or trips that are not rising with a falling clock.
    """

    name: str
    active_mw: int
    idle_mw: int
    hardware_model: str = ""
    arrays: int = 1
    array_rows: int = 4
    array_columns: int = 4
    clock_khz: int = 1_000_000
    pass_cycles: int = 0
    efficiency_permille: int = 500
    int4_permille: int = 0
    int8_permille: int = 1000
    int16_permille: int = 0
    float16_permille: int = 500
    float32_permille: int = 500
    host_macs_per_us: int = 2_000
    sram_bytes: int = 2**20
    sram_bytes_per_us: int = 50_000
    memory_bytes: int = 2**30
    memory_channels: int = 1
    memory_bytes_per_us: int = 5_000
    memory_efficiency_permille: int = 1000
    launch_ns: int = 2_000
    mac_fj: int = 5_000
    byte_fj: int = 50_000
    die_r_mk_per_w: int = 3_000
    die_c_mj_per_k: int = 5_000
    sink_r_mk_per_w: int = 8_000
    sink_c_mj_per_k: int = 60_000
    ambient_mdegc: int = 25_000
    trips: tuple[Trip, ...] = ()
    assumed: bool = True
    sources: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for key, (low, high, unit) in BOUNDS.items():
            bounded(f"profile {self.name} {key}", getattr(self, key), low, high, unit)
        if self.idle_mw > self.active_mw:
            raise RefusedError(f"profile {self.name} idle_mw", self.idle_mw, f"at most active_mw, {self.active_mw}")
        if self.die_r_mk_per_w * self.die_c_mj_per_k < 10**6:
            raise RefusedError(f"profile {self.name} die R * C", "less than a second", "a second or more")
        if self.sink_r_mk_per_w * self.sink_c_mj_per_k < 10**6:
            raise RefusedError(f"profile {self.name} sink R * C", "less than a second", "a second or more")
        _check_trips(self.name, self.trips)

    @property
    def label(self) -> str:
        """How anything that this profile computed must be marked when it stands in for a measurement."""
        return "emulated, parameters assumed" if self.assumed else "emulated from published figures"

    @property
    def sustained_bytes_per_us(self) -> int:
        return max(self.memory_bytes_per_us * self.memory_efficiency_permille // 1000, 1)

    def rate_permille(self, number_format: str) -> int:
        """The array's rate for a format of ``FORMATS``; 0 where only the host computes it."""
        return int(getattr(self, f"{number_format}_permille"))

    def clock_permille(self, temperature_mdegc: int) -> int:
        """The clock that the trip points allow at this temperature, of 1000."""
        return min((trip.clock_permille for trip in self.trips if temperature_mdegc >= trip.at_mdegc), default=1000)


def _check_trips(name: str, trips: tuple[Trip, ...]) -> None:
    if len(trips) > MAX_TRIPS:
        raise RefusedError(f"profile {name} trips", f"{len(trips)} trips", f"at most {MAX_TRIPS}")
    for lower, upper in zip(trips, trips[1:], strict=False):
        if upper.at_mdegc <= lower.at_mdegc or upper.clock_permille >= lower.clock_permille:
            raise RefusedError(f"profile {name} trips", str(upper), f"hotter and slower than the one before, {lower}")


def profile_names() -> list[str]:
    """The profiles that come with this package."""
    folder = resources.files("board_support") / "profiles"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


@lru_cache(maxsize=64)
def load_profile(name_or_path: str) -> Profile:
    """A profile of this package by its name, or any other by the path of its TOML file.

    It is read once a process. Raises ``RefusedError`` for an unknown name, an unreadable file, or a file that breaks a
    rule of this module.
    """
    if PROFILE_NAME.fullmatch(name_or_path):
        if name_or_path not in profile_names():
            raise _unknown(name_or_path, "no such profile")
        packaged = resources.files("board_support") / "profiles" / f"{name_or_path}.toml"
        return parse_profile(name_or_path, packaged.read_bytes())
    path = Path(name_or_path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_PROFILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise _unknown(name_or_path, str(error)) from None
    return parse_profile(path.stem, text)


def _unknown(name_or_path: str, why: str) -> RefusedError:
    return RefusedError(f"board profile {name_or_path!r}", why, f"{', '.join(profile_names())}, or the path of a TOML file")


def parse_profile(name: str, text: bytes) -> Profile:
    """The profile that a TOML file says. Raises ``RefusedError`` for anything that is missing, unknown or out of bounds."""
    subject = f"board profile {name}"
    if len(text) > MAX_PROFILE_BYTES:
        raise RefusedError(subject, "a larger file", f"at most {MAX_PROFILE_BYTES} bytes")
    try:
        table = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(subject, f"not TOML: {error}", "a TOML file", "see docs/boards.md") from None
    _exact_keys(subject, table, {"hardware_model", "assumed", "figures", "sources", "trips"})
    figures, sources = _table(subject, table, "figures"), _table(subject, table, "sources")
    _exact_keys(f"{subject} [figures]", figures, set(BOUNDS))
    _exact_keys(f"{subject} [sources]", sources, {*BOUNDS, "trips"})
    _check_sources(subject, sources, table["assumed"])
    if not isinstance(table["hardware_model"], str):
        raise RefusedError(f"{subject} hardware_model", table["hardware_model"], "text")
    return Profile(
        name=name,
        hardware_model=table["hardware_model"][:128],
        trips=_trips(subject, table["trips"]),
        assumed=table["assumed"],
        sources=tuple(sources.items()),
        **figures,
    )


def _exact_keys(subject: str, table: Mapping[str, Any], wanted: set[str]) -> None:
    if missing := sorted(wanted - set(table)):
        raise RefusedError(subject, f"no {', '.join(missing)}", "every key", "add them")
    if unknown := sorted(set(table) - wanted):
        raise RefusedError(subject, f"unknown key {', '.join(unknown)}", ", ".join(sorted(wanted)))


def _table(subject: str, table: Mapping[str, Any], key: str) -> dict[str, Any]:
    if isinstance(table[key], dict):
        return dict(table[key])
    raise RefusedError(f"{subject} {key}", table[key], "a table")


def _check_sources(subject: str, sources: Mapping[str, Any], assumed: object) -> None:
    for key, source in sources.items():
        if not isinstance(source, str) or not 0 < len(source) <= MAX_SOURCE_CHARS:
            raise RefusedError(f"{subject} [sources] {key}", source, f"text of 1 to {MAX_SOURCE_CHARS} characters")
    if assumed is not all(source.startswith(ASSUMED) for source in sources.values()):
        raise RefusedError(
            f"{subject} assumed", assumed, "true if every source begins with 'assumed', false if any figure was published"
        )


def _trips(subject: str, trips: object) -> tuple[Trip, ...]:
    keys = [field.name for field in fields(Trip)]
    if not isinstance(trips, list) or any(not isinstance(trip, dict) or sorted(trip) != sorted(keys) for trip in trips):
        raise RefusedError(f"{subject} trips", trips, f"a list of tables with the keys {', '.join(keys)}")
    return tuple(Trip(**trip) for trip in trips)
