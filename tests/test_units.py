"""What systemd starts on a board: units that it takes, with every drop-in, and that leave the agent nothing it does not need."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from board_support import first_boot, led
from board_support.registry import board_classes
from edge_agent.runtime import landlock, seccomp
from ota import launcher
from tests.needs import needs

SUPPORT = Path(__file__).resolve().parents[1] / "board_support"
UNITS = SUPPORT / "systemd"
AGENT, FIRST_BOOT = UNITS / "sly-agent.service", UNITS / "sly-first-boot.service"
BOARDS = ("jetson", "coral", "raspberry_pi", "jalapeno")
LIMIT_S = 60
MAX_EXPOSURE = {"jetson": 20, "coral": 21, "raspberry_pi": 20, "jalapeno": 20}
"""In tenths, as systemd-analyze reckons: 0 is nothing to be had, 100 all. 4 of them are the question whether the clock is
synchronised, which it takes for leave to set it; Coral has netlink besides."""
MAX_EXPOSURE_FIRST_BOOT = 25

NOTHING = ""
HARDENED = {
    "User": "sly", "Group": "sly", "UMask": "0077", "CapabilityBoundingSet": NOTHING, "AmbientCapabilities": NOTHING,
    "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ReadWritePaths": "/var/lib/sly", "StateDirectory": "sly",
    "StateDirectoryMode": "0700", "RuntimeDirectory": "sly", "RuntimeDirectoryMode": "0700", "ProtectHome": "yes",
    "PrivateTmp": "yes", "PrivateMounts": "yes", "PrivateIPC": "yes", "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes", "ProtectKernelLogs": "yes", "ProtectControlGroups": "yes",
    "ProtectHostname": "yes", "ProtectProc": "invisible", "RestrictSUIDSGID": "yes", "RestrictRealtime": "yes",
    "RestrictNamespaces": "yes", "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6", "LockPersonality": "yes",
    "MemoryDenyWriteExecute": "yes", "KeyringMode": "private",
    "SystemCallArchitectures": "native", "SystemCallErrorNumber": "EPERM", "DevicePolicy": "closed",
    "LimitCORE": "0", "OOMPolicy": "continue", "StandardOutput": "journal+console", "StandardError": "journal+console",
}  # fmt: skip
DEVICES = {
    "jetson": {"char-nvhost* rw", "char-nvgpu* rw", "char-drm rw", "/dev/nvmap rw"},
    "coral": {"char-apex rw", "char-usb_device rw"},
    "raspberry_pi": {"/dev/vcio rw"},
    "jalapeno": set(),
}


def settings(path: Path) -> dict[str, list[str]]:
    """By name, as systemd.syntax(7) has it; no name is in two sections."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    found: dict[str, list[str]] = {}
    for line in lines:
        if line and line[0] not in "#;[":
            name, equals, value = line.partition("=")
            assert equals, line
            found.setdefault(name, []).append(value)
    return found


def one(path: Path, name: str) -> str:
    (value,) = settings(path)[name]
    return value


def drop_in(board: str) -> Path:
    return UNITS / "boards" / f"{board}.conf"


