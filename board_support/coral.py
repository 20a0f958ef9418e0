"""Google Coral Edge TPU, on USB or PCIe (M.2, the Dev Boards).

Rules: the delegate library is loaded in a child first, because one that does not fit the runtime segfaults; an apex
temperature of exactly -89700 m°C means that the device is lost, not cold; trip points are read from the driver; one process
owns a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from board_support.board import Board, BoardInfo, Delegate, Reading, Sensors, Unavailable
from board_support.probe import PROBE_TIMEOUT_S, library_refusal
from board_support.roofline import Profile, load_profile
from board_support.sysfs import HIGHEST_MDEGC, LOWEST_MDEGC, Absent, Tree, known
from board_support.thermal import thermal_zones
from edge_agent.core.values import EnergyKind

LIBRARY = "libedgetpu.so.1"
LIBRARY_FOLDERS = ("usr/lib", "usr/lib/*-linux-*", "usr/local/lib", "lib", "lib/*-linux-*")
DELEGATE_SYMBOLS = ("tflite_plugin_create_delegate", "tflite_plugin_destroy_delegate")
USB_IDS = {("1a6e", "089a"): "before its firmware is loaded", ("18d1", "9302"): "ready"}
"""(vendor, product) as in the udev rules that come with libedgetpu: the device changes its id at the first use."""
LOST_MDEGC = -89_700
TRIPS = 3
RATED_KHZ = 500_000
"""The clock halves at every trip point: 500 -> 250 -> 125 -> 62.5 MHz."""


@dataclass(frozen=True, slots=True)
class Device:
    """One Edge TPU. ``option`` names it to the delegate; ``lost`` says why it cannot be used."""

    name: str
    option: str
    folder: str
    lost: str = ""


class Coral(Board):
    backend = "coral"
    probe_timeout_s: ClassVar[float] = PROBE_TIMEOUT_S

    @property
    def profile(self) -> Profile:
        return load_profile(self.settings.profile or "coral_m2")

    def probe(self) -> BoardInfo | Unavailable:
        tree = Tree(self.settings.root)
        devices = edge_tpus(tree)
        usable = [device for device in devices if not device.lost]
        reasons = [device.lost for device in devices if device.lost]
        if not devices:
            reasons = ["no apex device below /sys/class/apex", "no Edge TPU (1a6e:089a, 18d1:9302) below /sys/bus/usb/devices"]
        if refusal := library_refusal(self.library, DELEGATE_SYMBOLS, self.probe_timeout_s):
            reasons.append(refusal)
        if refusal or not usable:
            return Unavailable(self.backend, tuple(reasons))
        memory = tree.memory_bytes()
        notes = [f"{device.name} as {device.option}" for device in usable] + reasons + ["one process owns a device"]
        notes += [memory.reason] if isinstance(memory, Absent) else []
        name = f"Coral Edge TPU ({usable[0].name}) on {_host(tree)}"
        return BoardInfo(self.backend, name, f"Edge TPU through {self.library}", known(memory) or 0, notes=tuple(notes))

    @property
    def library(self) -> str:
        """Where the delegate is below the root; by its soname where the system's loader is to find it."""
        tree = Tree(self.settings.root)
        found = [path for folder in LIBRARY_FOLDERS for path in tree.matches(f"{folder}/{LIBRARY}") if tree.is_file(path)]
        if found:
            return str(tree.root / found[0])
        return LIBRARY if tree.is_this_machine else str(tree.root / "usr/lib" / LIBRARY)

    def delegate(self) -> Delegate | None:
        """The first Edge TPU that is not lost; ``None`` when there is none, and then the CPU computes."""
        usable = [device for device in edge_tpus(Tree(self.settings.root)) if not device.lost]
        return Delegate(self.library, {"device": usable[0].option}) if usable else None

    def read_sensors(self, now_us: int) -> Sensors:
        tree = Tree(self.settings.root)
        readings: list[Reading] = []
        throttled: list[str] = []
        trips: list[int] = []
        for device in edge_tpus(tree):
            temperature, passed = _temperature(tree, device), _trips(tree, device)
            readings.append(temperature)
            trips += [trip for trip in passed if trip is not None]
            readings.append(_clock(device, temperature.value, passed))
            throttled += _slowed(device, temperature.value, readings[-1].value)
        if not readings:
            readings.append(Reading("temperature", None, "mdegC", "no Edge TPU here"))
        temperatures = [reading.value for reading in readings if reading.unit == "mdegC" and reading.value is not None]
        if not trips:
            readings.append(Reading("throttle trip", None, "mdegC", "no trip point can be read from an apex driver"))
        readings += [zone.reading for zone in thermal_zones(tree)]
        readings.append(Reading("power", None, "mW", "an Edge TPU has no power sensor"))
        return Sensors(
            max(temperatures, default=None),
            min(trips, default=None),
            None,
            EnergyKind.ESTIMATED,
            tuple(throttled),
            tuple(readings),
        )


