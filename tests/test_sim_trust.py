"""Hostile boards in a simulated fleet: each is found out in time by all, gets nothing any more, and nobody else is.

How time is counted: when a deceit begins there is one epoch, until the board shows itself again at the latest,
then the messages that a verdict takes, one after the other (``TRIPS``), each over the broker with the delays of the scenario, and
where messages are lost, each lost twice on each of its two ways; and between them the periods of a node (``PERIODS_US``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from edge_agent.attest.telling import TELL_PERIOD_US
from edge_agent.core.errors import ConfigError
from edge_agent.core.values import Status, TrustTier
from edge_agent.node.attester import QUOTE_PERIOD_US
from edge_agent.sim.fleet import SimFleet
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
    """Counts the requests that each board is given by honest ones."""

    def __init__(self, scenario: Scenario, seed: int = 0, placer: str = "table") -> None:
        self.given = Counter[str]()
        self._guilty = {board for fault in scenario.faults for board in fault.boards}
        self._topics = Topics("home")
        super().__init__(scenario, seed, placer)

    def note(self, text: str, payload: bytes | memoryview = b"") -> None:
        super().note(text, payload)
        words = text.split()
        if words[1:3] == [">", "publish"] and words[0] not in self._guilty:
            topic = self._topics.parse(words[4])
            self.given[topic.board] += topic.kind is Kind.REQUEST

    @property
    def honest(self) -> list[str]:
        return [board for board in self.boards if board not in self._guilty]

    def tier(self, judge: str, board: str) -> TrustTier:
        return self.boards[judge].node.trust.tier(board)

    def contraindicated(self, judge: str) -> set[str]:
        """By what this board goes by when it places a request."""
        return {board for board in self.boards if self.tier(judge, board) is CONTRAINDICATED}

    def all_hold_against(self, boards: set[str]) -> bool:
        return all(self.contraindicated(judge) == boards for judge in self.honest)

    def all_doubt(self, board: str) -> bool:
        """Does nothing that asks for trust go there, whoever places it?"""
        return all(self.tier(judge, board) <= TrustTier.NONE for judge in self.honest)

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
    ("boards", "seed", "kinds", "links"),
    [
        (12, 1, ("swapped_model", "equivocates", "cloned_key"), QUICK),
        pytest.param(30, 1, ("swapped_model", "equivocates", "cloned_key"), QUICK, marks=pytest.mark.long),
        pytest.param(30, 2, ("cloned_key", "rolled_back", "equivocates"), ROUGH, marks=pytest.mark.long),
        pytest.param(30, 3, ("equivocates", "swapped_model", "rolled_back"), ROUGH, marks=pytest.mark.long),
    ],
)
def test_three_hostile_boards_of_a_fleet_are_contraindicated_by_all_within_an_epoch_and_the_round_trips(
    boards: int, seed: int, kinds: tuple[str, ...], links: LinkPlan
) -> None:
    guilty = set(HOSTILE)
    with watched(replace(house(boards - 3, *kinds, period_ms=5_000), links=links), seed) as fleet:
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


def test_a_board_whose_answers_are_wrong_is_found_out_by_those_who_run_them_again() -> None:
    """Its quotes are as they should be. With a share p of answers run again it goes unnoticed for 1/p of them on average."""
    scenario = house(3, "wrong_results", period_ms=200, attest=ATTEST + "recheck_permille = 200\n")
    with watched(scenario, 1) as fleet:
        fleet.until(BEGINS_MS * 1000 - STEP_US, set())
        assert fleet.given["orin-1"]
        assert any(fleet.all_doubt("orin-1") for _ in fleet.steps(2 * EPOCH_US, {"orin-1"}))
        assert any("orin-1" in fleet.contraindicated(judge) for judge in fleet.honest)
        assert "wrong answer" in fleet.boards["pi-1"].node.trust.why("orin-1")
        fleet.given.clear()
        fleet.until(fleet.since_start_us + 3_000_000, {"orin-1"})
        assert not fleet.given["orin-1"]


def test_a_board_that_gives_many_answers_receipts_of_one_number_is_found_out() -> None:
    with watched(house(3, "forks_receipts", period_ms=200), 1) as fleet:
        fleet.until(BEGINS_MS * 1000, set())
        assert any(fleet.all_doubt("orin-1") for _ in fleet.steps(bound_us(QUICK), {"orin-1"}))
        assert any("orin-1" in fleet.contraindicated(judge) for judge in fleet.honest)
        assert "receipt" in fleet.boards["pi-1"].node.trust.why("orin-1")


@pytest.mark.parametrize(("agree", "left"), [(1, TrustTier.NONE), (2, TrustTier.WARNING)])
def test_one_that_denounces_everybody_takes_nobody_down(agree: int, left: TrustTier) -> None:
    """By default it casts doubt, so that what asks for trust finds none; where two must agree, not even that."""
    with watched(house(3, "denounces", attest=ATTEST + f"agree = {agree}\n"), 1) as fleet:
        fleet.until(BEGINS_MS * 1000 + 2 * EPOCH_US, set())
        said = [each.tier for each in fleet.boards["pi-1"].node.trust.attestation.verifier.opinions.of("pi-2")]
        assert CONTRAINDICATED in said, "it was heard"
        assert all(fleet.tier(judge, board) is left for judge in fleet.honest for board in fleet.honest)
        assert left is TrustTier.NONE or {each.status for each in fleet.clients.served} == {Status.OK}


def test_a_board_that_shows_nothing_any_more_is_not_known_any_more_and_never_contraindicated() -> None:
    with watched(house(3, "stale_quotes"), 1) as fleet:
        fleet.until(BEGINS_MS * 1000 + 6 * EPOCH_US, set())
        assert {fleet.tier(judge, "orin-1") for judge in fleet.honest} == {TrustTier.NONE}
        fleet.given.clear()
        fleet.until(fleet.since_start_us + 3_000_000, set())
        assert not fleet.given["orin-1"], "what asks for a board that is known goes elsewhere"


def test_boards_without_attest_are_as_they_were() -> None:
    assert not load_scenario("house").attest.on


def test_a_hostile_board_needs_a_fleet_that_attests() -> None:
    with pytest.raises(ConfigError, match="attest"):
        house(3, "equivocates", attest="")


def test_a_hostile_run_is_a_pure_function_of_its_seed() -> None:
    scenario = replace(house(3, "equivocates", "cloned_key"), duration_us=16_000_000)
    runs = [SimFleet(scenario, 4) for _ in range(2)]
    digests = set()
    for fleet in runs:
        with fleet:
            digests.add(fleet.run().trace_digest)
    with shared_work(), SimFleet(scenario, 4) as fleet:
        digests.add(fleet.run().trace_digest)
    assert len(digests) == 1
