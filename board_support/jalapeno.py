"""Jalapeno: a parametric emulator of an inference accelerator; also of the other boards, by their profiles.

No board of this name can be bought.  OpenAI and Broadcom announced an inference chip called Jalapeno on 24 June 2026 and
published neither its arithmetic rate nor its memory; every parameter of ``jalapeno_edge`` is assumed.  Rules: results come
bit-exact from the CPU interpreter, only time, energy and heat are modelled; everything says that it is emulated; this board
runs only when it is named; its device root has a key of its own and proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from board_support.board import DEFAULT_SETTINGS, Board, BoardInfo, BoardSettings, Execution, Reading, Sensors, Unavailable
from board_support.device_root import DeviceRoot
from board_support.faults import BitFlips, ChannelLoss, Fault, Hang, Throttle, flipped
from board_support.plant import ThermalPlant
from board_support.profile import ASSUMED
from board_support.roofline import Cost, ModelWork, Profile, estimate, load_profile
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import EnergyKind

MAX_KNOWN_COSTS = 256
"""Costs that are kept between invocations; each holds on to its work, so that the work's identity can be the key."""


class Jalapeno(Board):
    """One emulated board. It computes one invocation at a time; heat and the weights on the chip are its state."""

    backend = "jalapeno"
    emulated = True

    def __init__(self, settings: BoardSettings = DEFAULT_SETTINGS) -> None:
        super().__init__(settings)
        self._root = DeviceRoot(settings.root_seed) if settings.root_seed else None
        self._faults: tuple[Fault, ...] = ()
        self._plant: ThermalPlant | None = None
        self._on_chip: ModelWork | None = None
        self._costs: dict[tuple[int, int, bool, int], tuple[ModelWork, Cost]] = {}
        self._busy_until_us = 0
        self._busy_mw = 0
        self._invocations = 0

    @property
    def profile(self) -> Profile:
        return load_profile(self.settings.profile or "jalapeno_edge")

    @property
    def faults(self) -> tuple[Fault, ...]:
        return self._faults

    def probe(self) -> BoardInfo | Unavailable:
        try:
            profile = self.profile
        except RefusedError as error:
            return Unavailable(self.backend, (str(error),))
        return BoardInfo(
            self.backend,
            f"emulated {profile.hardware_model}",
            f"{profile.arrays} x {profile.array_rows}x{profile.array_columns} MACs, {profile.label}; computed by the CPU",
            profile.memory_bytes,
            emulated=True,
            notes=(profile.label, f"profile {profile.name}: {_assumed(profile)}"),
        )

    def inject(self, faults: Iterable[Fault]) -> None:
        """Have exactly these faults from now on; none ends them all.

        Raises ``RefusedError`` for the loss of every memory channel.
        """
        chosen = tuple(faults)
        lost = sum(fault.channels for fault in chosen if isinstance(fault, ChannelLoss))
        if lost >= self.profile.memory_channels:
            raise RefusedError("fault channels", lost, f"fewer than the profile's {self.profile.memory_channels} channels")
        self._faults = chosen

    def read_sensors(self, now_us: int) -> Sensors:
        profile = self.profile
        plant = self._plant_at(now_us)
        clock, reasons = self._clock_permille(plant.temperature_mdegc)
        power = self._busy_mw if now_us < self._busy_until_us else profile.idle_mw
        readings = (
            Reading("temperature die", plant.temperature_mdegc, "mdegC", profile.label),
            Reading("temperature sink", plant.sink_mdegc, "mdegC", profile.label),
            Reading("power", power, "mW", profile.label),
            Reading("clock", profile.clock_khz * clock // 1000, "kHz", profile.label),
            Reading("clock share", clock, "permille", profile.label),
            Reading("faults injected", len(self._faults), "count", profile.label),
        )
        trip = profile.trips[0].at_mdegc if profile.trips else None
        return Sensors(plant.temperature_mdegc, trip, power, EnergyKind.EMULATED, reasons, readings)

    def execution(self, work: ModelWork, started_us: int, elapsed_us: int) -> Execution:
        """Modelled time and energy; the board is busy and warm afterwards. ``elapsed_us`` of the real CPU is not used.

        An invocation that begins while another still runs waits for it; the wait is not part of ``busy_us``.
        """
        plant = self._plant_at(started_us)
        clock, _ = self._clock_permille(plant.temperature_mdegc)
        cost = self._cost(work, clock)
        begun_us = plant.now_us
        self._busy_mw = cost.energy_uj * 1000 // max(cost.busy_us, 1)
        self._busy_until_us = begun_us + cost.busy_us
        plant.advance(self._busy_until_us, self._busy_mw)
        self._on_chip = work
        self._invocations += 1
        return Execution(cost.busy_us, cost.energy_uj, EnergyKind.EMULATED)

    def corrupt(self, output: bytes) -> bytes:
        """The bytes of an output as the faulty board would hand them over; the same bytes where no bit flips."""
        for fault in self._faults:
            if isinstance(fault, BitFlips):
                output = flipped(output, fault, self._invocations)
        return output

    def device_root(self) -> DeviceRoot | None:
        """One for each device, its registers zero when it was made; emulated, as all of it."""
        return self._root

    def _plant_at(self, now_us: int) -> ThermalPlant:
        if self._plant is None:
            self._plant = ThermalPlant(self.profile, now_us)
        self._plant.advance(now_us, self.profile.idle_mw)
        return self._plant

    def _clock_permille(self, temperature_mdegc: int) -> tuple[int, tuple[str, ...]]:
        """The slowest clock that heat and faults leave, and why it is below its rating."""
        thermal = self.profile.clock_permille(temperature_mdegc)
        injected = min((fault.clock_permille for fault in self._faults if isinstance(fault, Throttle)), default=1000)
        reasons = [f"emulated die at {temperature_mdegc} m°C: clock at {thermal} permille"] if thermal < 1000 else []
        reasons += [f"injected throttle: clock at {injected} permille"] if injected < 1000 else []
        return min(thermal, injected), tuple(reasons)

    def _cost(self, work: ModelWork, clock_permille: int) -> Cost:
        """Weights of another model were on the chip: all of this one's come over the bus first."""
        lost = sum(fault.channels for fault in self._faults if isinstance(fault, ChannelLoss))
        key = (id(work), clock_permille, work != self._on_chip, lost)
        if key not in self._costs:
            if len(self._costs) >= MAX_KNOWN_COSTS:
                self._costs.clear()
            cost = estimate(work, _without_channels(self.profile, lost), clock_permille, cold=work != self._on_chip)
            self._costs[key] = (work, cost)
        _, cost = self._costs[key]
        hang_us = sum(fault.hang_us for fault in self._faults if isinstance(fault, Hang))
        return Cost(cost.busy_us + hang_us, cost.energy_uj + self.profile.idle_mw * hang_us // 1000)


def _without_channels(profile: Profile, lost: int) -> Profile:
    if not lost:
        return profile
    bandwidth = profile.memory_bytes_per_us * (profile.memory_channels - lost) // profile.memory_channels
    return replace(profile, memory_bytes_per_us=max(bandwidth, 1))


def _assumed(profile: Profile) -> str:
    count = sum(source.startswith(ASSUMED) for _, source in profile.sources)
    return f"{count} of {len(profile.sources)} figures assumed, the file names the source of each"
