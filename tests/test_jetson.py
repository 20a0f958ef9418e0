"""Jetson: rails, zones, modes, and the traps in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from board_support.board import BoardInfo, BoardSettings, Reading, Sensors, Unavailable
from board_support.jetson import Jetson, parse_power_mode
from edge_agent.core.values import EnergyKind
from tests import trees

RAILS = "sys/bus/i2c/devices/1-0040/hwmon/hwmon1"
ZONES = "sys/devices/virtual/thermal"


def jetson(root: Path, **changes: str) -> Jetson:
    """A Jetson whose files are changed; an empty text takes the file away."""
    files = {**trees.jetson_files(), **{name.replace("__", "/"): text for name, text in changes.items()}}
    return Jetson(BoardSettings(root=trees.plant(root, {name: text for name, text in files.items() if text})))


def sensors(root: Path, changes: dict[str, str]) -> Sensors:
    return jetson(root, **changes).read_sensors(0)


def reading(found: Sensors, name: str) -> Reading:
    return next(reading for reading in found.readings if reading.name == name)


def test_power_is_millivolts_times_milliamperes_of_the_input_rail(tmp_path: Path) -> None:
    found = sensors(tmp_path, {})
    assert (found.power_mw, found.power_kind) == (7000, EnergyKind.MEASURED)
    assert reading(found, "power VDD_IN") == Reading("power VDD_IN", 7000, "mW", "critical at 4000 mA")
    assert reading(found, "power VDD_SOC").value == 1250


def test_nc_rails_and_the_sum_of_shunt_voltages_are_no_rails(tmp_path: Path) -> None:
    found = sensors(tmp_path, {f"{RAILS}/in3_label": "NC\n"})
    rails = [reading.name for reading in found.readings if reading.name.startswith("power VDD") or "sum" in reading.name]
    assert rails == ["power VDD_IN", "power VDD_CPU_GPU_CV"]


def test_another_chip_on_the_i2c_bus_is_no_power_sensor(tmp_path: Path) -> None:
    found = sensors(tmp_path, {f"{RAILS}/name": "jc42\n"})
    assert found.power_mw is None
    assert "VDD_IN" in reading(found, "power").note


def test_without_the_input_rail_the_other_rails_are_not_added_up(tmp_path: Path) -> None:
    found = sensors(tmp_path, {f"{RAILS}/in1_label": "VDD_GPU_SOC\n"})
    assert found.power_mw is None
    assert reading(found, "power VDD_GPU_SOC").value == 7000
    assert "do not add up" in reading(found, "power").note


@pytest.mark.parametrize("lost", [f"{RAILS}/in1_input", f"{RAILS}/curr1_input"])
def test_half_a_measurement_is_none(lost: str, tmp_path: Path) -> None:
    found = sensors(tmp_path, {lost: ""})
    assert found.power_mw is None
    assert f"/{lost}" in reading(found, "power VDD_IN").note


def test_temperature_is_the_hottest_zone_and_the_trip_the_lowest_that_throttles(tmp_path: Path) -> None:
    found = sensors(tmp_path, {})
    assert (found.temperature_mdegc, found.trip_mdegc, found.throttled) == (53500, 97000, ())


def test_trip_points_are_read_and_not_assumed(tmp_path: Path) -> None:
    assert sensors(tmp_path / "a", {f"{ZONES}/thermal_zone1/trip_point_0_temp": "71000"}).trip_mdegc == 71000
    without = {f"{ZONES}/thermal_zone{i}/trip_point_{j}_temp": "" for i in (0, 1) for j in (0, 1, 2)}
    found = sensors(tmp_path / "b", without)
    assert found.trip_mdegc is None
    assert reading(found, "throttle trip").note


def test_a_fan_step_and_a_shutdown_trip_do_not_throttle(tmp_path: Path) -> None:
    changes = {f"{ZONES}/thermal_zone1/trip_point_0_type": "active", f"{ZONES}/thermal_zone0/trip_point_1_type": "critical"}
    assert sensors(tmp_path, changes).trip_mdegc is None


def test_a_zone_over_its_passive_trip_is_named_as_the_cause(tmp_path: Path) -> None:
    found = sensors(tmp_path, {f"{ZONES}/thermal_zone1/temp": "97000"})
    assert found.throttled == ("gpu-thermal is at its passive trip of 97000 m°C",)


def test_a_zone_that_is_switched_off_reads_minus_256_degrees_and_is_absent(tmp_path: Path) -> None:
    found = sensors(tmp_path, {f"{ZONES}/thermal_zone0/temp": "-256000"})
    assert reading(found, "temperature cpu-thermal").value is None
    assert found.temperature_mdegc == 53500


def test_gpu_load_is_in_tenths_of_a_percent(tmp_path: Path) -> None:
    assert reading(sensors(tmp_path, {}), "load gpu") == Reading("load gpu", 43, "percent")


def test_the_release_is_read(tmp_path: Path) -> None:
    info = jetson(tmp_path).probe()
    assert isinstance(info, BoardInfo)
    assert info.notes[0] == "L4T R36.4.3"


def test_a_container_that_hides_the_device_tree_is_known_by_its_release(tmp_path: Path) -> None:
    info = jetson(tmp_path, **{"proc/device-tree/model": ""}).probe()
    assert isinstance(info, BoardInfo)
    assert "/proc/device-tree/model: No such file or directory" in info.notes


def test_a_raspberry_pi_with_a_stray_tegra_release_is_no_jetson(tmp_path: Path) -> None:
    found = jetson(tmp_path, **{"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0"}).probe()
    assert isinstance(found, Unavailable)
    assert "is not a Jetson" in found.reasons[0]


def test_the_power_mode_is_what_nvpmodel_says_and_asked_only_on_the_board(tmp_path: Path) -> None:
    assert parse_power_mode("NVPM VERB: x\nNV Power Mode: 15W\n0\n") == Reading("power mode", 0, "id", "15W")
    assert parse_power_mode("NV Power Mode: MAXN_SUPER\n2").note == "MAXN_SUPER"
    assert parse_power_mode("permission denied").value is None
    assert "only where the root is /" in reading(sensors(tmp_path, {}), "power mode").note
