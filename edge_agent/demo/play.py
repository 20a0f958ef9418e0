"""The demo: the main job on real input, the plug pulled twice, a model tampered with, two pushed; a verdict on every promise.

Owns the story and what is counted.  Rules: the agents are the ones that run on boards, in processes of their own; every
promise is checked on what the clients saw; one that broke is named and makes the exit code 1.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from edge_agent.broker_client import BrokerClient
from edge_agent.client import Client
from edge_agent.core.errors import ConfigError
from edge_agent.core.values import Status
from edge_agent.demo.act import CLIENTS_PER_BOARD, DEADLINE_US, Act, request, why_of
from edge_agent.demo.choices import agreement, choices, choices_json, choices_table
from edge_agent.demo.conversation import AFTER_KILL, LANGUAGE_MODEL, Asked, converse, talk_json, talk_table
from edge_agent.demo.report import closing_json, closing_table, promises
from edge_agent.demo.story import Served, Story, say
from edge_agent.demo.tampering import Caught, caught_json, caught_table, tamper
from edge_agent.demo.updating import Updated, update, updated_json, updated_table
from edge_agent.local_fleet import LocalFleet, Member
from edge_agent.progress import Bar
from edge_agent.transport.embedded import EmbeddedBroker

MODELS = ("blazeface-short", "blazeface-full")
PICTURE = "grace_hopper"
BOARDS = (
    Member("jetson", "orin_nano"),
    Member("coral", "coral_m2"),
    Member("pi", "raspberry_pi_5"),
    Member("jalapeno", "jalapeno_edge"),
)
OWED_REQUESTS = 24
BY_BROKER = "over the broker"
MAX_REQUESTS = 10_000


def run(output: Path, requests: int, *, as_json: bool = False) -> int:
    """Play the demo; 0 if every promise was kept. Raises ``SlyError`` for what keeps it from starting."""
    if not 8 <= requests <= MAX_REQUESTS:
        raise ConfigError("--requests", requests, f"8 to {MAX_REQUESTS}")
    picture = _fetched()
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="sly-demo-"))
    try:
        story = asyncio.run(_play(folder, picture, requests))
        asked = converse(folder, story)
        caught = _tamper(folder, story, picture)
        updated = _update(folder, story, picture)
        chosen = choices(each.why for each in story.served if each.why is not None)
        if as_json:
            extra = {"choices": choices_json(chosen), "talk": talk_json(asked), "trust": caught_json(caught)}
            extra["updates"] = updated_json(updated)
            print(json.dumps(closing_json(story, BOARDS) | extra))
        else:
            options = choices_table(chosen, len(story.served))
            tables = (talk_table(asked), caught_table(caught), updated_table(updated))
            print(closing_table(story, BOARDS), options, *tables, promises(story), sep="\n")
        _draw(output, picture, story, asked)
    finally:
        for log in folder.glob("**/agent.log"):
            shutil.copy(log, output / f"{log.parent.name}.log")
        shutil.rmtree(folder)
    broken = [text for kept, text in story.promises if not kept]
    for text in broken:
        say(f"broken: {text}")
    return 1 if broken else 0


def _fetched() -> bytes:
    from models.catalog import card
    from models.fetch import default_folder, fetch, fetch_picture
    from models.language_build import build_from_catalog, is_built
    from models.language_card import find

    for name in MODELS:
        fetch(card(name), report=say)
    folder = default_folder()
    if not is_built(find(LANGUAGE_MODEL, folder), folder):
        with Bar() as bar:
            build_from_catalog(LANGUAGE_MODEL, folder, progress=bar.show)
    return fetch_picture(PICTURE, report=say).read_bytes()


async def _play(folder: Path, picture: bytes, requests: int) -> Story:
    story = Story()
    broker = EmbeddedBroker(_free_port())
    say(f"Starting an MQTT broker and {len(BOARDS)} emulated boards, each an agent in a process of its own ...")
    with broker, LocalFleet(folder, BOARDS, MODELS, broker.port) as fleet:
        await asyncio.to_thread(fleet.start)
        await asyncio.to_thread(fleet.wait_acquainted, fleet.members)
        say(f"  all boards are ready and know each other after {story.now_s():.1f} s")
        boards = list(fleet.members)
        story.begin()

        say(f"Act 1: {requests} requests from {CLIENTS_PER_BOARD * len(boards)} clients at once")
        since_s = time.monotonic()
        await Act(story, fleet, picture, "all up").serve(boards, requests)
        await _judge_agreement(story, fleet, boards, "after act 1", since_s)

        doomed = Counter(each.result.board for each in story.served).most_common(1)[0][0]
        say(f"Act 2: {requests} more, and the plug of {doomed}, the busiest board, is pulled")
        act = Act(story, fleet, picture, "board lost")
        act.at(requests // 3, lambda: _kill(fleet, doomed, story))
        await act.serve(boards, requests)
        _judge_board_loss(story, doomed)

        survivors = [board for board in boards if board != doomed]
        await _act_three(story, fleet, broker, picture, survivors, requests)
        codes = await asyncio.to_thread(fleet.stop)
        story.promise(codes == [0] * len(survivors), f"the {len(survivors)} boards left drain and end cleanly (codes {codes})")
    _judge(story, 3 * requests + OWED_REQUESTS)
    return story


async def _act_three(
    story: Story, fleet: LocalFleet, broker: EmbeddedBroker, picture: bytes, boards: list[str], requests: int
) -> None:
    """The broker dies while it owes answers; boards serve their own clients; it returns, and what was owed is delivered."""
    from edge_agent.transport.backoff import BackoffLimits
    from edge_agent.transport.mqtt import BrokerAddress, MqttLink, MqttOptions

    say(f"Act 3: {OWED_REQUESTS} requests over the broker, which is killed at their first answer; {requests} more meanwhile")
    options = MqttOptions(5, backoff=BackoffLimits(100_000, 500_000))
    link = MqttLink(BrokerAddress("127.0.0.1", broker.port), "camera", asyncio.get_running_loop(), options)
    async with BrokerClient(link, fleet.name, "camera", fleet.keys) as client:
        asked = [(story.now_s(), client.ask(request(picture), boards[0])) for _ in range(OWED_REQUESTS)]
        await asyncio.wait([answer for _, answer in asked], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.to_thread(broker.kill)
        story.incident("broker killed")
        owed = client.outstanding
        await Act(story, fleet, picture, "broker lost").serve(boards, requests)
        offline = [each for each in story.served if each.act == "broker lost"]
        own = sum(each.client.startswith(each.result.board + "/") for each in offline)
        story.promise(own == len(offline), f"without a broker each board serves its own clients ({own} of {len(offline)})")
        back_s = time.monotonic()
        await asyncio.to_thread(broker.start)
        story.incident("broker back")
        await asyncio.wait([answer for _, answer in asked], timeout=DEADLINE_US / 1e6)
        answered_s = story.now_s()
        story.served += [
            Served(BY_BROKER, "camera", asked_s, answered_s, answer.result()) for asked_s, answer in asked if answer.done()
        ]
        _explain_the_rest(story, fleet, boards[0])
        came = owed - client.outstanding
        story.incident(f"{came} answers that were owed are delivered")
        text = f"{owed} answers were owed when the broker died and {came} came, each once ({client.duplicates} repeats dropped)"
        story.promise(came == owed > 0, text)
    await _judge_agreement(story, fleet, boards, "after the broker's return", back_s)


def _tamper(folder: Path, story: Story, picture: bytes) -> Caught:
    with EmbeddedBroker(_free_port()) as broker:
        return tamper(folder, story, broker, picture)


def _update(folder: Path, story: Story, picture: bytes) -> Updated:
    with EmbeddedBroker(_free_port()) as broker:
        return update(folder, story, broker, picture)


def _explain_the_rest(story: Story, fleet: LocalFleet, ingress: str) -> None:
    """What came in at ``ingress`` over the broker is explained by it too."""
    with Client(fleet.socket_of(ingress)) as client:
        story.served = [
            replace(each, why=why_of(client, each.result.request_id)) if each.act == BY_BROKER else each for each in story.served
        ]


async def _judge_agreement(story: Story, fleet: LocalFleet, boards: list[str], when: str, since_s: float) -> None:
    found = await asyncio.to_thread(agreement, fleet, boards, since_s)
    story.promise(found.holds, f"{when} the {len(boards)} boards tell each other that they hold the same table ({found})")


def _judge_board_loss(story: Story, doomed: str) -> None:
    during = [each for each in story.served if each.act == "board lost"]
    lost = [each for each in during if each.result.status is not Status.OK]
    killed_s = story.incidents[-1][0]
    after = Counter(each.result.board for each in during if each.asked_s > killed_s)
    story.promise(not lost, f"no request is lost with {doomed}: {len(during) - len(lost)} of {len(during)} answered")
    story.promise(after[doomed] == 0, f"what comes after goes elsewhere: {_counts(after)}")


def _judge(story: Story, expected: int) -> None:
    ids = Counter(each.result.request_id for each in story.served)
    good = sum(each.result.status is Status.OK for each in story.served)
    story.promise(
        len(story.served) == len(ids) == good == expected, f"each of {expected} requests was answered once, and well ({good})"
    )
    by_model: dict[str, set[bytes]] = {}
    for each in story.served:
        outputs = each.result.outputs
        by_model.setdefault(each.result.model, set()).add(b"".join(bytes(outputs[name].data) for name in sorted(outputs)))
    same = all(len(answers) == 1 for answers in by_model.values())
    story.promise(same, f"the same model gives the same bits on every board ({', '.join(sorted(by_model))})")


def _kill(fleet: LocalFleet, board: str, story: Story) -> None:
    fleet.kill(board)
    story.incident(f"{board} killed")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{board} {number}" for board, number in sorted(counter.items()))


def _draw(output: Path, picture: bytes, story: Story, asked: list[Asked]) -> None:
    from edge_agent.demo.talk_chart import draw_talk
    from edge_agent.demo.timeline import draw_timeline
    from edge_agent.drawing import draw

    last = next(each for each in reversed(story.served) if each.result.status is Status.OK)
    draw(output / "faces.png", picture, last.result)
    draw_timeline(output / "timeline.png", story, BOARDS)
    draw_talk(output / "talk.png", asked, AFTER_KILL)
    pictures = " ".join(str(output / name) for name in ("faces.png", "timeline.png", "talk.png"))
    say(f"pictures: {pictures}; logs: {output}/*.log")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
