"""One board of a virtual fleet that takes releases: the real ``Course`` and everything below it, on virtual time.

What stands in, and for what: ``Books`` for the ledger (a transaction is durable when it ends, and nothing of it before);
tables that survive a power cut for the cache and the staging (the pieces written last may be lost); engines that say what the
story wants; the fleet for python-tuf (what it lists is what it signed).  The link is the loopback's.  Rules: a killed board keeps
what is durable and nothing else; a kill may fall before a commit, and between a commit and its effects; what is served is whole
on the disk; a message is verified once for all boards that have the same key for it, because fifty verify the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from random import Random
from typing import Protocol, TypeVar

from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.transport.link import Delivered, Link, LinkDown, LinkEvent, LinkUp, Message, Published, Rejected
from edge_agent.transport.loopback import LoopbackBroker, LoopbackLink, LoopbackOptions
from edge_agent.transport.topics import Topics
from ota import course, events
from ota.chunks import Artefact, encode_chunk, set_of
from ota.course import Course
from ota.lifecycle import Here
from ota.manifest import decode_release
from ota.records import Records
from ota.rollout import Progress
from ota.slots import FACTORY, ModelSlots, State

FLEET = "home"
MODEL = "blazeface-short"
LIBRARY = "sim"
SOUND = sha256(b"the right answer to the golden input").digest()
LINK = LoopbackOptions(keepalive_us=4_000_000, connect_timeout_us=2_000_000)
TICK_US, IDLE_TICK_US = 250_000, 2_000_000
ENGINE_US = 400_000
DISK_US = 20_000
CHECK_US = 150_000
REQUEST_US = 1_500_000
TRIAL_BOOTS = 3
GIVES_BYTES_PER_S = 4 * 2**20
MAX_REMEMBERED = 10_000


class Fleet(Protocol):
    """What a board stands in."""

    topics: Topics
    broker: LoopbackBroker
    random: Random
    keys: dict[str, bytes]
    operators: dict[str, bytes]

    @property
    def now_us(self) -> int: ...
    def after(self, interval_us: int, callback: Callable[[], object]) -> None: ...
    def note(self, text: str) -> None: ...
    def promise(self, kept: object, text: str) -> None: ...
    def listed(self, offered: events.List) -> events.Listed | events.NotListed: ...
    def flaw(self, release: int, board: str, when: str) -> str:
        """What is wrong with a release on this board ``when`` it is loaded, probed or run; nothing with the factory's."""

    def looked_at(self, board: UpdatingBoard) -> None:
        """Something was decided there."""


T = TypeVar("T")
Open = Callable[[bytes, Callable[[bytes], bytes | None]], T]


def once(opened: Open[T]) -> Open[T]:
    """``opened``, a pure function of a message and of the keys that it looks up, remembering what came of a message."""
    known: dict[bytes, tuple[dict[bytes, bytes | None], T | RefusedError]] = {}

    def remembering(message: bytes, find_key: Callable[[bytes], bytes | None]) -> T:
        keys, found = known.get(message, ({b"": b""}, None))
        if any(find_key(kid) != key for kid, key in keys.items()):
            keys = dict[bytes, bytes | None]()

            def look_up(kid: bytes) -> bytes | None:
                keys[kid] = find_key(kid)
                return keys[kid]

            try:
                found = opened(message, look_up)
            except RefusedError as error:
                found = error
            if len(known) >= MAX_REMEMBERED:
                known.clear()
            known[message] = keys, found
        if isinstance(found, RefusedError):
            raise found
        assert found is not None
        return found

    return remembering


for _name in ("open_report", "open_rollout", "open_wants"):
    setattr(course, _name, once(getattr(course, _name)))


class PlugPulledError(Exception):
    """The board is dead in the middle of a decision."""


class Books:
    """What ``Records`` and ``Course`` ask of a ledger, in memory."""

    def __init__(self) -> None:
        self._documents: dict[str, bytes] = {}
        self._marks: dict[str, int] = {}
        self._is_open = False

    def document(self, name: str) -> bytes | None:
        return self._documents.get(name)

    def put_document(self, name: str, data: bytes) -> None:
        with self._own():
            self._documents[name] = data

    def high_water(self, name: str) -> int:
        return self._marks.get(name, 0)

    def raise_high_water(self, name: str, value: int) -> None:
        if value < self.high_water(name):
            raise RefusedError(f"high-water mark {name}", value, f"{self.high_water(name)} or more")
        with self._own():
            self._marks[name] = value

    @contextmanager
    def transaction(self) -> Iterator[None]:
        if self._is_open:
            raise RuntimeError("a transaction within another one")
        documents, marks, self._is_open = dict(self._documents), dict(self._marks), True
        try:
            yield
        except BaseException:
            self._documents, self._marks = documents, marks
            raise
        finally:
            self._is_open = False

    @contextmanager
    def _own(self) -> Iterator[None]:
        if self._is_open:
            yield
        else:
            with self.transaction():
                yield


