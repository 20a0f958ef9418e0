"""The demo's sixth act: two revisions of a model are pushed to the fleet, a bad one and a good one, while clients ask.

Owns that act and its table.  Rules: the operator's machine, its keys and its signatures are the ones of ``sly fleet`` and
``sly ota``; the bad revision is signed as a careless operator would, untested; what every board serves is asked of the boards.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.client import Client
from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import Status
from edge_agent.demo.act import request
from edge_agent.demo.story import Story, say
from edge_agent.local_fleet import LocalFleet, Member
from edge_agent.transport.embedded import EmbeddedBroker

if TYPE_CHECKING:
    from edge_agent.steward.folder import OperatorFolder
    from edge_agent.steward.session import OperatorSession
    from ota.manifest import Release

MODEL = "blazeface-short"
BOARDS = (
    Member("shop", "orin_nano"), Member("barn", "raspberry_pi_5"), Member("gate", "jalapeno_edge"), Member("yard", "coral_m2"),
)  # fmt: skip
OPERATOR = "operator"
FLEET = "update"
BROKEN_AT_BYTES, BROKEN_WEIGHTS = 60_000, 100
NOT_A_NUMBER = b"\x00\x00\xc0\x7f"
"""IEEE 754 (2019), binary32, little endian."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """One push: how it ended, and which release every board serves then."""

    what: str
    status: Mapping[str, Any]
    serves: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Updated:
    pushes: tuple[Pushed, ...]
    size_bytes: int
    answered: Counter[str]
    """Of the clients' requests meanwhile, by status."""


def update(folder: Path, story: Story, broker: EmbeddedBroker, picture: bytes) -> Updated:
    """Play the act and judge it. Raises ``SlyError`` for what keeps it from starting."""
    from edge_agent.steward.folder import FleetSettings, OperatorFolder

    say("Act 6: two revisions of a model are pushed to four boards while clients ask; the first one is broken")
    operator = OperatorFolder.create(folder / "operator", FleetSettings(FLEET, OPERATOR, "127.0.0.1", broker.port))
    root = folder / "root.json"
    root.write_bytes(operator.repository.root())
    settings = f'\n[ota]\nroot = "{root}"\ntrial_inferences = 3\ntrial_s = 1\n'
    with LocalFleet(folder / "update", BOARDS, [MODEL], broker.port, name=FLEET, settings=settings) as fleet:
        _enroll(operator, fleet)
        fleet.start()
        fleet.wait_acquainted(fleet.members)
        clients = _Clients(fleet, picture)
        with clients:
            pushes = asyncio.run(_push_both(folder, operator, broker.port, story))
        codes = fleet.stop()
    updated = Updated(pushes, _original().stat().st_size, clients.answered)
    _judge(story, updated, codes)
    return updated


class _Clients:
    """One client at every board, asking one question after the other until the block ends."""

    def __init__(self, fleet: LocalFleet, picture: bytes) -> None:
        self.answered: Counter[str] = Counter()
        self._fleet, self._picture, self._over = fleet, picture, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(board,), name=f"client of {board}") for board in fleet.members]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, board: str) -> None:
        with Client(self._fleet.socket_of(board)) as client:
            while not self._over.wait(0.05):
                try:
                    status = client.submit(request(self._picture)).status.value
                except UnavailableError:
                    status = "no answer"
                self.answered[status] += 1


def _enroll(operator: OperatorFolder, fleet: LocalFleet) -> None:
    from ota.charter import Enrolled

    boards = {
        board: Enrolled(key, "jalapeno", (), fleet.roots[board]) for board, key in sorted(fleet.keys.items())
    }  # fmt: skip
    operator.put_charter(replace(operator.charter, boards=boards))


async def _push_both(folder: Path, operator: OperatorFolder, port: int, story: Story) -> tuple[Pushed, ...]:
    from edge_agent.steward.session import OperatorSession
    from edge_agent.transport.endpoint import BrokerAddress

    original = _original().read_bytes()
    weights = NOT_A_NUMBER * BROKEN_WEIGHTS
    broken = original[:BROKEN_AT_BYTES] + weights + original[BROKEN_AT_BYTES + len(weights) :]
    async with OperatorSession(BrokerAddress("127.0.0.1", port), operator.charter, operator.signer) as session:
        bad = await _push(operator, session, _signed(folder, operator, broken), "with NaN among its weights", story)
        good = await _push(operator, session, _signed(folder, operator, original + b"\0" * 64), "sound", story)
    return bad, good


