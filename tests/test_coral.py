"""Coral: which devices, what may kill the probe, and the temperature that is none."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from board_support.board import BoardInfo, BoardSettings, Delegate, Reading, Sensors, Unavailable
from board_support.coral import DELEGATE_SYMBOLS, Coral
from board_support.probe import command_output
from board_support.sysfs import Absent, Tree
from tests import trees

APEX = "sys/class/apex/apex_0"


def coral(root: Path, files: dict[str, str | bytes], **changes: str | bytes) -> Coral:
    return Coral(BoardSettings(root=trees.plant(root, {k: v for k, v in {**files, **changes}.items() if v})))


def at(root: Path, temperature_mdegc: int) -> Sensors:
    return coral(root, trees.coral_pcie_files(), **{f"{APEX}/temp": f"{temperature_mdegc}\n"}).read_sensors(0)


def refusals(root: Path, **changes: str | bytes) -> str:
    found = coral(root, trees.coral_pcie_files(), **changes).probe()
    assert isinstance(found, Unavailable)
    return " | ".join(found.reasons)


def test_an_apex_at_minus_89700_is_lost_and_not_cold(tmp_path: Path) -> None:
    board = coral(tmp_path, trees.coral_pcie_files(), **{f"{APEX}/temp": "-89700\n"})
    found, sensors = board.probe(), board.read_sensors(0)
    assert isinstance(found, Unavailable)
    assert found.reasons == ("apex_0: its driver reads -89700 m°C: the device is lost, power-cycle the board",)
    assert sensors.temperature_mdegc is None
    assert "lost" in sensors.readings[0].note
    assert board.delegate() is None


def test_a_second_device_serves_when_the_first_is_lost(tmp_path: Path) -> None:
    other = {f"{APEX.replace('_0', '_1')}/temp": "50000\n"}
    board = coral(tmp_path, trees.coral_pcie_files(), **{f"{APEX}/temp": "-89700\n", **other})
    info = board.probe()
    assert isinstance(info, BoardInfo)
    assert any("lost" in note for note in info.notes)
    assert board.delegate() == Delegate(str(tmp_path / trees.EDGETPU_PATH), {"device": "pci:1"})


def test_a_usb_stick_before_and_after_its_firmware_is_the_same_device(tmp_path: Path) -> None:
    ready = {"sys/bus/usb/devices/2-1/idVendor": "18d1\n", "sys/bus/usb/devices/2-1/idProduct": "9302\n"}
    for root, changes in ((tmp_path / "before", {}), (tmp_path / "after", ready)):
        board = coral(root, trees.coral_usb_files(), **changes)
        assert isinstance(board.probe(), BoardInfo)
        assert board.delegate() == Delegate(str(root / trees.EDGETPU_PATH), {"device": "usb:0"})


def test_another_usb_device_is_no_edge_tpu(tmp_path: Path) -> None:
    found = coral(tmp_path, trees.coral_usb_files(), **{"sys/bus/usb/devices/2-1/idProduct": "9303\n"}).probe()
    assert isinstance(found, Unavailable)
    assert "18d1:9302" in found.reasons[1]


def test_usb_has_no_temperature_and_says_so(tmp_path: Path) -> None:
    sensors = coral(tmp_path, trees.coral_usb_files()).read_sensors(0)
    assert sensors.temperature_mdegc is None
    assert sensors.readings[0] == Reading("temperature usb 2-1", None, "mdegC", "an Edge TPU on USB has no temperature sensor")


@pytest.mark.parametrize(
    ("temperature", "clock"),
    [(84799, 500_000), (84800, 250_000), (89799, 250_000), (89800, 125_000), (94799, 125_000), (94800, 62_500)],
)
def test_each_trip_point_halves_the_clock(temperature: int, clock: int, tmp_path: Path) -> None:
    sensors = at(tmp_path, temperature)
    assert next(reading.value for reading in sensors.readings if reading.name == "clock apex_0") == clock
    assert bool(sensors.throttled) is (clock < 500_000)
    assert sensors.temperature_mdegc == temperature


def test_trip_points_are_the_drivers_and_not_assumed(tmp_path: Path) -> None:
    assert at(tmp_path / "a", 50_000).trip_mdegc == 84_800
    lowered = coral(tmp_path / "b", trees.coral_pcie_files(), **{f"{APEX}/trip_point0_temp": "65000"}).read_sensors(0)
    assert lowered.trip_mdegc == 65_000
    none = coral(tmp_path / "c", trees.coral_pcie_files(), **{f"{APEX}/trip_point{i}_temp": "" for i in range(3)})
    assert none.read_sensors(0).trip_mdegc is None
    assert none.read_sensors(0).throttled == ()


def test_a_libedgetpu_that_segfaults_while_probed_kills_only_the_child(tmp_path: Path) -> None:
    said = refusals(tmp_path, **{trees.EDGETPU_PATH: trees.shared_library(at_load="segfault")})
    assert "crashed with SIGSEGV" in said


def test_a_libedgetpu_that_hangs_while_probed_is_killed(tmp_path: Path) -> None:
    class Impatient(Coral):
        probe_timeout_s = 1.0

    files = {**trees.coral_pcie_files(), trees.EDGETPU_PATH: trees.shared_library(at_load="hang")}
    found = Impatient(BoardSettings(root=trees.plant(tmp_path, files))).probe()
    assert isinstance(found, Unavailable)
    assert "hung for 1 s" in found.reasons[0]


def test_a_library_without_the_delegate_symbols_is_refused_by_name(tmp_path: Path) -> None:
    said = refusals(tmp_path, **{trees.EDGETPU_PATH: trees.shared_library(DELEGATE_SYMBOLS[:1])})
    assert "has no symbol tflite_plugin_destroy_delegate" in said


def test_a_truncated_library_is_refused(tmp_path: Path) -> None:
    assert "libedgetpu.so.1: " in refusals(tmp_path, **{trees.EDGETPU_PATH: trees.shared_library()[:100]})


def test_a_device_without_the_library_says_where_it_was_looked_for(tmp_path: Path) -> None:
    assert f"{tmp_path}/usr/lib/libedgetpu.so.1: cannot open shared object file" in refusals(
        tmp_path, **{trees.EDGETPU_PATH: b""}
    )


def test_the_soname_is_given_to_the_systems_loader_only_on_the_real_root(tmp_path: Path) -> None:
    assert Coral(BoardSettings(root=tmp_path)).library == f"{tmp_path}/usr/lib/libedgetpu.so.1"
    assert Path(Coral(BoardSettings(root=Path("/"))).library).name == "libedgetpu.so.1"


def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> str | Absent:
    """What the board's command ``askme`` prints, when it is this shell script."""
    command = tmp_path / "askme"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return command_output(Tree(Path("/")), "askme", "now")


def test_a_command_is_bounded_in_output_time_and_blame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_here(tmp_path, monkeypatch, 'echo "answer to $1"') == "answer to now"
    assert run_here(tmp_path, monkeypatch, "exit 7") == Absent("askme now: exit code 7")
    assert run_here(tmp_path, monkeypatch, "exec yes") == Absent("askme now: printed more than 65536 bytes")
    monkeypatch.setattr("board_support.probe.COMMAND_TIMEOUT_S", 0.5)
    assert run_here(tmp_path, monkeypatch, "sleep 60 & sleep 60") == Absent("askme now: no answer in 0.5 s")


def test_what_a_hung_command_started_dies_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("board_support.probe.COMMAND_TIMEOUT_S", 2.0)
    pid_file = tmp_path / "pid"
    hung = run_here(tmp_path, monkeypatch, f"sleep 600 & echo $! > {pid_file}; wait")
    assert hung == Absent("askme now: no answer in 2 s")
    await_death(int(pid_file.read_text()))


def await_death(pid: int) -> None:
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state in "ZX":
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} lives on")
