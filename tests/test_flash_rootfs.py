"""flash.sh onto the root folder of a system: exactly its own files, judged before anything is written, never half a board."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from board_support import first_boot
from tests.flash_targets import BOARD, FLASH, KINDS, PATIENCE_S, ROOT, SHELLS, Workshop, everything, program, workshop
from tests.needs import needs_program

STATE = f"var/lib/sly/{BOARD}"
UNITS = "etc/systemd/system"
WHEELS = "opt/sly/wheels"
FOLDER, PRIVATE_FOLDER, PUBLIC, SECRET = 0o40755, 0o40700, 0o100644, 0o100600
LINK = 0o120777
PLACED = {
    "opt/sly": FOLDER, "opt/sly/python": LINK,
    "opt/sly/launcher.py": PUBLIC, "opt/sly/first_boot.py": PUBLIC, "opt/sly/flashed.list": PUBLIC,
    WHEELS: FOLDER, f"{WHEELS}/tiny-1.0-py3-none-any.whl": PUBLIC, f"{WHEELS}/pip-26.0-py3-none-any.whl": PUBLIC,
    f"{WHEELS}/wheelhouse.json": PUBLIC, "opt/sly/models": FOLDER,
    "etc/sly": FOLDER, "etc/sly/agent.toml": SECRET,
    f"{UNITS}/sly-agent.service": PUBLIC, f"{UNITS}/sly-first-boot.service": PUBLIC,
    f"{UNITS}/sly-agent.service.d": FOLDER, f"{UNITS}/sly-agent.service.d/10-board.conf": PUBLIC,
    f"{UNITS}/multi-user.target.wants": FOLDER, f"{UNITS}/multi-user.target.wants/sly-agent.service": LINK,
    "etc/udev": FOLDER, "etc/udev/rules.d": FOLDER, "etc/udev/rules.d/70-sly.rules": PUBLIC,
    "etc/sysusers.d": FOLDER, "etc/sysusers.d/sly.conf": PUBLIC,
    "var/lib/sly": PRIVATE_FOLDER, STATE: PRIVATE_FOLDER,
    **{f"{STATE}/{name}": SECRET for name in ("identity.key", "device_root.key", "client.key")},
    **{f"{STATE}/{name}": PUBLIC for name in ("client.pem", "ca.pem", "root.json")},
}  # fmt: skip
"""All that a flashing adds to the system of ``flash_targets``, with its type and mode."""


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.fixture
def target(shop: Workshop) -> Iterator[Path]:
    made = shop.system()
    yield made
    shutil.rmtree(made.parent)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# what comes of it


def test_a_flashed_system_has_exactly_these_files_with_these_modes_and_all_of_them_are_roots(
    target: Path, shop: Workshop, shell: str
) -> None:
    before = everything(target)
    done = shop.flash(target, shell=shell)
    assert done.code == 0, done.err
    after = everything(target)
    assert {path for path in after if path not in before} == set(PLACED)
    assert {path: int(str(after[path][0]), 8) for path in PLACED} == PLACED
    assert {after[path][1:3] for path in PLACED} == {(0, 0)}
    grew = {str(Path(path).parent) for path in PLACED}
    assert all(after[path] == before[path] for path in before if path not in grew), "nothing else was touched"
    assert all(after[path] == before[path] for path in before if path in grew), "nor mode and owner of folders that were there"
    assert f"{BOARD} now" in done.out and "sly fleet watch" in done.out


def test_what_is_placed_is_what_was_enrolled_and_what_lies_in_the_checkout(target: Path, shop: Workshop) -> None:
    assert shop.flash(target).code == 0
    same = {f"{STATE}/{path.name}": path for path in (shop.boards / BOARD).iterdir() if path.name != "agent.toml"}
    same |= {f"{WHEELS}/{path.name}": path for path in shop.wheels.iterdir()}
    same |= {"etc/sly/agent.toml": shop.boards / BOARD / "agent.toml", "opt/sly/launcher.py": ROOT / "ota/launcher.py"}
    same |= {"opt/sly/first_boot.py": ROOT / "board_support/first_boot.py"}
    same |= {f"{UNITS}/sly-agent.service.d/10-board.conf": ROOT / "board_support/systemd/boards/jalapeno.conf"}
    assert all((target / there).read_bytes() == here.read_bytes() for there, here in same.items())
    link = target / UNITS / "multi-user.target.wants/sly-agent.service"
    assert str(link.readlink()) == f"/{UNITS}/sly-agent.service"
    assert str((target / "opt/sly/python").readlink()) == "/usr/bin/python3.11"


def another_python(target: Path, name: str, machine: str = "aarch64", venv: bool = True) -> None:
    """Beside the system's own."""
    (target / "usr/bin" / name).write_bytes(program(machine))
    (target / "usr/lib" / name / "venv").mkdir(parents=True, exist_ok=True)
    if venv:
        (target / "usr/lib" / name / "venv/__init__.py").touch()


