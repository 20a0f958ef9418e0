"""Raspberry Pi: identified by its device tree and revision code, watched through the firmware's throttle bits.

Rules: the CPU kernels run here, there is no delegate; no Pi has a sensor for the whole board's power, so what is given is
labelled estimated or absent; the soft temperature limit is the firmware's own and is in no trip point, so it follows from the
model (Raspberry Pi documentation: 80 °C, on the 3B+ 60 °C), while trip points are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from board_support.board import Board, BoardInfo, Reading, Sensors, Unavailable
from board_support.probe import command_output
from board_support.roofline import Profile, load_profile
from board_support.sysfs import Absent, Tree, known
from board_support.thermal import hottest, lowest_trip, thermal_zones, throttling
from edge_agent.core.errors import shown
from edge_agent.core.values import EnergyKind

MODEL_FILE = "proc/device-tree/model"
REVISION = re.compile(r"^Revision\s*:\s*([0-9a-fA-F]{4,8})$", re.MULTILINE)
THROTTLED_FILES = ("sys/devices/platform/soc/soc:firmware/get_throttled", "sys/devices/platform/*/*firmware/get_throttled")
THROTTLED_TEXT = re.compile(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})")
THROTTLED_BITS = {0: "undervoltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
OCCURRED_SHIFT = 16
SOFT_LIMIT_MDEGC, SOFT_LIMIT_3BPLUS_MDEGC = 80_000, 60_000
RAIL = re.compile(r"(\w{1,32})_([AV]) (?:current|volt)\(\d{1,3}\)=(\d{1,4}\.\d{1,12})[AV]")
NEW_STYLE_BIT = 1 << 23
TYPES = {
    0x00: "A", 0x01: "B", 0x02: "A+", 0x03: "B+", 0x04: "2B", 0x06: "CM1", 0x08: "3B", 0x09: "Zero", 0x0A: "CM3",
    0x0C: "Zero W", 0x0D: "3B+", 0x0E: "3A+", 0x10: "CM3+", 0x11: "4B", 0x12: "Zero 2 W", 0x13: "400", 0x14: "CM4",
    0x15: "CM4S", 0x17: "5", 0x18: "CM5", 0x19: "500", 0x1A: "CM5 Lite",
}  # fmt: skip
PROCESSORS = {0: "BCM2835", 1: "BCM2836", 2: "BCM2837", 3: "BCM2711", 4: "BCM2712"}


@dataclass(frozen=True, slots=True)
class Revision:
    """A new-style revision code (Raspberry Pi documentation, "New-style revision codes"), taken apart."""

    code: int
    type_name: str
    processor: str
    memory_mib: int
    revision: int


class RaspberryPi(Board):
    backend = "raspberry_pi"

    @property
    def profile(self) -> Profile:
        return load_profile(self.settings.profile or "raspberry_pi_5")

    def probe(self) -> BoardInfo | Unavailable:
        tree = Tree(self.settings.root)
        model = tree.text(MODEL_FILE)
        if isinstance(model, Absent):
            return Unavailable(self.backend, (model.reason,))
        if "Raspberry Pi" not in model:
            return Unavailable(self.backend, (f"/{MODEL_FILE}: {model[:64]!r} is not a Raspberry Pi",))
        revision, memory = read_revision(tree), tree.memory_bytes()
        notes = [absent.reason for absent in (revision, memory) if isinstance(absent, Absent)]
        if isinstance(revision, Revision):
            notes.append(f"revision {revision.code:x}: {revision.type_name}, {revision.processor}, {revision.memory_mib} MiB")
            if revision.type_name not in ("5", "500", "CM5", "CM5 Lite") and not self.settings.profile:
                notes.append("its cost prior is that of a Raspberry Pi 5; measurements correct it")
        return BoardInfo(self.backend, model[:128], "CPU (XNNPACK)", known(memory) or 0, notes=tuple(notes))

    def read_sensors(self, now_us: int) -> Sensors:
        tree = Tree(self.settings.root)
        zones, bits, power = thermal_zones(tree), read_throttled(tree), _power(tree)
        limit = soft_limit_mdegc(tree)
        trips = [trip for trip in (lowest_trip(zones), limit.value) if trip is not None]
        readings = [zone.reading for zone in zones] + _flags(bits) + [limit, power]
        if not zones:
            readings.append(Reading("temperature", None, "mdegC", "no thermal zone below /sys/class/thermal"))
        now = () if isinstance(bits, Absent) else tuple(words for bit, words in THROTTLED_BITS.items() if bits >> bit & 1)
        return Sensors(
            hottest(zones),
            min(trips, default=None),
            power.value,
            EnergyKind.ESTIMATED,
            now + throttling(zones),
            tuple(readings),
        )


def read_revision(tree: Tree) -> Revision | Absent:
    text = tree.text("proc/cpuinfo")
    if isinstance(text, Absent):
        return text
    found = REVISION.search(text)
    return parse_revision(int(found[1], 16)) if found else Absent("/proc/cpuinfo: no Revision")


def parse_revision(code: int) -> Revision | Absent:
    """Bits: 23 new style, 20-22 memory (256 MiB << n), 12-15 processor, 4-11 type, 0-3 revision."""
    if not code & NEW_STYLE_BIT:
        return Absent(f"revision {code:04x} is of the old style, from before the Raspberry Pi 2")
    kind, processor = code >> 4 & 0xFF, code >> 12 & 0xF
    return Revision(
        code,
        TYPES.get(kind, f"unknown type 0x{kind:02x}"),
        PROCESSORS.get(processor, f"unknown processor {processor}"),
        256 << (code >> 20 & 7),
        code & 0xF,
    )


def soft_limit_mdegc(tree: Tree) -> Reading:
    """Where the firmware first lowers the clock. A Pi whose model cannot be read has none that is known."""
    model = tree.text(MODEL_FILE)
    if isinstance(model, Absent) or "Raspberry Pi" not in model:
        reason = model.reason if isinstance(model, Absent) else f"{model[:64]!r} is not a Raspberry Pi"
        return Reading("soft temperature limit", None, "mdegC", reason)
    revision = read_revision(tree)
    is_3bplus = revision.type_name in ("3B+", "3A+") if isinstance(revision, Revision) else "3 Model" in model and "Plus" in model
    limit = SOFT_LIMIT_3BPLUS_MDEGC if is_3bplus else SOFT_LIMIT_MDEGC
    return Reading("soft temperature limit", limit, "mdegC", "the firmware's default for this model; no file gives it")


def read_throttled(tree: Tree) -> int | Absent:
    """The firmware's bits, from sysfs or, on the board itself, from vcgencmd."""
    reasons = []
    for path in [path for pattern in THROTTLED_FILES for path in tree.matches(pattern)]:
        text = tree.text(path)
        bits = text if isinstance(text, Absent) else parse_throttled(text)
        if isinstance(bits, int):
            return bits
        reasons.append(bits.reason)
    answer = command_output(tree, "vcgencmd", "get_throttled")
    bits = answer if isinstance(answer, Absent) else parse_throttled(answer)
    if isinstance(bits, int):
        return bits
    return Absent("; ".join([*(reasons or [f"no /{THROTTLED_FILES[0]}"]), bits.reason]))


