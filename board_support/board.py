"""The contract of a board: what the agent may ask of the metal it stands on.

Rules:

* ``probe`` never raises for absent hardware: absence is an ``Unavailable`` value that keeps every reason.
* Everything is read below ``settings.root``, so that a test hands in a fabricated ``/sys`` and ``/proc``.
* A figure that the hardware does not give is ``None`` with a reason, never a guess; what is emulated says so.
* Must override: ``probe``, ``read_sensors``.  May override: ``delegate``, ``execution``, ``corrupt``, ``device_root``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from board_support.device_root import DeviceRoot
from board_support.roofline import ModelWork, Profile
from edge_agent.core.values import EnergyKind


@dataclass(frozen=True, slots=True)
class BoardSettings:
    """``root``: the folder that stands for ``/``. ``profile``: name or path of a profile, "" for the board's own."""

    root: Path = Path("/")
    profile: str = ""
    paced: bool = True
    """Emulated boards: wait out the modelled time. Off in the simulator and in benchmarks. The caller reads it and waits."""
    root_seed: bytes = field(default=b"", repr=False)
    """Emulated boards: the 32 secret bytes of the device root; empty for a device without one."""


@dataclass(frozen=True, slots=True)
class BoardInfo:
    """A board that is there. ``hardware_model`` is the board's own words; ``accelerator`` what inference runs on."""

    backend: str
    hardware_model: str
    accelerator: str
    memory_bytes: int
    emulated: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A board that is not there, with every reason found."""

    backend: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Delegate:
    """A TFLite external delegate: ``library`` is a path or soname, ``options`` go to it as they are."""

    library: str
    options: Mapping[str, str] = field(default_factory=dict)


UNITS = ("mdegC", "mW", "kHz", "percent", "permille", "flag", "count", "id")


@dataclass(frozen=True, slots=True)
class Reading:
    """One sensor: ``value`` in ``unit``, one of ``UNITS``, or ``None`` with the reason in ``note``."""

    name: str
    value: int | None
    unit: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sensors:
    """The live state. ``temperature_mdegc`` is the hottest zone, ``trip_mdegc`` the lowest trip point that throttles."""

    temperature_mdegc: int | None = None
    trip_mdegc: int | None = None
    power_mw: int | None = None
    power_kind: EnergyKind = EnergyKind.ESTIMATED
    throttled: tuple[str, ...] = ()
    """Why the clock is below its rating now, in words; empty when it is not."""
    readings: tuple[Reading, ...] = ()


@dataclass(frozen=True, slots=True)
class Execution:
    """What one invocation cost the board. On metal ``busy_us`` is measured; an emulated one is modelled and says so."""

    busy_us: int
    energy_uj: int
    energy_kind: EnergyKind


DEFAULT_SETTINGS = BoardSettings()


class Board(ABC):
    """One kind of board. Subclasses are found through the entry-point group ``sly.boards``, in its order."""

    backend: ClassVar[str]
    emulated: ClassVar[bool] = False

    def __init__(self, settings: BoardSettings = DEFAULT_SETTINGS) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def profile(self) -> Profile:
        """The roofline profile of this board: the prior of every cost. Raises ``RefusedError`` for a bad profile file."""

    @abstractmethod
    def probe(self) -> BoardInfo | Unavailable:
        """Is this board here? Bounded in time, no side effects, never raises for absence."""

    @abstractmethod
    def read_sensors(self, now_us: int) -> Sensors:
        """The live sensors. ``now_us`` is the caller's monotonic time; only emulated boards need it."""

    def delegate(self) -> Delegate | None:
        """The TFLite delegate to load in the engine child, ``None`` for the CPU kernels."""
        return None

    def execution(self, work: ModelWork, started_us: int, elapsed_us: int) -> Execution:
        """What an invocation cost that began at ``started_us`` (monotonic) and took the engine ``elapsed_us``.

        On metal: the elapsed time, and energy from the profile's active power, labelled estimated.
        An emulated board answers with modelled time and energy and warms up by it; the caller waits out the difference
        when ``settings.paced``.
        """
        return Execution(elapsed_us, elapsed_us * self.profile.active_mw // 1000, EnergyKind.ESTIMATED)

    def corrupt(self, output: bytes) -> bytes:
        """The bytes of an output as this board hands them over: changed only on an emulated board with injected bit flips."""
        return output

    def device_root(self) -> DeviceRoot | None:
        """The emulated root of trust of this device; ``None`` on metal, whose TPM is the shell's affair, and without a seed."""
        return None
