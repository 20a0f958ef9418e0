"""One board's updates with nothing around them: the real ``Course`` on books in memory, fed event by event.

Owns ``OneBoard`` and the words of its fleet: board b1 among b1 to b3, operator ann.  Rules: what a test does not answer is not
answered; every event is a transaction of its own, and an event that raises changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from edge_agent.core.cose import Signer
from edge_agent.transport.topics import Topics
from ota import events
from ota.charter import CHARTER_PATH, Charter, Enrolled, encode_charter
from ota.chunks import encode_chunk
from ota.course import Course
from ota.lifecycle import Here
from ota.manifest import AGENT, CHUNK_BYTES, Kind, Release, ReleasedFile, encode_release, manifest_path
from ota.orders import open_report, sign_report, sign_rollout
from ota.records import Records
from ota.rollout import Action, Plan, Progress, Report, Rollout, Step
from ota.slots import ModelSlots, State
from tests.ota_board import Books

FLEET, MODEL, OTHER, LIBRARY = "home", "blazeface-short", "face-landmark", "sim"
BOARDS = ("b1", "b2", "b3")
SECOND_US = 1_000_000
SOUND = sha256(b"the right answer").digest()
CATALOG = Path(__file__).parents[1] / "models" / "catalog"
E = TypeVar("E", bound=events.Effect)


def signer(name: str) -> Signer:
    return Signer(name.encode(), sha256(name.encode()).digest())


ANN = signer("ann")
KEYS = {name: signer(name).public_key for name in BOARDS}


def digest(data: bytes) -> bytes:
    return sha256(data).digest()


def file_of(data: bytes, name: str = "model.tflite") -> ReleasedFile:
    pieces = b"".join(digest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES))
    return ReleasedFile(name, len(data), digest(data), pieces)


def bytes_of(number: int, model: str = MODEL, size_bytes: int = CHUNK_BYTES + 1000) -> bytes:
    return Random(f"{model} {number}").randbytes(size_bytes)


def a_release(number: int = 7, model: str = MODEL, **changes: Any) -> Release:
    """Of a picture model, in two pieces, whose golden answer is ``SOUND``."""
    card = f'{(CATALOG / f"{model}.toml").read_text()}\n[golden]\n{LIBRARY} = "{SOUND.hex()}"\n' if model != AGENT else ""
    kind = Kind.AGENT if model == AGENT else Kind.PERCEPTION
    return replace(Release(model, number, kind, (file_of(bytes_of(number, model)),), card), **changes)


def a_plan(release: Release, serial: int = 1, **changes: Any) -> Plan:
    """Everybody is a canary."""
    plan = Plan(serial, release.model, release.number, digest(encode_release(release)), BOARDS, 3, 3, max_error_permille=1000)
    return replace(plan, **changes)


def a_charter(serial: int = 1, fleet: str = FLEET, operators: Mapping[str, bytes] | None = None, **keys: bytes) -> Charter:
    """``keys``: of boards whose key is another one; an empty one takes the board out."""
    known = {name: key for name, key in {**KEYS, **keys}.items() if key}
    operators = {"ann": ANN.public_key} if operators is None else operators
    return Charter(fleet, serial, {name: Enrolled(key) for name, key in known.items()}, operators)


class OneBoard:
    """``boot`` again to start anew from what is durable; ``now_us`` moves as the test says."""

    def __init__(self, name: str = "b1", agent: str = "1.2.0", gives_bytes_per_s: int = 0, backend: str = "raspberry_pi") -> None:
        self.here = Here(name, backend, agent, trial_inferences=3, trial_us=10 * SECOND_US, confirm_us=60 * SECOND_US)
        self.topics, self.books, self.now_us = Topics(FLEET), Books(), 100 * SECOND_US
        self.cache: dict[bytes, bytes] = {}
        self.boots, self._gives = 0, gives_bytes_per_s
        self.boot()

    def boot(self, charter: Charter | None = None, *, hosted: tuple[str, ...] = (MODEL,)) -> None:
        self.boots += 1
        self.effects: list[events.Effect] = []
        self.started = Records(self.books).count_start(3, hosted)
        held = [each for slots in self.started.values() for each in (*slots.held, slots.candidate) if each and each.number]
        manifests = {each.manifest: self.releases[each.manifest] for each in held if each.manifest in self.releases}
        self.course = Course(
            self.here, FLEET, self.boots, signer(self.here.board), self.books, self.started, manifests=manifests, held=self.cache,
            charter=charter, charter_digest=digest(encode_charter(charter)) if charter else b"",
            gives_bytes_per_s=self._gives, members=KEYS, operators={"ann": ANN.public_key},
        )  # fmt: skip

    releases: dict[bytes, Release] = {}
    """All that were ever made here, by manifest."""

    # events

    def feed(self, event: events.Event, after_us: int = 0) -> list[events.Effect]:
        self.now_us += after_us
        with self.books.transaction():
            effects = self.course.handle(event, self.now_us)
        self.effects += effects
        return effects

    def tick(self, after_us: int = SECOND_US) -> list[events.Effect]:
        return self.feed(events.Tick(), after_us)

    def link(self, up: bool = True) -> list[events.Effect]:
        return self.feed(events.LinkTurned(up))

    def hear(self, topic: str, payload: bytes, token: int = 1) -> list[events.Effect]:
        return self.feed(events.Heard(self.topics.parse(topic), payload, token))

    def order(self, plan: Plan, action: Action = Action.RUN, revision: int = 1, by: Signer = ANN) -> list[events.Effect]:
        rollout = Rollout(plan, by.kid.decode(), revision, action)
        return self.hear(self.topics.rollout(plan.model), sign_rollout(rollout, by))

    def report_of(self, board: str, step: Step, plan: Plan, number: int = 1) -> list[events.Effect]:
        report = Report(board, 1, number, progress=(Progress(plan.model, plan.serial, step),))
        return self.hear(self.topics.report(board), sign_report(report, signer(board)))

    def list_targets(self, *releases: Release, charter: Charter | None = None) -> None:
        """New metadata comes, and is verified."""
        targets = {}
        for release in releases:
            manifest = encode_release(release)
            self.releases[digest(manifest)] = release
            targets[manifest_path(release.model, release.number)] = (len(manifest), digest(manifest))
        if charter is not None:
            data = encode_charter(charter)
            targets[CHARTER_PATH] = (len(data), digest(data))
        self.verified(targets)

    def verified(self, targets: Mapping[str, tuple[int, bytes]]) -> None:
        self.feed(events.NotListed("something newer comes", refused=False))
        self.hear(self.topics.ota_meta("timestamp"), f"of {self.now_us}".encode())
        self.tick()
        assert self.all(events.List)
        self.feed(events.Listed(targets, {"tuf/timestamp/x": 1}))

    def fetch(self, data: bytes) -> None:
        """An artefact that was opened comes, is written and finished."""
        name = digest(data)
        assert [each for each in self.all(events.Open) if each.artefact.digest == name], "it was not asked for"
        self.feed(events.Opened(name))
        whole = self.artefact(name)
        for index in range(whole.count):
            piece = data[index * whole.step_bytes :][: whole.piece_bytes(index)]
            self.hear(self.topics.ota_chunk(name.hex()), encode_chunk(index, piece))
            self.feed(events.Stored(name, index))
        self.tick(0)
        assert events.Finish(name) in self.effects
        self.cache[name] = data
        self.feed(events.Finished(name, data if whole.count == 1 else b""))

    def take(self, release: Release, plan: Plan | None = None) -> Plan:
        """A rollout comes, and all of its release: it is brought when this returns."""
        plan = plan or a_plan(release)
        if not self.course.link_up:
            self.link()
        self.order(plan)
        self.list_targets(release)
        self.fetch(encode_release(release))
        for file in release.files:
            self.fetch(bytes_of(release.number, release.model))
            assert file.digest in self.cache
        return plan

    def try_(self, release: Release) -> None:
        """As far as that real requests go to it."""
        self.feed(events.Brought(release.model, release.number))
        self.feed(events.Probed(release.model, release.number, SOUND, LIBRARY))
        self.feed(events.Turned(release.model, release.number))

    def confirm(self, release: Release) -> None:
        self.try_(release)
        for _ in range(self.here.trial_inferences):
            self.feed(events.Ran(release.model, release.number))

    # what came of them

    def all(self, kind: type[E]) -> list[E]:
        return [each for each in self.effects if isinstance(each, kind)]

    def last(self, kind: type[E]) -> E | None:
        return next(reversed(self.all(kind)), None)

    def artefact(self, name: bytes) -> Any:
        return next(each.artefact for each in reversed(self.all(events.Open)) if each.artefact.digest == name)

    @property
    def notes(self) -> list[str]:
        return [each.text for each in self.all(events.Note)]

    def noted(self, text: str) -> bool:
        return any(text in note for note in self.notes)

    def slots(self, model: str = MODEL) -> ModelSlots:
        return Records(self.books).load(model)

    def state(self, model: str = MODEL) -> State:
        return self.slots(model).state

    def progress(self, model: str = MODEL) -> tuple[Step, str]:
        progress = self.course.lives[model].progress
        assert progress is not None
        return progress.step, progress.why

    def published(self, topic: str) -> list[bytes]:
        return [each.message.payload for each in self.all(events.Say) if each.message.topic == topic]

    @property
    def told(self) -> Report:
        """The report that it published last."""
        payload = self.published(self.topics.report(self.here.board))[-1]
        return open_report(payload, lambda kid: KEYS.get(kid.decode()))
