"""The command: nothing heavy before it is needed, help for everything, and one clear line for whatever is wrong.

Every fault here is told as a person meets it: through ``main`` or a real process, on stderr, with exit code 2.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent import cli
from edge_agent.local_fleet import LocalFleet, Member
from edge_agent.store.ledger import Ledger
from tests.brokers import free_port, mosquitto
from tests.certificates import Authority
from tests.fetched import model_path, picture_path
from tests.needs import needs, needs_module
from tests.test_agent import toml

MODEL = "blazeface-short"
HEAVY = (
    "numpy", "PIL", "ai_edge_litert", "tflite_runtime", "tflite", "flatbuffers", "paho", "nacl", "cbor2", "sqlite3", "starlette",
    "uvicorn", "asyncio", "ssl",
)  # fmt: skip
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
PR_CAPBSET_DROP = 24

Config = dict[str, dict[str, Any]]
Fault = Callable[..., str]


@pytest.fixture
def fault(capsys: pytest.CaptureFixture[str]) -> Fault:
    """Runs a command that must fail for something that the user can mend; what it said."""

    def run(*arguments: object) -> str:
        try:
            code: object = cli.main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code
        said = capsys.readouterr()
        assert said.out == ""
        return one_line(code, said.err)

    return run


def one_line(code: object, stderr: str) -> str:
    assert code == cli.USAGE_ERROR, stderr
    assert stderr.startswith("sly: ") and stderr.endswith("\n"), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr.removeprefix("sly: ").rstrip()


def good(folder: Path, **changes: dict[str, Any]) -> Config:
    """A configuration that an agent starts with, and changes to it."""
    config: Config = {
        "board": {"id": "kitchen", "backend": "jalapeno", "profile": "raspberry_pi_5"},
        "state": {"folder": str(folder / "state")},
        "models": {"serve": []},
    }
    for section, settings in changes.items():
        config[section] = config.get(section, {}) | settings
    return config


def written(folder: Path, config: Config | str) -> Path:
    path = folder / "agent.toml"
    path.write_text(config if isinstance(config, str) else toml(config))
    return path


# nothing heavy, help for everything


def modules_after(*arguments: str) -> set[str]:
    program = (
        "import sys\nfrom edge_agent.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('modules:', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return set(done.stderr.rsplit("modules:", 1)[1].split())


def test_help_imports_nothing_heavy() -> None:
    modules = modules_after("--help")
    assert "edge_agent.cli" in modules
    assert not modules & set(HEAVY)


def test_help_of_a_command_imports_nothing_heavy() -> None:
    assert not modules_after("agent", "--help") & set(HEAVY)


def commands(parser: argparse.ArgumentParser, *words: str) -> Iterator[tuple[str, ...]]:
    yield words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from commands(below, *words, name)


def test_every_command_has_help_that_names_it_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    known = list(commands(cli.parser()))
    wanted = {"agent", "ask", "board", "demo", "explain", "models", "pipeline", "run", "status", "trust", "verify"}
    assert {words[0] for words in known if words} >= wanted
    for words in known:
        with pytest.raises(SystemExit) as left:
            cli.main([*words, "--help"])
        help_text = capsys.readouterr().out
        assert left.value.code == 0
        assert help_text.startswith(f"usage: {' '.join(('sly', *words))} ")
        assert len(help_text.splitlines()) > 4, f"sly {' '.join(words)} says too little"


def test_every_argument_of_every_command_says_what_it_is() -> None:
    def arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                assert all(choice.help for choice in action._choices_actions)
                for below in action.choices.values():
                    yield from arguments(below)
            else:
                yield action

    silent = [action.dest for action in arguments(cli.parser()) if not action.help]
    assert silent == []


# the command line itself


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "COMMAND"),
        (("fly",), "fly"),
        (("agent",), "--config"),
        (("agent", "--config", "x", "--wings"), "--wings"),
        (("ask", "detect_faces", "x.jpg"), "--socket"),
        (("ask", "detect_faces", "x.jpg", "--socket", "s", "--deadline-ms", "soon"), "'soon'"),
        (("demo", "--requests", "many"), "'many'"),
        (("board",), "COMMAND"),
    ],
)
def test_a_command_line_that_cannot_be_is_named_in_one_line(fault: Fault, arguments: tuple[str, ...], named: str) -> None:
    said = fault(*arguments)
    assert named in said
    assert "--help" in said


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--deadline-ms", "0", "deadline"),
        ("--deadline-ms", "99999999", "deadline"),
        ("--energy-mj", "0", "energy"),
        ("--quality", "1001", "quality"),
        ("--quality", "-1", "quality"),
        ("--model", "No Such", "model"),
    ],
)
def test_a_limit_that_cannot_be_is_named_before_anybody_is_asked(
    fault: Fault, tmp_path: Path, option: str, value: str, named: str
) -> None:
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(b"\xff\xd8\xff")
    assert named in fault("ask", "detect_faces", picture, "--socket", tmp_path / "none.sock", f"{option}={value}")


def test_a_demo_of_too_few_requests_is_refused(fault: Fault, tmp_path: Path) -> None:
    assert "--requests: got 3" in fault("demo", "--requests", 3, "--output", tmp_path)


def test_a_demo_that_cannot_write_its_pictures_says_so_before_it_plays(fault: Fault, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file/out: Not a directory" in fault("demo", "--output", tmp_path / "file" / "out")


# configuration


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_a_config_file_that_is_not_there_is_named(fault: Fault, tmp_path: Path, check: tuple[str, ...]) -> None:
    said = fault("agent", "--config", tmp_path / "none.toml", *check)
    assert f"{tmp_path}/none.toml" in said and "No such file" in said


def test_a_config_that_is_a_folder_is_named(fault: Fault, tmp_path: Path) -> None:
    assert "Is a directory" in fault("agent", "--config", tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[board\n", "line 1"),
        ("[board]\nid = kitchen\n", "line 2"),
        ("\udcff", "utf-8"),
        ("[board]\nid = 'a'\n[wings]\n", "[wings]"),
        ("[board]\nid = 'a'\nwings = 2\n[state]\nfolder = 'x'\n", "[board] wings"),
        ("[board]\nid = 'a'\n", "[state] folder"),
        ("[board]\nid = 'A B'\n[state]\nfolder = 'x'\n", "[board] id"),
        ("[board]\nid = 7\n[state]\nfolder = 'x'\n", "[board] id"),
        ("board = 1\n", "[board]"),
        ("[board]\nid = 'a'\n[state]\nfolder = 'x'\n[broker]\nport = 70000\n", "[broker] port"),
        ("[board]\nid = 'a'\n[state]\nfolder = 'x'\n[fleet.members]\na = 'zz'\n", "[fleet] members.a"),
        ("#" * 300_000, "bytes"),
    ],
)
def test_a_config_that_breaks_a_rule_names_the_file_and_the_place(fault: Fault, tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    said = fault("agent", "--config", path, "--check")
    assert named in said
    assert str(path) in said


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_a_model_that_the_catalog_does_not_have_is_named_with_those_it_has(
    fault: Fault, tmp_path: Path, check: tuple[str, ...]
) -> None:
    config = written(tmp_path, good(tmp_path, models={"serve": ["no-such-model"]}))
    said = fault("agent", "--config", config, *check)
    assert "no-such-model" in said and MODEL in said


def test_a_model_that_was_not_fetched_says_how_to_fetch_it(fault: Fault, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    config = written(tmp_path, good(tmp_path, models={"serve": [MODEL], "folder": str(tmp_path / "models")}))
    assert f"sly models fetch {MODEL}" in fault("agent", "--config", config, "--check")


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_a_gateway_beyond_loopback_without_a_token_is_refused(fault: Fault, tmp_path: Path, check: tuple[str, ...]) -> None:
    config = written(tmp_path, good(tmp_path, gateway={"on": True, "host": "0.0.0.0"}))
    assert "set a token" in fault("agent", "--config", config, *check)


@pytest.mark.parametrize("check", [(), ("--check",)])
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"profile": "no_such_profile"}, "raspberry_pi_5"),
        ({"backend": "no_such_board", "profile": ""}, "jalapeno"),
        ({"backend": "auto", "profile": ""}, "jetson"),
    ],
)
def test_a_board_that_is_not_here_is_told_with_what_there_is(
    fault: Fault, tmp_path: Path, settings: dict[str, Any], named: str, check: tuple[str, ...]
) -> None:
    assert named in fault("agent", "--config", written(tmp_path, good(tmp_path, board=settings)), *check)


def test_a_profile_that_is_not_there_is_told_by_board_show_too(fault: Fault) -> None:
    assert "raspberry_pi_5" in fault("board", "show", "--backend", "jalapeno", "--profile", "no_such_profile")


# the state folder


@pytest.mark.parametrize("command", [("agent",), ("agent", "--check"), ("identity",)])
def test_a_state_folder_below_a_file_is_named(fault: Fault, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "file").touch()
    config = written(tmp_path, good(tmp_path, state={"folder": str(tmp_path / "file" / "state")}))
    said = fault(*command, "--config", config)
    assert f"{tmp_path}/file/state" in said and "Not a directory" in said


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("check", [(), ("--check",)])
def test_a_state_folder_without_permission_is_named(tmp_path: Path, there: bool, check: tuple[str, ...]) -> None:
    """Root is let in anywhere, so the command runs without the capabilities that say so, on a stranger's folder."""
    strange = tmp_path / "strange"
    (strange / "state").mkdir(parents=True)
    for folder in (strange / "state", strange):
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        folder.chmod(0o555)
    config = written(tmp_path, good(tmp_path, state={"folder": str(strange / ("state" if there else "other"))}))
    command = [sys.executable, "-m", "edge_agent.cli", "agent", "--config", str(config), *check]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=without_capabilities, timeout=60)
    said = one_line(done.returncode, done.stderr)
    assert str(strange) in said and "Permission denied" in said


