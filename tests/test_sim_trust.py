"""Hostile boards in a simulated fleet: each is found out in time by all, gets nothing any more, and nobody else is.

How time is counted: from the moment at which a deceit begins there is one epoch, until the board shows itself again at the latest;
then the messages that a verdict takes, one after the other (``TRIPS``), each over the broker with the delays of the scenario, and
where messages are lost, each lost twice on each of its two ways; and between them the periods of a node (``PERIODS_US``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from edge_agent.attest.verifier import TELL_PERIOD_US
from edge_agent.core.errors import ConfigError
from edge_agent.core.values import Status, TrustTier
from edge_agent.node.attester import QUOTE_PERIOD_US
from edge_agent.sim.fleet import START_US, SimFleet
from edge_agent.sim.plans import Fault, LinkPlan
from edge_agent.sim.scenario import Scenario, load_scenario, parse_scenario
from edge_agent.sim.sharing import shared_work
from edge_agent.sim.shell import IDLE_TICK_US
from edge_agent.transport.faults import Faults
from edge_agent.transport.topics import Kind, Topics

CONTRAINDICATED = TrustTier.CONTRAINDICATED
BEGINS_MS = 12_000
EPOCH_US = 10_000_000
TRIPS = 4
"""A nonce (a new boot must hear one), the quote, the other quote that a verifier was shown, the appraisal."""
PERIODS_US = QUOTE_PERIOD_US + TELL_PERIOD_US + 2 * IDLE_TICK_US
STEP_US = 500_000
AGREED_US = 12_000_000
"""Records that changed with the verdict go round, and tables are made anew (docs/convergence.md)."""
HOSTILE = ("orin-1", "orin-2", "orin-3")
HOUSE = """
title = "fast boards that all others would like to use"
duration_s = 60
[[models]]
name = "detector"
task = "detect_objects"
quality_permille = 600
macs = 6_000_000_000
weight_bytes = 9_000_000
[[boards]]
id = "orin"
count = 3
profile = "orin_nano"
models = ["detector"]
[[boards]]
id = "pi"
count = {slow}
profile = "raspberry_pi_5"
models = ["detector"]
[[arrivals]]
kind = "camera"
task = "detect_objects"
period_ms = {period_ms}
deadline_ms = 2000
trust = "warning"
"""
ATTEST = "[attest]\nepoch_s = 10\n"


def house(slow: int, *kinds: str, period_ms: int = 2_000, attest: str = ATTEST) -> Scenario:
    scenario = parse_scenario("house", (HOUSE.format(slow=slow, period_ms=period_ms) + attest).encode())
    faults = (Fault(kind, (board,), from_ms=BEGINS_MS) for kind, board in zip(kinds, HOSTILE, strict=False))
    return replace(scenario, faults=tuple(faults))


def bound_us(links: LinkPlan) -> int:
    """In how long after its deceit begins a board must be contraindicated everywhere."""
    way_us = links.delay_us + links.jitter_us + (2 * Faults().retry_us if links.loss_permille else 0)
    return EPOCH_US + TRIPS * 2 * way_us + PERIODS_US


class Watched(SimFleet):
    """Counts the requests that each board is given by others."""

    def __init__(self, scenario: Scenario, seed: int = 0, placer: str = "table") -> None:
        self.given = Counter[str]()
        self._topics = Topics("home")
        super().__init__(scenario, seed, placer)

    def note(self, text: str, payload: bytes | memoryview = b"") -> None:
        super().note(text, payload)
        words = text.split()
        if words[1:3] == [">", "publish"]:
            topic = self._topics.parse(words[4])
            self.given[topic.board] += topic.kind is Kind.REQUEST

    @property
    def honest(self) -> list[str]:
        guilty = {board for fault in self.scenario.faults for board in fault.boards}
        return [board for board in self.boards if board not in guilty]

    def tier(self, judge: str, board: str) -> TrustTier:
        return self.boards[judge].node.trust.tier(board)

    def contraindicated(self, judge: str) -> set[str]:
        """By what this board goes by when it places a request."""
        return {board for board in self.boards if self.tier(judge, board) is CONTRAINDICATED}

    def all_hold_against(self, boards: set[str]) -> bool:
        return all(self.contraindicated(judge) == boards for judge in self.honest)

    def one_table(self) -> bool:
        return len({self.boards[board].node.agreement.digest for board in self.honest}) == 1

    def steps(self, within_us: int, kept: set[str]) -> Iterator[None]:
        """Let time pass step by step."""
        end_us = self.since_start_us + within_us
        while self.since_start_us < end_us:
            self.until(self.since_start_us + STEP_US, kept)
            yield

    def until(self, end_us: int, kept: set[str] | None = None, *, all_know: bool = False) -> bool:
        """Let time pass to ``end_us`` of the load, or till all hold something against ``kept``; was that so?

        Meanwhile honest boards hold nothing against any other.
        """
        while self.since_start_us < end_us:
            self.clock.advance(STEP_US)
            for judge in self.honest:
                assert self.contraindicated(judge) <= (kept or set()), (self.since_start_us, judge)
            if all_know and self.all_hold_against(kept or set()):
                return True
        return False


@contextmanager
def watched(scenario: Scenario, seed: int) -> Iterator[Watched]:
    with shared_work(), Watched(scenario, seed) as fleet:
        fleet.begin()
        yield fleet


QUICK, ROUGH = LinkPlan(), LinkPlan(delay_us=5_000, jitter_us=100_000, loss_permille=10)


@pytest.mark.parametrize(
    ("seed", "kinds", "links"),
    [
        (1, ("swapped_model", "equivocates", "cloned_key"), QUICK),
        (2, ("cloned_key", "rolled_back", "equivocates"), ROUGH),
        (3, ("equivocates", "swapped_model", "rolled_back"), ROUGH),
    ],
)
def test_three_hostile_boards_of_thirty_are_contraindicated_by_all_within_an_epoch_and_the_round_trips(
    seed: int, kinds: tuple[str, ...], links: LinkPlan
) -> None:
    guilty = set(HOSTILE)
    with watched(replace(house(27, *kinds, period_ms=5_000), links=links), seed) as fleet:
        fleet.until(BEGINS_MS * 1000 - STEP_US, set())
        assert all(fleet.given[board] for board in guilty), "they must have something to lose"
        known = fleet.until(BEGINS_MS * 1000 + bound_us(links), guilty, all_know=True)
        assert known, {judge: fleet.contraindicated(judge) for judge in fleet.honest}
        print(f"{(fleet.since_start_us - BEGINS_MS * 1000) / 1e6:.1f} s of at most {bound_us(links) / 1e6:.1f} s")
        fleet.given.clear()
        fleet.until(fleet.since_start_us + 3_000_000, guilty)
        assert any(fleet.one_table() for _ in fleet.steps(AGREED_US, guilty)), "honest boards hold one table"
        assert not any(fleet.given[board] for board in guilty)
        assert {fleet.tier(judge, board) for judge in fleet.honest for board in fleet.honest} == {TrustTier.WARNING}
