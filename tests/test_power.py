"""A pulled plug leaves a board with the old release or the new one, whole, and with everything that it had acknowledged.

``tests/power.py`` has the simulator, ``python -m tests.power N`` runs it for as long as one likes.  What the simulator takes for
granted of SQLite is shown here on real processes that are killed.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store.ledger import Ledger
from ota.records import Records
from ota.slots import IllegalMoveError, ModelSlots, State, fall_back
from tests import power
from tests.power import MODEL, Board, LostError, after_kills, at_first, check, states
from tests.power_ledger import Book, Mains
from tests.power_stories import Take, published, told
from tests.test_kill import MAX_WAIT_S, killed_while

STATES = {0: 7_000, 1: 6_000, 2: 7_500}
"""So many at least has the story of each seed; 20,000 together and more."""
FEW_STATES = 1_500
"""Of the first story, with a single second cut after each first one."""


def test_case_19_cut_at_every_write_fsync_and_rename_and_again_in_recovery() -> None:
    assert sum(1 for _ in states(0, random_ones=0, second_cuts=1)) >= FEW_STATES


@pytest.mark.long
@pytest.mark.parametrize("seed", STATES)
def test_case_19_in_twenty_thousand_states(seed: int) -> None:
    assert sum(1 for _ in states(seed, random_ones=1)) >= STATES[seed]


def test_case_19_a_process_that_is_killed_first_leaves_nothing_that_a_later_power_cut_takes() -> None:
    assert sum(1 for _ in after_kills(0, later_cuts=3)) > 800


def test_the_stories_of_the_simulator_have_everything_in_them() -> None:
    deeds = [deed.end if isinstance(deed, Take) else type(deed).__name__ for seed in STATES for deed in told(seed)]
    assert {"sound", "bad", "dropped", "Return", "Deliver"} <= set(deeds)
    assert sum(STATES.values()) >= 20_000


class Unsynced(Mains):
    """A disk that says that it synced a file, and did not."""

    def fsync(self, fd: int) -> None:
        self._change()


class FolderUnsynced(Mains):
    def fsync_folder(self, folder: Path) -> None:
        self._change()


class Hasty(Mains):
    """A ledger that says that it committed before it did."""

    def commit(self, book: Book) -> None:
        before = self.book
        super().commit(book)
        self.book, self.writing = before, book


@pytest.mark.parametrize("liar", [Unsynced, FolderUnsynced, Hasty])
def test_the_simulator_finds_the_loss_on_a_disk_that_lies(liar: type[Mains], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = at_first(0)
    monkeypatch.setattr(power, "at_first", lambda seed: (honest[0].rebooted(lambda _: True, kind=liar), honest[1]))
    with pytest.raises((LostError, RefusedError, UnavailableError, IllegalMoveError)):
        for _ in states(0):
            pass


def flipped(disk: Mains, digest: bytes, bit: int) -> None:
    inode = disk.names_now[power.CACHE / digest.hex()]
    inode.data[bit // 8] ^= 1 << bit % 8
    inode.durable = bytes(inode.data)


def test_case_21_bit_flip_in_the_active_model_at_rest_is_found_and_the_release_before_runs() -> None:
    """Any bit of any file: set aside, never loaded; the release before is whole and becomes the confirmed one."""
    disk, witness = at_first(0)
    Board(disk, 0, witness).take(published(2, 0), "sound")
    random = Random(21)
    for _ in range(100):
        found = power.copied(disk)
        file = random.choice(published(2, 0).files)
        flipped(found, file.digest, random.randrange(8 * file.size_bytes))
        board = Board(found, 0, witness.copy())
        with pytest.raises(LostError, match="release 2 cannot run: .*bytes that hash to .*set aside"):
            check(board)
        board.save(fall_back(board.slots), "fell back")
        assert (board.slots.running, board.slots.floor) == (published(1, 0).held, 2)
        check(board)
        board.take(published(2, 0), "sound")
        assert board.slots.running == published(2, 0).held
        check(board)


RECORDS = """
import sys
from hashlib import sha256
from pathlib import Path
from edge_agent.store.ledger import Ledger
from ota.records import Records
from ota.slots import Held, State, confirm, roll_back, stage, try_

def say(slots):
    sys.stdout.write(f"at {position(slots)}\\n")
    sys.stdout.flush()

def moved(slots):
    if slots.state is State.STAGING:
        return try_(slots)
    if slots.state is State.TRIAL:
        return confirm(slots) if slots.candidate.number % 3 else roll_back(slots, "NaN")
    number = position(slots) // 3 + 1
    return stage(slots, Held(number, sha256(b"%d" % number).digest()))

def position(slots):
    number = (slots.candidate or slots.confirmed).number
    return 3 * number + {State.STAGING: 0, State.TRIAL: 1}.get(slots.state, 2)

with Ledger(Path(sys.argv[1])) as ledger:
    records = Records(ledger)
    slots = records.count_start(1000, ["m"])["m"]
    while True:
        slots = moved(slots)
        with ledger.transaction():
            records.save(slots)
        say(slots)
"""


def position(slots: ModelSlots) -> int:
    number = (slots.candidate or slots.confirmed).number
    return 3 * number + {State.STAGING: 0, State.TRIAL: 1}.get(slots.state, 2)


def test_a_kill_at_any_time_loses_no_state_of_a_model_that_was_committed_to_the_real_ledger(tmp_path: Path) -> None:
    path, random, last = tmp_path / "ledger.db", Random(19), 3
    for _ in range(20):
        said = [int(number) for _, number in killed_while(RECORDS, path, random.randint(1, 12), random.uniform(0, MAX_WAIT_S))]
        with Ledger(path) as ledger:
            records = Records(ledger)
            slots = records.load(MODEL)
            assert records.take_notes() == []
        assert said == list(range(said[0], said[0] + len(said))) and said[0] == last
        assert position(slots) - said[-1] in (0, 1)
        assert slots.floor == slots.confirmed.number
        last = position(slots) + 1
    assert last > 100
