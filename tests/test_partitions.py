"""T4: after the last link heals, all tables agree within a bound that is computed from the constants, whatever was cut and lost.

Each schedule is drawn from its seed: cuts of some boards, both ways or one; a broker that stops, and perhaps forgets; lost,
doubled and overtaken messages, and such as the broker keeps to itself; boards that are killed and come back, and some that do
not; models that come and go; requests all the while.  Then everything is mended and no more requests come.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random

import pytest

from edge_agent.core.config import PolicySection
from edge_agent.core.values import ModelOffer
from edge_agent.node.agreement import DIFFERING_PERIOD_US, MAKE_PERIOD_US, SAY_PERIOD_US
from edge_agent.node.announcer import CHANGED_PERIOD_US
from edge_agent.node.events import Hosted, Sensed, Withdrawn
from edge_agent.node.peers import PATIENCE_US
from edge_agent.sim.sharing import shared_work
from edge_agent.sim.shell import TICK_US
from edge_agent.transport.loopback import Delay, Faults, Partition, Way
from tests.deaf_link import DeafLink, make_deaf
from tests.virtual_board import LINK, RULES, offer
from tests.virtual_fleet import VirtualFleet

SCHEDULES, SCHEDULES_AT_ONCE, SCHEDULES_A_TEST = 200, 25, 25
"""Those after the first ones are tried by ``make test-long``."""
FIRSTS = [
    pytest.param(first, marks=() if first < SCHEDULES_AT_ONCE else pytest.mark.long)
    for first in range(0, SCHEDULES, SCHEDULES_A_TEST)
]
SECOND_US = 1_000_000
WEATHER_US = 8 * SECOND_US
RULES_HERE = replace(RULES, policy=PolicySection(horizon_us=SECOND_US))
CALM_US = 34 * SECOND_US
"""Until the demand of the last requests is forgotten (with so short a horizon), and so no record changes any more."""

RTT_US = 2 * (1_000 + Faults().retry_us)
"""There and back: a message on its way when the last link heals is lost once, and sent again."""
BACK_OFF_US = LINK.keepalive_us * 3 // 2 + LINK.connect_timeout_us + LINK.backoff.cap_us
"""Until both sides know that a connection is dead, the attempt that hangs is given up, and the next one is made."""
DIGEST_US = PATIENCE_US + max(SAY_PERIOD_US, DIFFERING_PERIOD_US)
"""Until who differs has said which records it holds."""
SOLVE_US = CHANGED_PERIOD_US + MAKE_PERIOD_US + 2 * TICK_US
"""Until what it lacks is said again, and everybody has made the table anew."""
HEALED_US = BACK_OFF_US + DIGEST_US + RTT_US + SOLVE_US
"""T4's bound: back-off + digest period + RTT + solve."""


def offers(random: Random) -> list[ModelOffer]:
    busy_us = random.choice((5_000, 40_000, 200_000))
    return random.choice(([offer("small", busy_us, 700)], [offer("small", busy_us, 700), offer("large", 3 * busy_us, 900)], []))


