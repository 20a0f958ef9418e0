"""A board's first boot, run for real by the system's Python in a folder: what it makes, and whatever may be wrong with a card."""

from __future__ import annotations

import ast
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from board_support import first_boot
from ota import launcher
from tests.flashed_board import KEY, NOT_AS_ROOT, PYTHON, FlashedBoard, system_python
from tests.needs import needs

FEW, MANY = 3, 5
"""Kills."""
MAX_WAIT_S = 4.0
"""About what a build takes here."""
FLASH = "run flash.sh"
IN_MEMORY = "/dev/shm"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes users and gives files away")


def hidden_ensurepip() -> str:
    """Debian's minimal system has the module venv, and ensurepip in a package apart."""
    asked = ["/usr/bin/python3", "-c", "import ensurepip, os; print(os.path.dirname(ensurepip.__file__))"]
    folder = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return f"mount -t tmpfs none {folder} && " if folder else ""


@contextmanager
def roots_parent() -> Iterator[Path]:
    """One that other users may pass, as a board's is; in memory, for thousands of small files are made durable here."""
    with tempfile.TemporaryDirectory(prefix="sly-first-boot-", dir=IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else None) as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def root() -> Iterator[Path]:
    with roots_parent() as made:
        yield made / "root"


@pytest.fixture
def board(root: Path) -> FlashedBoard:
    return FlashedBoard(root)


@pytest.fixture(scope="module")
def booted_once() -> Iterator[FlashedBoard]:
    """Its environment works where it is copied to, but for the scripts in it."""
    with roots_parent() as made:
        board = FlashedBoard(made / "root")
        code, said = board.boot("unshare", "--mount", "--net", "sh", "-c", hidden_ensurepip() + 'exec "$@"', "sh")
        assert (code, said.splitlines()[-1]) == (0, "first boot: done: the agent can start"), said
        assert all(line.startswith("first boot: ") for line in said.splitlines())
        yield board


@pytest.fixture
def booted(booted_once: FlashedBoard, root: Path) -> FlashedBoard:
    subprocess.run(["cp", "--archive", booted_once.root, root], check=True)
    return FlashedBoard(root, flashed=True)


def owner(path: Path) -> tuple[int, int, int]:
    facts = path.lstat()
    return facts.st_uid, facts.st_gid, facts.st_mode & 0o7777


def number(board: FlashedBoard, file: str) -> int:
    (line,) = [line for line in (board.root / "etc" / file).read_text().splitlines() if line.startswith("sly:")]
    return int(line.split(":")[2])


# what it makes


def test_it_makes_user_owners_and_environment_with_no_network_and_no_ensurepip(booted_once: FlashedBoard) -> None:
    board = booted_once
    uid, gid = number(board, "passwd"), number(board, "group")
    assert uid and gid
    assert owner(board.state) == owner(board.state / "kitchen") == (uid, gid, 0o700)
    assert owner(board.state / "kitchen/identity.key") == (uid, gid, 0o600)
    assert owner(board.root / "etc/sly/agent.toml") == (0, gid, 0o640)
    assert {owner(path)[:2] for path in board.opt.rglob("*")} == {(0, 0)}
    assert (board.state / "kitchen/identity.key").read_bytes() == KEY
    assert board.agent() == "1.0"


def test_its_user_has_the_groups_that_the_units_of_boards_name_at_hand(booted: FlashedBoard) -> None:
    groups = {line.split(":")[0] for line in (booted.root / "etc/group").read_text().splitlines()}
    assert groups >= {"sly", "tss", "video", "render", "apex", "plugdev"}


def test_a_second_start_changes_nothing_and_starts_no_program(booted: FlashedBoard) -> None:
    before = {path: (path.lstat().st_mtime_ns, path.lstat().st_ctime_ns) for path in booted.opt.rglob("*")}
    code, said = booted.boot("env", "PATH=/nonexistent")
    assert (code, said) == (0, "first boot: nothing to do: the agent's environment is there\n")
    assert {path: (path.lstat().st_mtime_ns, path.lstat().st_ctime_ns) for path in booted.opt.rglob("*")} == before


