"""The contract of a board, over every board: metal on fabricated trees, the emulator with each of its profiles."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from board_support import registry
from board_support.board import UNITS, Board, BoardInfo, BoardSettings, Delegate, Sensors, Unavailable
from board_support.coral import Coral
from board_support.jalapeno import Jalapeno
from board_support.jetson import Jetson
from board_support.raspberry_pi import RaspberryPi
from board_support.roofline import ModelWork, OpWork, Profile, profile_names
from edge_agent.commands import board as board_command
from edge_agent.core.errors import ConfigError, RefusedError, UnavailableError
from edge_agent.core.values import EnergyKind
from tests import trees

ROOT = Path(__file__).parents[1]
WORK = ModelWork((OpWork("CONV_2D", 6912, 448, 1792, 64, 27, 4, 1, "float32"),), 1792)


@dataclass(frozen=True)
class Case:
    kind: type[Board]
    files: Callable[[], dict[str, str | bytes]] = dict
    profile: str = ""

    def settings(self, root: Path) -> BoardSettings:
        return BoardSettings(root=root, profile=self.profile)

    def board(self, root: Path) -> Board:
        return self.kind(self.settings(trees.plant(root, self.files())))


CASES = {
    "jetson": Case(Jetson, trees.jetson_files),
    "coral-pcie": Case(Coral, trees.coral_pcie_files),
    "coral-usb": Case(Coral, trees.coral_usb_files),
    "raspberry_pi-5": Case(RaspberryPi, trees.raspberry_pi_files),
    "raspberry_pi-4": Case(
        RaspberryPi, lambda: trees.raspberry_pi_files("Raspberry Pi 4 Model B Rev 1.4", "c03114", throttled="50005")
    ),
    "jalapeno": Case(Jalapeno),
    **{f"jalapeno-{name}": Case(Jalapeno, profile=name) for name in profile_names()},
}
every_board = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_metal = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if not case.kind.emulated], ids=[k for k in CASES if "jalapeno" not in k]
)


def keeps_the_contract(sensors: Sensors) -> bool:
    """Every reading has a unit; what is absent says why; what is there is a whole number."""
    for reading in sensors.readings:
        assert reading.name and reading.unit in UNITS, reading
        assert type(reading.value) is int or (reading.value is None and reading.note), reading
    for figure in (sensors.temperature_mdegc, sensors.trip_mdegc, sensors.power_mw):
        assert figure is None or type(figure) is int
    absent = {reading.unit for reading in sensors.readings if reading.value is None}
    assert sensors.temperature_mdegc is not None or "mdegC" in absent
    assert sensors.power_mw is not None or "mW" in absent
    return all(isinstance(words, str) and words for words in sensors.throttled)


@every_board
def test_a_board_that_is_there_passes_and_says_what_it_is(case: Case, tmp_path: Path) -> None:
    info = case.board(tmp_path).probe()
    assert isinstance(info, BoardInfo), info
    assert info.backend == case.kind.backend
    assert info.hardware_model and info.accelerator
    assert info.memory_bytes == (case.board(tmp_path).profile.memory_bytes if info.emulated else 8052000 * 1024)


@every_board
def test_sensors_have_units_and_what_is_absent_has_a_reason(case: Case, tmp_path: Path) -> None:
    sensors = case.board(tmp_path).read_sensors(1_000_000)
    assert sensors.readings
    assert keeps_the_contract(sensors)


@every_board
def test_an_execution_costs_whole_numbers_of_a_named_kind(case: Case, tmp_path: Path) -> None:
    board = case.board(tmp_path)
    execution = board.execution(WORK, started_us=1_000_000, elapsed_us=2_000)
    assert type(execution.busy_us) is int and execution.busy_us > 0
    assert type(execution.energy_uj) is int and execution.energy_uj > 0
    if board.emulated:
        assert execution.energy_kind is EnergyKind.EMULATED
    else:
        assert execution.busy_us == 2_000
        assert execution.energy_uj == 2 * board.profile.active_mw
        assert execution.energy_kind is EnergyKind.ESTIMATED


@every_board
def test_the_delegate_is_none_or_names_a_library_with_text_options(case: Case, tmp_path: Path) -> None:
    delegate = case.board(tmp_path).delegate()
    if case.kind is not Coral:
        assert delegate is None
    else:
        assert isinstance(delegate, Delegate)
        assert Path(delegate.library).is_file()
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in delegate.options.items())


@every_board
def test_only_an_emulated_board_says_emulated_and_it_says_so_everywhere(case: Case, tmp_path: Path) -> None:
    board = case.board(tmp_path)
    info, sensors = board.probe(), board.read_sensors(0)
    assert isinstance(info, BoardInfo)
    assert info.emulated is board.emulated is ("emulated" in info.hardware_model)
    assert all(reading.note.startswith("emulated") is board.emulated for reading in sensors.readings)
    assert (sensors.power_kind is EnergyKind.EMULATED) is board.emulated
    if board.emulated:
        label = "emulated, parameters assumed" if "jalapeno" in board.profile.name else "emulated from published figures"
        assert label in info.notes and label in info.accelerator


@every_board
def test_the_profile_is_found_by_name_and_a_bad_one_is_refused(case: Case, tmp_path: Path) -> None:
    assert isinstance(case.board(tmp_path).profile, Profile)
    for bad in ("no_such_machine", str(tmp_path / "none.toml"), "/proc/self/mem", "bad\0path"):
        with pytest.raises(RefusedError, match="jalapeno_edge"):
            _ = case.kind(BoardSettings(root=tmp_path, profile=bad)).profile


@every_metal
def test_a_missing_board_is_a_value_with_every_reason(case: Case, tmp_path: Path) -> None:
    board = case.kind(case.settings(tmp_path))
    found = board.probe()
    assert isinstance(found, Unavailable)
    assert found.reasons and all("/" in reason for reason in found.reasons)
    assert keeps_the_contract(board.read_sensors(0))


def _garbage(seed: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(random.Random(f"{path.name}{seed}").randbytes(300))


WRECKS: dict[str, Callable[[Path], object]] = {
    "noise": _garbage(1),
    "empty": lambda path: path.write_bytes(b""),
    "huge number": lambda path: path.write_text("9" * 5000),
    "huge file": lambda path: path.write_bytes(b"a" * 200_000),
    "words": lambda path: path.write_text("not-a-number\n"),
    "negative": lambda path: path.write_text("-256000\n"),
    "folder": Path.mkdir,
    "fifo": trees.fifo,
    "unreadable": trees.unreadable,
    "loop": lambda path: path.symlink_to(path),
}


@every_metal
@pytest.mark.parametrize("wreck", WRECKS.values(), ids=WRECKS.keys())
def test_no_file_however_broken_makes_a_board_raise(case: Case, wreck: Callable[[Path], object], tmp_path: Path) -> None:
    board = case.board(tmp_path)
    if isinstance(board, Coral):
        (tmp_path / trees.EDGETPU_PATH).unlink()  # a child process for each file would only cost time
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        sound = path.read_bytes()
        path.unlink()
        wreck(path)
        assert isinstance(board.probe(), BoardInfo | Unavailable)
        assert keeps_the_contract(board.read_sensors(0)), path
        board.delegate()
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(sound)


@pytest.mark.parametrize("wreck", ["folder", "fifo", "unreadable", "loop"])
def test_what_stands_in_the_place_of_the_library_does_not_hold_the_probe(wreck: str, tmp_path: Path) -> None:
    board = CASES["coral-pcie"].board(tmp_path)
    (tmp_path / trees.EDGETPU_PATH).unlink()
    WRECKS[wreck](tmp_path / trees.EDGETPU_PATH)
    found = board.probe()
    assert isinstance(found, Unavailable)
    assert "libedgetpu.so.1: " in found.reasons[0]


@every_board
def test_probing_and_reading_change_nothing(case: Case, tmp_path: Path) -> None:
    board = case.board(tmp_path)

    def snapshot() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = snapshot()
    board.probe(), board.read_sensors(0), board.delegate()
    assert snapshot() == before


def test_boards_are_probed_in_the_order_of_their_numeric_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [kind.backend for kind in registry.board_classes()] == ["jetson", "coral", "raspberry_pi", "jalapeno"]
    names = ["100-late", "20-coral", "3-early", "unnumbered"]
    entries = [EntryPoint(name, "board_support.coral:Coral", registry.GROUP) for name in names]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    assert [entry.name for entry in sorted(entries, key=registry._order)] == ["3-early", "20-coral", "100-late", "unnumbered"]


def test_a_board_that_cannot_be_imported_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries = [
        EntryPoint("10-gone", "no.such.module:Board", registry.GROUP),
        EntryPoint("20-wrong", "json:dumps", registry.GROUP),
        EntryPoint("30-nameless", "json:Nothing", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    found = registry.probe_all(BoardSettings(root=tmp_path))
    assert [board.backend for board in found] == ["gone", "wrong", "nameless"]
    assert all(isinstance(board, Unavailable) and "entry point" in board.reasons[0] for board in found)
    with pytest.raises(UnavailableError, match="no.such.module"):
        registry.open_board("auto", BoardSettings(root=tmp_path))


@every_metal
def test_auto_takes_the_first_real_board_that_is_here(case: Case, tmp_path: Path) -> None:
    case.board(tmp_path)
    assert type(registry.open_board("auto", BoardSettings(root=tmp_path))) is case.kind


def test_auto_never_falls_back_to_emulation(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as refused:
        registry.open_board("auto", BoardSettings(root=tmp_path, profile="raspberry_pi_5"))
    said = str(refused.value)
    assert all(f"{name}: " in said for name in ("jetson", "coral", "raspberry_pi"))
    assert 'backend = "jalapeno"' in said


def test_the_emulator_runs_when_it_is_named(tmp_path: Path) -> None:
    assert isinstance(registry.open_board("jalapeno", BoardSettings(root=tmp_path)), Jalapeno)


def test_a_named_board_that_is_not_here_is_refused_with_its_reasons(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="/proc/device-tree/model: No such file"):
        registry.open_board("jetson", BoardSettings(root=tmp_path))
    with pytest.raises(RefusedError, match="auto, jetson, coral, raspberry_pi, jalapeno"):
        registry.open_board("esp32", BoardSettings(root=tmp_path))


def test_the_agent_side_of_the_boards_imports_no_numpy() -> None:
    program = (
        "import sys; from board_support.registry import board_classes; import board_support.roofline\n"
        "print(len(board_classes()), [name for name in ('numpy', 'tflite', 'flatbuffers') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "4 []"


def run_command(*words: str) -> int:
    parser = ArgumentParser()
    board_command.add(parser.add_subparsers())
    args = parser.parse_args(["board", *words])
    return int(args.run(args))


def test_sly_board_probe_shows_every_board_with_pass_or_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.plant(tmp_path, trees.raspberry_pi_files())
    assert run_command("probe", "--root", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "raspberry_pi   PASS" in text and "jetson         not here" in text
    assert "EMULATED, only when named" in text
    assert run_command("probe", "--root", str(tmp_path), "--json") == 0
    found = {board["backend"]: board for board in json.loads(capsys.readouterr().out)}
    assert [name for name, board in found.items() if board["available"]] == ["raspberry_pi", "jalapeno"]
    assert found["jalapeno"]["only_when_named"] and not found["raspberry_pi"]["only_when_named"]
    assert found["coral"]["reasons"]


@every_board
def test_sly_board_show_gives_every_reading(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = case.board(tmp_path)
    words = ("show", "--backend", case.kind.backend, "--root", str(tmp_path), "--profile", case.profile)
    assert run_command(*words) == 0
    table = capsys.readouterr().out
    assert run_command(*words, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    expected = [reading.name for reading in board.read_sensors(0).readings]
    assert [reading["name"] for reading in answer["sensors"]["readings"]] == expected
    assert all(name in table for name in expected)
    assert answer["board"]["emulated"] is case.kind.emulated


def test_sly_board_refuses_a_root_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--root"):
        run_command("probe", "--root", str(tmp_path / "none"))
