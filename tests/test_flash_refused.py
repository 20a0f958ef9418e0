"""What flash.sh is given and does not take: one clear line, and the target as it was, to the last time stamp."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.flash_targets import BOARD, FLASH, PATIENCE_S, SHELLS, Workshop, everything, flash, program, wheelhouse, workshop
from tests.needs import needs_program

REFUSED, FAILED = 2, 1
PLAIN_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE1 me@here\n"


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.fixture
def target(shop: Workshop) -> Iterator[Path]:
    made = shop.system()
    yield made
    shutil.rmtree(made.parent)


@dataclass(frozen=True, slots=True)
class Bench:
    """What a case may spoil: the system, a copy of the board's folder and of the wheels, and a folder of its own."""

    system: Path
    enrolled: Path
    wheels: Path
    folder: Path

    def file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path


@dataclass(frozen=True, slots=True)
class Case:
    """``spoil`` changes what is on the bench, and returns options for flash.sh besides the usual; ``says``: parts of its line."""

    says: tuple[str, ...]
    spoil: Callable[[Bench], Mapping[str, Any] | None] = field(default=lambda bench: None)
    code: int = REFUSED


def written(path: Path, data: bytes) -> Mapping[str, Any]:
    path.write_bytes(data)
    return {}


def given(**options: object) -> Callable[[Bench], Mapping[str, Any]]:
    return lambda bench: options


def without(*names: str) -> Callable[[Bench], None]:
    def spoil(bench: Bench) -> None:
        for name in names:
            (bench.system / name).unlink()

    return spoil


def enrolled_without(name: str) -> Callable[[Bench], None]:
    return lambda bench: (bench.enrolled / name).unlink()


def programs(machine: str) -> Callable[[Bench], None]:
    def spoil(bench: Bench) -> None:
        for name in ("usr/bin/python3.11", "usr/lib/systemd/systemd"):
            (bench.system / name).write_bytes(program(machine))

    return spoil


def python_is(name: str) -> Callable[[Bench], None]:
    def spoil(bench: Bench) -> None:
        (bench.system / "usr/bin/python3.11").rename(bench.system / "usr/bin" / name)
        (bench.system / "usr/bin/python3").unlink()
        (bench.system / "usr/bin/python3").symlink_to(name)

    return spoil


def jetpack(bench: Bench) -> None:
    python_is("python3.10")(bench)
    (bench.system / "usr/lib/os-release").write_text('PRETTY_NAME="Ubuntu 22.04.5 LTS"\nID=ubuntu\n')


def python_speaks(bench: Bench) -> None:
    python_is("\x1b[31mred\nflash.sh: all is well")(bench)
    (bench.system / "usr/lib/python3.12").mkdir()


def replaced(old: str, new: str) -> Callable[[Bench], None]:
    """In the board's agent.toml."""

    def spoil(bench: Bench) -> None:
        path = bench.enrolled / "agent.toml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return spoil


def from_other_board(name: str) -> Callable[[Bench], None]:
    def spoil(bench: Bench) -> None:
        shutil.copy(bench.folder.parent / "fleet" / "boards" / "barn" / name, bench.enrolled / name)

    return spoil


def with_identity(board: str, key: bytes) -> Callable[[Bench], None]:
    def spoil(bench: Bench) -> None:
        state = bench.system / "var/lib/sly" / board
        state.mkdir(parents=True)
        (state / "identity.key").write_bytes(key)

    return spoil


def other_wheels(**facts: str) -> Callable[[Bench], Mapping[str, Any]]:
    return lambda bench: {"wheels": wheelhouse(bench.folder / "other", **facts)}


def ssh_key(text: str) -> Callable[[Bench], Mapping[str, Any]]:
    return lambda bench: {"ssh_key": bench.file("me.pub", text)}


def wifi(password: str, software: bool = True) -> Callable[[Bench], Mapping[str, Any]]:
    def spoil(bench: Bench) -> Mapping[str, Any]:
        if software:
            (bench.system / "usr/sbin/wpa_supplicant").write_text("")
        return {"wifi": "net", "wifi_password_file": bench.file("password", password)}

    return spoil


