"""What the operator reckons from wheels is what a board measures once it runs them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from edge_agent.attest.measure import PACKAGES, ROOT, code_digest, library_files, set_digest
from edge_agent.core.errors import RefusedError
from ota.measured_wheels import references_of_wheels


def wheel_of(path: Path, files: dict[str, Path]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, source in files.items():
            wheel.write(source, name)
    return path


def test_the_code_in_a_wheel_has_the_digest_that_a_board_measures(tmp_path: Path) -> None:
    files = {f.relative_to(ROOT).as_posix(): f for package in PACKAGES for f in (ROOT / package).rglob("*.py")}
    own = wheel_of(tmp_path / "slyos_edge-9-py3-none-any.whl", files)
    assert references_of_wheels({own.name: own}).code == {code_digest()}


def test_the_library_in_a_wheel_has_the_digest_that_a_board_measures(tmp_path: Path) -> None:
    library = library_files()
    assert library.files, "no interpreter is installed"
    wheel = wheel_of(tmp_path / "ai_edge_litert-9-cp311-none-any.whl", dict(library.files))
    assert references_of_wheels({wheel.name: wheel}).libraries == {set_digest(library.digests())}


def test_one_changed_byte_of_code_is_another_digest(tmp_path: Path) -> None:
    changed = tmp_path / "cli.py"
    changed.write_bytes((ROOT / "edge_agent" / "cli.py").read_bytes() + b"#")
    names = [f for package in PACKAGES for f in (ROOT / package).rglob("*.py")]
    files = {f.relative_to(ROOT).as_posix(): f for f in names} | {"edge_agent/cli.py": changed}
    own = wheel_of(tmp_path / "slyos_edge-9-py3-none-any.whl", files)
    assert references_of_wheels({own.name: own}).code != {code_digest()}


def test_what_is_no_wheel_is_refused_by_name(tmp_path: Path) -> None:
    bad = tmp_path / "slyos_edge-9-py3-none-any.whl"
    bad.write_bytes(b"no archive")
    with pytest.raises(RefusedError, match="slyos_edge-9"):
        references_of_wheels({bad.name: bad})