@pytest.fixture(params=BOARDS)
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder as flash.sh leaves it for a kind of board, but that here /opt/sly/python is what it leads to on most."""
    needs(shutil.which("systemd-analyze"), "systemd-analyze is not installed (apt-get install systemd)")
    needs(Path("/usr/bin/python3").exists(), "there is no /usr/bin/python3, which the units start")
    for unit in UNITS.glob("*.service"):
        (tmp_path / unit.name).write_text(unit.read_text().replace("=/opt/sly/python ", "=/usr/bin/python3 "))
    (tmp_path / "sly-agent.service.d").mkdir()
    shutil.copy(drop_in(request.param), tmp_path / "sly-agent.service.d" / "10-board.conf")
    yield tmp_path


def board_of(installed: Path) -> str:
    text = (installed / "sly-agent.service.d" / "10-board.conf").read_text()
    return next(board for board in BOARDS if drop_in(board).read_text() == text)


def analyzed(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, timeout=LIMIT_S)


def test_systemd_takes_the_units_with_the_drop_in_of_each_board(installed: Path) -> None:
    done = analyzed("verify", *map(str, installed.glob("*.service")))
    assert (done.returncode, done.stderr) == (0, "")


def test_what_an_agent_that_was_taken_over_could_do_is_little(installed: Path) -> None:
    most = MAX_EXPOSURE[board_of(installed)]
    exposed = analyzed("security", "--offline=yes", f"--threshold={most}", str(installed / "sly-agent.service"))
    assert exposed.returncode == 0, exposed.stdout
    first = analyzed(
        "security", "--offline=yes", f"--threshold={MAX_EXPOSURE_FIRST_BOOT}", str(installed / "sly-first-boot.service")
    )
    assert first.returncode == 0, first.stdout


def test_the_score_is_one_that_a_weaker_unit_does_not_reach(installed: Path) -> None:
    unit = installed / "sly-agent.service"
    unit.write_text(re.sub("(?m)^(CapabilityBoundingSet|ProtectSystem|SystemCallFilter)=.*$", "", unit.read_text()))
    assert analyzed("security", "--offline=yes", f"--threshold={max(MAX_EXPOSURE.values())}", str(unit)).returncode != 0


@pytest.mark.parametrize("name", HARDENED)
def test_the_agents_unit_is_hardened(name: str) -> None:
    assert one(AGENT, name) == HARDENED[name]


def test_no_drop_in_takes_any_of_it_back_but_what_an_accelerators_library_may_need() -> None:
    adds = {"SupplementaryGroups", "DeviceAllow", "MemoryMax", "RestrictAddressFamilies", "ReadWritePaths", "ExecStopPost"}
    for board in BOARDS:
        accelerated = {"MemoryDenyWriteExecute"} if board in ("jetson", "coral") else set()
        assert set(settings(drop_in(board))) <= adds | accelerated
        assert settings(drop_in(board)).get("RestrictAddressFamilies", ["AF_NETLINK"]) == ["AF_NETLINK"]
        for paths in settings(drop_in(board)).get("ReadWritePaths", []):
            assert all(path.startswith("-/sys/class/leds/") for path in paths.split())


def test_every_kind_of_board_has_a_drop_in_with_its_devices_and_memory_and_there_is_no_other() -> None:
    assert {path.stem for path in (UNITS / "boards").iterdir()} == set(BOARDS) == {each.backend for each in board_classes()}
    for board in BOARDS:
        found = settings(drop_in(board))
        assert set(found.get("DeviceAllow", [])) == DEVICES[board]
        assert re.fullmatch("[4-8][0-9]%", one(drop_in(board), "MemoryMax"))
    assert settings(AGENT)["DeviceAllow"] == ["/dev/tpmrm0 rw"]


def test_the_docs_say_which_devices_groups_and_memory_each_board_has() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| (.*) \| (.*) \| ([0-9]+%) \|$", (SUPPORT.parent / "docs/first-boot.md").read_text())
    assert [row[0] for row in rows] == list(BOARDS)
    for board, devices, groups, memory in rows:
        found = settings(drop_in(board))
        named = set(re.findall("`((?:char-|/dev/)[^`]*)`", devices))
        assert {f"{device} rw" for device in named} == DEVICES[board]
        assert re.findall("`(\\w+)`", groups) == " ".join(found.get("SupplementaryGroups", [])).split()
        assert [memory] == found["MemoryMax"]


def test_every_light_that_the_agent_may_switch_is_open_to_it() -> None:
    for board in BOARDS:
        opened = " ".join(settings(drop_in(board)).get("ReadWritePaths", [])).split()
        assert opened == [f"-/sys/class/leds/{name}" for name in led.LEDS.get(board, ())]
    assert {name for names in led.LEDS.values() for name in names} == set(first_boot.LEDS)


@pytest.mark.parametrize("names", [("ACT",), ("led0",), ()])
@pytest.mark.parametrize(("result", "light"), [("exit-code", "timer\n"), ("watchdog", "timer\n"), ("success", "mmc0\n")])
def test_an_agent_that_did_not_start_or_died_leaves_the_light_blinking_and_one_that_was_stopped_does_not(
    tmp_path: Path, names: tuple[str, ...], result: str, light: str
) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "trigger").write_text("mmc0\n")
    told = (
        one(drop_in("raspberry_pi"), "ExecStopPost")
        .removeprefix("-")
        .replace("$$", "$")
        .replace("/sys/class/leds", str(tmp_path))
    )
    done = subprocess.run(shlex.split(told), env={"SERVICE_RESULT": result}, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.stdout, done.stderr) == ("", "")
    assert [(tmp_path / name / "trigger").read_text() for name in names] == [light] * len(names)
    assert set(re.findall(r"\w+", told.partition("for led in ")[2].partition(";")[0])) == set(led.LEDS["raspberry_pi"])


def test_every_group_that_a_unit_names_is_made_at_first_boot_and_given_a_device_by_udev() -> None:
    made = set(re.findall(r"(?m)^g (\w+)", (SUPPORT / "sysusers/sly.conf").read_text()))
    named = {group for path in (AGENT, *map(drop_in, BOARDS)) for line in settings(path).get("SupplementaryGroups", [])
             for group in line.split()}  # fmt: skip
    assert named == made
    ruled = set(re.findall(r'GROUP="(\w+)"', (SUPPORT / "udev/70-sly.rules").read_text()))
    assert ruled == named - {"render"}, "JetPack and Debian give the GPU's render node to render themselves"


def test_udev_rules_open_no_device_to_everybody() -> None:
    rules = [line for line in (SUPPORT / "udev/70-sly.rules").read_text().splitlines() if line and not line.startswith("#")]
    assert len(rules) == 6
    for rule in rules:
        assert re.fullmatch(r'(\w+(\{\w+\})?(==|!=|=|\+=)"[^"]*"(, |$))+', rule), rule
        assert "MODE=" not in rule or 'MODE="0660"' in rule


def test_the_system_calls_by_which_engines_confine_themselves_pass_the_filter() -> None:
    allowed, denied, _ = settings(AGENT)["SystemCallFilter"]
    assert allowed.split()[0] == "@system-service" and denied.startswith("~")
    assert {"seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"} <= set(allowed.split())
    assert (landlock.CREATE_RULESET, landlock.ADD_RULE, landlock.RESTRICT_SELF) == (444, 445, 446)
    needs(shutil.which("systemd-analyze"), "systemd-analyze is not installed (apt-get install systemd)")
    known = analyzed("syscall-filter").stdout
    service = _members(known, "@system-service")
    calls = (
        set(seccomp.ALWAYS) | set(seccomp.DEVICE) | set(seccomp.GUARDED) | {"prctl", "execve", "pidfd_open", "pidfd_send_signal"}
    )
    denied_calls = {call for word in denied[1:].split() for call in (_members(known, word) if word[0] == "@" else {word})}
    assert calls - service - set(allowed.split()) == set() and calls & denied_calls == set()


def test_the_clock_may_be_asked_whether_it_is_synchronised_and_not_be_set() -> None:
    """As the first list allows, later ones add and take away in their order (systemd.exec(5))."""
    needs(shutil.which("systemd-analyze"), "systemd-analyze is not installed (apt-get install systemd)")
    known = analyzed("syscall-filter").stdout
    allowed = set[str]()
    for line in settings(AGENT)["SystemCallFilter"]:
        words = {call for word in line.lstrip("~").split() for call in (_members(known, word) if word[0] == "@" else {word})}
        allowed = allowed - words if line.startswith("~") else allowed | words
    assert allowed & _members(known, "@clock") == {"adjtimex", "clock_adjtime"}, "by which glibc asks, without CAP_SYS_TIME"
    assert "ProtectClock" not in settings(AGENT), "it denies both, whatever a list allows"
    assert one(AGENT, "CapabilityBoundingSet") == NOTHING and one(AGENT, "DevicePolicy") == "closed"


def _members(known: str, name: str) -> set[str]:
    """Of a set of system calls, as ``systemd-analyze syscall-filter`` lists them, with those of the sets in it."""
    block = re.search(rf"(?m)^{name}\n((?:    .*\n)+)", known)
    assert block, name
    words = [line.strip() for line in block[1].splitlines() if not line.strip().startswith("#")]
    return {call for word in words for call in (_members(known, word) if word.startswith("@") else {word})}


def test_first_boot_comes_before_the_agent_and_without_it_there_is_none() -> None:
    assert "sly-first-boot.service" in one(AGENT, "After").split() and one(AGENT, "Requires") == "sly-first-boot.service"
    assert one(FIRST_BOOT, "Before") == "sly-agent.service" and one(FIRST_BOOT, "Type") == "oneshot"
    assert one(FIRST_BOOT, "ExecStart") == "/opt/sly/python -I /opt/sly/first_boot.py"
    assert one(FIRST_BOOT, "PrivateNetwork") == "yes"
    assert one(FIRST_BOOT, "StandardOutput") == "journal+console"


def test_a_python_that_was_taken_away_is_said_on_the_console_with_what_to_do(tmp_path: Path) -> None:
    """Nothing that needs it could: a distribution's upgrade removed what ``/opt/sly/python`` leads to."""
    shell, option, script = shlex.split(one(FIRST_BOOT, "ExecStartPre").replace("$$", "$"))
    link = tmp_path / "python"
    for aim, code in ((sys.executable, 0), ("/usr/bin/python3.99", 1), (None, 1)):
        link.unlink(missing_ok=True)
        if aim:
            link.symlink_to(aim)
        done = subprocess.run([shell, option, script.replace("/opt/sly/python", str(link))], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, "")
        said = [f"{aim or link}, the Python that this card was flashed for, is gone", f"what to do: {first_boot.FLASH_AGAIN}"]
        assert all(words in done.stdout for words in said) if code else not done.stdout


def test_the_launcher_starts_the_environment_that_first_boot_makes() -> None:
    words = one(AGENT, "ExecStart").split()
    args = launcher._parser().parse_args(words[3:])
    assert str(args.factory) == f"/{first_boot.FACTORY}/bin/python"
    assert str(args.folder).startswith(f"/{first_boot.STATE}/") and args.words[-1] == f"/{first_boot.CONFIG}"
