"""flash.sh a second time, half a time, and onto systems that would lead it elsewhere."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from board_support import first_boot
from tests.flash_targets import (
    BOARD,
    KINDS,
    PATIENCE_S,
    Workshop,
    command,
    everything,
    wheelhouse,
    workshop,
)
from tests.wheels import PYTHON

STATE = f"var/lib/sly/{BOARD}"
LIST, UNFINISHED = "opt/sly/flashed.list", "opt/sly/flashing.list"
WHEELS = "opt/sly/wheels"
KEYS = "root/.ssh/authorized_keys"
AGENT_USER = 900
REFUSED, FAILED = 2, 1
ASH = "busybox ash"
"""Dash is what the rest runs under."""


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.fixture
def target(shop: Workshop) -> Iterator[Path]:
    made = shop.system()
    yield made
    shutil.rmtree(made.parent)


@pytest.fixture(params=["dash", pytest.param(ASH, marks=pytest.mark.long)])
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def lived(target: Path) -> set[str]:
    """What a board has written since it was flashed; the paths."""
    files = {f"{STATE}/ledger.sqlite": b"receipts", f"{STATE}/blobs/ab": b"a model", "var/lib/sly/agent/record-0.json": b"{}"}
    files |= {"opt/sly/factory-0123abcd/bin/python": b"", "opt/sly/models/own.tflite": b"brought by hand"}
    for name, data in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    (target / "opt/sly/factory").symlink_to("factory-0123abcd")
    for path in (target / "var/lib/sly").rglob("*"):
        os.chown(path, AGENT_USER, AGENT_USER)
    return {*files, "opt/sly/factory"}


# again


def test_flashing_again_keeps_identity_ledger_and_models_byte_for_byte(shop: Workshop, target: Path, shell: str) -> None:
    assert shop.flash(target).code == 0
    own = lived(target)
    before = everything(target)
    done = shop.flash(target, shell=shell)
    assert done.code == 0 and "stays with its ledger and its models" in done.out, done.err
    after = everything(target)
    assert set(after) == set(before)
    assert {path: after[path] for path in own} == {path: before[path] for path in own}
    assert {path: about[3] for path, about in after.items()} == {path: about[3] for path, about in before.items()}


def test_a_renewed_certificate_comes_and_the_identity_stays(shop: Workshop, target: Path) -> None:
    assert shop.flash(target).code == 0
    renewed = shop.room / "renewed"
    shutil.copytree(shop.boards / BOARD, renewed)
    (renewed / "root.json").write_text("{}")
    (renewed / "identity.key").unlink()
    assert shop.flash(target, enrolled=renewed).code == 0
    assert (target / STATE / "root.json").read_text() == "{}"
    assert (target / STATE / "identity.key").read_bytes() == (shop.boards / BOARD / "identity.key").read_bytes()


def test_wipe_makes_another_board_of_it_and_leaves_nothing_of_the_first(shop: Workshop, target: Path) -> None:
    assert shop.flash(target).code == 0
    own = lived(target)
    options: dict[str, Any] = {"board": KINDS["barn"], "enrolled": shop.boards / "barn"}
    before = everything(target, times=True)
    unasked = shop.flash(target, "--wipe", shell=ASH, **options)
    assert unasked.code == REFUSED and "--yes" in unasked.last and everything(target, times=True) == before
    done = shop.flash(target, "--wipe", "--yes", shell=ASH, **options)
    assert done.code == 0, done.err
    after = set(everything(target))
    assert not own & after and not any(BOARD in path for path in after) and "var/lib/sly/barn/identity.key" in after


def test_what_an_earlier_flashing_wrote_and_this_one_does_not_goes_and_nothing_else(shop: Workshop, target: Path) -> None:
    models = shop.room / "models ash"
    models.mkdir()
    (models / "faces.tflite").write_bytes(b"weights")
    (models / "photograph.png").write_bytes(b"no model")
    assert shop.flash(target, models=models).code == 0
    assert {path.name for path in (target / "opt/sly/models").iterdir()} == {"faces.tflite"}
    own = lived(target)
    before = everything(target)
    done = shop.flash(target, wheels=wheelhouse(shop.room / "newer ash", version="2.0"), shell=ASH)
    assert done.code == 0, done.err
    after = everything(target)
    assert set(before) - set(after) == {"opt/sly/models/faces.tflite", f"{WHEELS}/tiny-1.0-py3-none-any.whl"}
    assert set(after) - set(before) == {f"{WHEELS}/tiny-2.0-py3-none-any.whl"}
    assert {path: after[path] for path in own} == {path: before[path] for path in own}


def test_a_list_that_names_what_is_not_ours_removes_nothing(shop: Workshop, target: Path) -> None:
    assert shop.flash(target).code == 0
    hostile = [
        "/etc/passwd",
        "/opt/sly/../../etc/hostname",
        "/",
        "/home/me",
        f"/{STATE}/identity.key",
        "/etc/systemd/system",
        "opt",
        "",
    ]
    with (target / LIST).open("a") as file:
        file.writelines(f"{kind}\t0644\t{path}\t-\n" for path in hostile for kind in "fdlx")
        file.write("\t\t\t\nno tabs at all\n" + "x" * 5000)
    before = everything(target)
    assert shop.flash(target).code == 0
    assert set(everything(target)) == set(before)


def test_dry_run_touches_neither_the_system_nor_the_wheels_that_are_kept(shop: Workshop, target: Path) -> None:
    kept = shop.room / "kept ash"
    kept.mkdir()
    before = everything(target, times=True), everything(kept, times=True)
    both: list[dict[str, Any]] = [{}, {"wheels": None}]
    for options in both:
        done = shop.flash(target, "--dry-run", "--wipe", shell=ASH, variables={"SLY_BUILD": str(kept), "SLY": "false"}, **options)
        assert done.code == 0 and "kitchen, a jalapeno" in done.out and "nothing was written" in done.err, done.err
    assert "would be packed" in done.err
    assert (everything(target, times=True), everything(kept, times=True)) == before


# what is the owner's


def test_keys_are_added_and_networks_and_names_stay_when_they_are_not_named_again(shop: Workshop, target: Path) -> None:
    (target / KEYS).parent.mkdir(mode=0o700)
    (target / KEYS).write_text("ssh-rsa AAAA the owner's, without a last line feed")
    (target / "usr/sbin/NetworkManager").write_text("")
    key, password = shop.room / "me.pub", shop.room / "password"
    key.write_text("ssh-ed25519 AAAAC3Nza me@here")
    password.write_text(r"it's \ a; pass=word")
    options: dict[str, Any] = {"ssh_key": key, "wifi": "Café 1", "wifi_password_file": password, "hostname": "kitchen-1"}
    for _ in range(2):
        done = shop.flash(target, shell=ASH, **options)
        assert done.code == 0, done.err
    assert (target / KEYS).read_text().splitlines() == ["ssh-rsa AAAA the owner's, without a last line feed", key.read_text()]
    network = target / "etc/NetworkManager/system-connections/sly-wifi.nmconnection"
    assert network.stat().st_mode & 0o777 == 0o600
    lines = network.read_text().splitlines()
    assert f"ssid={''.join(f'{byte};' for byte in 'Café 1'.encode())}" in lines
    assert r"psk=it's\s\\\sa;\spass=word" in lines, "as GLib's key files escape it"
    assert (target / "etc/hostname").read_text() == "kitchen-1\n"
    before = everything(target)
    assert shop.flash(target, shell=ASH).code == 0
    assert everything(target) == before


def test_wifi_without_network_manager_is_wpa_supplicants_and_networkds(shop: Workshop, target: Path) -> None:
    (target / "usr/sbin/wpa_supplicant").write_text("")
    password = shop.room / "other password"
    password.write_text('say "friend"')
    assert shop.flash(target, wifi="net", wifi_password_file=password).code == 0
    placed = target / "etc/wpa_supplicant/wpa_supplicant-wlan0.conf"
    assert placed.stat().st_mode & 0o777 == 0o600
    assert f"ssid={b'net'.hex()}" in placed.read_text() and 'psk="say "friend""' in placed.read_text()
    wants = target / "etc/systemd/system/multi-user.target.wants"
    assert {path.name for path in wants.iterdir()} >= {"wpa_supplicant@wlan0.service", "systemd-networkd.service"}


# half


def halting(folder: Path, number: int, how: str) -> dict[str, str]:
    """A PATH on which the ``number``-th rename of a file ends everything that was started with it, itself too."""
    folder.mkdir()
    script = folder / "mv"
    script.write_text(
        f'#!/bin/sh\necho >>"{folder}/count"\n[ "$(wc -l <"{folder}/count")" -ne {number} ] || kill -{how} 0\nexec /bin/mv "$@"\n'
    )
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder)}


@pytest.mark.parametrize(
    ("how", "steps"),
    [
        ("TERM", 2),
        ("KILL", 2),
        pytest.param("TERM", 99, marks=pytest.mark.long),
        pytest.param("KILL", 99, marks=pytest.mark.long),
    ],
)
def test_a_flashing_that_is_cut_off_is_never_taken_for_a_good_one_and_the_next_completes_it(
    shop: Workshop, target: Path, tmp_path: Path, how: str, steps: int
) -> None:
    """At its first write and at one other; long: at every one."""
    newer = wheelhouse(shop.room / f"newer {how} {steps}", version="2.0")
    whole = shop.system()
    assert shop.flash(whole, wheels=newer).code == 0
    assert shop.flash(target).code == 0
    writes = sum(line[0] in "fl" for line in (target / LIST).read_text().splitlines()) + 2
    for number in range(1, writes + 1) if steps > writes else (1, writes // 2 if how == "TERM" else writes):
        variables = halting(tmp_path / str(number), number, how)
        running = subprocess.Popen(
            command(*shop.words(target, wheels=newer)), env=variables, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        code = running.wait(PATIENCE_S)
        assert code == (-signal.SIGKILL if how == "KILL" else 128 + signal.SIGTERM)
        first = number == 1
        assert (target / LIST).exists() == first, "only before its first write is it the board that it was"
        staged = [path for path in (tmp_path / str(number)).iterdir() if path.is_dir()]
        assert bool(staged) == (how == "KILL")
        assert all(path.stat().st_mode & 0o077 == 0 for path in staged)
    done = shop.flash(target, wheels=newer, variables={"TMPDIR": str(tmp_path / "1")})
    assert done.code == 0, done.err
    assert not [path for path in (tmp_path / "1").iterdir() if path.is_dir()], "keys that a killed one left are removed"
    assert everything(target) == everything(whole), "nothing is left of the first agent, of parts, of lists"


def test_a_disk_that_is_full_half_way_leaves_no_finished_board(shop: Workshop, target: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size=64m,nr_inodes={len(everything(target)) + 15}", "small", place],
        check=True,
        timeout=PATIENCE_S,
    )
    try:
        root = place / "root"
        shutil.copytree(target, root, symlinks=True)
        done = shop.flash(root)
        assert done.code == FAILED and "it could not be written" in done.last, done.err
        assert not (root / LIST).exists() and (root / UNFINISHED).exists()
        assert not list(root.rglob(".*.sly-part"))
        subprocess.run(["mount", "-o", "remount,nr_inodes=400", place], check=True, timeout=PATIENCE_S)
        assert shop.flash(root).code == 0
        assert shop.flash(target).code == 0 and everything(root) == everything(target)
    finally:
        subprocess.run(["umount", place], check=True, timeout=PATIENCE_S)


def test_what_a_disk_changed_is_found_and_the_board_is_not_finished(shop: Workshop, target: Path, tmp_path: Path) -> None:
    """A sync after which a file, a mode and an owner are others: what failing cards do."""
    script = tmp_path / "sync"
    spoilt = f'"{target}"/opt/sly'
    script.write_text(
        f"#!/bin/sh\n[ ! -e {spoilt}/launcher.py ] || {{ printf x >{spoilt}/launcher.py; chmod 0666 {spoilt}/first_boot.py; "
        f"chown 7 {spoilt}/wheels/wheelhouse.json; }}\n"
    )
    script.chmod(0o755)
    done = shop.flash(target, variables={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.code == FAILED and "3 of " in done.last, done.err
    assert all(name in done.err for name in ("launcher.py", "mode and owner 0666 0 0", "mode and owner 0644 7 0"))
    assert not (target / LIST).exists() and (target / UNFINISHED).exists()


# systems that lead elsewhere


@pytest.mark.parametrize(
    "aim", ["{outside}", "../../../../../../../..{outside}", "/home/me"], ids=["absolute", "upwards", "home"]
)
def test_links_on_the_way_are_followed_inside_the_system_and_never_out_of_it(
    shop: Workshop, target: Path, tmp_path: Path, aim: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    inside = Path(aim.format(outside=outside)) if aim == "/home/me" else outside
    place = target / str(inside).lstrip("/")
    place.mkdir(parents=True, exist_ok=True)
    for name in ("etc", "var"):
        for path in (target / name).iterdir():
            path.rename(place / path.name) if path.is_symlink() else shutil.move(path, place / path.name)
        (target / name).rmdir()
        (target / name).symlink_to(aim.format(outside=outside))
    (target / "usr/lib/os-release").rename(target / "usr/lib/os-release.real")
    (target / "usr/lib/os-release").symlink_to("os-release.real")
    (place / "os-release").unlink()
    (place / "os-release").symlink_to("/usr/lib/os-release")
    done = shop.flash(target, shell=ASH)
    assert done.code == 0, done.err
    assert (place / "lib/sly" / BOARD / "identity.key").exists() and (place / "sly/agent.toml").exists()
    assert not list(outside.iterdir())


@pytest.mark.parametrize("aim", ["/home/me", "../../../../home/me", "../home/me"])
def test_a_link_below_the_root_is_followed_from_where_it_lies_or_from_the_root_of_the_system(
    shop: Workshop, target: Path, aim: str
) -> None:
    (target / "var/lib").rmdir()
    (target / "var/lib").symlink_to(aim)
    assert shop.flash(target).code == 0
    assert (target / "home/me/sly" / BOARD / "identity.key").exists() and not list((target / "var").glob("home"))


def test_a_file_of_ours_that_is_a_link_is_replaced_and_what_it_named_stays(shop: Workshop, target: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (
        "opt/sly/launcher.py",
        "etc/udev/rules.d/70-sly.rules",
        "opt/sly/.first_boot.py.sly-part",
        "opt/sly/flashing.list",
    ):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).symlink_to(victim)
    assert shop.flash(target).code == 0
    assert victim.read_text() == "precious" and not (target / "opt/sly/launcher.py").is_symlink()


# wheels


PACKS = """#!/bin/sh
echo "$@" >>"{calls}"
[ "$3" != --fails ] || exit 1
cp -r "{wheels}" "$3"
"""


def test_wheels_are_packed_once_kept_and_packed_again_when_the_agent_changed(
    shop: Workshop, target: Path, tmp_path: Path
) -> None:
    sly, calls, kept = tmp_path / "sly", tmp_path / "calls", tmp_path / "kept wheels"
    sly.write_text(PACKS.format(calls=calls, wheels=shop.wheels))
    sly.chmod(0o755)
    variables = {"SLY": str(sly), "SLY_BUILD": str(kept)}
    for _ in range(2):
        done = shop.flash(target, wheels=None, shell=ASH, variables=variables)
        assert done.code == 0, done.err
    assert len(calls.read_text().splitlines()) == 1
    asked = calls.read_text().split()
    assert asked[:2] == ["ota", "pack-agent"]
    assert asked[-6:] == ["--board", "jalapeno", "--python", "3.11", "--machine", "aarch64"]
    (kept / "wheels-3.11-aarch64.source").write_text("an earlier agent\n")
    assert shop.flash(target, wheels=None, shell=ASH, variables=variables).code == 0
    assert "--like" in calls.read_text().splitlines()[1], "boards fetch what changed and nothing else"
    assert sorted(path.name for path in kept.iterdir()) == ["wheels-3.11-aarch64", "wheels-3.11-aarch64.source"]


def test_wheels_that_cannot_be_packed_are_said_with_board_and_python_and_leave_nothing(
    shop: Workshop, target: Path, tmp_path: Path
) -> None:
    sly, kept = tmp_path / "sly", tmp_path / "kept"
    sly.write_text('#!/bin/sh\nmkdir -p "$3"; touch "$3/half.whl"; echo "sly: pip download: no wheel of numpy" >&2; exit 2\n')
    sly.chmod(0o755)
    before = everything(target, times=True)
    done = shop.flash(target, wheels=None, shell=ASH, variables={"SLY": str(sly), "SLY_BUILD": str(kept)})
    assert done.code == FAILED and "--board jalapeno (Python 3.11, aarch64)" in done.last and "no wheel of numpy" in done.err
    assert everything(target, times=True) == before and not list(kept.iterdir())


def test_packing_that_is_ended_leaves_nothing_and_what_a_killed_one_left_goes(
    shop: Workshop, target: Path, tmp_path: Path
) -> None:
    sly, kept = tmp_path / "sly", tmp_path / "kept"
    sly.write_text('#!/bin/sh\nmkdir -p "$3"; touch "$3/half.whl"; kill -$HOW 0\n')
    sly.chmod(0o755)
    before = everything(target, times=True)
    for how, left in (("KILL", 1), ("TERM", 0)):
        variables = {**os.environ, "SLY": str(sly), "SLY_BUILD": str(kept), "HOW": how}
        subprocess.run(
            command(*shop.words(target, wheels=None)),
            env=variables,
            start_new_session=True,
            capture_output=True,
            timeout=PATIENCE_S,
        )
        assert len(list(kept.iterdir())) == left
    assert everything(target, times=True) == before


def test_a_model_that_is_served_and_not_given_is_told(shop: Workshop, target: Path) -> None:
    models, enrolled = shop.room / "served models", shop.room / "serving"
    models.mkdir()
    (models / "faces.tflite").write_bytes(b"weights")
    shutil.copytree(shop.boards / BOARD, enrolled)
    text = (enrolled / "agent.toml").read_text()
    (enrolled / "agent.toml").write_text(text.replace("serve = []", 'serve = ["faces", "persons"]'))
    done = shop.flash(target, enrolled=enrolled, models=models)
    assert done.code == 0 and "serves persons" in done.err and "serves faces" not in done.err
    done = shop.flash(target, "--dry-run", enrolled=enrolled)
    assert "serves persons" in done.err and "serves faces" not in done.err, "it is on the target"


@pytest.mark.long
def test_the_agent_of_this_checkout_is_packed_flashed_and_its_factory_is_made_of_it(shop: Workshop, tmp_path: Path) -> None:
    """Needs the package index, as packing does."""
    target = shop.system(platform.machine(), PYTHON)
    sly = Path(sys.executable).with_name("sly")
    done = shop.flash(target, wheels=None, variables={"SLY": str(sly), "SLY_BUILD": str(tmp_path)})
    assert done.code == 0, done.err
    house = first_boot.wheelhouse(target, first_boot.flashed(target))
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-I", "-m", "venv", "--without-pip", place], check=True, timeout=PATIENCE_S)
    python = place / "bin/python"
    install: list[str | Path] = [
        python,
        "-I",
        first_boot._pip(house.wheels),
        "install",
        *first_boot._HERMETIC,
        *map(str, house.wheels),
    ]
    subprocess.run(install, check=True, timeout=10 * PATIENCE_S)
    subprocess.run([python, "-I", "-m", "pip", "check"], check=True, timeout=PATIENCE_S)
    subprocess.run([python, "-I", "-c", f"import {house.probed}"], check=True, timeout=PATIENCE_S)