def link(name: str, aim: str) -> Callable[[Bench], None]:
    def spoil(bench: Bench) -> None:
        (bench.system / name).parent.mkdir(parents=True, exist_ok=True)
        (bench.system / name).symlink_to(aim)

    return spoil


def round_and_round(bench: Bench) -> None:
    (bench.system / "opt").rmdir()
    (bench.system / "opt").symlink_to("round")
    (bench.system / "round").symlink_to("opt")


def renamed_wheel(bench: Bench) -> None:
    path = next(bench.wheels.glob("pip-*"))
    path.rename(bench.wheels / "pip-26.0-cp311-cp311-manylinux_2_28_x86_64.whl")


CASES = {
    "no board": Case(("--board: nothing; allowed: jetson, coral, raspberry_pi or jalapeno",), given(board=None)),
    "an unknown board": Case(("--board: toaster", "jetson"), given(board="toaster")),
    "no enrolment": Case(("--enrolled: nothing", "sly fleet enroll"), given(enrolled=None)),
    "no target": Case(("target: none", "--rootfs"), given(rootfs=None)),
    "two targets": Case(("target: more than one",), given(ssh="root@board")),
    "an option that only images have": Case(("--out",), given(out="x.img")),
    "a partition that is no number": Case(("--partition",), given(partition="one")),
    "no folder": Case(("--rootfs", "no folder"), lambda bench: {"rootfs": bench.folder / "nowhere"}),
    "a file": Case(("--rootfs", "no folder"), lambda bench: {"rootfs": bench.file("image", "x")}),
    "a folder that is no system": Case(("no system with systemd",), lambda bench: {"rootfs": bench.folder}),
    "a system without systemd": Case(("no system with systemd",), without("usr/lib/systemd/systemd")),
    "this machine's own system": Case(("the system of this machine", "--ssh"), given(rootfs="/")),
    "this machine's own system by another name": Case(("the system of this machine",), given(rootfs="/proc/self/root/usr/..")),
    "a system of 32 bits": Case(
        ("armv7l (32-bit)", "allowed: aarch64", "Raspberry Pi OS Lite (64-bit)"),
        lambda bench: [
            programs("armv7l")(bench),
            {"board": "raspberry_pi", "enrolled": bench.folder.parent / "fleet/boards/gate"},
        ][1],
    ),
    "a PC's system for a Raspberry Pi": Case(
        ("x86_64", "allowed: aarch64 for --board raspberry_pi"),
        lambda bench: [
            programs("x86_64")(bench),
            {"board": "raspberry_pi", "enrolled": bench.folder.parent / "fleet/boards/gate"},
        ][1],
    ),
    "programs that are none": Case(
        ("no program that Linux runs",),
        lambda bench: [written(bench.system / name, b"#!/bin/sh") for name in ("usr/bin/python3.11", "usr/lib/systemd/systemd")][
            0
        ],
    ),
    "no Python": Case(
        ("Python of", "none in /usr/bin/python3", "apt-get install python3"), without("usr/bin/python3", "usr/bin/python3.11")
    ),
    "a Python that leads nowhere": Case(("none in /usr/bin/python3",), without("usr/bin/python3.11")),
    "an old Python": Case(("3.10", "allowed: 3.11 or later"), python_is("python3.10")),
    "the Python of JetPack 6": Case(("3.10", "apt-get install python3.11", "universe"), jetpack),
    "a Python whose name speaks to the terminal": Case(("?[31mred?flash.sh: all is well",), python_speaks),
    "a Python that is half there": Case(
        ("without its module venv", "python3-minimal"), without("usr/lib/python3.11/venv/__init__.py")
    ),
    "wheels for another Python": Case(
        ("wheels for Python 3.12 on aarch64; allowed: Python 3.11 on aarch64", "sly ota pack-agent"), other_wheels(python="3.12")
    ),
    "wheels for another machine": Case(("wheels for Python 3.11 on x86_64",), other_wheels(machine="x86_64")),
    "one wheel for another machine": Case(("pip-26.0-cp311-cp311-manylinux_2_28_x86_64.whl", "aarch64"), renamed_wheel),
    "wheels without their facts": Case(("without wheelhouse.json",), lambda bench: (bench.wheels / "wheelhouse.json").unlink()),
    "no wheel of the agent": Case(("no wheel of tiny-1.0",), lambda bench: next(bench.wheels.glob("tiny-*")).unlink()),
    "no wheel of pip": Case(("no wheel of pip",), lambda bench: next(bench.wheels.glob("pip-*")).unlink()),
    "an empty wheel": Case(
        ("pip-26.0-py3-none-any.whl, which is no wheel",),
        lambda bench: written(next(bench.wheels.glob("pip-*")), b""),
    ),
    "a wheel of a hostile name": Case(("a file a b.whl",), lambda bench: written(bench.wheels / "a b.whl", b"PK")),
    **{
        f"an enrolment without {name}": Case(("--enrolled", name, "enroll"), enrolled_without(name))
        for name in ("agent.toml", "client.key", "client.pem", "ca.pem", "root.json", "identity.key")
    },
    "an enrolment for another kind of board": Case(("--board: coral", "allowed: jalapeno"), given(board="coral")),
    "an enrolment with another state folder": Case(
        ("state.folder",), replaced('folder = "/var/lib/sly/kitchen"', 'folder = "/srv"')
    ),
    "an id that leads elsewhere": Case(("board.id", "../x"), replaced('id = "kitchen"', 'id = "../x"')),
    "the id under which the agent's own updates lie": Case(("board.id: agent",), replaced('id = "kitchen"', 'id = "agent"')),
    "another board's certificate": Case(("the certificate of barn; allowed: that of kitchen",), from_other_board("client.pem")),
    "another board's TLS key": Case(("client.key",), from_other_board("client.key")),
    "another board's identity": Case(("identity.key: another board's key",), from_other_board("identity.key")),
    "a torn identity": Case(("identity.key: 31 bytes",), lambda bench: written(bench.enrolled / "identity.key", b"x" * 31)),
    "a system that is another board": Case(("the identity of barn", "--wipe"), with_identity("barn", b"b" * 32)),
    "a system that is this board with another key": Case(
        ("another key than the one enrolled", "--wipe"), with_identity(BOARD, b"k" * 32)
    ),
    "a folder of ours that is a link": Case(("/opt/sly on the target: a link",), link("opt/sly", "/home/me")),
    "a configuration folder that is a link": Case(("/etc/sly on the target: a link",), link("etc/sly", "/home/me")),
    "a state folder that is a link": Case(
        (f"/var/lib/sly/{BOARD} on the target: a link",), link(f"var/lib/sly/{BOARD}", "/home")
    ),
    "links that never end": Case(("links that never end",), round_and_round),
    "a private key as the public one": Case(("--ssh-key", "a private key"), ssh_key("-----BEGIN OPENSSH PRIVATE KEY-----\n")),
    "something else as a key": Case(("--ssh-key", "something else"), ssh_key('command="rm" ' + PLAIN_KEY)),
    "an empty key": Case(("--ssh-key",), ssh_key("")),
    "authorized keys that are a link": Case(
        ("/root/.ssh/authorized_keys on the target: a link",),
        lambda bench: [link("root/.ssh/authorized_keys", "/etc/passwd")(bench), ssh_key(PLAIN_KEY)(bench)][1],
    ),
    "Wi-Fi without a password": Case(("--wifi: net", "--wifi-password-file"), given(wifi="net")),
    "a Wi-Fi password that is short": Case(("--wifi-password-file: 5 characters",), wifi("short")),
    "a Wi-Fi password of two lines": Case(("--wifi-password-file",), wifi('password"\nnetwork={')),
    "Wi-Fi on a system that has none": Case(("neither NetworkManager nor wpa_supplicant",), wifi("password", software=False)),
    "a name that is none": Case(("--hostname",), given(hostname="kitchen; rm")),
    "models that are not there": Case(("--models",), lambda bench: {"models": bench.folder / "nowhere"}),
    "a folder without models": Case(("--models", "without any model"), lambda bench: {"models": bench.folder}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_is_one_line_and_changes_nothing(shop: Workshop, target: Path, tmp_path: Path, name: str) -> None:
    case, own = CASES[name], shop.room / "own"
    bench = Bench(target, own / "enrolled", own / "wheels", own / "folder")
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(shop.boards / BOARD, bench.enrolled)
    shutil.copytree(shop.wheels, bench.wheels)
    bench.folder.mkdir()
    (own / "fleet").symlink_to(shop.boards.parent)
    options: dict[str, Any] = {"enrolled": bench.enrolled, "wheels": bench.wheels, **(case.spoil(bench) or {})}
    before = everything(target, times=True)
    shell = list(SHELLS)[list(CASES).index(name) % 2]
    done = shop.flash(target, "--yes", shell=shell, variables={"TMPDIR": str(tmp_path)}, **options)
    assert done.code == case.code, done.err
    assert done.last.startswith("flash.sh: ") and all(part in done.last for part in case.says), done.err
    assert "not found" not in done.err and not done.out
    assert everything(target, times=True) == before
    assert not list(tmp_path.iterdir()), "nothing is left where it was staged"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--frobnicate", "x"], "option: --frobnicate"),
        (["--board"], "--board: no value"),
        (["--board", ""], "--board: no value"),
        (["jalapeno"], "option: jalapeno"),
    ],
)
@pytest.mark.parametrize("shell", SHELLS)
def test_an_option_that_there_is_not_is_named(words: list[str], says: str, shell: str) -> None:
    needs_program(SHELLS[shell][0], SHELLS[shell][0])
    done = flash(*words, shell=shell)
    assert (done.code, says in done.last) == (REFUSED, True), done.err