class UpdatingBoard:
    """``boot`` and ``kill`` it; ``course`` is its heart while it is ``up``; ``serving``: the release that answers requests."""

    gives_bytes_per_s = GIVES_BYTES_PER_S

    def __init__(self, fleet: Fleet, name: str, backend: str) -> None:
        self.fleet, self.name, self.backend = fleet, name, backend
        self.signer = Signer(name.encode(), sha256(name.encode()).digest())
        self.random = Random(f"{fleet.random.random()} {name}")
        self.books = Books()
        self.cache: dict[bytes, bytes] = {}
        self.staged: defaultdict[bytes, dict[int, bytes]] = defaultdict(dict)
        self.up = False
        self.serving = FACTORY
        self.trials = 0
        """How often a release was tried here: served real requests unconfirmed."""
        self.dies: str = ""
        """``before`` or ``after`` the next commit."""
        self._boots = 0
        self._life = 0
        self._host_free_us = 0
        self._young: list[tuple[bytes, int]] = []

    # lives

    def boot(self) -> None:
        if self.up:
            return
        self.up, self.dies = True, ""
        self._life += 1
        self._boots += 1
        self.fleet.note(f"{self.name} boots for the {self._boots}th time")
        slots = Records(self.books).count_start(TRIAL_BOOTS, [MODEL])
        self._load(slots[MODEL])
        here = Here(self.name, self.backend, "1.0.0", trial_inferences=3, trial_us=10_000_000)
        held = [each.manifest for each in (*slots[MODEL].held, slots[MODEL].candidate) if each and each.number]
        manifests = {digest: decode_release(self.cache[digest]) for digest in held if digest in self.cache}
        self.course = Course(
            here, FLEET, self._boots, self.signer, self.books, slots, manifests=manifests, held=self.cache,
            gives_bytes_per_s=self.gives_bytes_per_s, members=self.fleet.keys, operators=self.fleet.operators,
        )  # fmt: skip
        self._connect()
        self._tick()

    def _connect(self) -> None:
        self.link: Link = LoopbackLink(self.fleet.broker, self.name, LINK)
        self.link.open(self._hear)

    def kill(self) -> None:
        """The plug is pulled."""
        if not self.up:
            return
        self.fleet.note(f"{self.name} loses its power")
        self.up, self.dies = False, ""
        self._life += 1
        assert isinstance(self.link, LoopbackLink)
        self.link.crash(power_cut=True)
        for digest, index in self._young:
            if self.random.random() < 0.5:
                self.staged[digest].pop(index, None)
        self._young.clear()

    @property
    def slots(self) -> ModelSlots:
        """As the records have them, also while the board is off."""
        return Records(self.books).load(MODEL)

    @property
    def at_rest(self) -> bool:
        """It is up, and about to do nothing."""
        return self.up and not self.course.pending(self.fleet.now_us)

    @property
    def progress(self) -> Progress | None:
        return self.course.lives[MODEL].progress

    def _load(self, slots: ModelSlots) -> None:
        """What the agent does at its start: the confirmed release serves, and one on trial is brought anew by the course."""
        self.fleet.promise(slots.confirmed.number == FACTORY or self._whole(slots.confirmed.manifest), f"{self.name} can start")
        self.serving = slots.confirmed.number

    def _whole(self, manifest: bytes) -> bool:
        """All of a release is in the cache, byte by byte."""
        data = self.cache.get(manifest, b"")
        if sha256(data).digest() != manifest:
            return False
        files = decode_release(data).files
        return all(sha256(self.cache.get(file.digest, b"")).digest() == file.digest for file in files)

    # events in

    def feed(self, event: events.Event) -> None:
        if not self.up:
            return
        try:
            with self.books.transaction():
                effects = self.course.handle(event, self.fleet.now_us)
                self._die_if("before")
        except PlugPulledError:
            self.kill()
            return
        if self.dies == "after":
            self.kill()
            return
        self.fleet.looked_at(self)
        for effect in effects:
            if self.up:
                self._carry_out(effect)

    def _die_if(self, when: str) -> None:
        if self.dies == when:
            raise PlugPulledError

    def _hear(self, event: LinkEvent) -> None:
        match event:
            case LinkUp():
                self.feed(events.LinkTurned(True))
            case LinkDown():
                self.feed(events.LinkTurned(False))
            case Published(ticket) if ticket:
                self.feed(events.Sent(ticket))
            case Rejected(reason, ticket) if ticket:
                self.feed(events.Sent(ticket, reason))
            case Delivered(message, token):
                self.feed(events.Heard(self.fleet.topics.parse(message.topic), message.payload, token))

    def _tick(self) -> None:
        self.feed(events.Tick())
        self._later(IDLE_TICK_US if not self.up or self.at_rest else TICK_US, self._tick)

    def _later(self, interval_us: int, callback: Callable[[], object]) -> None:
        """Once so much time has passed, and half as much again at most, if this life lasts so long."""
        life = self._life
        jitter_us = self.random.randrange(interval_us // 2 + 1)
        self.fleet.after(interval_us + jitter_us, lambda: callback() if life == self._life and self.up else None)

    def _at_host(self, interval_us: int, callback: Callable[[], object]) -> None:
        """As ``_later``, one thing after the other, in the order in which they were asked for."""
        life, jitter_us = self._life, self.random.randrange(interval_us // 2 + 1)
        self._host_free_us = max(self._host_free_us, self.fleet.now_us) + interval_us + jitter_us
        wait_us = self._host_free_us - self.fleet.now_us
        self.fleet.after(wait_us, lambda: callback() if life == self._life and self.up else None)

    # effects out

    def _carry_out(self, effect: events.Effect) -> None:
        match effect:
            case events.List():
                self._later(CHECK_US, lambda: self.feed(self.fleet.listed(effect)))
            case events.Open(artefact):
                held = set_of(self.staged[artefact.digest], artefact.count)
                self._later(DISK_US, lambda: self.feed(events.Opened(artefact.digest, held)))
            case events.Store(digest, index, data, token):
                self._later(DISK_US, lambda: self._store(digest, index, data, token))
            case events.Finish(digest):
                self._later(DISK_US, lambda: self._finish(digest))
            case events.Abandon(digest):
                self.staged.pop(digest, None)
            case events.Give(artefact, index, ticket):
                self._later(DISK_US, lambda: self._give(artefact, index, ticket))
            case events.Bring(installed):
                self._at_host(ENGINE_US, lambda: self._brought(installed.name, installed.number))
            case events.BringBack(model):
                self._at_host(ENGINE_US, lambda: self.feed(events.Brought(model, FACTORY)))
            case events.Probe(model, number) | events.Stand(model, number):
                self._at_host(ENGINE_US, lambda: self._probe(model, number))
            case events.Turn(model, number):
                self._at_host(DISK_US, lambda: self._turn(model, number))
            case events.TurnBack() | events.Settle():
                self._at_host(DISK_US, self._turn_to_confirmed)
            case events.Note(text):
                self.fleet.note(f"{self.name}: {text}")
            case events.Say() | events.Listen() | events.Leave() | events.Done():
                with suppress(UnavailableError):
                    self._use_link(effect)
            case events.Keep() | events.Adopt():
                pass
            case events.BringAgent():
                self.fleet.promise(False, "nobody pushes an agent here")

    def _use_link(self, effect: events.Say | events.Listen | events.Leave | events.Done) -> None:
        match effect:
            case events.Say(message, ticket):
                self.link.publish(message, ticket)
            case events.Listen(topic_filter):
                self.link.subscribe(topic_filter)
            case events.Leave(topic_filter):
                self.link.unsubscribe(topic_filter)
            case events.Done(token) if token:
                self.link.acknowledge(token)

    def _store(self, digest: bytes, index: int, data: bytes, token: int) -> None:
        self.staged[digest][index] = data
        self._young = [*self._young[-3:], (digest, index)]
        self.feed(events.Stored(digest, index, token))

    def _finish(self, digest: bytes) -> None:
        pieces = self.staged.pop(digest, {})
        whole = b"".join(pieces[index] for index in sorted(pieces))
        if sha256(whole).digest() != digest:
            self.feed(events.Finished(digest, why="its pieces do not make it up"))
            return
        self.cache[digest] = whole
        self.feed(events.Finished(digest, whole if len(pieces) == 1 else b""))

    def _give(self, artefact: Artefact, index: int, ticket: int) -> None:
        data = self.cache[artefact.digest][index * artefact.step_bytes :][: artefact.piece_bytes(index)]
        topic = self.fleet.topics.ota_chunk(artefact.digest.hex())
        try:
            self.link.publish(Message(topic, encode_chunk(index, data)), ticket)
        except UnavailableError as error:
            self.feed(events.Sent(ticket, str(error)))

    def _brought(self, model: str, number: int) -> None:
        self.fleet.promise(self._whole(self._manifest_of(number)), f"release {number} is whole on {self.name} when it is loaded")
        self.feed(events.Brought(model, number, self.fleet.flaw(number, self.name, "loaded")))

    def _probe(self, model: str, number: int) -> None:
        flaw = self.fleet.flaw(number, self.name, "probed")
        self.feed(events.Probed(model, number, sha256(flaw.encode()).digest() if flaw else SOUND, LIBRARY))

    def _turn_to_confirmed(self) -> None:
        self.serving = self.slots.confirmed.number

    def _turn(self, model: str, number: int) -> None:
        if number != FACTORY:
            self.fleet.promise(self._whole(self._manifest_of(number)), f"release {number} is whole on {self.name} when it serves")
        self.serving = number
        self.trials += self.course.lives[MODEL].slots.state is State.TRIAL
        self.feed(events.Turned(model, number))
        self._serve_requests(number)

    def _serve_requests(self, number: int) -> None:
        """Real requests come while a release is on trial; of each is told what was wrong with its answer."""
        if self.serving == number and self.course.lives[MODEL].slots.state is State.TRIAL:
            self.feed(events.Ran(MODEL, number, self.fleet.flaw(number, self.name, "run")))
            self._later(REQUEST_US, lambda: self._serve_requests(number))

    def _manifest_of(self, number: int) -> bytes:
        slots = self.course.lives[MODEL].slots
        here = [each for each in (slots.candidate, slots.confirmed, slots.previous) if each is not None]
        return next((each.manifest for each in here if each.number == number), b"")