class Schedule:
    """What befalls one fleet."""

    def __init__(self, fleet: VirtualFleet, seed: int) -> None:
        self.fleet, self.random = fleet, Random(f"partitions {seed}")
        self.gone: set[str] = set()
        self.deaf: list[DeafLink] = []

    def begin(self) -> None:
        random, fleet = self.random, self.fleet
        for number in range(random.randrange(3, 6)):
            board = fleet.add_board(f"b{number}", *(offers(random) if number else [offer("small", 20_000)]))
            board.rules = RULES_HERE
        fleet.boot()
        happenings = (
            self.cut,
            self.cut,
            self.cut,
            self.stop_broker,
            self.lose,
            self.keep_back,
            self.kill,
            self.change,
            self.warm,
        )
        for _ in range(random.randrange(3, 8)):
            fleet.after(random.randrange(WEATHER_US), random.choice(happenings))
        for _ in range(random.randrange(3, 8)):
            fleet.after(random.randrange(WEATHER_US), self.ask)
        if random.random() < 0.3:
            fleet.after(random.randrange(WEATHER_US), self.lose_for_good)

    def heal(self) -> None:
        """The last link heals; whoever is to come back is back."""
        broker = self.fleet.broker
        for link in self.deaf:
            link.lost = "\0"
        broker.wire.faults = Faults()
        broker.heal()
        if not broker.running:
            broker.start()
        for name, board in self.fleet.boards.items():
            if name not in self.gone:
                board.boot()

    @property
    def board(self) -> str:
        return self.random.choice(list(self.fleet.boards))

    def cut(self) -> None:
        some = self.random.sample(list(self.fleet.boards), self.random.randrange(1, len(self.fleet.boards) + 1))
        ways = self.random.choice((frozenset(Way), frozenset({Way.TO_BROKER}), frozenset({Way.FROM_BROKER})))
        self.fleet.broker.partition(Partition(frozenset(some), ways))
        self.fleet.after(self.random.randrange(100_000, 6_000_000), self.fleet.broker.heal)

    def stop_broker(self) -> None:
        broker, keep = self.fleet.broker, self.random.random() < 0.5
        if broker.running:
            broker.stop()
            wait_us = self.random.randrange(10_000, 6_000_000)
            self.fleet.after(wait_us, lambda: None if broker.running else broker.start(keep, keep))

    def lose(self) -> None:
        delay = Delay(1_000, self.random.choice((0, 300_000)))
        self.fleet.broker.wire.faults = Faults(delay, self.random.choice((0, 100, 400)), 100, self.random.choice((0, 300)))

    def keep_back(self) -> None:
        """The broker keeps something from a board for good, and believes that it has it."""
        board = self.fleet.boards[self.board]
        if board.up:
            deaf = make_deaf(board, self.random.choice(("/record", "/online", f"{self.board}/record", f"digest/{self.board}")))
            self.fleet.after(self.random.randrange(WEATHER_US), lambda: setattr(deaf, "lost", "\0"))
            self.deaf.append(deaf)

    def kill(self) -> None:
        board = self.fleet.boards[self.board]
        board.kill(power_cut=self.random.random() < 0.5)
        self.fleet.after(self.random.randrange(10_000, 5_000_000), lambda: None if board.name in self.gone else board.boot())

    def lose_for_good(self) -> None:
        """A board dies; the broker may never get to tell it."""
        name = self.board
        if len(self.fleet.boards) - len(self.gone) > 2:
            self.gone.add(name)
            self.fleet.boards[name].kill(power_cut=self.random.random() < 0.5)

    def change(self) -> None:
        board, model = self.fleet.boards[self.board], offer("tiny", self.random.choice((1_000, 10_000)))
        if board.up:
            board.feed(self.random.choice((Hosted(model), Withdrawn("small", "tried"))))

    def warm(self) -> None:
        board = self.fleet.boards[self.board]
        if board.up:
            board.feed(Sensed(self.random.choice((60_000, 84_000)), 85_000))

    def ask(self) -> None:
        board = self.board
        for _ in range(self.random.randrange(1, 6)):
            self.fleet.ask(self.fleet.request(), board)


async def time_to_agree_us(seed: int) -> int:
    """How long after the last link healed all tables agreed for the first time; they do so for good once no record changes."""
    with VirtualFleet(seed) as fleet:
        schedule = Schedule(fleet, seed)
        schedule.begin()
        fleet.run_for(WEATHER_US)
        schedule.heal()
        healed_us = fleet.now_us
        fleet.run_until(lambda: agreed(fleet), HEALED_US, f"the tables agree (schedule {seed})")
        first_us = fleet.now_us - healed_us
        fleet.run_for(CALM_US)
        assert agreed(fleet), f"schedule {seed}: they agreed, and do so no more"
        return first_us


def agreed(fleet: VirtualFleet) -> bool:
    nodes = [board.node for board in fleet.boards.values() if board.up]
    return len({node.agreement.digest for node in nodes}) == 1 and all(node.link_up for node in nodes)


@pytest.mark.parametrize("first", FIRSTS)
def test_t4_after_the_last_link_heals_all_tables_agree_within_the_bound(first: int) -> None:
    with shared_work():
        times_us = sorted(asyncio.run(time_to_agree_us(seed)) for seed in range(first, first + SCHEDULES_A_TEST))
    print(f"agreed after {times_us[len(times_us) // 2]} µs in the middle, {times_us[-1]} µs at most; the bound is {HEALED_US} µs")
