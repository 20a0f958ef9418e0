"""The ledger's slots of the agent and the launcher's record, wherever the power failed between the two."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from edge_agent.core.config import OtaSection
from edge_agent.core.errors import UnavailableError
from edge_agent.store.files import Disk
from ota.agent_slots import AgentSlots, held
from ota.agent_turns import AgentTurns, Agreed
from ota.launcher import Environment, Record, State, write_record
from ota.manifest import AGENT, encode_release
from ota.slots import Held, ModelSlots
from ota.slots import State as Slot
from tests.wheels import tiny_agent

ONE = Environment("env-1-00000001", 1, "11" * 32)
TWO = Environment("env-2-00000002", 2, "22" * 32)
THREE = Environment("env-3-00000003", 3, "33" * 32)
FIRST, SECOND, THIRD = held(ONE), held(TWO), held(THREE)
TRYING_SECOND = ModelSlots(AGENT, FIRST, candidate=SECOND, state=Slot.TRIAL, floor=1)
CONFIG = OtaSection(confirm_s=3600, trial_boots=2)


class House:
    """The agent of ``runs``, with the launcher's ``record``."""

    def __init__(self, folder: Path, runs: Environment, record: Record) -> None:
        write_record(Disk(), folder, record)
        self.slots = AgentSlots(folder, prefix=folder / runs.folder)
        self.turns = AgentTurns(self.slots, CONFIG)

    @property
    def record(self) -> Record:
        return self.slots.record


TRIED = Record(confirmed=ONE, candidate=TWO, state=State.TRIAL, boots=1)


def test_what_the_ledger_confirmed_is_confirmed_for_the_launcher_at_the_next_start(tmp_path: Path) -> None:
    house = House(tmp_path, TWO, TRIED)
    slots = ModelSlots(AGENT, SECOND, FIRST, floor=2)
    assert house.turns.agree(slots) == Agreed(slots, 2)
    assert (house.record.confirmed, house.record.previous, house.record.state) == (TWO, ONE, State.EMPTY)


def test_an_agent_on_trial_that_the_ledger_gave_up_leaves(tmp_path: Path) -> None:
    house = House(tmp_path, TWO, TRIED)
    given_up = replace(TRYING_SECOND, state=Slot.ROLLED_BACK, why="start 2 of 2 allowed")
    assert house.turns.agree(given_up) == Agreed(given_up, 2, leave="start 2 of 2 allowed")
    assert house.turns.turn_back("start 2 of 2 allowed")
    assert (house.record.state, house.record.why) == (State.ROLLED_BACK, "start 2 of 2 allowed")


def test_an_agent_on_trial_of_which_the_ledger_knows_nothing_leaves(tmp_path: Path) -> None:
    assert House(tmp_path, TWO, TRIED).turns.agree(ModelSlots(AGENT)).leave


def test_an_agent_on_trial_goes_on_with_it(tmp_path: Path) -> None:
    house = House(tmp_path, TWO, TRIED)
    assert house.turns.agree(TRYING_SECOND) == Agreed(TRYING_SECOND, 2) and house.record.state is State.TRIAL


def test_the_way_back_that_the_launcher_knows_of_is_gone_by_the_ledger_too_and_no_floor_is_lower(tmp_path: Path) -> None:
    house = House(tmp_path, ONE, Record(confirmed=ONE, candidate=TWO, state=State.ROLLED_BACK, why="the fleet goes back"))
    assert house.turns.agree(ModelSlots(AGENT, SECOND, FIRST, floor=2)).slots == ModelSlots(AGENT, FIRST, floor=2)


def test_a_record_of_the_launcher_that_was_lost_means_the_factorys_agent(tmp_path: Path) -> None:
    house = House(tmp_path, Environment(), Record())
    assert house.turns.agree(ModelSlots(AGENT, SECOND, FIRST, floor=2)) == Agreed(ModelSlots(AGENT, Held(), floor=2))


def test_a_ledger_that_was_lost_learns_who_is_confirmed(tmp_path: Path) -> None:
    house = House(tmp_path, TWO, Record(confirmed=TWO, previous=ONE))
    assert house.turns.agree(ModelSlots(AGENT)).slots == ModelSlots(AGENT, SECOND, FIRST, floor=2)


def test_the_launchers_reason_is_told_of_the_release_that_it_left_and_of_no_other(tmp_path: Path) -> None:
    left = Record(confirmed=ONE, candidate=TWO, state=State.ROLLED_BACK, why="2 starts without confirmation")
    house = House(tmp_path, ONE, left)
    assert house.turns.agree(TRYING_SECOND) == Agreed(TRYING_SECOND, 1, "2 starts without confirmation")
    later = replace(TRYING_SECOND, candidate=THIRD)
    assert house.turns.agree(later) == Agreed(later, 1)


def test_a_trial_that_the_launcher_could_not_even_begin_is_over(tmp_path: Path) -> None:
    house = House(tmp_path, ONE, TRIED)
    assert house.turns.agree(TRYING_SECOND) == Agreed(TRYING_SECOND, 1, "it could not be started")
    assert house.record.state is State.ROLLED_BACK


def test_what_was_built_and_is_wanted_no_more_makes_room(tmp_path: Path) -> None:
    house = House(tmp_path, ONE, Record(confirmed=ONE, candidate=TWO, state=State.READY))
    states = []
    for slots in (TRYING_SECOND, ModelSlots(AGENT, FIRST, floor=1)):
        house.turns.agree(slots)
        states.append(house.record.state)
    assert states == [State.READY, State.EMPTY]


def test_what_lies_there_whole_is_not_built_again(tmp_path: Path) -> None:
    release, wheels = tiny_agent(tmp_path / "wheels", 2)
    built = Environment(TWO.folder, 2, sha256(encode_release(release)).hexdigest())
    house = House(tmp_path, ONE, Record(confirmed=ONE, candidate=built, state=State.READY))
    asyncio.run(house.turns.install(release, wheels))
    assert house.record.candidate == built


def test_a_trial_lasts_longer_than_its_confirmation_takes_and_has_the_configured_starts(tmp_path: Path) -> None:
    house = House(tmp_path, ONE, Record(confirmed=ONE, candidate=TWO, state=State.READY))
    house.turns.turn()
    assert (house.record.state, house.record.max_boots) == (State.TRIAL, 2) and house.record.trial_s > CONFIG.confirm_s


def test_a_release_of_a_trial_that_never_began_is_given_up_and_the_agent_stays(tmp_path: Path) -> None:
    house = House(tmp_path, ONE, Record(confirmed=ONE, candidate=TWO, state=State.READY))
    assert not house.turns.turn_back("aborted")
    assert house.record.state is State.EMPTY


def test_a_move_that_the_table_has_not_is_no_crash(tmp_path: Path) -> None:
    house = House(tmp_path, ONE, Record(confirmed=ONE))
    for move in (house.turns.turn, house.turns.go_back):
        with pytest.raises(UnavailableError, match="cannot"):
            move()


def test_without_a_launcher_nothing_is_installed_and_a_trial_is_over() -> None:
    turns = AgentTurns(None, CONFIG)
    assert "not started by ota.launcher" in turns.agree(TRYING_SECOND).why
    with pytest.raises(UnavailableError, match="A/B"):
        turns.turn()
    assert not turns.turn_back("aborted")