def test_an_agent_that_its_user_cannot_import_leaves_the_one_before_and_a_good_one_takes_its_place(booted: FlashedBoard) -> None:
    old = booted.environments()
    booted.flash(2, "import no_such_module\n" + NOT_AS_ROOT)
    code, said = booted.boot()
    assert code == 1 and "the agent: ModuleNotFoundError: No module named 'no_such_module'" in said
    assert booted.agent() == "1.0"
    booted.flash(3)
    assert booted.boot()[0] == 0
    assert booted.agent() == "3.0" and len(booted.environments()) == 1 and booted.environments() != old


def test_files_that_a_later_flashing_renewed_are_the_agents_again(booted: FlashedBoard) -> None:
    renewed = booted.state / "kitchen/client.pem"
    renewed.write_text("a newer certificate")
    code, said = booted.boot()
    assert code == 0 and "1 files and folders in /var/lib/sly are sly's now" in said
    assert owner(renewed)[:2] == (number(booted, "passwd"), number(booted, "group")) and owner(renewed)[2] & 0o077 == 0


def test_without_systemd_sysusers_the_same_user_is_made_by_useradd(board: FlashedBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = board.root.parent / "tools"
    tools.mkdir()
    for name in ("useradd", "groupadd"):
        found = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin")
        needs(found, f"{name} is not installed (apt-get install passwd)")
        (tools / name).symlink_to(str(found))
    for name in ("passwd", "group", "shadow", "gshadow"):
        (board.root / "etc" / name).touch()
    monkeypatch.setenv("PATH", str(tools))
    assert first_boot.user(board.root) == (number(board, "passwd"), number(board, "group"))
    assert first_boot._groups(board.root) >= {"sly", "tss", "video", "render", "apex", "plugdev"}


def test_where_no_user_can_be_made_it_says_so(board: FlashedBoard) -> None:
    code, said = board.boot("env", "PATH=/nonexistent")
    assert code == 1 and "there is no user sly" in said and "what to do: run: useradd" in said


def test_it_is_one_file_of_the_standard_library() -> None:
    tree = ast.parse(Path(first_boot.__file__).read_text())
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in named} <= sys.stdlib_module_names
    assert first_boot.PROBED == launcher.PROBED


# cards that are not as they should be


@pytest.mark.parametrize("harm", ["missing", "torn", "without its end", "garbled", "without wheels"])
def test_a_card_that_was_not_finished_is_refused_and_left_alone(board: FlashedBoard, harm: str) -> None:
    path = board.opt / "flashed.list"
    whole = path.read_bytes()
    harmed = {
        "torn": whole[: len(whole) // 2], "without its end": whole[:-1], "garbled": b"\0\xff\n" * 40,
        "without wheels": b"".join(line for line in whole.splitlines(keepends=True) if b".whl" not in line),
    }  # fmt: skip
    path.unlink() if harm == "missing" else path.write_bytes(harmed[harm])
    code, said = board.boot()
    assert code == 1 and "this card was not finished" in said and FLASH in said
    assert owner(board.state / "kitchen/identity.key") == (0, 0, 0o600) and not board.environments()


@pytest.mark.parametrize("harm", ["a bit", "cut short", "gone", "a link"])
def test_a_damaged_file_is_named(board: FlashedBoard, harm: str) -> None:
    path = next(board.opt.glob("wheels/tiny*.whl"))
    data = path.read_bytes()
    path.unlink()
    if harm in ("a bit", "cut short"):
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:] if harm == "a bit" else data[:-1])
    elif harm == "a link":
        path.symlink_to("/etc/hostname")
    code, said = board.boot()
    assert code == 1 and "damaged: /opt/sly/wheels/tiny-1.0-py3-none-any.whl: " in said and FLASH in said
    assert not board.environments()


