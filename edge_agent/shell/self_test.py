"""The self-test of a board that serves: soon after each start, then again and again; told to people, the fleet and a light.

Rules: it never keeps the agent from anything: it runs beside the serving, what it asks of the machine is asked in a thread or in
a child and has a time limit, and a fault of its own is a line in the log.  What is told is of this boot and kept nowhere but on
the broker.  It is looked at about once a minute, and when the link has turned, but never more often than ``REST_S``; a change of
a verdict is told at once, a change of words alone about once an hour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

from board_support.board import Board
from board_support.led import Led, open_led
from edge_agent.attest.self_test import MAX_AGENT_CHARS, Check, SelfTest, Verdict, sign_self_test, worst
from edge_agent.configured import engine_settings
from edge_agent.core.clock import Clock
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.hosting import Host
from edge_agent.node.node import Node
from edge_agent.shell import checks
from edge_agent.shell.examination import answer_checks, disk_check, in_order, machine_checks
from edge_agent.shell.known_answer import Asked, ask_known_answer
from edge_agent.transport.link import Link, LinkDown, LinkEvent, LinkUp, Message, Published, Rejected
from edge_agent.transport.topics import Topics

SOON_S = 3.0
"""After the start, so that what comes up has come up."""
LOOK_S, REST_S = 60.0, 5.0
WHOLE_US = 3_600_000_000
"""Between two whole ones, with the known answer, and two that differ in words alone."""
LINK_LIMIT_US = 60_000_000
"""A broker that was not reached for so long is a failure."""
LOOK_LIMIT_S = 30.0
TICKET = 2**50
"""Of what this room publishes: beyond the tickets of the node and of the updates."""
DISTRIBUTION = "slyos-edge"


class Tested(Protocol):
    """What of the agent is looked at."""

    config: AgentConfig
    board: Board
    host: Host
    node: Node
    clock: Clock


@dataclass(slots=True)
class _LinkSeen:
    """``why``: why it is down, in the words of the transport; ``since_us``: since when it is."""

    since_us: int
    up: bool = False
    why: str = ""


class SelfTesting:
    """``start``, ``hear`` every event of the link, ``close``; ``last`` is what was found last, ``None`` before the first.

    ``link`` gives the link there is now, ``disk`` why the state folder keeps nothing, empty if it does.
    """

    def __init__(
        self, agent: Tested, link: Callable[[], Link | None], disk: Callable[[], str], say: Callable[[str], None]
    ) -> None:
        self._agent, self._link, self._disk, self._say = agent, link, disk, say
        self._seen_link = _LinkSeen(agent.clock.monotonic_us())
        self._asked: Asked | None = None
        self._looking: asyncio.Future[list[Check]] | None = None
        self._whole_due_us = self._words_due_us = 0
        self._told: dict[str, Check] = {}
        self._publish_again, self._refused = False, ""
        self._stir = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._led: Led | None = None
        self.last: SelfTest | None = None

    def start(self) -> None:
        led = open_led(self._agent.board.backend, self._agent.board.settings.root)
        self._led = led if isinstance(led, Led) else None
        self._task = asyncio.get_running_loop().create_task(self._run_for_ever(), name="self-test")
        self._task.add_done_callback(self._ended)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._led is not None:
            self._led.give_back()

    def hear(self, event: LinkEvent) -> bool:
        """An event of the link; ``True`` if it was about the self-test alone."""
        seen = self._seen_link
        match event:
            case LinkUp():
                seen.up, seen.why, self._publish_again = True, "", True
                self._stir.set()
            case LinkDown(reason):
                if seen.up:
                    seen.up, seen.since_us = False, self._agent.clock.monotonic_us()
                    self._stir.set()
                seen.why = reason
            case Published(ticket):
                return ticket == TICKET
            case Rejected(reason, ticket) if ticket == TICKET:
                self._say_once(f"the broker does not take the self-test: {reason}; write its access list anew: sly fleet broker")
                return True
        return False

    async def _run_for_ever(self) -> None:
        await asyncio.sleep(SOON_S)
        while True:
            self._stir.clear()
            self._take_in(await self._look())
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._stir.wait()
            await asyncio.sleep(REST_S)

    # looking

    async def _look(self) -> tuple[Check, ...]:
        agent = self._agent
        now_us = agent.clock.monotonic_us()
        if self._asked is None or (now_us >= self._whole_due_us and agent.host.at_rest):
            delegate = await asyncio.to_thread(agent.board.delegate)
            self._asked = await ask_known_answer(engine_settings(agent.config), delegate)
            self._whole_due_us = now_us + WHOLE_US
        execution = agent.node.execution
        found = [
            *answer_checks(self._asked),
            checks.models(agent.config.models.serve, execution.offers.keys(), execution.withdrawn),
            *await self._machine(),
            self._broker(),
        ]
        return in_order(found)

    async def _machine(self) -> list[Check]:
        """In a thread; one that does not come back is not followed by another."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().run_in_executor(None, self._seen)
        try:
            async with asyncio.timeout(LOOK_LIMIT_S):
                return await asyncio.shield(self._looking)
        except TimeoutError:
            return [checks.failed("disk", f"the machine did not answer within {LOOK_LIMIT_S:g} s", "see dmesg: a disk may fail")]

    def _seen(self) -> list[Check]:
        agent = self._agent
        return [*machine_checks(agent.config, agent.board, agent.clock), disk_check(agent.config, self._disk())]

    def _broker(self) -> Check:
        config, link, seen = self._agent.config.broker, self._link(), self._seen_link
        address = f"{config.host}:{config.port}" if config.host else ""
        patient = self._agent.clock.monotonic_us() - seen.since_us < LINK_LIMIT_US
        return checks.broker(address, link is not None and link.up, "" if patient else seen.why)

    # telling

    def _take_in(self, found: tuple[Check, ...]) -> None:
        now_us, before = self._agent.clock.monotonic_us(), self._told
        changed = [each for each in found if _essence(each) != _essence(before.get(each.name))]
        gone = before.keys() - {each.name for each in found}
        settings = self._agent.node.settings
        anew = self.last is None or self.last.boot_epoch != settings.boot_epoch
        if changed or gone or anew or now_us >= self._words_due_us:
            self._words_due_us = now_us + WHOLE_US
            number = self.last.number + 1 if self.last else 1
            agent = version(DISTRIBUTION)[:MAX_AGENT_CHARS]
            self.last = SelfTest(settings.board, settings.boot_epoch, number, agent, found)
            self._told, self._publish_again = {each.name: each for each in found}, True
            self._say_changes(changed, before)
        self._show(worst(found) is Verdict.FAIL)
        if self._publish_again:
            self._publish()

    def _say_changes(self, changed: list[Check], before: Mapping[str, Check]) -> None:
        for each in changed:
            if each.verdict is not Verdict.PASS or each.name in before:
                self._say(f"self-test: {each}")
        if not before:
            passes = sum(each.verdict is Verdict.PASS for each in self._told.values())
            self._say(f"self-test: {passes} of {len(self._told)} checks pass")

    def _show(self, failing: bool) -> None:
        if self._led is not None and (why := self._led.show(failing)):
            self._say(f"the light is not switched: {why}")
            self._led = None

    def _publish(self) -> None:
        link, test, config = self._link(), self.last, self._agent.config
        if link is None or not link.up or test is None:
            return
        topic = Topics(config.fleet.name).self_test(config.board.id)
        try:
            link.publish(Message(topic, sign_self_test(test, self._agent.node.settings.signer), retain=True), TICKET)
            self._publish_again = False
        except (UnavailableError, RefusedError) as error:
            self._say_once(f"the self-test is not sent: {error}")

    def _say_once(self, text: str) -> None:
        if text != self._refused:
            self._refused = text
            self._say(text)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._say(f"the self-test ended by a fault of its own: {error!r}; the serving goes on")


def _essence(check: Check | None) -> tuple[str, ...]:
    """What a change of is told at once: figures in the words of what does not fail may change all the time."""
    if check is None:
        return ()
    return check.verdict.value, check.remedy, check.what if check.verdict is Verdict.FAIL else ""
