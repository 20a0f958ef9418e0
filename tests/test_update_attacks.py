"""What a publisher that errs, a broker that lies and a member of the fleet that means harm can do to the updates of one board.

SECURITY.md cases 9, 10, 17 and 34-37 as far as updates go, on the sans-I/O heart and a real ledger.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest

from edge_agent.core.cose import Signer
from edge_agent.core.values import MAX_BOARDS
from edge_agent.store.ledger import Ledger
from edge_agent.transport.topics import Kind as TopicKind
from edge_agent.transport.topics import Topics
from ota import chunks, course, events, orders
from ota.charter import CHARTER_PATH, Charter, Enrolled, encode_charter
from ota.checked import MAX_DOCUMENTS
from ota.chunks import Artefact, encode_chunk, sign_wants, want_of
from ota.lifecycle import Here
from ota.manifest import CHUNK_BYTES, Kind, Release, ReleasedFile, encode_release, manifest_path
from ota.orders import sign_report, sign_rollout
from ota.records import Records
from ota.rollout import MAX_ROLLOUTS, Action, Plan, Progress, Report, Rollout, Step
from ota.slots import Held, ModelSlots, State, confirm, stage, try_

FLEET, MODEL, OTHER = "home", "blazeface-short", "mobilenet-v1"
TOPICS = Topics(FLEET)
SETTLED_US = 1_000_000


def signer(name: str) -> Signer:
    return Signer(name.encode(), sha256(name.encode()).digest())


ATTIC, CELLAR, ANN = signer("attic"), signer("cellar"), signer("ann")
MEMBERS = {"attic": ATTIC.public_key, "cellar": CELLAR.public_key}


def released(model: str = MODEL, number: int = 7, classes: tuple[str, ...] = (), min_agent: str = "0.0.0") -> Release:
    data = Random(f"{model} {number}").randbytes(CHUNK_BYTES + 10)
    chunks = sha256(data[:CHUNK_BYTES]).digest() + sha256(data[CHUNK_BYTES:]).digest()
    file = ReleasedFile("model.tflite", len(data), sha256(data).digest(), chunks)
    card = (Path(__file__).parents[1] / "models" / "catalog" / f"{MODEL}.toml").read_text()
    return Release(model, number, Kind.PERCEPTION, (file,), card, classes, min_agent)


def plan_of(release: Release, serial: int = 1, model: str = MODEL) -> Plan:
    manifest = sha256(encode_release(release)).digest()
    return Plan(serial, model, release.number, manifest, ("attic", "cellar"), 2, 2)


class Attic:
    """A board whose clock moves a second with every event; ``notes`` and ``done`` are all that it ever said and acknowledged."""

    def __init__(
        self, ledger: Ledger, slots: Mapping[str, ModelSlots] | None = None, boot: int = 1, here: Iterable[Release] = ()
    ) -> None:
        self.ledger, self.now_us = ledger, boot * 10**9
        self.course = course.Course(
            Here("attic", "raspberry_pi", "1.2.0"), FLEET, boot, ATTIC, ledger, slots or {},
            manifests={sha256(encode_release(each)).digest(): each for each in here},
            held=[file.digest for each in here for file in each.files],
            gives_bytes_per_s=2**20, members=MEMBERS, operators={"ann": ANN.public_key},
        )  # fmt: skip
        self.notes: list[str] = []
        self.done: list[int] = []
        self.effects: list[events.Effect] = []
        self.feed(events.LinkTurned(True))

    def feed(self, event: events.Event) -> list[events.Effect]:
        """What followed."""
        self.now_us += SETTLED_US
        with self.ledger.transaction():
            effects = self.course.handle(event, self.now_us)
        self.notes += [each.text for each in effects if isinstance(each, events.Note)]
        self.done += [each.token for each in effects if isinstance(each, events.Done)]
        self.effects += effects
        return effects

    def hears(self, topic: str, payload: bytes, token: int = 1) -> list[events.Effect]:
        return self.feed(events.Heard(TOPICS.parse(topic), payload, token))

    def hears_rollout(self, plan: Plan, action: Action = Action.RUN, revision: int = 1, by: Signer = ANN, token: int = 1) -> None:
        rollout = Rollout(plan, by.kid.decode(), revision, action)
        self.hears(TOPICS.rollout(plan.model), sign_rollout(rollout, by), token)

    def finds(self, targets: Mapping[str, bytes]) -> None:
        """The metadata was verified, and lists these."""
        self.hears(TOPICS.ota_meta("timestamp"), f"at {self.now_us}".encode())
        assert [each for each in self.feed(events.Tick()) if isinstance(each, events.List)]
        listed = {path: (len(data), sha256(data).digest()) for path, data in targets.items()}
        self.feed(events.Listed(listed, {}))
        for data in targets.values():
            self.fetches(data)

    def fetches(self, data: bytes) -> None:
        """A small artefact that it asks for, if it does."""
        digest = sha256(data).digest()
        if any(isinstance(each, events.Open) and each.artefact.digest == digest for each in self.effects):
            self.feed(events.Opened(digest))
            self.hears(TOPICS.ota_chunk(digest.hex()), encode_chunk(0, data))
            self.feed(events.Stored(digest, 0))
            self.feed(events.Finished(digest, data))

    @property
    def step(self) -> tuple[Step, str]:
        progress = self.course.lives[MODEL].progress
        assert progress is not None
        return progress.step, progress.why

    @property
    def opened(self) -> list[Artefact]:
        return [each.artefact for each in self.effects if isinstance(each, events.Open)]


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The virtual fleet, in the same process, remembers every message that it opened."""
    for opened in (orders.open_report, orders.open_rollout, chunks.open_wants):
        monkeypatch.setattr(course, opened.__name__, opened)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.db") as opened:
        yield opened


