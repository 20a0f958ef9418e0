"""The agent as a daemon: a real process, told to start, watched, stopped, killed, and left without a broker."""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from board_support.faults import BitFlips, Hang
from board_support.jalapeno import Jalapeno
from edge_agent import cli
from edge_agent.agent import Agent
from edge_agent.client import Client, request_for_picture
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import EnergyKind, InferenceRequest, Limits, Status, Tensor
from edge_agent.gateway.local import LocalConnection
from tests.brokers import free_port, mosquitto
from tests.certificates import Authority
from tests.fetched import model_path, picture_path

WAIT_S = 60.0
MODEL = "blazeface-short"


def configuration(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "board": {"id": "kitchen", "backend": "jalapeno", "profile": "raspberry_pi_5"},
        "state": {"folder": str(folder)},
        "models": {"serve": [MODEL], "folder": str(model_path(MODEL).parent)},
        **sections,
    }


def toml(configuration: dict[str, Any]) -> str:
    lines = []
    for section, settings in configuration.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


class Daemon:
    """``sly agent`` with a service manager's ear at its ``NOTIFY_SOCKET``."""

    def __init__(self, folder: Path, watchdog_s: float = 0, **sections: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        config, self._ear = folder / "agent.toml", socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        config.write_text(toml(configuration(folder, **sections)))
        (folder / "notify").unlink(missing_ok=True)
        self._ear.bind(str(folder / "notify"))
        self._ear.settimeout(WAIT_S)
        environment = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify")}
        if watchdog_s:
            environment["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        command = [sys.executable, "-m", "edge_agent.cli", "agent", "--config", str(config)]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def hear(self, wanted: str) -> None:
        """Wait until it says so; fails at once, with its last words, if it ends before."""
        end = os.pidfd_open(self.process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._ear, selectors.EVENT_READ)
                selector.register(end, selectors.EVENT_READ)
                while heard := [key.fileobj for key, _ in selector.select(WAIT_S)]:
                    if self._ear not in heard:
                        pytest.fail(f"it ended before it said {wanted}: {self.process.communicate()[1]}")
                    if wanted in self._ear.recv(4096).decode().splitlines():
                        return
            pytest.fail(f"it did not say {wanted} within {WAIT_S} s")
        finally:
            os.close(end)

    def stop(self) -> tuple[int, str]:
        """Ask it to stop; its exit code and what it logged."""
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, log

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        if self.process.stderr is not None and not self.process.stderr.closed:
            self.process.communicate()
        self._ear.close()

    def status(self) -> Any:
        with LocalConnection(self.folder / "agent.sock") as connection:
            return connection.call("status", timeout_s=WAIT_S)


@contextmanager
def daemon(folder: Path, watchdog_s: float = 0, **sections: dict[str, Any]) -> Iterator[Daemon]:
    running = Daemon(folder, watchdog_s, **sections)
    try:
        running.hear("READY=1")
        yield running
    finally:
        running.close()


def test_it_says_ready_feeds_the_watchdog_from_its_work_loop_and_says_goodbye(tmp_path: Path) -> None:
    with daemon(tmp_path, watchdog_s=0.4) as running:
        for _ in range(3):
            running.hear("WATCHDOG=1")
        running.process.send_signal(signal.SIGTERM)
        running.hear("STOPPING=1")
        assert running.process.wait(WAIT_S) == 0


def test_a_stopped_work_loop_feeds_no_watchdog(tmp_path: Path) -> None:
    with daemon(tmp_path, watchdog_s=0.4) as running:
        running.hear("WATCHDOG=1")
        running.process.send_signal(signal.SIGSTOP)
        with selectors.DefaultSelector() as selector:
            selector.register(running._ear, selectors.EVENT_READ)
            while selector.select(1.5):
                running._ear.recv(4096)
        running.process.send_signal(signal.SIGCONT)
        running.hear("WATCHDOG=1")


def test_it_serves_after_a_cold_boot_with_no_broker_anywhere(tmp_path: Path) -> None:
    nobody = {"host": "127.0.0.1", "port": free_port()}
    with daemon(tmp_path, broker=nobody) as running, Client(tmp_path / "agent.sock") as client:
        answer = client.look("detect_faces", picture_path("grace_hopper"))
        code, log = running.stop()
    assert [finding.label for finding in answer.findings] == ["face"]
    assert (answer.board, answer.energy_kind) == ("kitchen", EnergyKind.EMULATED)
    assert code == 0
    assert "Traceback" not in log


def test_sigterm_drains_what_was_asked_is_answered(tmp_path: Path) -> None:
    picture = picture_path("grace_hopper").read_bytes()
    results, asked = [], threading.Barrier(9)

    def ask() -> None:
        with Client(tmp_path / "agent.sock") as client:
            results.append(client.submit(request_for_picture("detect_faces", picture)))
            asked.wait(WAIT_S)
            results.append(client.submit(request_for_picture("detect_faces", picture)))

    with daemon(tmp_path, board={"id": "kitchen", "backend": "jalapeno", "profile": "coral_m2"}) as running:
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        asked.wait(WAIT_S)
        while running.status()["pending"] == 0 and any(thread.is_alive() for thread in threads):
            pass
        code, _ = running.stop()
        for thread in threads:
            thread.join(WAIT_S)
    assert code == 0
    assert len(results) == 16
    assert all(r.status is Status.OK or (r.status is Status.SHED and "being stopped" in r.reason) for r in results)


def test_a_killed_agent_comes_back_as_itself_one_boot_later(tmp_path: Path) -> None:
    with daemon(tmp_path) as running:
        before, key = running.status()["boards"][0], (tmp_path / "identity.key").read_bytes()
        running.process.kill()
        running.process.wait(WAIT_S)
    with daemon(tmp_path) as running:
        after = running.status()["boards"][0]
    assert after["boot_epoch"] == before["boot_epoch"] + 1
    assert (tmp_path / "identity.key").read_bytes() == key


def test_a_dead_engine_child_is_a_failed_request_and_a_new_child_never_a_dead_agent(tmp_path: Path) -> None:
    picture = picture_path("grace_hopper").read_bytes()
    with daemon(tmp_path) as running, Client(tmp_path / "agent.sock") as client:
        for child in _children_of(running.process.pid):
            os.kill(child, signal.SIGKILL)
        first = client.submit(request_for_picture("detect_faces", picture))
        second = client.submit(request_for_picture("detect_faces", picture))
        code, log = running.stop()
    assert first.status in (Status.OK, Status.SHED)
    assert second.status is Status.OK
    assert "its engine died" in log
    assert code == 0


def test_the_engine_dies_of_a_model_until_it_is_withdrawn_and_the_agent_serves_on(tmp_path: Path) -> None:
    picture = picture_path("grace_hopper").read_bytes()
    other = "blazeface-full"
    models = {"serve": [MODEL, other], "folder": str(model_path(other).parent)}
    model_path(MODEL)
    with daemon(tmp_path, models=models, engine={"max_deaths": 1}) as running, Client(tmp_path / "agent.sock") as client:
        victim = _engine_child_of(running.process.pid, MODEL)
        os.kill(victim, signal.SIGKILL)
        results = [client.submit(request_for_picture("detect_faces", picture)) for _ in range(3)]
        status = running.status()
    assert {result.status for result in results} == {Status.OK}
    assert results[-1].model == other
    assert MODEL not in status["boards"][0]["models"]


def test_a_client_that_vanishes_leaves_nothing_behind(tmp_path: Path) -> None:
    picture = picture_path("astronaut").read_bytes()
    slow = {"id": "kitchen", "backend": "jalapeno", "profile": "coral_m2"}
    with daemon(tmp_path, board=slow) as running:
        for _ in range(4):
            asker = subprocess.Popen([sys.executable, "-c", _ASK_AND_HANG, str(tmp_path / "agent.sock"), str(len(picture))],
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
            assert asker.stdin is not None and asker.stdout is not None
            asker.stdin.write(picture)
            asker.stdin.flush()
            asker.stdout.readline()
            asker.kill()
            asker.communicate()
        with Client(tmp_path / "agent.sock") as client:
            assert client.submit(request_for_picture("detect_faces", picture)).status is Status.OK
        assert running.status()["pending"] == 0


def test_an_agent_in_this_process_refuses_tensors_by_name_and_runs_good_ones(tmp_path: Path) -> None:
    async def play() -> list[Any]:
        said: list[str] = []
        config = AgentConfig.from_mapping(configuration(tmp_path, fleet={"name": "farm"}))
        async with Agent(config, said.append) as agent:
            zeros = Tensor("float32", (1, 128, 128, 3), bytes(4 * 128 * 128 * 3))
            bad = Tensor("float32", (1, 2), bytes(8))
            return [
                await agent.submit(InferenceRequest("0" * 31 + str(n), "invoke", {"input": tensor}, MODEL))
                for n, tensor in enumerate((zeros, bad))
            ]

    good, refused = asyncio.run(play())
    assert good.status is Status.OK
    assert refused.status is Status.REFUSED
    assert "input" in refused.reason and "float32[1,2]" in refused.reason and "float32[1,128,128,3]" in refused.reason


def test_a_deadline_that_passes_is_an_answer(tmp_path: Path) -> None:
    async def play() -> Any:
        async with Agent(AgentConfig.from_mapping(configuration(tmp_path)), lambda text: None) as agent:
            picture = picture_path("grace_hopper").read_bytes()
            return await agent.submit(request_for_picture("detect_faces", picture, limits=Limits(deadline_us=1)))

    result = asyncio.run(play())
    assert result.status is Status.SHED
    assert "µs" in result.reason


def test_a_second_agent_on_the_same_state_is_refused(tmp_path: Path) -> None:
    with daemon(tmp_path), pytest.raises(UnavailableError, match="ledger"):
        asyncio.run(_enter(AgentConfig.from_mapping(configuration(tmp_path))))


def test_a_broker_with_a_wrong_certificate_stops_the_start_in_one_line(tmp_path: Path) -> None:
    ours, stranger = Authority(tmp_path / "ours"), Authority(tmp_path / "stranger")
    certificate, key = stranger.issue("127.0.0.1")
    with mosquitto(tmp_path / "broker", tls=f"certfile {certificate}\nkeyfile {key}") as running:
        broker = {"host": "127.0.0.1", "port": running.port, "ca_file": str(ours.certificate)}
        strict = Daemon(tmp_path / "strict", broker=broker)
        _, log = strict.process.communicate(timeout=WAIT_S)
        strict.close()
        with daemon(tmp_path / "patient", broker={**broker, "untrusted": "go_on"}) as patient:
            alone = patient.status()
    assert strict.process.returncode == 2
    assert len(log.splitlines()) == 1 and log.startswith("sly: broker 127.0.0.1:") and "not signed by our CA" in log
    assert alone["boards"][0]["standing"] == "serving"


def test_a_model_that_is_not_what_its_card_says_is_withdrawn_and_said_why(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    data = bytearray(model_path(MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / model_path(MODEL).name).write_bytes(data)

    async def play() -> Any:
        config = configuration(tmp_path / "state", models={"serve": [MODEL], "folder": str(folder)})
        async with Agent(AgentConfig.from_mapping(config), lambda text: None) as agent:
            return dict(agent.node.execution.withdrawn)

    assert "that hash to" in asyncio.run(play())[MODEL]


def test_calls_that_are_not_understood_are_refused_and_the_agent_lives(tmp_path: Path) -> None:
    with daemon(tmp_path) as running, LocalConnection(tmp_path / "agent.sock") as connection:
        with pytest.raises(RefusedError, match="infer, explain, place, table, status, trust, evidence, talk, sessions or drop"):
            connection.call("reboot", timeout_s=WAIT_S)
        with pytest.raises(RefusedError, match="request"):
            connection.call("infer", b"\xff", timeout_s=WAIT_S)
        with pytest.raises(RefusedError, match="not remembered"):
            connection.call("explain", "0" * 32, timeout_s=WAIT_S)
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(tmp_path / "agent.sock"))
            rude.sendall(b"\xff\xff\xff\xffGET / HTTP/1.1")
            with rude.makefile("rb") as answer:
                assert b"frame" in answer.read()
        assert running.status()["boards"][0]["board"] == "kitchen"


_ASK_AND_HANG = """
import sys
from edge_agent.client import request_for_picture
from edge_agent.core import wire
from edge_agent.core.cbor import encode
from edge_agent.gateway.local import LocalConnection
picture = sys.stdin.buffer.read(int(sys.argv[2]))
connection = LocalConnection(sys.argv[1])
connection.connect()
body = wire.encode_request(request_for_picture("detect_faces", picture), wire.LOCAL)
data = encode({0: 1, 1: "infer", 2: body})
connection._socket.sendall(len(data).to_bytes(4, "big") + data)
print("asked", flush=True)
sys.stdin.read()
"""


async def _enter(config: AgentConfig) -> None:
    async with Agent(config, lambda text: None):
        pass


def _children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _engine_child_of(pid: int, model: str) -> int:
    """The child that maps the model's bytes."""
    size = model_path(model).stat().st_size
    for child in _children_of(pid):
        for descriptor in Path(f"/proc/{child}/fd").iterdir():
            if descriptor.stat().st_size == size:
                return child
    raise AssertionError(f"no child of {pid} holds {model}")


def test_faults_of_an_emulated_board_reach_its_clients(tmp_path: Path) -> None:
    async def play() -> list[Any]:
        async with Agent(AgentConfig.from_mapping(configuration(tmp_path)), lambda text: None) as agent:
            assert isinstance(agent.board, Jalapeno)
            results = []
            for faults in ((), (BitFlips(seed=1, flips=3),), (Hang(hang_us=3_000_000),)):
                agent.board.inject(faults)
                request = request_for_picture("detect_faces", picture, limits=Limits(deadline_us=1_000_000))
                results.append(await agent.submit(request))
            return results

    picture = picture_path("grace_hopper").read_bytes()
    good, flipped, hung = asyncio.run(play())
    assert good.status is flipped.status is Status.OK
    assert {n: bytes(t.data) for n, t in good.outputs.items()} != {n: bytes(t.data) for n, t in flipped.outputs.items()}
    assert hung.status is Status.SHED
    assert hung.reason


def test_sly_ask_goes_over_the_broker_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, config = picture_path("grace_hopper"), tmp_path / "agent.toml"
    with mosquitto(tmp_path / "broker") as broker, daemon(tmp_path, broker={"host": "127.0.0.1", "port": broker.port}):
        code = cli.main(["ask", "detect_faces", str(picture), "--config", str(config), "--json"])
        answer = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (answer["board"], [finding["label"] for finding in answer["findings"]]) == ("kitchen", ["face"])
    assert cli.main(["ask", "detect_faces", str(picture), "--config", str(config)]) == 2
    assert (
        capsys.readouterr().err
        == f"sly: broker 127.0.0.1:{broker.port}: nothing listens there; check host and port, and that the broker runs\n"
    )
