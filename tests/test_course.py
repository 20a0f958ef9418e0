"""The updates of one board as a whole: charters, what the ledger holds and has damaged, words that the broker keeps, islands."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_agent.core.cbor import encode
from edge_agent.core.cose import Signer
from edge_agent.core.errors import UnavailableError
from edge_agent.transport.loopback import Partition, Way
from ota import events
from ota.charter import CHARTER_PATH, Charter, Enrolled, encode_charter
from ota.chunks import sign_wants, want_of
from ota.course import MAX_ASIDE, MAX_ASIDE_BYTES
from ota.events import Adopt, Keep, Listen, Open
from ota.kept import CHARTER, MARKS, PROGRESS, ROLLOUT, Kept, KeptCharter, kept_charter
from ota.manifest import encode_release
from ota.orders import sign_report
from ota.records import Records
from ota.rollout import Progress, Report, Standing, Step
from ota.slots import State
from tests.one_board import KEYS, MODEL, OTHER, SECOND_US, OneBoard, a_charter, a_plan, a_release, bytes_of, digest, signer
from tests.ota_board import Books
from tests.ota_fleet import NUMBER, OtaFleet

BOB = signer("bob")


@pytest.fixture
def board() -> OneBoard:
    board = OneBoard()
    board.link()
    return board


def adopted(board: OneBoard, charter: Charter) -> None:
    board.list_targets(charter=charter)
    board.fetch(encode_charter(charter))


# charters


def test_a_charter_is_adopted_kept_and_what_the_broker_holds_is_asked_for_again(board: OneBoard) -> None:
    charter = a_charter(4)
    adopted(board, charter)
    assert board.last(Adopt) == Adopt(charter) and board.books.document("ota/charter") == digest(encode_charter(charter))
    last = board.effects[board.effects.index(Adopt(charter)) :]
    topics = {
        board.topics.every(board.topics.parse(topic).kind) for topic in (board.topics.rollout("m"), board.topics.report("b"))
    }
    assert {each.topic_filter for each in last if isinstance(each, Listen)} >= topics
    keep = board.last(Keep)
    assert keep is not None and digest(encode_charter(charter)) in keep.digests


def refusal(board: OneBoard, charter: Charter, kept: Charter | None) -> str:
    """Why a charter is not adopted; it is in the report, and the one before stays."""
    board.effects.clear()
    adopted(board, charter)
    assert not board.all(Adopt) and board.course.charter == kept
    board.tick()
    assert board.told.note, "it is in the report"
    board.tick(3_600 * SECOND_US)
    assert len(board.all(Open)) == 1, "and is not fetched again"
    return board.told.note


def test_a_charter_that_was_rolled_back_is_refused(board: OneBoard) -> None:
    kept = a_charter(4)
    adopted(board, kept)
    assert "charter serial: got 3; allowed: 4 or more" in refusal(board, a_charter(3), kept)


def test_another_charter_of_the_same_serial_is_refused(board: OneBoard) -> None:
    kept = a_charter(4)
    adopted(board, kept)
    assert "charter serial: got 4, another one; allowed: 5 or more" in refusal(board, a_charter(4, b3=b""), kept)


def test_the_charter_of_another_fleet_is_refused(board: OneBoard) -> None:
    assert "got 'theirs' inside, 'home' outside" in refusal(board, a_charter(fleet="theirs"), None)


def test_a_board_enrolled_elsewhere_refuses_the_charter_that_gives_its_name_to_another_key(board: OneBoard) -> None:
    why = refusal(board, a_charter(b1=signer("twin").public_key), None)
    assert "another public key than this board's" in why and "enroll it anew" in why


@pytest.mark.parametrize(
    ("change", "text"), [("removed", "is not in charter 2"), ("revoked", "is revoked by charter 2 of home: lost")]
)
def test_a_board_that_the_charter_leaves_out_goes_by_it_and_says_so(board: OneBoard, change: str, text: str) -> None:
    charter = a_charter(2)
    boards = {**charter.boards, "b1": Enrolled(KEYS["b1"], revoked="lost")}
    charter = replace(charter, boards=boards if change == "revoked" else {n: e for n, e in boards.items() if n != "b1"})
    adopted(board, charter)
    assert board.last(Adopt) == Adopt(charter) and board.noted(text) and text in board.course.note


def test_a_charter_that_cannot_be_read_is_refused_and_the_same_bytes_are_not_read_again(board: OneBoard) -> None:
    data = encode([1, 2, 3])
    board.verified({CHARTER_PATH: (len(data), digest(data))})
    board.fetch(data)
    assert board.noted("signed, and of no use here: charter") and board.course.charter is None
    assert "charter" in board.course.note


def test_19_a_charter_that_was_cached_when_the_power_failed_is_read_from_there() -> None:
    board = OneBoard()
    board.link()
    data = encode_charter(a_charter(4))
    board.cache[digest(data)] = data
    board.boot()
    board.link()
    board.list_targets(charter=a_charter(4))
    opened = board.last(Open)
    assert opened is not None and opened.artefact.digest == digest(data) and digest(data) in opened.seeds
    board.feed(events.Opened(digest(data), held=1))
    board.tick()
    board.feed(events.Finished(digest(data), data))
    assert board.last(Adopt) == Adopt(a_charter(4))


def test_19_a_manifest_that_was_cached_when_the_power_failed_is_read_from_there() -> None:
    board, manifest = OneBoard(), encode_release(a_release())
    board.cache[digest(manifest)] = manifest
    board.boot()
    board.link()
    board.order(a_plan(a_release()))
    board.list_targets(a_release())
    board.feed(events.Opened(digest(manifest), held=1))
    board.tick()
    board.feed(events.Finished(digest(manifest), manifest))
    assert board.state() is State.STAGING


# who may order


def test_a_rollout_by_a_stranger_or_by_a_board_changes_nothing_and_is_said(board: OneBoard) -> None:
    for by in (BOB, signer("b2")):
        board.order(a_plan(a_release()), by=by)
        assert not board.course.words.rollouts and board.noted(f"not believed: signed message: kid: got b'{by.kid.decode()}'")
    board.order(a_plan(a_release()), by=signer("ann"))
    assert board.course.words.rollouts


def test_a_rollout_by_an_operator_who_was_removed_counts_no_more_from_then_on(board: OneBoard) -> None:
    """Nor after a start; what was fetched for it is let go, and another's plan is heeded."""
    release = a_release()
    board.order(a_plan(release))
    board.list_targets(release)
    board.fetch(encode_release(release))
    assert board.state() is State.STAGING
    charter = a_charter(2, operators={"bob": BOB.public_key})
    adopted(board, charter)
    assert not board.course.words.rollouts and board.noted("the rollout of 7 to blazeface-short counts no more")
    assert board.state() is State.EMPTY and not board.course.transfers.pending
    board.boot(charter)
    assert not board.course.words.rollouts
    board.link()
    assert board.noted("that was kept is left out")
    board.order(a_plan(release))
    assert not board.course.words.rollouts
    board.order(a_plan(release, serial=2), by=BOB)
    assert board.course.words.rollouts