def without_capabilities() -> None:
    libc = ctypes.CDLL(None)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def test_a_state_folder_in_use_names_the_process_that_has_it(fault: Fault, tmp_path: Path) -> None:
    config = written(tmp_path, good(tmp_path))
    (tmp_path / "state").mkdir()
    with Ledger(tmp_path / "state" / "ledger.db"):
        said = fault("agent", "--config", config)
    assert f"in use by 'process {os.getpid()}" in said


def test_a_socket_path_that_is_taken_by_a_file_is_named(fault: Fault, tmp_path: Path) -> None:
    config = written(tmp_path, good(tmp_path))
    taken = tmp_path / "state" / "agent.sock"
    taken.parent.mkdir()
    taken.write_text("precious")
    said = fault("agent", "--config", config)
    assert str(taken) in said
    assert taken.read_text() == "precious"


def test_a_socket_that_somebody_answers_on_is_not_taken_away(fault: Fault, tmp_path: Path) -> None:
    config = written(tmp_path, good(tmp_path))
    taken = tmp_path / "state" / "agent.sock"
    taken.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(taken))
        other.listen()
        assert "another agent answers" in fault("agent", "--config", config)
    assert taken.exists()


@pytest.mark.parametrize("key", [b"short", b""])
def test_an_identity_key_that_is_none_is_named_and_kept(fault: Fault, tmp_path: Path, key: bytes) -> None:
    config = written(tmp_path, good(tmp_path))
    path = tmp_path / "state" / "identity.key"
    path.parent.mkdir()
    path.write_bytes(key)
    assert str(path) in fault("identity", "--config", config)
    assert path.read_bytes() == key