def parse_throttled(text: str) -> int | Absent:
    """``50005`` as sysfs writes it, ``throttled=0x50005`` as vcgencmd does."""
    found = THROTTLED_TEXT.fullmatch(text)
    return int(found[1], 16) if found else Absent(f"get_throttled: {shown(text)} is not a bit mask in hex")


def _flags(bits: int | Absent) -> list[Reading]:
    """Two flags a cause: true now, and true at some time since boot."""
    if isinstance(bits, Absent):
        return [Reading(name, None, "flag", bits.reason) for name in THROTTLED_BITS.values()]
    now = [Reading(name, bits >> bit & 1, "flag") for bit, name in THROTTLED_BITS.items()]
    since = [Reading(f"{name} has occurred", bits >> (bit + OCCURRED_SHIFT) & 1, "flag") for bit, name in THROTTLED_BITS.items()]
    return now + since


def _power(tree: Tree) -> Reading:
    answer = command_output(tree, "vcgencmd", "pmic_read_adc")
    if isinstance(answer, Absent):
        return Reading("power", None, "mW", f"no Raspberry Pi measures the whole board; {answer.reason}")
    return parse_pmic(answer)


def parse_pmic(answer: str) -> Reading:
    """The sum over the PMIC's rails of a Pi 5 from the output of ``vcgencmd pmic_read_adc``: not the whole board."""
    values = {(name, unit): Decimal(number) for name, unit, number in RAIL.findall(answer)}
    rails = [(current, values[name, "V"]) for (name, unit), current in values.items() if unit == "A" and (name, "V") in values]
    if not rails:
        return Reading("power", None, "mW", "vcgencmd pmic_read_adc: no rail with a current and a voltage")
    total_mw = int(sum(current * volts for current, volts in rails) * 1000)
    return Reading("power", total_mw, "mW", f"estimated: the sum of {len(rails)} PMIC rails, not the whole board")