def test_a_file_that_a_later_flashing_damaged_is_named_though_the_environment_is_whole(booted: FlashedBoard) -> None:
    (booted.opt / "launcher.py").write_text("torn")
    assert booted.boot()[0] == 0, "what changed since is not looked at in each boot"
    (booted.opt / "flashed.list").touch()
    code, said = booted.boot()
    assert code == 1 and "damaged: /opt/sly/launcher.py" in said


@pytest.mark.parametrize(("told", "words"), [({"python": "3.9"}, "Python 3.9 on"), ({"machine": "riscv64"}, "on riscv64")])
def test_wheels_for_another_python_or_machine_are_refused(root: Path, told: dict[str, str], words: str) -> None:
    code, said = FlashedBoard(root, told=told).boot()
    assert code == 1 and words in said and f"this system has Python {system_python()}" in said and FLASH in said


def test_wheels_without_pip_are_refused(root: Path) -> None:
    code, said = FlashedBoard(root, pip=False).boot()
    assert code == 1 and "there is no wheel of pip" in said and "sly ota pack-agent" in said


def test_a_disk_that_is_too_full_says_how_much_is_missing(board: FlashedBoard) -> None:
    small = (
        f'mount -t tmpfs -o size=24m,mode=755 none {board.opt.parent} && mkdir {board.opt} && cp -a $0/. {board.opt} && exec "$@"'
    )
    kept = shutil.copytree(board.opt, board.root.parent / "kept", symlinks=True)
    code, said = board.boot("unshare", "--mount", "sh", "-c", small, str(kept))
    assert code == 1 and "MiB are missing" in said and "what to do: make room" in said
    assert not board.environments()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fills_or_fails_meanwhile_is_told_by_its_own_name(code: int) -> None:
    error = first_boot._failure("pip", 1, f"ERROR: Could not install packages due to an OSError: {os.strerror(code)}: 'x'")
    assert str(error) == f"pip: {os.strerror(code)}" and error.remedy == first_boot.REMEDIES[code]


def test_a_failure_makes_a_light_blink_fast_where_there_is_one(booted: FlashedBoard) -> None:
    light = booted.root / "sys/class/leds/ACT"
    light.mkdir(parents=True)
    for name in ("trigger", "delay_on", "delay_off"):
        (light / name).touch()
    assert booted.boot()[0] == 0 and (light / "trigger").read_text() == ""
    (booted.opt / "flashed.list").unlink()
    assert booted.boot()[0] == 1
    assert [(light / name).read_text() for name in ("trigger", "delay_on", "delay_off")] == ["timer", "100", "100"]


# a state folder that its agent, taken over, prepared for root

SLY = first_boot.Identity(60_200, 60_200)


@pytest.fixture
def outside(board: FlashedBoard) -> Path:
    """A file of root's that others may not read."""
    path = board.root.parent / "shadow"
    path.write_text("root's")
    path.chmod(0o600)
    return path


def test_a_link_in_the_state_folder_leads_nowhere(board: FlashedBoard, outside: Path) -> None:
    before = owner(outside), owner(outside.parent)
    (board.state / "kitchen/link").symlink_to(outside)
    (board.state / "kitchen/folder").symlink_to(outside.parent)
    first_boot.give(board.root, SLY)
    assert (owner(outside), owner(outside.parent)) == before
    assert owner(board.state / "kitchen/link")[:2] == owner(board.state / "kitchen/identity.key")[:2] == SLY


@pytest.mark.parametrize("folder", ["", "kitchen"])
def test_a_state_folder_that_is_a_link_gives_nothing_away(board: FlashedBoard, outside: Path, folder: str) -> None:
    shutil.rmtree(board.state / folder)
    board.state.joinpath(folder).symlink_to(outside.parent)
    before = owner(outside.parent)
    if folder:
        first_boot.give(board.root, SLY)
    else:
        with pytest.raises(OSError):
            first_boot.give(board.root, SLY)
    assert (owner(outside), owner(outside.parent)) == ((0, 0, 0o600), before)


def test_a_second_name_of_a_file_of_roots_gives_nothing_away(board: FlashedBoard, outside: Path) -> None:
    os.link(outside, board.state / "kitchen/mine")
    with pytest.raises(first_boot.FirstBootError, match="/var/lib/sly/kitchen/mine has 2 names"):
        first_boot.give(board.root, SLY)
    assert owner(outside) == (0, 0, 0o600)