def edge_tpus(tree: Tree) -> list[Device]:
    """Every Edge TPU in the order in which the delegate counts them: PCIe, then USB."""
    apexes = [_apex(tree, i, folder) for i, folder in enumerate(tree.matches("sys/class/apex/apex_[0-9]*"))]
    sticks = [
        folder
        for folder in tree.matches("sys/bus/usb/devices/[0-9]*")
        if (tree.text(f"{folder}/idVendor"), tree.text(f"{folder}/idProduct")) in USB_IDS
    ]
    return apexes + [Device(f"usb {folder.rsplit('/', 1)[1]}", f"usb:{i}", folder) for i, folder in enumerate(sticks)]


def _apex(tree: Tree, index: int, folder: str) -> Device:
    name = folder.rsplit("/", 1)[1]
    lost = tree.text(f"{folder}/temp") == str(LOST_MDEGC)
    reason = f"{name}: its driver reads {LOST_MDEGC} m°C: the device is lost, power-cycle the board" if lost else ""
    return Device(name, f"pci:{index}", folder, reason)


def _host(tree: Tree) -> str:
    for path in ("proc/device-tree/model", "sys/class/dmi/id/product_name"):
        if isinstance(name := tree.text(path), str):
            return name[:64]
    return "a host that does not name itself"


def _temperature(tree: Tree, device: Device) -> Reading:
    name = f"temperature {device.name}"
    if device.option.startswith("usb"):
        return Reading(name, None, "mdegC", "an Edge TPU on USB has no temperature sensor")
    if device.lost:
        return Reading(name, None, "mdegC", device.lost)
    temperature = tree.number(f"{device.folder}/temp", LOWEST_MDEGC, HIGHEST_MDEGC, "m°C")
    return Reading(name, known(temperature), "mdegC", temperature.reason if isinstance(temperature, Absent) else "")


def _trips(tree: Tree, device: Device) -> list[int | None]:
    """The trip points that the driver holds, coolest first, ``None`` where one cannot be read."""
    return [known(tree.number(f"{device.folder}/trip_point{i}_temp", 1, HIGHEST_MDEGC, "m°C")) for i in range(TRIPS)]


def _clock(device: Device, temperature_mdegc: int | None, trips: list[int | None]) -> Reading:
    """The clock that the driver's trip points leave; no file says it."""
    name = f"clock {device.name}"
    if temperature_mdegc is None or None in trips:
        return Reading(name, None, "kHz", "follows from temperature and trip points, and one of them cannot be read")
    passed = sum(temperature_mdegc >= trip for trip in trips if trip is not None)
    return Reading(name, RATED_KHZ >> passed, "kHz", "follows from temperature and trip points")


def _slowed(device: Device, temperature_mdegc: int | None, clock_khz: int | None) -> list[str]:
    if clock_khz is None or clock_khz == RATED_KHZ:
        return []
    return [f"{device.name} at {temperature_mdegc} m°C: clock stepped down to {clock_khz} kHz"]