def test_a_trial_under_way_ends_though_its_operator_was_removed(board: OneBoard) -> None:
    board.take(a_release())
    board.try_(a_release())
    adopted(board, a_charter(2, operators={"bob": BOB.public_key}))
    assert board.state() is State.TRIAL
    for _ in range(3):
        board.feed(events.Ran(MODEL, 7))
    assert board.slots().confirmed.number == 7


def test_what_only_a_later_charter_lets_be_believed_counts_when_it_comes(board: OneBoard) -> None:
    plan = a_plan(a_release())
    board.order(plan, by=BOB)
    adopted(board, a_charter(2, operators={"bob": BOB.public_key}))
    assert board.course.words.rollout(MODEL) is not None


def test_35_what_is_put_aside_for_a_later_charter_is_bounded_in_number_and_in_bytes(board: OneBoard) -> None:
    for number in range(2 * MAX_ASIDE):
        board.hear(board.topics.report(f"s{number}"), b"not a report")
    assert len(board.course._aside) == MAX_ASIDE
    for number in range(40):
        board.hear(board.topics.report(f"s{number}"), bytes(100_000))
    assert sum(map(len, board.course._aside.values())) <= MAX_ASIDE_BYTES


def test_a_board_whose_key_is_another_one_now_was_not_heard_and_is_heard_by_its_new_one(board: OneBoard) -> None:
    plan = a_plan(a_release())
    board.order(plan)
    board.report_of("b2", Step.FAILED, plan, number=50)
    board.report_of("b3", Step.FAILED, plan)
    twin = Signer(b"b2", digest(b"a key of its own"))
    adopted(board, a_charter(2, b2=twin.public_key, b3=b""))
    assert "b2" not in board.course.words.reports
    assert board.course.words.reports["b3"].progress[0].failed, "what a board that left has lost in this plan stays lost"
    report = Report("b2", 1, 1, progress=(Progress(MODEL, 1, Step.CONFIRMED),))
    board.hear(board.topics.report("b2"), sign_report(report, signer("b2")))
    assert "b2" not in board.course.words.reports, "by the old key"
    board.hear(board.topics.report("b2"), sign_report(report, twin))
    assert board.course.words.reports["b2"] == report


