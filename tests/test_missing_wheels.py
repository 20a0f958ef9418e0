"""A pack whose wheels are not all there says which nobody made, all of them, and for which boards they are.

With a real pip, and an index of small wheels that lies in a folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.commands import missing_wheels
from edge_agent.commands.pack_agent import pack
from edge_agent.core.errors import ConfigError, UnavailableError
from tests.wheels import wheel

LEDGER = {
    "edge_agent/__init__.py": "",
    "edge_agent/store/__init__.py": "",
    "edge_agent/store/ledger.py": "SCHEMA, USABLE_FROM = 9, 7\n",
}
NEEDS = "Requires-Python: >=3.11\nRequires-Dist: engine-of-all>=2\nRequires-Dist: sums\nRequires-Dist: plain<3\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of wheels that has what is of Python alone; pip is told of no other."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in missing_wheels.OF_PYTHON_ALONE:
        wheel(folder, name.replace("-", "_"), "99", {})
    wheel(folder, "plain", "2.5", {})
    monkeypatch.setattr(missing_wheels, "PYTHONS", ("3.12", "3.13"))
    monkeypatch.setattr(missing_wheels, "MACHINES", ("aarch64",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


def compiled(index: Path, name: str, version: str, *tags: str) -> None:
    """A wheel for those Pythons and machines alone, as its name says."""
    made = wheel(index, name, version, {}).read_bytes()
    (index / f"{name}-{version}-py3-none-any.whl").unlink()
    for tag in tags:
        (index / f"{name}-{version}-{tag}.whl").write_bytes(made)


def agent(folder: Path) -> str:
    folder.mkdir()
    return str(wheel(folder, "slyos_edge", "9.9", LEDGER, NEEDS))


def packed(tmp_path: Path, python: str, machine: str) -> set[str]:
    pack(tmp_path / "out", agent(tmp_path / "own"), python, machine, [], lambda text: None, None, "raspberry_pi")
    return {path.name for path in (tmp_path / "out").glob("*.whl")}


def test_every_wheel_that_nobody_made_is_named_with_the_boards_that_have_all(index: Path, tmp_path: Path) -> None:
    compiled(index, "engine_of_all", "2.1", "cp312-cp312-manylinux_2_28_aarch64", "cp312-cp312-manylinux_2_28_armv7l")
    compiled(index, "sums", "1.0", "cp312-cp312-manylinux_2_28_aarch64", "cp313-cp313-manylinux_2_28_aarch64")
    with pytest.raises(ConfigError) as told:
        packed(tmp_path, "3.11", "armv7l")
    assert told.value.subject == "wheels for raspberry_pi (Python 3.11 on armv7l)"
    assert told.value.got == "none of engine-of-all>=2, sums"
    assert told.value.allowed == "Python 3.12 on aarch64"
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_an_old_version_or_one_for_a_newer_c_library_does_not_count(index: Path, tmp_path: Path) -> None:
    compiled(index, "engine_of_all", "1.9", "cp311-cp311-manylinux_2_28_aarch64")
    compiled(index, "sums", "1.0", "cp311-cp311-manylinux_2_36_aarch64")
    with pytest.raises(ConfigError, match="none of engine-of-all>=2, sums; allowed: no Python and machine"):
        packed(tmp_path, "3.11", "aarch64")


def test_wheels_that_are_there_for_other_boards_than_this_machine_are_packed(index: Path, tmp_path: Path) -> None:
    for name, version in (("engine_of_all", "2.1"), ("sums", "1.0")):
        compiled(index, name, version, "cp313-cp313-manylinux_2_35_aarch64")
    files = packed(tmp_path, "3.13", "aarch64")
    assert {"sums-1.0-cp313-cp313-manylinux_2_35_aarch64.whl", "plain-2.5-py3-none-any.whl", "pip-99-py3-none-any.whl"} <= files


def test_an_index_that_does_not_answer_is_not_taken_for_wheels_that_are_missing(index: Path, tmp_path: Path) -> None:
    for path in index.iterdir():
        path.unlink()
    with pytest.raises(UnavailableError, match="pip download"):
        packed(tmp_path, "3.11", "aarch64")


@pytest.mark.parametrize(("python", "machine", "why"), [
    ("3.10", "aarch64", "--python: got 3.10; allowed: 3.11 or later"), ("3", "aarch64", "--python: got 3;"),
    ("3.11", "--help", "--machine: got --help"),
])  # fmt: skip
def test_a_python_that_the_agent_does_not_run_on_is_refused(
    index: Path, tmp_path: Path, python: str, machine: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        packed(tmp_path, python, machine)
    assert not (tmp_path / "out").exists()