@pytest.mark.parametrize("made_by", [os.symlink, os.link])
def test_a_configuration_that_is_another_file_gives_nothing_away(
    board: FlashedBoard, outside: Path, made_by: Callable[[Path, Path], None]
) -> None:
    config = board.root / "etc/sly/agent.toml"
    config.unlink()
    made_by(outside, config)
    with pytest.raises((OSError, first_boot.FirstBootError)):
        first_boot.give(board.root, SLY)
    assert owner(outside) == (0, 0, 0o600)


def test_a_pipe_does_not_stop_it_and_a_device_is_left_alone(board: FlashedBoard) -> None:
    os.mkfifo(board.state / "kitchen/pipe")
    os.mknod(board.state / "kitchen/device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    first_boot.give(board.root, SLY)
    assert owner(board.state / "kitchen/device") == (0, 0, 0o600)


def test_folders_in_folders_without_end_are_refused(board: FlashedBoard) -> None:
    (board.state / "/".join(["d"] * 100)).mkdir(parents=True)
    with pytest.raises(first_boot.FirstBootError, match="64 deep"):
        first_boot.give(board.root, SLY)


# the power goes


@pytest.mark.parametrize("kills", [FEW, pytest.param(MANY, marks=pytest.mark.long)])
def test_19_power_cut_at_any_point_leaves_the_old_agent_or_the_new_one_and_the_next_boot_finishes(
    kills: int, board: FlashedBoard
) -> None:
    random, version = Random(1), 1
    for _ in range(kills):
        _killed(board, random.uniform(0, MAX_WAIT_S))
        agent = board.agent()
        assert agent in {f"{version - 1}.0" if version > 1 else "", f"{version}.0"}
        if agent == f"{version}.0":
            version += 1
            board.flash(version)
    version += 1
    board.flash(version)
    assert board.boot()[0] == 0 and board.agent() == f"{version}.0" and len(board.environments()) == 1


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What is made durable and what gets another name from now on, in this order."""
    done: list[tuple[str, Path]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(fd: int) -> None:
        fsync(fd)
        done.append(("fsync", Path(f"/proc/self/fd/{fd}").readlink()))

    def recorded_replace(old: Path, new: Path) -> None:
        replace(old, new)
        done.append(("rename", Path(new)))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    return done


def test_19_all_of_an_environment_is_durable_before_its_stamp_and_the_stamp_before_the_link(
    board: FlashedBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill does not show: the order in which the disk is told. The rest of the build is the real one."""
    done = recorded(monkeypatch)
    monkeypatch.setattr(sys, "executable", str(PYTHON))
    house = first_boot.wheelhouse(board.root, first_boot.flashed(board.root))
    old = board.opt / "factory-00000000"
    old.mkdir()
    first_boot.build(board.root, house, first_boot.Identity(65534, 65534))
    made = board.opt / f"factory-{house.stamp[:8]}"
    stamp, link = made / first_boot.STAMP, board.opt / "factory"
    stamped, linked = done.index(("rename", stamp)), done.index(("rename", link))
    inside = {made, *(path for path in made.rglob("*") if not path.is_symlink())} - {stamp}
    assert inside <= {path for what, path in done[:stamped] if what == "fsync"}
    assert done[stamped - 1] == ("fsync", stamp.with_name(f".{stamp.name}"))
    assert stamped < linked and ("fsync", made) in done[stamped:linked] and ("fsync", board.opt) in done[linked:]
    assert not old.exists() and board.agent() == "1.0"


def _killed(board: FlashedBoard, wait_s: float) -> None:
    """It and what it started, as by the power; or it has ended before."""
    with subprocess.Popen(board.command(), stdout=subprocess.DEVNULL, start_new_session=True) as booting:
        try:
            booting.wait(wait_s)
        except subprocess.TimeoutExpired:
            os.killpg(booting.pid, signal.SIGKILL)