# the broker


def broker_section(port: int, ca: Path) -> dict[str, Any]:
    return {"host": "127.0.0.1", "port": port, "ca_file": str(ca)}


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    folder = tmp_path_factory.mktemp("certificates")
    return Authority(folder / "ours"), Authority(folder / "strangers")


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_a_broker_with_a_certificate_of_another_ca_stops_the_start_and_fails_the_check(
    fault: Fault, tmp_path: Path, authorities: tuple[Authority, Authority], check: tuple[str, ...]
) -> None:
    ours, strangers = authorities
    certificate, key = strangers.issue("127.0.0.1")
    with mosquitto(tmp_path / "broker", tls=f"certfile {certificate}\nkeyfile {key}") as broker:
        config = written(tmp_path, good(tmp_path, broker=broker_section(broker.port, ours.certificate)))
        said = fault("agent", "--config", config, *check)
    assert f"127.0.0.1:{broker.port}" in said and "not signed by our CA" in said


def test_a_good_broker_passes_the_check(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, authorities: tuple[Authority, Authority]
) -> None:
    ours, _ = authorities
    certificate, key = ours.issue("127.0.0.1")
    with mosquitto(tmp_path / "broker", tls=f"certfile {certificate}\nkeyfile {key}") as broker:
        config = written(tmp_path, good(tmp_path, broker=broker_section(broker.port, ours.certificate)))
        assert cli.main(["agent", "--config", str(config), "--check"]) == 0
    assert capsys.readouterr() == (f"{config}: fine\n", "")


def test_a_broker_that_is_not_there_fails_the_check(fault: Fault, tmp_path: Path) -> None:
    config = written(tmp_path, good(tmp_path, broker={"host": "127.0.0.1", "port": free_port()}))
    assert "nothing listens there" in fault("agent", "--config", config, "--check")


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_a_ca_file_that_is_not_there_is_named(fault: Fault, tmp_path: Path, check: tuple[str, ...]) -> None:
    config = written(tmp_path, good(tmp_path, broker=broker_section(free_port(), tmp_path / "none.pem")))
    said = fault("agent", "--config", config, *check)
    assert "none.pem" in said and "No such file" in said