@pytest.mark.parametrize("shell", SHELLS)
def test_help_names_every_option_and_is_told_to_whoever_says_nothing(shell: str) -> None:
    needs_program(SHELLS[shell][0], SHELLS[shell][0])
    done, nothing = flash("--help", shell=shell), flash(shell=shell)
    assert (done.code, nothing.code, done.err) == (0, REFUSED, "") and nothing.out == done.out
    known = {word.rstrip(")") for line in FLASH.read_text().splitlines() for word in line.split() if word.startswith("--")}
    options = {word for word in known if word.strip("-").replace("-", "").isalpha()}
    assert "--rootfs" in options and all(option in done.out for option in options)


def test_without_rights_it_says_so_and_says_what_needs_none(shop: Workshop, target: Path) -> None:
    nobody = [needs_program("setpriv", "util-linux"), "--reuid=65534", "--regid=65534", "--clear-groups"]
    own = shop.room / "nobody"
    shutil.copytree(shop.boards / BOARD, own)
    subprocess.run(["chown", "-R", "65534:65534", own], check=True, timeout=PATIENCE_S)
    shop.room.chmod(0o755)
    target.parent.chmod(0o755)
    before = everything(target, times=True)
    done = shop.flash(target, before=nobody, enrolled=own)
    assert done.code == REFUSED and "--rootfs: user nobody; allowed: root" in done.last and "--image" in done.last, done.err
    done = shop.flash(target, "--dry-run", before=nobody, enrolled=own)
    assert done.code == 0 and "kitchen, a jalapeno" in done.out, "to look needs no rights"
    done = shop.flash(target, before=nobody)
    assert done.code == REFUSED and "--enrolled" in done.last, "another's keys are another's"
    assert everything(target, times=True) == before


@pytest.mark.parametrize("shell", SHELLS)
def test_a_folder_that_another_flashes_is_refused(shop: Workshop, target: Path, shell: str) -> None:
    before = everything(target, times=True)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        done = shop.flash(target, shell=shell)
        assert done.code == REFUSED and "another flash.sh is at work" in done.last, done.err
        assert shop.flash(target, "--dry-run", shell=shell).code == 0, "to look disturbs nobody"
    finally:
        os.close(descriptor)
    assert everything(target, times=True) == before


def test_too_little_room_is_said_before_anything_is_written(shop: Workshop, target: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", place], check=True, timeout=PATIENCE_S)
    try:
        shutil.copytree(target, place / "root", symlinks=True)
        before = everything(place / "root", times=True)
        done = shop.flash(place / "root")
        assert done.code == FAILED and "room on" in done.last and "MiB needed" in done.last, done.err
        assert everything(place / "root", times=True) == before
    finally:
        subprocess.run(["umount", place], check=True, timeout=PATIENCE_S)