@pytest.fixture
def attic(ledger: Ledger) -> Attic:
    return Attic(ledger)


# what is signed, and not for this board


def test_a_release_that_is_for_it_is_fetched(attic: Attic) -> None:
    release = released(classes=("jetson", "raspberry_pi"), min_agent="1.2.0")
    attic.hears_rollout(plan_of(release))
    attic.finds({manifest_path(MODEL, 7): encode_release(release)})
    assert attic.step == (Step.FETCHING, "")
    assert attic.opened[-1].digest == release.files[0].digest


@pytest.mark.parametrize(
    ("release", "words"),
    [
        (released(classes=("jetson", "coral")), "it is for jetson, coral; this board is raspberry_pi"),
        (released(min_agent="1.2.1"), "it needs agent 1.2.1 or later; this is 1.2.0"),
    ],
)
def test_9_a_release_for_the_wrong_board_class_or_a_newer_agent_is_refused(attic: Attic, release: Release, words: str) -> None:
    attic.hears_rollout(plan_of(release))
    attic.finds({manifest_path(MODEL, 7): encode_release(release)})
    step, why = attic.step
    assert step is Step.REFUSED and words in why
    assert release.files[0].digest not in [each.digest for each in attic.opened]
    assert attic.course.lives[MODEL].slots == ModelSlots(MODEL)


def test_10_a_valid_release_for_another_model_is_refused_under_this_ones_name(attic: Attic) -> None:
    other = released(OTHER)
    attic.hears_rollout(plan_of(other))
    attic.finds({manifest_path(MODEL, 7): encode_release(other)})
    step, why = attic.step
    assert step is Step.REFUSED and f"release 7 of {OTHER}" in why
    assert other.files[0].digest not in [each.digest for each in attic.opened]