# what the ledger holds


@pytest.mark.parametrize("damage", [b"", b"\xff", b"\x00" * 50, encode([["m", 1, "waiting", "", False]]), encode({1: 2})])
@pytest.mark.parametrize("document", [PROGRESS, *MARKS, ROLLOUT + MODEL])
def test_20_a_damaged_document_costs_one_line_and_never_the_start(document: str, damage: bytes) -> None:
    board = OneBoard()
    board.take(a_release())
    board.books.put_document(document, damage)
    board.boot()
    board.link()
    board.tick()
    assert len(board.notes) >= 1 and isinstance(board.last(events.Bring), events.Bring), "the trial goes on"
    board.confirm(a_release())
    assert board.slots().confirmed.number == 7


def test_20_damaged_progress_is_told_once_and_the_board_takes_part_again() -> None:
    board = OneBoard()
    plan = board.take(a_release())
    board.confirm(a_release())
    board.books.put_document(PROGRESS, b"damaged")
    board.boot()
    board.link()
    assert [note for note in board.notes if "how far this board was" in note]
    board.order(plan)
    board.tick()
    assert board.progress() == (Step.CONFIRMED, "")
    board.boot()
    board.tick()
    assert not board.notes, "it was written anew"


@pytest.mark.parametrize(
    ("document", "text"), [(b"short", "5 bytes is no digest"), (bytes(32), "is not in the cache"), (None, "charter")]
)
def test_20_a_damaged_charter_costs_one_line_and_never_the_start(board: OneBoard, document: bytes | None, text: str) -> None:
    data = encode_charter(a_charter(4))
    adopted(board, a_charter(4))
    assert kept_charter(board.books, board.cache.__getitem__) == KeptCharter(a_charter(4), digest(data))
    if document is None:
        board.cache[digest(data)] = data[:-1]
    else:
        board.books.put_document(CHARTER, document)
    found = kept_charter(board.books, lambda name: board.cache.get(name, b""))
    assert found.charter is None and text in found.why and kept_charter(Books(), lambda name: b"") == KeptCharter()


def test_25_without_the_charter_that_was_in_force_no_configured_operator_is_believed_until_it_is_here_again(
    board: OneBoard,
) -> None:
    """One whom it does not name any more might order."""
    charter = a_charter(4, operators={"bob": BOB.public_key})
    adopted(board, charter)
    board.books.put_document(CHARTER, bytes(32))
    board.cache.clear()
    board.boot()
    board.link()
    board.order(a_plan(a_release()))
    board.order(a_plan(a_release(), serial=2), by=BOB)
    assert not board.course.words.rollouts
    adopted(board, charter)
    rollout = board.course.words.rollout(MODEL)
    assert rollout is not None and rollout.operator == "bob"


