"""A fleet of real agents: many requests while a board and the broker are killed; each answered once, none lost.

Real processes, a real Mosquitto, a real detector, real SIGKILL.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from pathlib import Path

import pytest

from edge_agent.answers import findings_of
from edge_agent.broker_client import BrokerClient
from edge_agent.client import Client, request_for_picture
from edge_agent.core.values import InferenceResult, Limits, Status
from edge_agent.local_fleet import LocalFleet, Member
from edge_agent.transport.backoff import BackoffLimits
from edge_agent.transport.mqtt import BrokerAddress, MqttLink, MqttOptions
from tests.brokers import Mosquitto
from tests.fetched import model_path, picture_path

MEMBERS = (
    Member("jetson", "orin_nano"),
    Member("coral", "coral_m2"),
    Member("pi", "raspberry_pi_5"),
    Member("jalapeno", "jalapeno_edge"),
)
MODEL = "blazeface-short"
REQUESTS, MANY_REQUESTS = 300, 1000
"""A fifth of them over the broker."""
LIMITS = Limits(deadline_us=120_000_000)
WAIT_S = 120.0


class Crowd:
    """Clients at the boards' sockets that ask until ``requests`` are answered; each falls back to another board."""

    def __init__(self, fleet: LocalFleet, picture: bytes, requests: int) -> None:
        self._fleet, self._picture = fleet, picture
        self._left = threading.Semaphore(requests)
        self._answered = threading.Condition()
        self.results: list[InferenceResult] = []
        self.asked: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(2 * len(MEMBERS))]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait_answered(self, number: int) -> None:
        with self._answered:
            assert self._answered.wait_for(lambda: len(self.results) >= number, WAIT_S), f"{len(self.results)} answers only"

    def join(self) -> None:
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()

    def _ask(self, number: int) -> None:
        boards = list(self._fleet.members)
        order = boards[number % len(boards) :] + boards[: number % len(boards)]
        with Client(*(self._fleet.socket_of(board) for board in order)) as client:
            while self._left.acquire(blocking=False):
                request = request_for_picture("detect_faces", self._picture, limits=LIMITS)
                with self._answered:
                    self.asked.append(request.request_id)
                result = client.submit(request)
                with self._answered:
                    self.results.append(result)
                    self._answered.notify_all()


@pytest.mark.parametrize("requests", [REQUESTS, pytest.param(MANY_REQUESTS, marks=pytest.mark.long)])
def test_each_of_many_requests_is_answered_once_while_a_board_and_the_broker_are_killed(tmp_path: Path, requests: int) -> None:
    over_the_broker = requests // 5
    picture = picture_path("grace_hopper").read_bytes()
    models = model_path(MODEL).parent
    broker = Mosquitto(tmp_path / "broker")
    broker.start()
    settings = "[queue]\nmax_requests = 2048"
    with LocalFleet(tmp_path, MEMBERS, [MODEL], broker.port, settings=settings, models_folder=models) as fleet:
        fleet.start()
        fleet.wait_acquainted(fleet.members)
        crowd = Crowd(fleet, picture, requests - over_the_broker)
        results, repeats = asyncio.run(_over_the_broker(fleet, broker, crowd, picture, requests))
        crowd.join()
        codes = fleet.stop()
    broker.stop()

    everything = [*crowd.results, *results]
    assert Counter(result.status for result in everything) == {Status.OK: requests}, [
        result.reason for result in everything if result.status is not Status.OK
    ][:3]
    assert sorted(result.request_id for result in crowd.results) == sorted(crowd.asked)
    assert len({result.request_id for result in everything}) == requests
    assert {len(findings_of(result)) for result in everything} == {1}, "one face is in the picture"
    assert codes == [0, 0, 0]
    assert repeats <= over_the_broker


async def _over_the_broker(
    fleet: LocalFleet, broker: Mosquitto, crowd: Crowd, picture: bytes, requests: int
) -> tuple[list[InferenceResult], int]:
    """Ask over MQTT too, and pull two plugs at given numbers of answers; the results, and how many came repeated."""
    link = MqttLink(
        BrokerAddress("127.0.0.1", broker.port), "camera", asyncio.get_running_loop(),
        MqttOptions(5, backoff=BackoffLimits(100_000, 500_000)),
    )  # fmt: skip
    async with BrokerClient(link, fleet.name, "camera", fleet.keys) as client:
        asked = [
            client.ask(request_for_picture("detect_faces", picture, limits=LIMITS), board)
            for board in ("jetson", "coral")
            for _ in range(requests // 10)
        ]
        crowd.start()
        await asyncio.to_thread(crowd.wait_answered, requests * 15 // 100)
        await asyncio.to_thread(fleet.kill, "pi")
        await asyncio.to_thread(crowd.wait_answered, requests * 30 // 100)
        await asyncio.to_thread(broker.kill)
        await asyncio.to_thread(crowd.wait_answered, requests * 60 // 100)
        await asyncio.to_thread(broker.start)
        async with asyncio.timeout(WAIT_S):
            results = await asyncio.gather(*asked)
        return results, client.duplicates


def test_a_board_that_was_killed_takes_up_what_it_had_accepted_when_it_starts_again(tmp_path: Path) -> None:
    picture = picture_path("grace_hopper").read_bytes()
    models = model_path(MODEL).parent
    broker = Mosquitto(tmp_path / "broker")
    broker.start()
    with LocalFleet(tmp_path, MEMBERS[:1], [MODEL], broker.port, models_folder=models) as fleet:
        fleet.start()
        results = asyncio.run(_kill_and_restart(fleet, broker.port, picture))
    broker.stop()
    assert Counter(result.status for result in results) == {Status.OK: 60}


async def _kill_and_restart(fleet: LocalFleet, port: int, picture: bytes) -> list[InferenceResult]:
    loop = asyncio.get_running_loop()
    link = MqttLink(BrokerAddress("127.0.0.1", port), "camera", loop, MqttOptions(5))
    async with BrokerClient(link, fleet.name, "camera", fleet.keys) as client:
        asked = [client.ask(request_for_picture("detect_faces", picture, limits=LIMITS), "jetson") for _ in range(60)]
        async with asyncio.timeout(WAIT_S):
            await asked[5]
            await asyncio.to_thread(fleet.kill, "jetson")
            await asyncio.to_thread(fleet.start, ["jetson"])
            return list(await asyncio.gather(*asked))
