"""The updates of one board: every decision of them, with no socket, no clock, no process and no file in sight.

``handle(event, now_us) -> effects``.  Rules:

* What is durable changes in the ledger alone, within the caller's transaction; a ledger that fails makes the caller begin anew
  from what it holds.
* Nothing is believed but by a signature: metadata by the fleet's root, the charter and releases by the metadata, rollouts by an
  operator and reports by a board of the charter, pieces by their digests.
* A newer charter, a newer rollout of a model, a newer report of a board counts; an older one changes nothing.
* Each board judges by itself what a rollout asks of it; who rolled it out may be gone.
* By a newer charter everything that was heard is judged anew: whom it does not name was not heard.
* No table grows with what others say, and nothing that comes, or that the ledger has damaged, raises but a ledger that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError
from edge_agent.transport.link import Message
from edge_agent.transport.topics import Kind, Topic, Topics
from ota.charter import CHARTER_PATH, Charter, decode_charter
from ota.chunks import Artefact, Wants, open_wants
from ota.events import (
    Adopt,
    Brought,
    Done,
    Effect,
    Event,
    Finished,
    Heard,
    Keep,
    LinkTurned,
    Listed,
    Listen,
    Note,
    NotListed,
    Opened,
    Probed,
    Ran,
    Say,
    Sent,
    Stored,
    Tick,
    Turned,
)
from ota.heard import Heard as HeardWords
from ota.kept import CHARTER as CHARTER
from ota.kept import CHARTER_SERIAL, Kept
from ota.lifecycle import Doing, Here, Lifecycle, Need, Shelf
from ota.manifest import AGENT, Release, decode_release, encode_release, manifest_path
from ota.offered import Offered
from ota.orders import open_report, open_rollout, sign_report
from ota.records import Books, Records
from ota.rollout import MAX_ROLLOUTS, Progress, Report, SlotReport
from ota.sharing import Sharing, artefacts_of
from ota.slots import MAX_WHY_CHARS, ModelSlots
from ota.transfers import Transfers

REPORT_PERIOD_US = 1_000_000
KINDS = frozenset({Kind.OTA_META, Kind.ROLLOUT, Kind.REPORT, Kind.OTA_WANT, Kind.OTA_CHUNK})
"""Of the topics that this is about."""
AWAITS_CHARTER = (Kind.ROLLOUT, Kind.REPORT, Kind.OTA_WANT)
"""Signed by whom a charter names."""
MAX_ASIDE = 256
MAX_ASIDE_BYTES = 2 * 2**20


class Course:
    """``slots``: as ``Records.count_start`` gave them; ``manifests``: the releases that are in the cache, by digest; ``held``:
    all artefacts that are; ``charter``: the one in force; ``members``, ``operators``: public keys where there is no charter."""

    def __init__(
        self, here: Here, fleet: str, boot_epoch: int, signer: Signer, books: Books, slots: Mapping[str, ModelSlots], *,
        manifests: Mapping[bytes, Release] | None = None, held: Iterable[bytes] = (), charter: Charter | None = None,
        charter_digest: bytes = b"", gives_bytes_per_s: int = 0, members: Mapping[str, bytes] | None = None,
        operators: Mapping[str, bytes] | None = None,
    ) -> None:  # fmt: skip
        self.here, self._boot_epoch, self._signer, self._books = here, boot_epoch, signer, books
        self.topics = Topics(fleet)
        self._fleet = fleet
        self.charter, self._charter_digest = charter, charter_digest
        self._members, self._operators = dict(members or {}), dict(operators or {})
        self._members.setdefault(here.board, signer.public_key)
        self._manifests = dict(manifests or {})
        self._sizes: dict[bytes, int] = {}
        self.sharing = Sharing(here.board, gives_bytes_per_s) if gives_bytes_per_s else None
        self.offered, self.words = Offered(), HeardWords()
        self._records = Records(books)
        self.transfers = Transfers(here.board, boot_epoch, signer, self.topics, held)
        self._kept = Kept(books)
        self._is_first = not books.high_water(CHARTER_SERIAL)
        """No charter was ever in force. Where one was and is lost, no operator is known until it is here again."""
        progress = self._kept.progress
        self.lives = {model: self._life(model, each, progress.get(model)) for model, each in slots.items()}
        self._notes = [*self._kept.notes]
        self._recall_rollouts()
        self.link_up = False
        self._pinned: frozenset[bytes] | None = None
        self._number = 0
        self._own: Report | None = None
        self._standing: tuple[object, ...] = ()
        """What that was made of."""
        self._aside: dict[Topic, bytes] = {}
        self._charter_is_new = False
        self._told: Report | None = None
        self._told_us = -REPORT_PERIOD_US
        self._handlers: dict[type, Callable[..., Iterator[Effect]]] = {
            LinkTurned: self._link_turned, Heard: self._heard, Sent: self._sent, Listed: self._listed,
            NotListed: self._not_listed, Opened: self._opened, Stored: self._stored, Finished: self._finished, Tick: self._tick,
            Brought: self._of_life("brought"), Probed: self._of_life("probed"), Turned: self._of_life("turned"),
            Ran: self._of_life("ran"),
        }  # fmt: skip

    def handle(self, event: Event, now_us: int) -> list[Effect]:
        """One event in, the effects out, in the order in which they must be carried out."""
        effects = [*self._handlers[type(event)](event, now_us)]
        if isinstance(event, Stored | Sent) or (isinstance(event, Heard) and event.topic.kind is Kind.OTA_CHUNK):
            return [*effects, *self._fetch(now_us)]
        return [*effects, *self._go_on(now_us)]

    def agent_started(self, running: int, now_us: int, why: str = "") -> list[Effect]:
        """Which release of the agent this is, 0 for none; ``why`` the one before did not stay."""
        life = self.lives.get(AGENT)
        return [*(life.agent_started(running, now_us, why) if life else ()), *self._go_on(now_us)]

    def pending(self, now_us: int) -> bool:
        """Something becomes due soon by itself."""
        gives = self.sharing is not None and self.sharing.pending(now_us)
        under_way = any(life.doing is not Doing.NOTHING for life in self.lives.values())
        return gives or under_way or self.offered.pending or self.transfers.pending

    @property
    def note(self) -> str:
        """What ails the updates of this board."""
        return (self.offered.why or self._charter_why() or self.transfers.why)[:MAX_WHY_CHARS]

    def _charter_why(self) -> str:
        """Why the charter that the metadata lists is not in force, or what this board is by the one that is."""
        listed = self.offered.targets.get(CHARTER_PATH)
        if listed is not None and (why := self.transfers.why_never(listed[1])):
            return why
        return _why_out(self.charter, self.here.board) if self.charter is not None else ""

    def members(self) -> Mapping[str, bytes]:
        return self.charter.members if self.charter else self._members

    def report(self) -> Report:
        """What this board says of its updates."""
        progress = [life.progress for life in self.lives.values() if life.progress is not None]
        slots = tuple(_slot_report(life.slots) for life in self.lives.values())
        newest = sorted(progress, key=lambda each: (each.serial, each.model))[-MAX_ROLLOUTS:]
        return Report(
            self.here.board, self._boot_epoch, self._number, self.here.agent, tuple(newest), slots[:MAX_ROLLOUTS], self.note
        )

    # what comes

    def _link_turned(self, event: LinkTurned, now_us: int) -> Iterator[Effect]:
        self.link_up = event.up
        self.transfers.turned(event.up)
        if self.sharing is not None:
            self.sharing.restart()
        if event.up:
            self._told = None
            yield Listen(self.topics.every(Kind.OTA_META))
            yield from map(Listen, self._filters())

    def _filters(self) -> Iterator[str]:
        """What the broker keeps and only a charter lets be believed: asked for again when there is another. Who gives nothing
        hears of what is lacking only what the broker has as its own word."""
        yield self.topics.every(Kind.ROLLOUT)
        yield self.topics.every(Kind.REPORT)
        yield self.topics.every(Kind.OTA_WANT) if self.sharing is not None else self.topics.ota_want(self.here.board)

    def _heard(self, event: Heard, now_us: int) -> Iterator[Effect]:
        if event.topic.kind is Kind.OTA_CHUNK:
            yield from self.transfers.heard(bytes.fromhex(event.topic.digest), event.payload, event.token)
            return
        try:
            self._take(event.topic, event.payload, now_us)
        except RefusedError as error:
            yield Note(f"not believed: {error}")
            self._put_aside(event.topic, event.payload)
        if event.token:
            yield Done(event.token)

    def _put_aside(self, topic: Topic, payload: bytes) -> None:
        """What a later charter may let be believed; the oldest gives way."""
        if topic.kind not in AWAITS_CHARTER:
            return
        self._aside.pop(topic, None)
        self._aside[topic] = payload
        while len(self._aside) > MAX_ASIDE or sum(map(len, self._aside.values())) > MAX_ASIDE_BYTES:
            del self._aside[next(iter(self._aside))]

    def _take_again(self, now_us: int) -> None:
        """What was put aside, by the charter that is in force now."""
        aside, self._aside = self._aside, {}
        for topic, payload in aside.items():
            try:
                self._take(topic, payload, now_us)
            except RefusedError:
                self._aside[topic] = payload

    def _take(self, topic: Topic, payload: bytes, now_us: int) -> None:
        if topic.kind is Kind.OTA_META:
            self.offered.hear(topic.role, payload, now_us)
        elif topic.kind is Kind.ROLLOUT:
            self._take_rollout(topic.model, payload)
        elif topic.board == self.here.board:
            self._hear_back(topic.kind, payload)
        elif payload and topic.kind is Kind.REPORT:
            report = open_report(payload, self._member_key)
            _must_agree("report", report.board, topic.board)
            self.words.hear_report(report)
        elif payload:
            wants = open_wants(payload, self._member_key)
            _must_agree("wants", wants.board, topic.board)
            if self.sharing is not None:
                self.sharing.heard(wants, now_us)

    def _hear_back(self, kind: Kind, payload: bytes) -> None:
        """What the broker has of this board: if it is not what was said last, it is said again, for who comes later."""
        said: Report | Wants | None = None
        try:
            if payload:
                said = open_wants(payload, self._own_key) if kind is Kind.OTA_WANT else open_report(payload, self._own_key)
        finally:
            if kind is Kind.OTA_WANT:
                self.transfers.hear_own(said.newness if said else None)
            elif self._told is not None and (said is None or said.newness < self._told.newness):
                self._told = None

    def _take_rollout(self, model: str, payload: bytes) -> None:
        """An empty one, as any stranger may send it, takes nothing back."""
        if not payload:
            return
        rollout = open_rollout(payload, self._operator_key)
        _must_agree("rollout", rollout.plan.model, model)
        if self.words.hear_rollout(rollout, payload) and self.here.board in rollout.plan.boards:
            self._kept.put_rollout(model, payload)

    def _sent(self, event: Sent, now_us: int) -> Iterator[Effect]:
        if self.sharing is not None:
            self.sharing.sent(event.ticket)
        yield from ()

    def _listed(self, event: Listed, now_us: int) -> Iterator[Effect]:
        try:
            self._kept.raise_floors(event.marks)
        except RefusedError as error:
            yield from self._not_listed(NotListed(str(error), refused=True), now_us)
            return
        if self.offered.why:
            yield Note("the fleet's metadata is good again")
        self.offered.listed(event, now_us)

    def _not_listed(self, event: NotListed, now_us: int) -> Iterator[Effect]:
        if event.why != self.offered.why:
            yield Note(f"the fleet's metadata: {event.why}")
        self.offered.not_listed(event, now_us)
        if self.link_up and not event.refused:
            yield Listen(self.topics.every(Kind.OTA_META))  # what is lacking may have found no room when it came

    def _opened(self, event: Opened, now_us: int) -> Iterator[Effect]:
        self.transfers.opened(event, now_us)
        yield from ()

    def _stored(self, event: Stored, now_us: int) -> Iterator[Effect]:
        yield from self.transfers.stored(event, now_us)

    def _finished(self, event: Finished, now_us: int) -> Iterator[Effect]:
        self.transfers.finished(event, now_us)
        if event.refused:
            yield Note(f"signed, and of no use here: {event.why}")
        elif not event.why and event.data:
            try:
                yield from self._read(event.digest, event.data)
            except RefusedError as error:
                self.transfers.refuse(event.digest, str(error))
                yield Note(f"signed, and of no use here: {error}")

    def _read(self, digest: bytes, data: bytes) -> Iterator[Effect]:
        """A charter or a manifest is here."""
        listed = self.offered.targets.get(CHARTER_PATH)
        if listed is None or listed[1] != digest:
            path = next((path for path, target in self.offered.targets.items() if target[1] == digest), "")
            if path:
                self._manifests[digest] = decode_release(data, path)
            return
        charter = decode_charter(data)
        self._must_be_next(charter, digest)
        self._books.raise_high_water(CHARTER_SERIAL, charter.serial)
        self._books.put_document(CHARTER, digest)
        before, self.charter, self._charter_digest = self.members(), charter, digest
        self._judge_anew(before)
        yield Note(f"charter {charter.serial} of {charter.fleet}: {len(charter.members)} boards")
        if why := _why_out(charter, self.here.board):
            yield Note(why)
        yield Adopt(charter)
        if self.link_up:
            yield from map(Listen, self._filters())
        self._charter_is_new = True

    def _must_be_next(self, charter: Charter, digest: bytes) -> None:
        """Raises ``RefusedError`` for a charter that is not for this board, or older than what was in force."""
        _must_agree("charter of fleet", charter.fleet, self._fleet)
        own = charter.boards.get(self.here.board)
        if own is not None and own.key != self._signer.public_key:
            remedy = "it was enrolled elsewhere, or lost its identity.key: enroll it anew"
            raise RefusedError(f"charter, {self.here.board}", "another public key than this board's", own.key.hex(), remedy)
        floor = self._books.high_water(CHARTER_SERIAL)
        is_other = self.charter is not None and charter.serial == self.charter.serial and digest != self._charter_digest
        if charter.serial < floor or is_other:
            got = f"{charter.serial}{', another one' if is_other else ''}"
            raise RefusedError("charter serial", got, f"{floor + is_other} or more", "this is a rollback to an older state")

    def _judge_anew(self, before: Mapping[str, bytes]) -> None:
        """By the charter in force: rollouts of operators that it names, reports of boards that have the key they had."""
        words, self.words, self._own = self.words, HeardWords(), None
        for model, rollout in words.rollouts.items():
            signed = words.signed(model)
            try:
                self.words.hear_rollout(open_rollout(signed, self._operator_key), signed)
            except RefusedError as error:
                self._notes.append(f"the rollout of {rollout.plan.number} to {model} counts no more: {error}")
        members = self.members()
        planned = {board for rollout in self.words.rollouts.values() for board in rollout.plan.boards}
        for board, report in words.reports.items():
            if members.get(board) == before.get(board) if board in members else board in planned:
                self.words.hear_report(report)
        if self.sharing is not None:
            self.sharing.keep_only([board for board, key in members.items() if before.get(board) == key])

    def _tick(self, event: Tick, now_us: int) -> Iterator[Effect]:
        life = self.lives.get(AGENT)
        if life is not None:
            yield from life.agent_well(now_us, self.link_up)

    def _of_life(self, name: str) -> Callable[..., Iterator[Effect]]:
        def told(event: Brought | Probed | Turned | Ran, now_us: int) -> Iterator[Effect]:
            life = self.lives.get(event.model)
            yield from getattr(life, name)(event, now_us) if life is not None else ()

        return told

    # what follows

    def _go_on(self, now_us: int) -> Iterator[Effect]:
        while self._notes:
            yield Note(self._notes.pop(0))
        if self._charter_is_new:
            self._charter_is_new = False
            self._take_again(now_us)
        if look := self.offered.look(self._wanted_paths(), self._kept.floors, now_us):
            yield look
        yield from self._pursue(now_us)
        yield from self._keep()
        yield from self._fetch(now_us)
        yield from self._tell(now_us)

    def _fetch(self, now_us: int) -> Iterator[Effect]:
        needs = [*self._charter_need(), *(need for life in self.lives.values() for need in life.needs)]
        yield from self.transfers.go_on(needs, now_us)
        if self.sharing is not None and self.link_up:
            yield from self.sharing.go_on(now_us)

    def _pursue(self, now_us: int) -> Iterator[Effect]:
        """Every model that a rollout asks for, or that is under way."""
        shelf = Shelf(
            self.offered.targets, self._manifests.get, self.transfers.holds, self.transfers.permille, self.transfers.why_never
        )
        self._hear_self()
        for model, rollout in self.words.rollouts.items():
            if self.here.board in rollout.plan.boards and model not in self.lives:
                self.lives[model] = self._life(model, self._records.load(model), None)
        for model, life in self.lives.items():
            known = self.words.rollout(model)
            plan = known.plan if known is not None and self.here.board in known.plan.boards else None
            move = self.words.move(model, self.here.board, self._out(plan.boards)) if plan is not None else None
            yield from life.go_on(plan, move, shelf, now_us)
        for note in self._records.take_notes():
            yield Note(note)
        progress = {model: life.progress for model, life in self.lives.items() if life.progress is not None}
        self._kept.put_progress(progress)

    def _hear_self(self) -> None:
        """What this board says counts in its own judgement as anybody's does."""
        standing = (self.note, *((life.progress, life.slots) for life in self.lives.values()))
        if standing == self._standing and self._own is not None:
            return
        self._standing, report = standing, self.report()
        if self._own is None or not _same(report, self._own):
            self._number += 1
            self._own = self.report()
            self.words.hear_report(self._own)

    def _life(self, model: str, slots: ModelSlots, progress: Progress | None) -> Lifecycle:
        return Lifecycle(self.here, model, self._records, slots, progress)

    def _out(self, boards: Iterable[str]) -> frozenset[str]:
        members = self.members()
        return frozenset(board for board in boards if board not in members)

    def _wanted_paths(self) -> set[str]:
        plans = [rollout.plan for rollout in self.words.rollouts.values() if self.here.board in rollout.plan.boards]
        return {CHARTER_PATH, *(manifest_path(plan.model, plan.number) for plan in plans)}

    def _charter_need(self) -> Iterator[Need]:
        listed = self.offered.targets.get(CHARTER_PATH)
        if listed is not None and listed[1] != self._charter_digest:
            yield Need(listed[1], listed[0])

    def _keep(self) -> Iterator[Effect]:
        """What must stay in the cache, and what of it is there: nothing else counts as held."""
        kept = {self._charter_digest} if self._charter_digest else set()
        for life in self.lives.values():
            for held in life.slots.held:
                release = self._manifests.get(held.manifest)
                kept |= {held.manifest, *(file.digest for file in release.files)} if release else {held.manifest}
        self.transfers.keep_only(kept)
        there = frozenset(self.transfers.held)
        if there != self._pinned:
            self._pinned = there
            yield Keep(there)
            self._forget_manifests()
            if self.sharing is not None:
                self.sharing.hold(self._held_artefacts(there))
        if self.sharing is not None:
            self.sharing.look_at(self.words, self._manifests.values())

    def _forget_manifests(self) -> None:
        """Those that no slots and no plan name."""
        named = {rollout.plan.manifest for rollout in self.words.rollouts.values()}
        for life in self.lives.values():
            candidate = life.slots.candidate
            named |= {held.manifest for held in (*life.slots.held, *([candidate] if candidate else []))}
        for digest in self._manifests.keys() - named:
            del self._manifests[digest]
            self._sizes.pop(digest, None)

    def _held_artefacts(self, there: frozenset[bytes]) -> Iterator[Artefact]:
        for digest in sorted(there & self._manifests.keys()):
            release = self._manifests[digest]
            if digest not in self._sizes:
                self._sizes[digest] = len(encode_release(release))
            for artefact in artefacts_of(release, digest, self._sizes[digest]):
                if artefact.digest in there:
                    yield artefact

    def _tell(self, now_us: int) -> Iterator[Effect]:
        """This board's report, when it says something new."""
        self._hear_self()
        if not self.link_up or self._own is None or now_us - self._told_us < REPORT_PERIOD_US:
            return
        if self._told is not None and _same(self._own, self._told):
            return
        self._told, self._told_us = self._own, now_us
        yield Say(Message(self.topics.report(self.here.board), sign_report(self._told, self._signer), retain=True))

    def _recall_rollouts(self) -> None:
        for model, signed in self._kept.rollouts([*self._kept.progress, *self.lives]).items():
            try:
                self.words.hear_rollout(open_rollout(signed, self._operator_key), signed)
            except RefusedError as error:
                self._notes.append(f"the rollout of {model} that was kept is left out: {error}")

    def _member_key(self, kid: bytes) -> bytes | None:
        return self.members().get(kid.decode("utf-8", "replace"))

    def _own_key(self, kid: bytes) -> bytes | None:
        return self._signer.public_key if kid == self._signer.kid else None

    def _operator_key(self, kid: bytes) -> bytes | None:
        operators = self.charter.operators if self.charter else self._operators if self._is_first else {}
        return operators.get(kid.decode("utf-8", "replace"))


def _must_agree(subject: str, inside: str, outside: str) -> None:
    if inside != outside:
        raise RefusedError(subject, f"{inside!r} inside, {outside!r} outside", "one and the same")


def _why_out(charter: Charter, board: str) -> str:
    """Why a board is none of the fleet's; empty if it is one."""
    own = charter.boards.get(board)
    if own is None:
        return f"this board is not in charter {charter.serial} of {charter.fleet}: enroll it"
    return f"this board is revoked by charter {charter.serial} of {charter.fleet}: {own.revoked}" if own.revoked else ""


def _slot_report(slots: ModelSlots) -> SlotReport:
    candidate = slots.candidate.number if slots.candidate else 0
    return SlotReport(slots.model, slots.running.number, candidate, slots.state.value, slots.why)


def _same(one: Report, other: Report) -> bool:
    return (one.agent, one.progress, one.slots, one.note) == (other.agent, other.progress, other.slots, other.note)