@pytest.mark.parametrize("lost", [MARKS[:1], MARKS[1:], MARKS])
def test_25_floors_hold_though_their_list_was_deleted_or_damaged(lost: tuple[str, ...]) -> None:
    """With one of its two copies they are asked for; with none, what is below them is refused when it comes."""
    board = OneBoard()
    board.link()
    board.hear(board.topics.ota_meta("timestamp"), b"1")
    board.tick()
    board.feed(events.Listed({}, {"tuf/timestamp/x": 9, "tuf/root": 2}))
    for document in lost:
        board.books.put_document(document, b"damaged")
    board.boot()
    board.link()
    board.hear(board.topics.ota_meta("timestamp"), b"2")
    board.tick()
    look = board.last(events.List)
    assert look is not None and look.floors == ({"tuf/root": 2} if lost == MARKS else {"tuf/root": 2, "tuf/timestamp/x": 9})
    board.feed(events.Listed({CHARTER_PATH: (10, bytes(32))}, {"tuf/timestamp/x": 8}))
    assert "this is a rollback" in board.course.note and not board.course.offered.targets
    board.hear(board.topics.ota_meta("timestamp"), b"3")
    board.tick()
    assert board.all(events.List)[-1].floors["tuf/timestamp/x"] == 9, "and is asked for from now on"
    board.feed(events.Listed({}, {"tuf/timestamp/x": 10}))
    assert not board.course.note and Kept(board.books).notes == []
    assert Kept(board.books).floors["tuf/timestamp/x"] == 10