def _signed(folder: Path, operator: OperatorFolder, data: bytes) -> Release:
    from edge_agent.steward.pushing import release_into
    from ota.release import release_of_model

    path = folder / f"{MODEL}.tflite"
    path.write_bytes(data)
    built = release_of_model(str(path), 1, name=MODEL, golden=False)
    return release_into(operator, built.release, built.files)


async def _push(operator: OperatorFolder, session: OperatorSession, release: Release, what: str, story: Story) -> Pushed:
    from edge_agent.steward.pushing import Wanted, attend, begin, planned

    await operator.publish(session)
    await begin(operator, session, planned(operator, release, Wanted(canary_permille=250, wave_permille=750)))
    say(f"  [{story.now_s():5.2f} s] release {release.number} of {MODEL}, {what}, is pushed: one canary, then the others")
    last = ""

    def show(status: Mapping[str, Any]) -> None:
        nonlocal last
        line = f"{status['state']}: " + ", ".join(f"{count} {step}" for step, count in status["counts"].items())
        if line != last:
            say(f"  [{story.now_s():5.2f} s] {line}")
        last = line

    status = await attend(operator, session, MODEL, show)
    return Pushed(what, status, {each["board"]: each["serves"] for each in status["boards"]})


def _original() -> Path:
    from models.fetch import default_folder

    return default_folder() / f"{MODEL}.tflite"


def _judge(story: Story, updated: Updated, codes: list[int]) -> None:
    bad, good = updated.pushes
    failed = [each for each in bad.status["boards"] if each["failed"]]
    why = failed[0]["why"] if failed else "nobody failed"
    begun = sum(each["step"] != "waiting" for each in bad.status["boards"])
    stopped = bad.status["state"] == "stopped" and begun == 1
    story.promise(stopped, f"the broken revision stops at the canary, {begun} of {len(BOARDS)}: {why}")
    story.promise(set(bad.serves.values()) == {0}, "and every board serves what it served before")
    number = good.status["number"]
    arrived = good.status["state"] == "done" and set(good.serves.values()) == {number}
    story.promise(arrived, f"the sound one, release {number}, is on all of them")
    given_kb = sum(push.status["given_bytes"] for push in updated.pushes) / 1e3
    model_kb = updated.size_bytes / 1e3
    cost = f"both cost {given_kb:.0f} kB of upload for {len(BOARDS)} boards, of a model of {model_kb:.0f} kB"
    story.promise(given_kb < 2 * model_kb, cost)
    total = sum(updated.answered.values())
    good_answers = updated.answered[Status.OK.value]
    answered = f"{good_answers} of {total} answered meanwhile"
    story.promise(total == good_answers > 0, f"no request fails because of an update: {answered}")
    story.promise(set(codes) == {0}, f"the {len(codes)} agents drain and end cleanly (codes {codes})")


def updated_table(updated: Updated) -> str:
    heads = [f"after release {push.status['number']} ({push.status['state']})" for push in updated.pushes]
    lines = ["", f"{'board':<12} {'served before':>14} " + " ".join(f"{head:>27}" for head in heads)]
    for member in sorted(BOARDS, key=lambda each: each.board):
        cells = [f"release {push.serves[member.board] or 'factory'}" for push in updated.pushes]
        lines.append(f"{member.board:<12} {'factory':>14} " + " ".join(f"{cell:>27}" for cell in cells))
    return "\n".join(lines)


def updated_json(updated: Updated) -> dict[str, object]:
    pushes = [
        {key: push.status[key] for key in ("number", "state", "why", "counts", "given_bytes")} | {"serves": dict(push.serves)}
        for push in updated.pushes
    ]
    return {"pushes": json.loads(json.dumps(pushes)), "answered": dict(updated.answered)}