def test_10_a_valid_release_whose_card_is_another_models_is_never_loaded(ledger: Ledger) -> None:
    other = released(OTHER)
    slots = try_(stage(ModelSlots(OTHER), Held(7, plan_of(other).manifest)))
    attic = Attic(ledger, {OTHER: slots}, here=[other])
    assert not [each for each in attic.effects if isinstance(each, events.Bring)]
    assert any(f"got {MODEL}; allowed: {OTHER}" in note for note in attic.notes)
    assert Records(ledger).load(OTHER).state is State.ROLLED_BACK


def test_10_a_plan_for_another_manifest_than_the_signed_one_is_refused(attic: Attic) -> None:
    attic.hears_rollout(replace(plan_of(released()), manifest=bytes(32)))
    attic.finds({manifest_path(MODEL, 7): encode_release(released())})
    step, why = attic.step
    assert step is Step.REFUSED and "the plan names manifest" in why


def charter_with(key: bytes, fleet: str = FLEET, serial: int = 3) -> bytes:
    boards = {"attic": Enrolled(key), "cellar": Enrolled(CELLAR.public_key)}
    return encode_charter(Charter(fleet, serial, boards, {"ann": ANN.public_key}))


def test_a_charter_of_this_fleet_with_this_boards_key_is_adopted(attic: Attic) -> None:
    attic.finds({CHARTER_PATH: charter_with(ATTIC.public_key)})
    assert [each.charter.serial for each in attic.effects if isinstance(each, events.Adopt)] == [3]


@pytest.mark.parametrize("data", [charter_with(ATTIC.public_key, "neighbours"), charter_with(ATTIC.public_key, serial=2)])
def test_a_charter_that_is_older_or_of_another_fleet_changes_nothing(attic: Attic, data: bytes) -> None:
    attic.finds({CHARTER_PATH: charter_with(ATTIC.public_key)})
    before = attic.course.charter
    attic.finds({CHARTER_PATH: data})
    assert attic.course.charter is before is not None
    assert attic.notes[-1].startswith("signed, and of no use here")


def test_a_charter_of_another_fleet_is_refused(attic: Attic) -> None:
    attic.finds({CHARTER_PATH: charter_with(ATTIC.public_key, "neighbours")})
    assert attic.course.charter is None
    assert "charter of fleet: got 'neighbours' inside, 'home' outside" in attic.notes[-1]


def test_a_charter_with_another_key_for_this_board_is_refused(attic: Attic) -> None:
    """Enrolled elsewhere under the same name: whoever has that key would be this board from now on."""
    attic.finds({CHARTER_PATH: charter_with(signer("a twin").public_key)})
    assert attic.course.charter is None
    assert "another public key than this board's" in attic.notes[-1] and "enroll it anew" in attic.notes[-1]


# a reboot


def test_17_a_reboot_with_a_newer_release_arrived_takes_the_newer_one(ledger: Ledger) -> None:
    first, second = released(), released(number=8)
    attic = Attic(ledger)
    attic.hears_rollout(plan_of(first))
    attic.finds({manifest_path(MODEL, 7): encode_release(first)})
    assert Records(ledger).load(MODEL).candidate == Held(7, plan_of(first).manifest)
    rebooted = Attic(ledger, Records(ledger).count_start(3, [MODEL]), boot=2)
    rebooted.hears_rollout(plan_of(second, serial=2))
    targets = {manifest_path(MODEL, each.number): encode_release(each) for each in (first, second)}
    rebooted.finds(targets)
    assert Records(ledger).load(MODEL).candidate == Held(8, plan_of(second, 2).manifest)
    assert rebooted.opened[-1].digest == second.files[0].digest
    assert rebooted.step == (Step.FETCHING, "")


def test_17_a_reboot_before_the_metadata_is_here_goes_on_with_the_rollout_that_was_kept(ledger: Ledger) -> None:
    release = released()
    attic = Attic(ledger)
    attic.hears_rollout(plan_of(release))
    attic.finds({manifest_path(MODEL, 7): encode_release(release)})
    rebooted = Attic(ledger, Records(ledger).count_start(3, [MODEL]), boot=2)
    rebooted.finds({manifest_path(MODEL, 7): encode_release(release)})
    assert rebooted.opened[-1].digest == release.files[0].digest