def own_python(target: Path, name: str) -> None:
    (target / "usr/bin/python3").unlink()
    (target / "usr/bin/python3").symlink_to(name)


def test_beside_an_old_python_the_newest_whole_one_is_taken_and_the_systems_own_stays(target: Path, shop: Workshop) -> None:
    another_python(target, "python3.10")
    own_python(target, "python3.10")
    another_python(target, "python3.9")
    another_python(target, "python3.13", venv=False)
    another_python(target, "python3.14", machine="x86_64")
    another_python(target, "python3.12-config")
    done = shop.flash(target)
    assert done.code == 0 and "aarch64, Python 3.11" in done.out, done.err
    assert str((target / "opt/sly/python").readlink()) == "/usr/bin/python3.11"
    assert str((target / "usr/bin/python3").readlink()) == "python3.10"
    another_python(target, "python3.12")
    done = shop.flash(target, "--dry-run", wheels=None, shell="busybox ash")
    assert done.code == 0 and "aarch64, Python 3.12" in done.out, done.err


def test_a_python_of_the_system_that_is_new_enough_is_taken_though_a_newer_one_is_beside_it(target: Path, shop: Workshop) -> None:
    another_python(target, "python3.12")
    assert shop.flash(target).code == 0
    assert str((target / "opt/sly/python").readlink()) == "/usr/bin/python3.11"


@pytest.mark.parametrize("board", KINDS)
def test_every_kind_of_board_is_flashed_with_its_own_devices(target: Path, shop: Workshop, board: str) -> None:
    done = shop.flash(target, board=KINDS[board], enrolled=shop.boards / board)
    assert done.code == 0, done.err
    placed = target / UNITS / "sly-agent.service.d/10-board.conf"
    assert placed.read_bytes() == (ROOT / f"board_support/systemd/boards/{KINDS[board]}.conf").read_bytes()


def test_no_private_key_can_be_read_by_others_nor_lies_anywhere_twice(target: Path, shop: Workshop) -> None:
    assert shop.flash(target).code == 0
    secrets = [(shop.boards / BOARD / name).read_bytes() for name in ("identity.key", "device_root.key", "client.key")]
    holding = [path for path in target.rglob("*") if path.is_file() and any(s in path.read_bytes() for s in secrets)]
    assert sorted(path.name for path in holding) == ["client.key", "device_root.key", "identity.key"]
    assert all(path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0 for path in holding)


def test_nothing_secret_is_told_or_left_where_it_was_staged(
    target: Path, shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "password").write_text("correct horse")
    (target / "usr/sbin/NetworkManager").write_text("")
    done = shop.flash(target, wifi="net", wifi_password_file=tmp_path / "password")
    assert done.code == 0
    key = (shop.boards / BOARD / "client.key").read_text().splitlines()[1]
    assert key not in done.out + done.err and "correct horse" not in done.out + done.err
    assert [path.name for path in tmp_path.iterdir()] == ["password"]


def test_the_first_boot_finds_what_was_flashed_whole(target: Path, shop: Workshop) -> None:
    assert shop.flash(target).code == 0
    entries = first_boot.flashed(target)
    assert [why for each in entries if (why := first_boot.why_damaged(target, each))] == []
    files = {path for path, mode in PLACED.items() if mode in (PUBLIC, SECRET)}
    assert {each.path.lstrip("/") for each in entries} >= files - {"opt/sly/flashed.list"}


def test_systemd_takes_the_units_as_they_lie_there(target: Path, shop: Workshop) -> None:
    needs_program("systemd-analyze", "systemd")
    assert shop.flash(target).code == 0
    shutil.copytree("/usr/lib/systemd/system", target / "usr/lib/systemd/system", symlinks=True)
    (target / "usr/bin/sh").write_bytes(program("aarch64"))
    for name in ("python3.11", "sh"):
        (target / "usr/bin" / name).chmod(0o755)
    with (target / "etc/passwd").open("a") as file:
        file.write("sly:x:900:900::/var/lib/sly:/usr/sbin/nologin\n")
    units = ["sly-first-boot.service", "sly-agent.service"]
    done = subprocess.run(
        ["systemd-analyze", "verify", f"--root={target}", "--man=no", "--recursive-errors=no", *units],
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0 and "sly-" not in done.stderr, done.stderr


def test_the_scripts_are_clean_to_shellcheck() -> None:
    shellcheck = needs_program("shellcheck", "shellcheck")
    scripts = [FLASH, *sorted((ROOT / "board_support/flash").glob("*.sh"))]
    done = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout
