"""Many enrolled boards of a real fleet in one process, without engines: ``python -m tests.light_boards [--quick] FOLDER...``.

Each has the real ``Course`` and a real link, with the certificate and the key of its folder, as ``sly fleet enroll`` wrote it.
What stands in is what ``tests.ota_board`` says: tables for the ledger and the cache, and an engine that is a script: a release
whose file holds a NaN gives one.  Metadata is verified by the agent's own check, once for all boards that were offered the same.
They give nothing to each other; there is an operator, and boards that do.
Says ``up NAME...`` when every board is connected; answers each line on its stdin with a line of JSON: what serves where.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from edge_agent.configured import broker_address, client_id, mqtt_options, read_config, signer_of, signing_keys
from edge_agent.core.clock import VirtualClock
from edge_agent.core.errors import RefusedError, SlyError
from edge_agent.transport.link import LinkEvent, LinkUp
from edge_agent.transport.loopback import LoopbackBroker
from edge_agent.transport.mqtt import MqttLink
from edge_agent.transport.topics import Topics
from ota import checking, course, events, lifecycle
from ota.checked import Checked
from ota.manifest import decode_release
from tests import ota_board
from tests.ota_board import FLEET, LIBRARY, SOUND, UpdatingBoard

NAN = b"\x00\x00\xc0\x7f" * 4
"""Four of them in a row, as little-endian float32 (IEEE 754)."""
NAN_WORDS = "output scores: element 0 is NaN or infinite"
REQUEST_S = 0.1


class LightBoard(UpdatingBoard):
    """One board, of the files in ``folder``."""

    fleet: LightFleet
    gives_bytes_per_s = 0

    def __init__(self, fleet: LightFleet, folder: Path) -> None:
        self._config = read_config(folder / "agent.toml")
        super().__init__(fleet, self._config.board.id, self._config.board.backend)
        self.signer = signer_of(self._config)
        fleet.keys |= signing_keys("members", self._config.fleet.members)
        fleet.operators |= signing_keys("operators", self._config.fleet.operators)
        self.root = Path(self._config.ota.root).read_bytes()
        self.connected = asyncio.Event()

    def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self.link = MqttLink(broker_address(self._config), client_id(self._config), loop, mqtt_options(self._config))
        self.link.open(self._hear)

    def _hear(self, event: LinkEvent) -> None:
        if isinstance(event, LinkUp):
            self.connected.set()
        super()._hear(event)

    def _carry_out(self, effect: events.Effect) -> None:
        if isinstance(effect, events.List):
            self.fleet.check(self, effect)
        else:
            super()._carry_out(effect)

    def _probe(self, model: str, number: int) -> None:
        why = self._flaw(number)
        self.feed(events.Probed(model, number, b"" if why else SOUND, LIBRARY, why))

    def _serve_requests(self, number: int) -> None:
        if self.serving == number and self.slots.candidate is not None:
            self.feed(events.Ran(self._model, number, self._flaw(number)))
            self._later(int(REQUEST_S * 1e6), lambda: self._serve_requests(number))

    def _flaw(self, number: int) -> str:
        files = decode_release(self.cache[self._manifest_of(number)]).files
        return NAN_WORDS if any(NAN in self.cache[each.digest] for each in files) else ""

    @property
    def _model(self) -> str:
        return next(iter(self.course.lives))


class LightFleet:
    """What the boards stand in (``ota_board.Fleet``): the clock of this machine, the loop, and python-tuf's verdicts."""

    def __init__(self, folder: Path) -> None:
        self.topics, self.random = Topics(FLEET), Random(0)
        self.broker = LoopbackBroker(VirtualClock(), 0)
        """Nobody is on it."""
        self.keys: dict[str, bytes] = {}
        self.operators: dict[str, bytes] = {}
        self._folder = folder
        self._checks: dict[object, asyncio.Task[events.Event]] = {}

    @property
    def now_us(self) -> int:
        return time.monotonic_ns() // 1000

    def after(self, interval_us: int, callback: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_later(interval_us / 1e6, callback)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def promise(self, kept: object, text: str) -> None:
        if not kept:
            raise AssertionError(text)

    def flaw(self, release: int, board: str, when: str) -> str:
        return ""

    def looked_at(self, board: UpdatingBoard) -> None:
        pass

    def listed(self, offered: events.List) -> events.Listed | events.NotListed:
        raise NotImplementedError("see check, which takes its time")

    def check(self, board: LightBoard, effect: events.List) -> None:
        key = (tuple(sorted(effect.offered.items())), effect.wanted, board.root)
        if key not in self._checks:
            self._checks[key] = asyncio.get_running_loop().create_task(self._checked(effect, board.root))
        self._checks[key].add_done_callback(lambda task: board.feed(task.result()))

    async def _checked(self, effect: events.List, root: bytes) -> events.Event:
        folder = self._folder / f"metadata-{len(self._checks)}"
        try:
            found: Checked = await checking.check(folder, root, effect.offered, effect.wanted, effect.floors, 0)
        except SlyError as error:
            return events.NotListed(str(error), isinstance(error, RefusedError))
        targets = {path: (each.size_bytes, each.digest) for path, each in found.targets.items()}
        return events.Listed(targets, found.marks)


def stop_at_once(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """A broken promise or a bug of a board is no line in a log: this process ends."""
    loop.default_exception_handler(dict(context))
    sys.stderr.flush()
    os._exit(1)


QUICK = "--quick"
"""Before the folders: boards tell and look ten times as often as others do."""


def _hurry() -> None:
    course.REPORT_PERIOD_US //= 10
    lifecycle.STAND_EVERY_US //= 10
    ota_board.TICK_US //= 10
    ota_board.IDLE_TICK_US //= 40


async def run(folders: list[Path], scratch: Path) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(stop_at_once)
    fleet = LightFleet(scratch)
    boards = [LightBoard(fleet, folder) for folder in folders]
    for board in boards:
        board.boot()
    await asyncio.gather(*(board.connected.wait() for board in boards))
    print("up", *(board.name for board in boards), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        serving = {board.name: [board.serving, board.slots.confirmed.number, board.slots.state.value] for board in boards}
        print(json.dumps(serving), flush=True)
    for board in boards:
        board.link.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="sly-light-") as made:
        if QUICK in sys.argv:
            _hurry()
        asyncio.run(run([Path(each) for each in sys.argv[1:] if each != QUICK], Path(made)))