# asking


@pytest.mark.parametrize(
    "command", [("status",), ("explain", "0" * 32), ("ask", "detect_faces", "PICTURE")], ids=["status", "explain", "ask"]
)
@pytest.mark.parametrize("there", [True, False])
def test_an_agent_that_does_not_run_is_named_with_how_to_start_one(
    fault: Fault, tmp_path: Path, command: tuple[str, ...], there: bool
) -> None:
    picture, path = tmp_path / "picture.jpg", tmp_path / "agent.sock"
    picture.write_bytes(b"\xff\xd8\xff")
    if there:
        path.touch()
    said = fault(*(str(picture) if word == "PICTURE" else word for word in command), "--socket", path)
    assert str(path) in said and "sly agent --config" in said


def test_a_picture_that_is_not_there_is_named(fault: Fault, tmp_path: Path) -> None:
    said = fault("ask", "detect_faces", tmp_path / "none.jpg", "--socket", tmp_path / "none.sock")
    assert f"{tmp_path}/none.jpg" in said and "No such file" in said


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a real agent with one model and no broker."""
    needs(model_path(MODEL), "the model")
    folder = tmp_path_factory.mktemp("running")
    with LocalFleet(folder, [Member("kitchen", "raspberry_pi_5")], [MODEL], free_port()) as fleet:
        fleet.start()
        yield fleet.socket_of("kitchen")


def test_a_picture_that_is_text_is_refused_in_one_line(fault: Fault, running: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.jpg"
    picture.write_text("not a picture\nat all\n")
    assert "JPEG" in fault("ask", "detect_faces", picture, "--socket", running)


def test_a_task_that_nobody_does_is_told_with_what_there_is(fault: Fault, running: Path) -> None:
    said = fault("ask", "read_minds", picture_path("grace_hopper"), "--socket", running)
    assert "read_minds" in said and "detect_faces" in said


def test_a_word_that_is_no_task_is_told_with_what_one_looks_like(fault: Fault, running: Path) -> None:
    assert "Read Minds" in fault("ask", "Read Minds", picture_path("grace_hopper"), "--socket", running)


def test_a_model_that_nobody_hosts_is_named(fault: Fault, running: Path) -> None:
    said = fault("ask", "detect_faces", picture_path("grace_hopper"), "--socket", running, "--model", "no-such-model")
    assert "no-such-model" in said and MODEL in said


@pytest.mark.parametrize(("request_id", "named"), [("0" * 32, "not remembered"), ("xyz", "[0-9a-f]")])
def test_a_request_that_is_not_known_cannot_be_explained(fault: Fault, running: Path, request_id: str, named: str) -> None:
    assert named in fault("explain", request_id, "--socket", running)


def test_a_picture_that_cannot_be_written_is_named(fault: Fault, running: Path, tmp_path: Path) -> None:
    picture = picture_path("grace_hopper")
    (tmp_path / "file").touch()
    said = fault("ask", "detect_faces", picture, "--socket", running, "--output", tmp_path / "file" / "found.png")
    assert f"{tmp_path}/file/found.png" in said and "--output" in said


def test_an_answer_can_be_explained_by_its_id(capsys: pytest.CaptureFixture[str], running: Path) -> None:
    picture = str(picture_path("grace_hopper"))
    assert cli.main(["ask", "detect_faces", picture, "--socket", str(running), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [finding["label"] for finding in answer["findings"]] == ["face"]
    assert cli.main(["explain", answer["request"], "--socket", str(running)]) == 0
    assert "-> kitchen" in capsys.readouterr().out
    assert cli.main(["status", "--socket", str(running)]) == 0
    assert "kitchen" in capsys.readouterr().out


def test_output_into_a_pipe_that_is_closed_is_no_fault(running: Path) -> None:
    command = [sys.executable, "-m", "edge_agent.cli", "status", "--socket", str(running)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_port_that_is_taken_is_told(fault: Fault) -> None:
    needs_module("iotcore", "demo")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} cannot be used (address already in use); choose another port" in fault("broker", "--port", port)
    assert "a whole number from 1 to 65535" in fault("broker", "--port", 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_broker_runs_until_it_is_asked_to_end(number: signal.Signals) -> None:
    needs_module("iotcore", "demo")
    command = [sys.executable, "-m", "edge_agent.cli", "broker", "--port", str(free_port())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        assert running.stderr is not None
        assert "Ctrl-C ends it" in running.stderr.readline()
        os.killpg(running.pid, number)
        assert running.wait(60) == 0
        assert running.stderr.read() == ""