def test_a_ledger_that_fails_under_a_charter_fails_the_event_and_not_the_charter(
    board: OneBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    charter = a_charter(2)
    board.list_targets(charter=charter)
    data = encode_charter(charter)
    board.feed(events.Opened(digest(data), held=1))

    def full(self: Books, name: str, data: bytes) -> None:
        raise UnavailableError("ledger", "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Books, "put_document", full)
        with pytest.raises(UnavailableError):
            board.feed(events.Finished(digest(data), data))
    assert not board.course.transfers.why_never(digest(data)), "nothing is wrong with it"


def test_what_only_an_evicted_release_had_counts_as_held_no_more() -> None:
    board = OneBoard()
    for number in (7, 8, 9):
        board.take(a_release(number), a_plan(a_release(number), serial=number))
        board.confirm(a_release(number))
    keep = board.last(Keep)
    assert keep is not None and digest(bytes_of(7)) not in keep.digests and digest(bytes_of(8)) in keep.digests
    assert board.course.transfers.held == keep.digests
    assert len(board.course._manifests) == 2, "manifests that nobody names are forgotten"


# what the broker keeps


def test_36_an_emptied_report_of_this_board_is_said_again_with_the_same_bytes(board: OneBoard) -> None:
    board.tick()
    topic = board.topics.report("b1")
    said = board.published(topic)
    for emptied in (b"", b"not a report"):
        board.hear(topic, emptied)
        board.tick()
        assert board.published(topic)[-1] == said[-1]
    assert len(board.published(topic)) == len(said) + 2
    board.hear(topic, said[-1])
    board.tick()
    assert len(board.published(topic)) == len(said) + 2, "its own word comes back, and that is all"


def test_36_emptied_and_stale_wants_of_this_board_are_put_right(board: OneBoard) -> None:
    board.order(a_plan(a_release()))
    board.list_targets(a_release())
    board.feed(events.Opened(digest(encode_release(a_release()))))
    board.tick()
    topic = board.topics.ota_want("b1")
    said = board.published(topic)[-1]
    stale = sign_wants("b1", 0, 99, [want_of(board.artefact(digest(encode_release(a_release()))), 1)], signer("b1"))
    for wrong in (b"", stale, b"x"):
        board.hear(topic, wrong)
        board.tick(SECOND_US // 3)
        assert board.published(topic)[-1] == said
    count = len(board.published(topic))
    board.hear(topic, said)
    board.tick(SECOND_US // 3)
    assert len(board.published(topic)) == count


def test_36_an_emptied_rollout_takes_nothing_back_also_after_a_start(board: OneBoard) -> None:
    board.take(a_release())
    board.hear(board.topics.rollout(MODEL), b"")
    board.boot()
    board.link()
    board.hear(board.topics.rollout(MODEL), b"")
    assert board.course.words.rollout(MODEL) is not None and board.state() is State.TRIAL


def test_36_a_stale_charter_offered_again_changes_nothing(board: OneBoard) -> None:
    old, new = a_charter(4), a_charter(5)
    adopted(board, old)
    adopted(board, new)
    board.effects.clear()
    adopted(board, old)
    assert not board.all(Adopt) and board.course.charter == new
    board.list_targets(charter=new)
    board.tick()
    assert not board.course.note, "when the newer one is offered again all is well"


def test_34_a_word_that_is_cut_short_is_dropped_and_acknowledged(board: OneBoard) -> None:
    topic = board.topics.rollout(MODEL)
    for payload in (b"\xd2", b"\x84" * 100, b"x" * 70_000):
        effects = board.hear(topic, payload, token=5)
        assert events.Done(5) in effects and not board.course.words.rollouts


def test_events_of_models_that_nobody_knows_change_nothing(board: OneBoard) -> None:
    for event in (events.Brought(OTHER, 1), events.Probed(OTHER, 1), events.Turned(OTHER, 1), events.Ran(OTHER, 1)):
        assert not [each for each in board.feed(event) if not isinstance(each, events.Say | Keep)]
    assert OTHER not in board.course.lives and not Records(board.books).models()


# islands


@pytest.mark.parametrize("ways", [frozenset(Way), frozenset({Way.TO_BROKER}), frozenset({Way.FROM_BROKER})])
def test_43_a_rollout_over_islands_waits_for_who_is_cut_off_and_all_agree_when_they_heal(ways: frozenset[Way]) -> None:
    """A canary and a board of the next wave are cut off, also one way only: no later wave begins, and nobody fails for it."""
    fleet = OtaFleet(f"islands {len(ways)}", 6, lambda board, when: "")
    fleet.boot()
    fleet.push(canary=2, wave=2)
    assert fleet.plan is not None
    boards = fleet.plan.boards
    fleet.run_for(2 * SECOND_US)
    fleet.broker.partition(Partition(frozenset({boards[1], boards[2]}), ways))
    fleet.run_for(60 * SECOND_US)
    assert fleet.boards[boards[0]].serving == NUMBER, "who is not cut off goes on"
    assert not fleet.begun & {*boards[2:]}, "the canaries have not settled"
    fleet.broker.heal()
    fleet.run_until(fleet.has_arrived, "everybody has it and judges alike")
    assert [board.trials for board in fleet.boards.values()] == [1] * 6, "each tried it once"


def test_43_a_canary_that_is_cut_off_in_its_trial_ends_it_alone_and_is_heard_when_the_islands_heal() -> None:
    fleet = OtaFleet("island of one", 4, lambda board, when: "")
    fleet.boot()
    fleet.push(canary=1, wave=3)
    assert fleet.plan is not None
    canary = fleet.boards[fleet.plan.boards[0]]
    fleet.run_until(lambda: canary.slots.state is State.TRIAL, "the canary tries it")
    fleet.broker.partition(Partition(frozenset({canary.name})))
    fleet.run_until(lambda: canary.slots.confirmed.number == NUMBER, "without a link")
    fleet.run_for(10 * SECOND_US)
    assert fleet.begun == {canary.name}
    fleet.broker.heal()
    fleet.run_until(fleet.has_arrived, "everybody has it")


def test_a_stopped_rollout_is_stopped_on_a_board_that_was_away(board: OneBoard) -> None:
    plan = a_plan(a_release(), canary=1, wave=2, max_error_permille=0, boards=("b2", "b3", "b1"))
    board.order(plan)
    board.report_of("b2", Step.FAILED, plan)
    verdict = board.course.words.verdict(MODEL)
    assert verdict is not None and verdict.state is Standing.STOPPED
    board.list_targets(a_release())
    assert not board.all(Open), "nothing is fetched of it"