# what the broker says


def words_of_everybody(number: int = 5) -> dict[str, bytes]:
    """A good message of each kind that is believed by its signature, by topic."""
    release, manifest = released(), encode_release(released())
    report = Report("cellar", 1, number, progress=(Progress(MODEL, 1, Step.CONFIRMED),))
    wants = [want_of(Artefact(sha256(manifest).digest(), len(manifest)), 1)]
    return {
        TOPICS.rollout(MODEL): sign_rollout(Rollout(plan_of(release), "ann", number, Action.PAUSE), ANN),
        TOPICS.report("cellar"): sign_report(report, CELLAR),
        TOPICS.ota_want("cellar"): sign_wants("cellar", 1, number, wants, CELLAR),
    }


def state_of(attic: Attic) -> tuple[object, ...]:
    words = attic.course.words
    return words.rollouts, dict(words.reports), attic.course.lives.keys(), attic.course.offered.targets


@pytest.mark.parametrize("topic", words_of_everybody())
def test_34_every_bit_flip_truncation_and_extension_of_a_word_on_updates_is_dropped_told_and_acknowledged(
    attic: Attic, topic: str
) -> None:
    message = words_of_everybody()[topic]
    before = state_of(attic)
    broken = [*(message[:length] for length in range(1, len(message), 7)), message + b"\0"]
    for bit in range(0, 8 * len(message), 5):
        flipped = bytearray(message)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.append(bytes(flipped))
    for token, each in enumerate(broken, 1):
        attic.hears(topic, each, token)
    assert state_of(attic) == before
    assert attic.done == list(range(1, len(broken) + 1))
    assert len([note for note in attic.notes if note.startswith("not believed")]) == len(broken)


def test_35_forged_identities_are_not_believed_and_take_no_room(attic: Attic) -> None:
    before = state_of(attic)
    for number in range(500):
        stranger = signer(f"stranger-{number}")
        name = f"stranger-{number}"
        attic.hears(TOPICS.report(name), sign_report(Report(name, 1, 1), stranger), number)
        attic.hears(TOPICS.ota_want(name), sign_wants(name, 1, 1, (), stranger), number)
        attic.hears_rollout(replace(plan_of(released()), model=f"model-{number}"), by=stranger, token=number)
    plan = plan_of(released())
    forged = [
        (TOPICS.rollout(MODEL), sign_rollout(Rollout(plan, "cellar", 1, Action.ABORT), CELLAR)),
        (TOPICS.report("ann"), sign_report(Report("ann", 1, 1), ANN)),
        (TOPICS.report("attic"), sign_report(Report("attic", 9, 9), CELLAR)),
    ]
    under_another_name = [
        (TOPICS.report("attic"), sign_report(Report("cellar", 1, 1), CELLAR)),
        (TOPICS.ota_want("attic"), sign_wants("cellar", 1, 1, (), CELLAR)),
        (TOPICS.rollout(OTHER), sign_rollout(Rollout(plan, "ann", 1, Action.RUN), ANN)),
    ]
    for topic, payload in forged + under_another_name:
        attic.hears(topic, payload)
    assert state_of(attic) == before
    assert len(attic.notes) == 3 * 500 + 6 and all(note.startswith("not believed") for note in attic.notes)


def test_35_a_flood_of_metadata_topics_is_bounded_and_a_good_document_still_has_room(attic: Attic) -> None:
    attic.hears(TOPICS.ota_meta("timestamp"), b"1")
    for number in range(2 * MAX_DOCUMENTS):
        attic.hears(TOPICS.ota_meta(f"{number}.root"), b"x" * 100)
    assert len(attic.course.offered.documents) == MAX_DOCUMENTS
    assert any(f"at most {MAX_DOCUMENTS}" in note for note in attic.notes)
    attic.hears(TOPICS.ota_meta("timestamp"), b"2")
    assert attic.course.offered.documents["timestamp"] == b"2"


