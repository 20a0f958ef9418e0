"""NVIDIA Jetson: identified by its device tree, measured by its INA3221 rails, thermal zones and GPU load file.

Rules: NVML is not used, it fails on Jetson; the power of the whole board is only ever the rail that measures it; limits
and modes differ from release to release, so they are read and never assumed.
"""

from __future__ import annotations

import re

from board_support.board import Board, BoardInfo, Reading, Sensors, Unavailable
from board_support.probe import command_output
from board_support.roofline import Profile, load_profile
from board_support.sysfs import Absent, Tree, known
from board_support.thermal import hottest, lowest_trip, thermal_zones, throttling
from edge_agent.core.values import EnergyKind

MODEL_FILE, RELEASE_FILE = "proc/device-tree/model", "etc/nv_tegra_release"
JETSON_MODEL = re.compile(r"jetson|nvidia", re.IGNORECASE)
RELEASE = re.compile(r"# (R\d{1,3}) \(release\), REVISION: ([\d.]{1,12})")
INA3221 = "sys/bus/i2c/devices/*/hwmon/hwmon[0-9]*"
MAX_MV, MAX_MA = 60_000, 100_000
TOTAL_RAIL = "VDD_IN"
SKIPPED_LABELS = ("nc", "sum of shunt voltages")
"""Unconnected inputs, and the sum that the driver computes; neither is a rail."""
POWER_MODE = re.compile(r"NV Power Mode:\s*(\S{1,64})\s+(\d{1,3})")


class Jetson(Board):
    backend = "jetson"

    @property
    def profile(self) -> Profile:
        return load_profile(self.settings.profile or "orin_nano")

    def probe(self) -> BoardInfo | Unavailable:
        tree = Tree(self.settings.root)
        model, release = tree.text(MODEL_FILE), tree.text(RELEASE_FILE)
        if isinstance(model, str) and not JETSON_MODEL.search(model):
            return Unavailable(self.backend, (f"/{MODEL_FILE}: {model[:64]!r} is not a Jetson",))
        version = None if isinstance(release, Absent) else RELEASE.match(release)
        if isinstance(model, Absent) and version is None:
            why = release.reason if isinstance(release, Absent) else f"/{RELEASE_FILE}: names no release"
            return Unavailable(self.backend, (model.reason, why))
        memory = tree.memory_bytes()
        notes = [f"L4T {version[1]}.{version[2]}" if version else f"/{RELEASE_FILE}: no release read"]
        notes += [absent.reason for absent in (model, memory) if isinstance(absent, Absent)]
        notes.append("the GPU is reached only by ai-edge-litert's WebGPU accelerator (CompiledModel); the quote says what ran")
        name = "Jetson, model unreadable" if isinstance(model, Absent) else model[:128]
        return BoardInfo(self.backend, name, "CPU (XNNPACK)", known(memory) or 0, notes=tuple(notes))

    def read_sensors(self, now_us: int) -> Sensors:
        tree = Tree(self.settings.root)
        zones, rails = thermal_zones(tree), _rails(tree)
        power = next((rail.value for rail in rails if rail.name == f"power {TOTAL_RAIL}"), None)
        readings = [zone.reading for zone in zones] + rails + [_gpu_load(tree), _power_mode(tree)]
        if power is None:
            readings.append(
                Reading("power", None, "mW", f"no readable rail {TOTAL_RAIL}; the other rails do not add up to the board")
            )
        if not zones:
            readings.append(Reading("temperature", None, "mdegC", "no thermal zone below /sys/devices/virtual/thermal"))
        if lowest_trip(zones) is None:
            readings.append(Reading("throttle trip", None, "mdegC", "no thermal zone has a passive trip point"))
        return Sensors(hottest(zones), lowest_trip(zones), power, EnergyKind.MEASURED, throttling(zones), tuple(readings))


def _rails(tree: Tree) -> list[Reading]:
    """Every connected rail of every INA3221: mW = mV * mA / 1000."""
    return [
        _rail(tree, folder, label_path, label)
        for folder in tree.matches(INA3221)
        if tree.text(f"{folder}/name") == "ina3221"
        for label_path in tree.matches(f"{folder}/in[0-9]*_label")
        if isinstance(label := tree.text(label_path), str) and label.lower() not in SKIPPED_LABELS
    ]


def _rail(tree: Tree, folder: str, label_path: str, label: str) -> Reading:
    channel = label_path.removesuffix("_label").rsplit("/in", 1)[1]
    volts = tree.number(f"{folder}/in{channel}_input", 0, MAX_MV, "mV")
    current = tree.number(f"{folder}/curr{channel}_input", 0, MAX_MA, "mA")
    name = f"power {label[:64]}"
    if isinstance(volts, Absent) or isinstance(current, Absent):
        return Reading(name, None, "mW", volts.reason if isinstance(volts, Absent) else current.reason)  # type: ignore[union-attr]
    limit = tree.number(f"{folder}/curr{channel}_crit", 1, MAX_MA, "mA")
    return Reading(name, volts * current // 1000, "mW", "" if isinstance(limit, Absent) else f"critical at {limit} mA")


def _gpu_load(tree: Tree) -> Reading:
    """The load file is in tenths of a percent."""
    paths = tree.matches("sys/class/devfreq/*/device/load")
    load = tree.number(paths[0], 0, 1000) if paths else Absent("no /sys/class/devfreq/<gpu>/device/load")
    if isinstance(load, Absent):
        return Reading("load gpu", None, "percent", load.reason)
    return Reading("load gpu", load // 10, "percent")


def _power_mode(tree: Tree) -> Reading:
    answer = command_output(tree, "nvpmodel", "-q")
    if isinstance(answer, Absent):
        return Reading("power mode", None, "id", answer.reason)
    return parse_power_mode(answer)


def parse_power_mode(answer: str) -> Reading:
    """The mode from the output of ``nvpmodel -q``: its number, and its name as the note."""
    mode = POWER_MODE.search(answer)
    return (
        Reading("power mode", int(mode[2]), "id", mode[1])
        if mode
        else Reading("power mode", None, "id", "nvpmodel: no mode named")
    )
