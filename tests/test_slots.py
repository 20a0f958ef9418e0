"""The life of a model on a board goes by its table, always leaves something to run, and is remembered whatever rots."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.cbor import encode
from edge_agent.core.errors import RefusedError
from edge_agent.store.ledger import Ledger
from ota.records import MAX_MODELS, Records
from ota.slots import (
    MAX_WHY_CHARS,
    Held,
    IllegalMoveError,
    ModelSlots,
    State,
    boot,
    confirm,
    fall_back,
    give_up,
    go_back,
    roll_back,
    stage,
    try_,
)

FACTORY = Held()


def held(number: int) -> Held:
    return Held(number, sha256(b"%d" % number).digest())


EMPTY = ModelSlots("m", confirmed=held(4), previous=held(3), floor=4)
STAGING = stage(EMPTY, held(5))
TRIAL = try_(STAGING)
ROLLED_BACK = roll_back(TRIAL, "NaN")
MOVES: dict[str, Callable[[ModelSlots], ModelSlots]] = {
    "stage": lambda slots: stage(slots, held(6)),
    "try_": try_,
    "give_up": give_up,
    "confirm": confirm,
    "roll_back": lambda slots: roll_back(slots, "NaN"),
    "boot": lambda slots: boot(slots, 3),
    "go_back": go_back,
    "fall_back": fall_back,
}
TABLE = {
    (State.EMPTY, "stage"): State.STAGING,
    (State.STAGING, "try_"): State.TRIAL,
    (State.STAGING, "give_up"): State.EMPTY,
    (State.TRIAL, "confirm"): State.EMPTY,
    (State.TRIAL, "roll_back"): State.ROLLED_BACK,
    (State.TRIAL, "boot"): State.TRIAL,
    (State.ROLLED_BACK, "stage"): State.STAGING,
    (State.EMPTY, "go_back"): State.EMPTY,
    (State.ROLLED_BACK, "go_back"): State.EMPTY,
    **{(state, "fall_back"): state for state in State},
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("slots", [EMPTY, STAGING, TRIAL, ROLLED_BACK], ids=lambda slots: slots.state.value)
def test_every_move_that_the_table_does_not_know_raises_and_changes_nothing(slots: ModelSlots, move: str) -> None:
    if (slots.state, move) in TABLE:
        assert MOVES[move](slots).state is TABLE[slots.state, move]
    else:
        before = replace(slots)
        with pytest.raises(IllegalMoveError, match=f"m: {move} while {slots.state.value}; only while "):
            MOVES[move](slots)
        assert slots == before


def test_what_runs_is_the_confirmed_release_but_in_a_trial() -> None:
    assert [each.running.number for each in (EMPTY, STAGING, TRIAL, ROLLED_BACK)] == [4, 4, 5, 4]


def test_a_confirmed_release_keeps_the_one_before_and_raises_the_floor() -> None:
    assert confirm(TRIAL) == ModelSlots("m", confirmed=held(5), previous=held(4), floor=5)


def test_a_release_that_was_rolled_back_raises_no_floor_and_may_be_tried_again() -> None:
    assert (ROLLED_BACK.floor, ROLLED_BACK.candidate, ROLLED_BACK.why) == (4, held(5), "NaN")
    again = stage(ROLLED_BACK, held(5))
    assert (again.state, again.why, again.boots) == (State.STAGING, "", 0)


def test_going_back_takes_the_release_before_and_lowers_no_floor() -> None:
    assert go_back(EMPTY) == ModelSlots("m", confirmed=held(3), floor=4)
    with pytest.raises(IllegalMoveError, match="there is no release before 3 to go back to"):
        go_back(go_back(EMPTY))


def test_a_confirmed_release_whose_bytes_are_lost_falls_back_to_the_one_before_and_at_last_to_the_factorys() -> None:
    once = fall_back(TRIAL)
    assert (once.confirmed, once.candidate, once.state) == (held(3), held(5), State.TRIAL)
    assert fall_back(once).confirmed == FACTORY
    with pytest.raises(IllegalMoveError, match="nothing lies below the factory's"):
        fall_back(fall_back(once))


def test_an_older_release_than_the_floor_is_refused() -> None:
    with pytest.raises(RefusedError, match="release 3 of m: got an older release; allowed: release 4 or later; an older release"):
        stage(EMPTY, held(3))
    with pytest.raises(RefusedError, match="release 3 of m"):
        stage(go_back(EMPTY), held(3))
    assert stage(go_back(EMPTY), held(4)).candidate == held(4)
    with pytest.raises(RefusedError, match="allowed: release 1 or later"):
        stage(ModelSlots("m"), FACTORY)


def test_another_manifest_under_the_number_of_the_confirmed_release_is_refused() -> None:
    with pytest.raises(RefusedError, match="release 4 of m: got manifest 0707.*, confirmed here"):
        stage(EMPTY, Held(4, b"\x07" * 32))
    with pytest.raises(IllegalMoveError, match="is the confirmed one already"):
        stage(EMPTY, held(4))


def test_what_must_stay_here_is_what_may_run_again() -> None:
    numbers = {slots.state: [each.number for each in slots.held] for slots in (EMPTY, STAGING, TRIAL, ROLLED_BACK)}
    assert numbers == {State.EMPTY: [4, 3], State.STAGING: [4, 5, 3], State.TRIAL: [4, 5, 3], State.ROLLED_BACK: [4, 3]}
    assert confirm(try_(stage(ModelSlots("m"), held(1)))).held == (held(1),)


def test_slots_that_contradict_themselves_cannot_be_built() -> None:
    for fields in ({"candidate": held(5)}, {"state": State.TRIAL}, {"candidate": FACTORY, "state": State.STAGING}):
        with pytest.raises(ValueError, match="^m: "):
            ModelSlots("m", **fields)
    assert len(roll_back(TRIAL, "x" * 1000).why) == MAX_WHY_CHARS


@given(st.lists(st.tuples(st.sampled_from(sorted(MOVES)), st.integers(1, 9)), max_size=40))
def test_whatever_happens_something_runs_and_the_floor_never_sinks(moves: list[tuple[str, int]]) -> None:
    slots, ever = ModelSlots("m"), {FACTORY}
    for move, number in moves:
        try:
            new = stage(slots, held(number)) if move == "stage" else MOVES[move](slots)
        except (IllegalMoveError, RefusedError):
            continue
        assert new.floor >= slots.floor
        ever |= {slots.candidate} if move == "confirm" and slots.candidate else set()
        assert new.confirmed in ever, "a release that was never confirmed"
        assert new.running in (new.confirmed, new.candidate)
        assert {new.running, new.confirmed} <= {*new.held, FACTORY}
        slots = new


def kept(ledger: Ledger, *all_slots: ModelSlots) -> Records:
    records = Records(ledger)
    for slots in all_slots:
        with ledger.transaction():
            records.save(slots)
    return records


SLOTS = st.builds(
    lambda base, boots, why: replace(base, boots=boots, why=why),
    st.sampled_from([EMPTY, STAGING, TRIAL, ROLLED_BACK, ModelSlots("m", floor=4), go_back(EMPTY)]),
    st.integers(0, 10_000),
    st.text(st.characters(codec="utf-8"), max_size=MAX_WHY_CHARS),
)


def test_what_was_saved_is_loaded_after_a_restart(tmp_path: Path) -> None:
    random, last = Random(7), {}
    for _ in range(20):
        with Ledger(tmp_path / "ledger.db") as ledger:
            records = Records(ledger)
            assert {model: records.load(model) for model in records.models()} == last
            model, base = random.choice("abc"), random.choice([EMPTY, STAGING, TRIAL, ROLLED_BACK])
            last[model] = replace(base, model=model)
            kept(ledger, last[model])
            assert records.take_notes() == []


def test_a_model_of_which_nothing_was_saved_runs_the_factorys_release(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        records = Records(ledger)
        assert (records.load("m"), records.models(), records.take_notes()) == (ModelSlots("m"), [], [])


@given(SLOTS)
def test_every_state_is_read_as_it_was_written(slots: ModelSlots) -> None:
    books = Pages()
    Records(books).save(slots)  # type: ignore[arg-type]
    assert Records(books).load("m") == slots  # type: ignore[arg-type]


class Pages:
    """Documents and marks without a file, so that they can be torn."""

    def __init__(self) -> None:
        self.documents: dict[str, bytes] = {}
        self.marks: dict[str, int] = {}

    def document(self, name: str) -> bytes | None:
        return self.documents.get(name)

    def put_document(self, name: str, data: bytes) -> None:
        self.documents[name] = data

    def high_water(self, name: str) -> int:
        return self.marks.get(name, 0)

    def raise_high_water(self, name: str, value: int) -> None:
        self.marks[name] = max(value, self.high_water(name))


def torn(data: bytes) -> list[bytes]:
    flips = [data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for at in range(len(data)) for bit in range(8)]
    sectors = [data[: len(data) // 2] + bytes(len(data) - len(data) // 2), bytes(len(data)), b"\xff" * len(data)]
    return flips + [data[:end] for end in range(len(data))] + [data + b"\0"] + sectors


def test_case_20_torn_record_the_other_copy_counts() -> None:
    books = Pages()
    records = Records(books)  # type: ignore[arg-type]
    for slots in (EMPTY, STAGING, TRIAL):
        records.save(slots)
    whole = dict(books.documents)
    assert {records.load("m")} == {TRIAL}
    newest, older = "ota/slots/m/0", "ota/slots/m/1"
    for name, expected in ((newest, STAGING), (older, TRIAL)):
        for data in torn(whole[name]):
            books.documents = {**whole, name: data}
            assert records.load("m") == expected
            assert len(records.take_notes()) == 1
            records.save(ROLLED_BACK)
            assert records.load("m") == ROLLED_BACK, "the good copy was replaced, not the torn one"
            records.take_notes()


def test_case_20_both_slots_records_invalid_the_factorys_release_runs_under_the_old_floor_and_a_line_says_so() -> None:
    books = Pages()
    records = Records(books)  # type: ignore[arg-type]
    for slots in (EMPTY, STAGING):
        records.save(slots)
    random = Random(1)
    for _ in range(200):
        whole = dict(books.documents)
        for which in (0, 1):
            books.documents[f"ota/slots/m/{which}"] = random.choice(torn(whole[f"ota/slots/m/{which}"]))
        found = records.load("m")
        assert found == ModelSlots("m", floor=4)
        assert "record ota/slots/m: no valid copy is left" in records.take_notes()[-1]
        with pytest.raises(RefusedError, match="older release"):
            stage(found, held(3))
        books.documents = whole


def test_a_record_under_another_models_name_is_not_taken() -> None:
    books = Pages()
    records = Records(books)  # type: ignore[arg-type]
    records.save(TRIAL)
    books.documents["ota/slots/other/0"] = books.documents["ota/slots/m/0"]
    assert records.load("other") == ModelSlots("other")
    assert "one of 'ota/slots/m'; allowed: ota/slots/other" in records.take_notes()[0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({0: [0, b""], 1: "trial", 2: 0, 3: 0, 4: ""}, "trial with candidate None"),
        ({0: [0, b""], 1: "?", 2: 0, 3: 0, 4: ""}, "state: got '\\?'"),
        ({0: [0, b"x"], 1: "empty", 2: 0, 3: 0, 4: ""}, "digest of a held manifest"),
        ({0: [0], 1: "empty", 2: 0, 3: 0, 4: ""}, "a number and a digest"),
        ({0: [0, b""], 1: "empty", 2: 0, 3: 0, 4: "", 9: 1}, "unknown key"),
        ({0: [0, b""], 1: "empty", 2: -1, 3: 0, 4: ""}, "boots within a trial"),
    ],
)
def test_a_record_with_a_right_check_sum_and_wrong_values_is_refused_too(body: dict[int, object], said: str) -> None:
    books = Pages()
    record = encode({0: 1, 1: "ota/slots/m", 2: 1, 3: body})
    books.documents["ota/slots/m/0"] = record + sha256(record).digest()
    records = Records(books)  # type: ignore[arg-type]
    assert records.load("m") == ModelSlots("m")
    assert re.search(said, records.take_notes()[0])


def test_an_old_state_cannot_be_saved_over_a_higher_floor(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        records = kept(ledger, confirm(TRIAL))
        with pytest.raises(RefusedError, match="high-water mark ota/m: got 4; allowed: 5 or more"), ledger.transaction():
            records.save(EMPTY)
        assert records.load("m") == confirm(TRIAL)


def test_the_floor_outlives_the_record_of_its_model(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        records = kept(ledger, EMPTY, confirm(TRIAL))
        for which in (0, 1):
            ledger.put_document(f"ota/slots/m/{which}", b"")
        assert records.load("m").floor == 5


def test_what_failed_within_a_transaction_is_not_kept(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        records = kept(ledger, STAGING)
        with pytest.raises(ZeroDivisionError), ledger.transaction():
            records.save(confirm(TRIAL))
            raise ZeroDivisionError
        assert records.load("m") == STAGING


def test_the_models_of_a_board_are_bounded(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger, ledger.transaction():
        records = Records(ledger)
        for number in range(MAX_MODELS):
            records.save(ModelSlots(f"m{number}"))
        with pytest.raises(RefusedError, match="models with slots, count: got 65"):
            records.save(ModelSlots("one-more"))
        assert len(records.models()) == MAX_MODELS


def test_case_23_boot_loop_is_bounded_for_starts_are_counted_durably_before_anything_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        kept(ledger, TRIAL, replace(EMPTY, model="other"))
    ran = []
    for _ in range(6):
        with Ledger(path) as ledger:
            started = Records(ledger).count_start(3)["m"]
        # What is loaded here may take the board down: nothing after this line is certain to run.
        ran.append(started.running.number)
    assert ran == [5, 5, 4, 4, 4, 4]
    assert started.why == "start 3 of 3 allowed without being confirmed"


def test_case_23_boot_loop_is_bounded_also_for_a_model_that_the_list_of_models_lost(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        records = kept(ledger, TRIAL)
        for which in (0, 1):
            ledger.put_document(f"ota/models/{which}", b"torn")
        assert records.count_start(1, hosted=["m"])["m"].state is State.ROLLED_BACK
        assert any("record ota/models: no valid copy" in note for note in records.take_notes())


@pytest.mark.parametrize("max_boots", [1, 2, 5])
def test_as_many_starts_as_are_allowed_find_the_candidate_rolled_back(max_boots: int) -> None:
    slots, starts = TRIAL, 0
    while slots.state is State.TRIAL:
        slots, starts = boot(slots, max_boots), starts + 1
    assert starts == max_boots