def test_35_what_a_flood_left_no_room_for_is_asked_for_again(attic: Attic) -> None:
    for number in range(MAX_DOCUMENTS - 1):
        attic.hears(TOPICS.ota_meta(f"{number + 50}.root"), b"junk")
    attic.hears(TOPICS.ota_meta("timestamp"), b"1")
    attic.hears(TOPICS.ota_meta("2.snapshot"), b"no room")
    for number in range(MAX_DOCUMENTS - 1):
        attic.hears(TOPICS.ota_meta(f"{number + 50}.root"), b"")
    effects = attic.feed(events.NotListed("2.snapshot is not offered", refused=False))
    assert events.Listen(TOPICS.every(TopicKind.OTA_META)) in effects
    attic.hears(TOPICS.ota_meta("2.snapshot"), b"now there is")
    assert attic.course.offered.documents == {"timestamp": b"1", "2.snapshot": b"now there is"}


def test_35_a_flood_of_large_metadata_holds_bounded_memory(attic: Attic) -> None:
    tracemalloc.start()
    try:
        for number in range(100):
            attic.hears(TOPICS.ota_meta(f"{number}.targets"), bytes(2**20))
        used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used_bytes < 20 * 2**20


def test_35_large_forged_words_hold_bounded_memory(attic: Attic) -> None:
    tracemalloc.start()
    try:
        for number in range(300):
            for topic in (TOPICS.report(f"b-{number}"), TOPICS.rollout(f"m-{number}"), TOPICS.ota_want(f"b-{number}")):
                attic.hears(topic, bytes(2**20))
        used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used_bytes < 20 * 2**20


def test_35_a_members_flood_of_reports_rollouts_and_wants_finds_every_table_bounded(ledger: Ledger) -> None:
    """An operator's key and all boards' keys in hostile hands: still no table grows without end."""
    boards = {f"board-{number}": signer(f"board-{number}") for number in range(MAX_BOARDS - 1)}
    attic = Attic(ledger)
    attic.course._members |= {name: each.public_key for name, each in boards.items()}
    for number in range(MAX_ROLLOUTS + 20):
        plan = replace(plan_of(released()), model=f"model-{number}", boards=("attic",), canary=1, wave=1)
        attic.hears_rollout(plan)
    for name in list(boards)[:8]:
        for number in range(3):
            progress = tuple(Progress(f"m-{each}", number + 1, Step.FAILED, failed=True) for each in range(MAX_ROLLOUTS))
            attic.hears(TOPICS.report(name), sign_report(Report(name, 1, number, progress=progress), boards[name]))
    words = attic.course.words
    assert len(words.rollouts) <= MAX_ROLLOUTS and len(attic.course.lives) <= MAX_ROLLOUTS
    assert all(len(report.progress) <= MAX_ROLLOUTS for report in words.reports.values())
    assert any(f"at most {MAX_ROLLOUTS} models" in note for note in attic.notes)


def test_36_an_empty_retained_word_on_updates_changes_nothing(attic: Attic) -> None:
    for topic, payload in words_of_everybody().items():
        attic.hears(topic, payload)
    attic.finds({manifest_path(MODEL, 7): encode_release(released())})
    before = state_of(attic)
    for topic in words_of_everybody():
        attic.hears(topic, b"")
    attic.hears(TOPICS.ota_meta("timestamp"), b"")
    attic.feed(events.Tick())
    assert state_of(attic) == before


def test_36_a_stale_retained_word_on_updates_never_takes_the_place_of_a_newer_one(attic: Attic) -> None:
    for topic, payload in words_of_everybody(number=5).items():
        attic.hears(topic, payload)
    before = state_of(attic)
    for topic, payload in words_of_everybody(number=4).items():
        attic.hears(topic, payload)
    assert state_of(attic) == before
    assert attic.course.words.reports["cellar"].number == 5


