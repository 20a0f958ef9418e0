"""Raspberry Pi: throttle bits, revision codes, limits, and power that nobody measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from board_support.board import BoardInfo, BoardSettings, Reading, Sensors
from board_support.raspberry_pi import (
    THROTTLED_BITS,
    RaspberryPi,
    Revision,
    parse_pmic,
    parse_revision,
    parse_throttled,
)
from board_support.sysfs import Absent
from edge_agent.core.values import EnergyKind
from tests import trees

THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
ZONE = "sys/devices/virtual/thermal/thermal_zone0"


def raspberry_pi(root: Path, files: dict[str, str | bytes] | None = None, /, **changes: str) -> RaspberryPi:
    chosen = {**(files or trees.raspberry_pi_files()), **changes}
    return RaspberryPi(BoardSettings(root=trees.plant(root, {name: text for name, text in chosen.items() if text})))


def reading(found: Sensors, name: str) -> Reading:
    return next(reading for reading in found.readings if reading.name == name)


@pytest.mark.parametrize("bit", THROTTLED_BITS)
def test_each_throttle_bit_is_told_apart_now_and_since_boot(bit: int, tmp_path: Path) -> None:
    name = THROTTLED_BITS[bit]
    now = raspberry_pi(tmp_path / "now", trees.raspberry_pi_files(throttled=f"{1 << bit:x}")).read_sensors(0)
    since = raspberry_pi(tmp_path / "since", trees.raspberry_pi_files(throttled=f"{1 << bit + 16:x}")).read_sensors(0)
    assert now.throttled == (name,)
    assert since.throttled == ()
    assert [found.name for found in now.readings if found.unit == "flag" and found.value] == [name]
    assert [found.name for found in since.readings if found.unit == "flag" and found.value] == [f"{name} has occurred"]


@pytest.mark.parametrize(
    ("text", "bits"),
    [("50005", 0x50005), ("throttled=0x50005", 0x50005), ("0x0", 0), ("0", 0), ("f000f", 0xF000F)],
)
def test_the_mask_is_hexadecimal_in_sysfs_and_in_vcgencmd(text: str, bits: int) -> None:
    assert parse_throttled(text) == bits


@pytest.mark.parametrize("text", ["", "throttled=", "error=1", "0x123456789", "-1", "0x5 5"])
def test_what_is_no_mask_is_absent(text: str) -> None:
    assert isinstance(parse_throttled(text), Absent)


def test_without_the_firmware_file_every_flag_is_absent_with_the_reason(tmp_path: Path) -> None:
    found = raspberry_pi(tmp_path, **{THROTTLED: ""}).read_sensors(0)
    flags = [flag for flag in found.readings if flag.unit == "flag"]
    assert len(flags) == 4 and all(flag.value is None and "vcgencmd" in flag.note for flag in flags)
    assert found.throttled == ()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0xA02082, Revision(0xA02082, "3B", "BCM2837", 1024, 2)),
        (0xA020D3, Revision(0xA020D3, "3B+", "BCM2837", 1024, 3)),
        (0xC03114, Revision(0xC03114, "4B", "BCM2711", 4096, 4)),
        (0xD04170, Revision(0xD04170, "5", "BCM2712", 8192, 0)),
        (0x9000C1, Revision(0x9000C1, "Zero W", "BCM2835", 512, 1)),
        (0x2A02082, Revision(0x2A02082, "3B", "BCM2837", 1024, 2)),
    ],
)
def test_revision_codes_are_taken_apart(code: int, expected: Revision) -> None:
    assert parse_revision(code) == expected


def test_an_unknown_revision_is_shown_as_unknown_and_an_old_one_as_old(tmp_path: Path) -> None:
    future = parse_revision(0xF0FFF0)
    assert isinstance(future, Revision)
    assert (future.type_name, future.processor) == ("unknown type 0xff", "unknown processor 15")
    assert isinstance(parse_revision(0x0010), Absent)
    info = raspberry_pi(tmp_path, trees.raspberry_pi_files("Raspberry Pi Model B Rev 2", "000e")).probe()
    assert isinstance(info, BoardInfo)
    assert any("old style" in note for note in info.notes)


@pytest.mark.parametrize(
    ("model", "revision", "limit"),
    [
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "a020d3", 60_000),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "unreadable", 60_000),
        ("Raspberry Pi 3 Model B Rev 1.2", "a02082", 80_000),
        ("Raspberry Pi 5 Model B Rev 1.0", "d04170", 80_000),
    ],
)
def test_the_soft_limit_is_60_degrees_on_a_3b_plus_and_80_elsewhere(
    model: str, revision: str, limit: int, tmp_path: Path
) -> None:
    assert raspberry_pi(tmp_path, trees.raspberry_pi_files(model, revision)).read_sensors(0).trip_mdegc == limit


def test_a_passive_trip_below_the_soft_limit_is_read_and_a_fan_step_is_not_taken_for_one(tmp_path: Path) -> None:
    assert raspberry_pi(tmp_path / "fan").read_sensors(0).trip_mdegc == 80_000
    cooler = {f"{ZONE}/trip_point_0_type": "passive", f"{ZONE}/trip_point_0_temp": "70000"}
    assert raspberry_pi(tmp_path / "passive", **cooler).read_sensors(0).trip_mdegc == 70_000


def test_no_power_is_invented_for_a_board_without_a_sensor(tmp_path: Path) -> None:
    found = raspberry_pi(tmp_path).read_sensors(0)
    assert found.power_mw is None
    assert found.power_kind is EnergyKind.ESTIMATED
    assert "no Raspberry Pi measures the whole board" in reading(found, "power").note


def test_the_pmic_of_a_pi_5_is_summed_over_whole_rails_and_called_an_estimate() -> None:
    answer = """
     3V7_WL_SW_A current(0)=0.10000000A
       3V3_SYS_A current(1)=0.20000000A
       ORPHAN_A current(2)=9.00000000A
     3V7_WL_SW_V volt(8)=3.70000000V
       3V3_SYS_V volt(9)=3.30000000V
        EXT5V_V volt(24)=5.10000000V
    """
    found = parse_pmic(answer)
    assert found.value == 370 + 660
    assert found.note == "estimated: the sum of 2 PMIC rails, not the whole board"
    assert parse_pmic("VCHI initialization failed").value is None


def test_a_pi_4_says_that_its_prior_is_another_boards(tmp_path: Path) -> None:
    info = raspberry_pi(tmp_path, trees.raspberry_pi_files("Raspberry Pi 4 Model B Rev 1.4", "c03114")).probe()
    assert isinstance(info, BoardInfo)
    assert "revision c03114: 4B, BCM2711, 4096 MiB" in info.notes
    assert any("cost prior" in note for note in info.notes)