def test_36_a_stale_report_of_this_board_that_the_broker_kept_is_said_anew(attic: Attic) -> None:
    attic.hears_rollout(plan_of(released()))
    said = [each.message for each in attic.effects if isinstance(each, events.Say) and "/report/" in each.message.topic]
    assert said
    stale = sign_report(Report("attic", 0, 9, progress=(Progress(MODEL, 1, Step.CONFIRMED),)), ATTIC)
    effects = attic.hears(TOPICS.report("attic"), stale)
    again = [each.message for each in effects if isinstance(each, events.Say)]
    assert [each.topic for each in again] == [TOPICS.report("attic")] and again[0].payload != stale


def test_36_a_stale_rollout_does_not_bring_back_what_was_taken_back(ledger: Ledger) -> None:
    first, second = released(), released(number=8)
    slots = ModelSlots(MODEL)
    for each in (first, second):
        slots = confirm(try_(stage(slots, Held(each.number, plan_of(each).manifest))))
    with ledger.transaction():
        Records(ledger).save(slots)
    attic = Attic(ledger, {MODEL: slots})
    attic.hears_rollout(plan_of(second, serial=2))
    attic.hears_rollout(plan_of(first, serial=1), revision=9)
    attic.finds({manifest_path(MODEL, each.number): encode_release(each) for each in (first, second)})
    assert attic.course.lives[MODEL].slots.running.number == 8 and attic.step[0] is Step.CONFIRMED


def test_37_duplicates_of_every_word_are_acknowledged_each_and_act_once(attic: Attic) -> None:
    release = released()
    for token in (1, 2, 3):
        for topic, payload in words_of_everybody().items():
            attic.hears(topic, payload, token)
    changes = attic.course.words.changes
    for topic, payload in words_of_everybody().items():
        attic.hears(topic, payload, 4)
    assert attic.course.words.changes == changes
    assert sorted(attic.done) == sorted([1, 2, 3, 4] * 3)
    attic.hears_rollout(plan_of(release, serial=2))
    attic.finds({manifest_path(MODEL, 7): encode_release(release)})
    attic.feed(events.Opened(release.files[0].digest))
    data = Random(f"{MODEL} 7").randbytes(CHUNK_BYTES + 10)[:CHUNK_BYTES]
    chunk = (TOPICS.ota_chunk(release.files[0].digest.hex()), encode_chunk(0, data))
    first, second = attic.hears(*chunk, 71), attic.hears(*chunk, 72)
    assert [each for each in first if isinstance(each, events.Store)] == [events.Store(release.files[0].digest, 0, data, 71)]
    assert not [each for each in second if isinstance(each, events.Store)] and events.Done(72) in second
    stored = attic.feed(events.Stored(release.files[0].digest, 0, 71))
    assert events.Done(71) in stored, "acknowledged when it is written, not before"


def test_37_after_a_connection_that_lost_its_session_everything_is_asked_for_again(attic: Attic) -> None:
    """Whatever the broker says that it remembers."""
    release = released()
    attic.hears_rollout(plan_of(release))
    attic.finds({manifest_path(MODEL, 7): encode_release(release)})
    attic.feed(events.Opened(release.files[0].digest))
    attic.feed(events.LinkTurned(False))
    effects = [*attic.feed(events.LinkTurned(True)), *attic.feed(events.Tick())]
    listened = {each.topic_filter for each in effects if isinstance(each, events.Listen)}
    assert TOPICS.ota_chunk(release.files[0].digest.hex()) in listened and len(listened) == 5
    assert {each.message.topic for each in effects if isinstance(each, events.Say)} == {
        TOPICS.report("attic"), TOPICS.ota_want("attic"),
    }  # fmt: skip
