"""The updates of a board, carried out: what ``course`` asks for, on the disk, in the cache, by the host, over the link.

The only file of the updates with I/O.  Rules: nothing is decided here; the ledger's transaction closes before any effect is
carried out; every message is acknowledged, whatever becomes of it; what takes long runs beside the event loop and comes back as
an event; a ledger or a disk that fails costs the updates a pause and never the serving: they begin anew from what the ledger
holds, or go on where the disk left them; what belongs to an attempt that was given up is not heard.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, assert_never

from edge_agent.core.clock import Clock
from edge_agent.core.config import OtaSection
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.core.values import ModelOffer
from edge_agent.store.blobs import BlobStore
from edge_agent.store.files import Disk, read_bounded
from edge_agent.store.ledger import Ledger
from edge_agent.transport.link import Delivered, Link, LinkDown, LinkEvent, LinkUp, Message, Published, Rejected
from edge_agent.transport.topics import Topics
from models.installed import Installed
from ota import checking, events
from ota.agent_turns import AgentHouse, AgentTurns
from ota.artefacts import Artefacts
from ota.charter import MAX_CHARTER_BYTES, Charter
from ota.checked import Checked
from ota.chunks import encode_chunk
from ota.course import KINDS, Course
from ota.kept import kept_charter
from ota.lifecycle import Doing, Here, files_here, installed_of
from ota.manifest import AGENT, Release
from ota.records import Records
from ota.slots import FACTORY, Held, ModelSlots, State, fall_back

FIRST_TICKET = 2**40
"""Tickets of this room begin here; those of the node are smaller."""
TICK_S = 1.0
BUSY_TICK_S = 0.25
AGAIN_S = 10.0
MAX_ROOT_BYTES = 512 * 2**10
NOT_BEFORE_S = 0
"""What has passed for sure is among the floors: the latest moment that the timestamp's own keys have signed."""


class Hosts(Protocol):
    """What this needs of the host (``edge_agent.hosting``). All raise ``SlyError``."""

    on_trial: Callable[[str, str], None]

    async def load(self, name: str, installed: Installed | None = None) -> ModelOffer: ...

    async def bring(self, installed: Installed) -> None: ...

    async def bring_factory(self, name: str) -> None: ...

    async def golden_beside(self, name: str) -> tuple[bytes, str]: ...

    async def hand_over(self, name: str) -> ModelOffer: ...

    async def settle(self, name: str) -> None: ...

    async def take_back(self, name: str) -> ModelOffer | None:
        """Whatever was brought goes; the offer of what serves then, ``None`` if nothing does."""
        ...

    def factory_files(self, name: str) -> tuple[Path, ...]: ...


class Door(Protocol):
    """The agent around the updates."""

    def hosted(self, offer: ModelOffer) -> None: ...

    def withdrawn(self, model: str, why: str) -> None: ...

    def adopt(self, charter: Charter) -> None: ...

    def start_anew(self, why: str) -> None: ...

    def library(self) -> str:
        """The interpreter library, as cards name it in ``golden``."""
        ...

    def say(self, text: str) -> None: ...


class Updater:
    """``start`` before models are loaded, ``load_models``, ``run_for_ever`` as a task, ``close``."""

    def __init__(
        self, config: OtaSection, here: Here, fleet: str, boot_epoch: int, signer: Signer, folder: Path, ledger: Ledger,
        blobs: BlobStore, host: Hosts, door: Door, clock: Clock, *, members: Mapping[str, bytes],
        operators: Mapping[str, bytes], agent: AgentHouse | None = None, disk: Disk | None = None,
    ) -> None:  # fmt: skip
        self._config, self._here, self._fleet, self._boot_epoch, self._signer = config, here, fleet, boot_epoch, signer
        self._folder, self._ledger, self._blobs, self._host, self._door, self._clock = folder, ledger, blobs, host, door, clock
        self._members, self._operators = members, operators
        self._has_slots, self._agent = agent is not None, AgentTurns(agent, config)
        self._disk = disk or Disk()
        self._topics = Topics(fleet)
        self._records = Records(ledger)
        self._root = read_bounded(self._disk, Path(config.root), MAX_ROOT_BYTES)
        self._artefacts = Artefacts(folder, blobs, self._disk, self._say)
        self._course: Course | None = None
        self._generation = 0
        self._paused = False
        self._unfinished: set[str] = set()
        """Models that the attempt before had in hand."""
        self._link: Link | None = None
        self._link_up = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._stir = asyncio.Event()
        self._tickets: dict[int, int] = {}
        self.slots: dict[str, ModelSlots] = {}
        host.on_trial = self._ran

    @property
    def charter(self) -> Charter | None:
        return self._course.charter if self._course is not None else None

    @property
    def course(self) -> Course | None:
        """Of the attempt that goes on; ``None`` while the ledger fails."""
        return self._course

    # a start

    def start(self, hosted: Iterable[str]) -> None:
        """Count this start, and take up what the ledger holds. Raises ``SlyError`` when the disk or the ledger fails."""
        self.slots = self._records.count_start(self._config.trial_boots, hosted)
        for note in self._records.take_notes():
            self._door.say(note)
        try:
            self._artefacts.stage()
            self._agent.recover()
        except UnavailableError as error:
            self._door.say(f"updates wait for the disk: {error}")
        self._begin()

    # a ledger that fails

    def pause(self, why: str) -> None:
        """The ledger is gone until ``resume`` brings another."""
        self._paused, self._link_up = True, False
        self._leave_course()
        self._door.say(f"updates pause: {why}")

    def resume(self, ledger: Ledger, boot_epoch: int, door: Door) -> None:
        """Begin anew from what ``ledger`` holds, in a boot of its own. ``open_link`` before what the link brings."""
        self._ledger, self._records = ledger, Records(ledger)
        self._boot_epoch, self._door, self._paused = boot_epoch, door, False
        self._link = None
        try:
            self._begin_as_agent()
        except SlyError as error:
            self._give_up(str(error), None)
            return
        self._spawn(self._take_back_unfinished(), "updates begin anew")

    def _leave_course(self) -> None:
        if self._course is not None:
            self._unfinished |= {model for model, life in self._course.lives.items() if life.doing is not Doing.NOTHING}
        self._course = None
        self._generation += 1

    async def _take_back_unfinished(self) -> None:
        """What was brought, or is on trial, goes: who still wants it brings it again."""
        unfinished, self._unfinished = self._unfinished, set()
        on_trial = {model for model, slots in self.slots.items() if slots.state is State.TRIAL}
        for model in sorted((unfinished | on_trial) - {AGENT}):
            async with self._turns[model]:
                await self._take_back(model)

    async def load_models(self, names: Iterable[str]) -> None:
        """Bring up what is confirmed of each model; where that cannot be, what was before it, at the last the factory's."""
        self._artefacts.keep(frozenset(filter(self._blobs.contains, self._held_digests())))
        for name in dict.fromkeys([*names, *(model for model in self.slots if model != AGENT)]):
            await self._load(name)
        self._begin_as_agent()

    def _begin_as_agent(self) -> None:
        """A course, which knows what agent this is, after a start that a release of the agent may have made."""
        known = self._records.load(AGENT)
        if not self._has_slots and AGENT not in self._records.models():
            self._begin()
            return
        try:
            agreed = self._agent.agree(known)
        except UnavailableError as error:
            self._door.say(f"the agent's own slots wait for the disk: {error}")
            self._begin()
            return
        if agreed.slots != known:
            self._door.say(f"release {agreed.slots.confirmed.number} of the agent is the confirmed one, as the launcher has it")
            with self._ledger.transaction():
                self._records.save(agreed.slots)
        self._begin()
        course = self._course
        if course is not None:
            self._decide(lambda now_us: course.agent_started(agreed.running, now_us, agreed.why), None)
        if agreed.leave:
            self._leave_agent(agreed.leave)

    def _held_digests(self) -> Iterator[bytes]:
        """What no file that is taken into the cache at this start may evict."""
        for held in {held for slots in self.slots.values() for held in slots.held}:
            yield held.manifest
            release = self._artefacts.manifest(held.manifest)
            yield from (file.digest for file in release.files) if release is not None else ()

    async def _load(self, name: str) -> None:
        """What can be loaded of ``name``; a confirmed release whose bytes are lost is given up for good, one that only cannot be
        loaded now is not."""
        slots, lost = self.slots.get(name, ModelSlots(name)), True
        while True:
            try:
                installed = self._installed(name, slots.confirmed)
                self._door.hosted(await self._host.load(name, installed))
                return
            except SlyError as error:
                if slots.confirmed.number == FACTORY:
                    self._door.withdrawn(name, str(error))
                    return
                lost = lost and (isinstance(error, RefusedError) or not self._is_whole(slots.confirmed))
                self._door.say(f"release {slots.confirmed.number} of {name} cannot be loaded: {error}; taking the one before")
            slots = fall_back(slots)
            if lost:
                with self._ledger.transaction():
                    self._records.save(slots)
                self.slots[name] = slots

    def _is_whole(self, held: Held) -> bool:
        """Whether everything of a release is in the cache, as far as names tell."""
        release = self._artefacts.manifest(held.manifest)
        return release is not None and all(self._blobs.contains(file.digest) for file in files_here(self._here, release))

    def _installed(self, name: str, held: Held) -> Installed | None:
        if held.number == FACTORY:
            return None
        release = self._artefacts.manifest(held.manifest)
        if release is None:
            raise UnavailableError(f"release {held.number} of {name}", "its manifest is not in the cache", "push it again")
        return installed_of(self._here, release)

    def _begin(self) -> None:
        """A course from what the ledger and the cache hold."""
        self._generation += 1
        self.slots = {model: self._records.load(model) for model in {*self.slots, *self._records.models()}}
        manifests = {}
        for held in {held for slots in self.slots.values() for held in (*slots.held, slots.candidate) if held}:
            if (release := self._artefacts.manifest(held.manifest)) is not None:
                manifests[held.manifest] = release
        kept = kept_charter(self._ledger, lambda digest: self._artefacts.read(digest, MAX_CHARTER_BYTES))
        if kept.why:
            self._door.say(kept.why)
        self._course = Course(
            self._here, self._fleet, self._boot_epoch, self._signer, self._ledger, self.slots, manifests=manifests,
            held=self._blobs.digests(), charter=kept.charter, charter_digest=kept.digest,
            gives_bytes_per_s=self._config.max_bytes_per_s if self._config.serve else 0,
            members=self._members, operators=self._operators,
        )  # fmt: skip

    # events in

    def open_link(self, link: Link) -> None:
        self._link = link

    def hear(self, event: LinkEvent) -> bool:
        """An event of the link; ``True`` if it was about updates, and nobody else need hear it."""
        match event:
            case LinkUp():
                self._link_up = True
                self.feed(events.LinkTurned(True))
            case LinkDown():
                self._link_up = False
                self._tickets.clear()
                self.feed(events.LinkTurned(False))
            case Published(ticket) if ticket >= FIRST_TICKET:
                self.feed(events.Sent(ticket - FIRST_TICKET))
                return True
            case Rejected(reason, ticket) if ticket >= FIRST_TICKET:
                self.feed(events.Sent(ticket - FIRST_TICKET, reason))
                return True
            case Delivered(message, token):
                return self._heard(message, token)
        return False

    def _heard(self, message: Message, token: int) -> bool:
        try:
            topic = self._topics.parse(message.topic)
        except RefusedError:
            return False
        if topic.kind not in KINDS:
            return False
        if self._course is None:
            self._acknowledge(token)
        else:
            self.feed(events.Heard(topic, message.payload, token))
        return True

    def _ran(self, model: str, why: str) -> None:
        number = self._candidate(model)
        if number:
            self.feed(events.Ran(model, number, why))

    def _candidate(self, model: str) -> int:
        life = self._course.lives.get(model) if self._course is not None else None
        return life.slots.candidate.number if life is not None and life.slots.candidate is not None else 0

    def feed(self, event: events.Event, generation: int | None = None) -> None:
        """Take in an event and decide; ``generation``: of the attempt that it belongs to."""
        if self._course is None or (generation is not None and generation != self._generation):
            if isinstance(event, events.Heard | events.Stored):
                self._acknowledge(event.token)
            return
        self._decide(partial(self._course.handle, event), event)

    def _decide(self, step: Callable[[int], list[events.Effect]], event: object) -> None:
        try:
            with self._ledger.transaction():
                effects = step(self._clock.monotonic_us())
        except SlyError as error:
            self._give_up(str(error), event)
            return
        for effect in effects:
            self._carry_out(effect)
        self._stir.set()

    def _give_up(self, why: str, event: object) -> None:
        """The ledger failed: what this attempt believes may be ahead of it."""
        self._door.say(f"updates pause for {AGAIN_S:g} s: {why}")
        self._leave_course()
        if isinstance(event, events.Heard | events.Stored):
            self._acknowledge(event.token)
        self._spawn(self._begin_again(self._generation), "updates begin anew")

    async def _begin_again(self, generation: int) -> None:
        await asyncio.sleep(AGAIN_S)
        if self._paused or generation != self._generation:
            return
        try:
            self._begin_as_agent()
        except SlyError as error:
            self._give_up(str(error), None)
            return
        await self._take_back_unfinished()
        if self._link_up:
            self.feed(events.LinkTurned(True))

    async def run_for_ever(self) -> None:
        """Let time pass."""
        while True:
            busy = self._course is not None and self._course.pending(self._clock.monotonic_us())
            self._stir.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(BUSY_TICK_S if busy else TICK_S):
                    await self._stir.wait()
                    await asyncio.sleep(BUSY_TICK_S)
            self.feed(events.Tick())

    async def close(self) -> None:
        self._course = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._artefacts.close()

    # effects out

    def _carry_out(self, effect: events.Effect) -> None:
        match effect:
            case events.List():
                self._spawn(self._check(effect), "metadata")
            case events.Open():
                beside = self._host.factory_files(effect.model) if effect.model else ()
                self._spawn(self._told(self._artefacts.opened(effect, beside)), "staging")
            case events.Store():
                self._spawn(self._told(self._artefacts.stored(effect)), "piece")
            case events.Finish(digest):
                self._spawn(self._told(self._artefacts.finished(digest)), "artefact")
            case events.Abandon(digest):
                self._artefacts.abandon(digest)
            case events.Keep(digests):
                self._artefacts.keep(digests)
            case events.Give():
                self._spawn(self._give(effect), "give")
            case events.Bring(installed):
                self._spawn(self._bring(installed.name, installed.number, self._host.bring(installed)), "bring")
            case events.BringBack(model):
                self._spawn(self._bring(model, FACTORY, self._bring_back(model)), "bring back")
            case events.BringAgent(release):
                self._spawn(self._bring(AGENT, release.number, self._install_agent(release)), "install")
            case events.Probe(model, number) | events.Stand(model, number):
                self._spawn(self._probe(model, number), "probe")
            case events.Turn(model, number):
                self._spawn(self._turn(model, number), "turn")
            case events.Settle(model):
                self._spawn(self._settle(model), "settle")
            case events.TurnBack(model, why):
                self._spawn(self._turn_back(model, why), "turn back")
            case events.Adopt(charter):
                self._door.adopt(charter)
            case events.Note(text):
                self._door.say(text)
            case events.Say() | events.Listen() | events.Leave() | events.Done():
                self._use_link(effect)
            case _:
                assert_never(effect)

    def _use_link(self, effect: events.Say | events.Listen | events.Leave | events.Done) -> None:
        if self._link is None:
            return
        try:
            match effect:
                case events.Say(message, ticket):
                    self._link.publish(message, ticket + FIRST_TICKET if ticket else 0)
                case events.Listen(topic_filter):
                    self._link.subscribe(topic_filter)
                case events.Leave(topic_filter):
                    self._link.unsubscribe(topic_filter)
                case events.Done(token):
                    self._acknowledge(token)
        except (UnavailableError, RefusedError) as error:
            self._door.say(f"not sent: {error}")
            if isinstance(effect, events.Say) and effect.ticket:
                self._spawn(self._not_sent(effect.ticket, str(error)), "not sent")

    async def _not_sent(self, ticket: int, why: str) -> None:
        self.feed(events.Sent(ticket, why))

    def _acknowledge(self, token: int) -> None:
        if self._link is not None and token:
            self._link.acknowledge(token)

    # metadata

    async def _check(self, effect: events.List) -> None:
        generation = self._generation
        try:
            checked = await self._checked(effect)
        except SlyError as error:
            self.feed(events.NotListed(str(error), isinstance(error, RefusedError)), generation)
            return
        targets = {path: (each.size_bytes, each.digest) for path, each in checked.targets.items()}
        self.feed(events.Listed(targets, checked.marks), generation)

    async def _checked(self, effect: events.List) -> Checked:
        """By what the broker keeps; by the mirror, if there is one, where that does not do."""
        known = (effect.wanted, effect.floors, NOT_BEFORE_S)
        try:
            return await checking.check(self._folder / "metadata", self._root, effect.offered, *known)
        except SlyError as error:
            if not self._config.url:
                raise
            self._door.say(f"what the broker keeps of the metadata will not do: {error}; asking {self._config.url}")
            return await checking.check(self._folder / "metadata", self._root, {}, *known, self._config.url)

    # models

    async def _bring(self, model: str, number: int, bringing: Coroutine[Any, Any, None]) -> None:
        generation, why = self._generation, ""
        async with self._turns[model]:
            try:
                await bringing
            except SlyError as error:
                why = str(error)
        self.feed(events.Brought(model, number, why), generation)

    async def _probe(self, model: str, number: int) -> None:
        generation, golden = self._generation, b""
        async with self._turns[model]:
            try:
                golden, why = await self._host.golden_beside(model)
            except SlyError as error:
                why = str(error)
        self.feed(events.Probed(model, number, golden, self._door.library(), why), generation)

    async def _turn(self, model: str, number: int) -> None:
        generation, why = self._generation, ""
        try:
            if model == AGENT and self._going_back(model):
                self._agent.go_back()
            elif model == AGENT:
                self._agent.turn()
            else:
                async with self._turns[model]:
                    self._door.hosted(await self._host.hand_over(model))
        except SlyError as error:
            why = str(error)
        self.feed(events.Turned(model, number, why), generation)
        if model == AGENT and not why:
            self._door.start_anew(f"release {number} of the agent takes over")

    def _going_back(self, model: str) -> bool:
        life = self._course.lives.get(model) if self._course is not None else None
        return life is not None and life.doing is Doing.GOING_BACK

    async def _bring_back(self, model: str) -> None:
        """The agent's own environment before this one is still there."""
        if model != AGENT:
            await self._host.bring_factory(model)

    async def _settle(self, model: str) -> None:
        if model == AGENT:
            await self._settle_agent()
            return
        async with self._turns[model]:
            await self._host.settle(model)

    async def _turn_back(self, model: str, why: str) -> None:
        if model == AGENT:
            self._leave_agent(why)
            return
        async with self._turns[model]:
            await self._take_back(model)

    async def _settle_agent(self) -> None:
        """Until it is kept: the guard of a trial ends whom the launcher's record does not have as confirmed."""
        while True:
            try:
                self._agent.settle()
                return
            except SlyError as error:
                self._door.say(f"the agent is confirmed, which its launcher cannot be told: {error}")
            await asyncio.sleep(AGAIN_S)

    def _leave_agent(self, why: str) -> None:
        """What the record cannot be told now, the next start finds out from the ledger."""
        try:
            ends = self._agent.turn_back(why)
        except SlyError as error:
            self._door.say(f"the launcher cannot be told that it is to go back: {error}")
            return
        if ends:
            self._door.start_anew(f"the agent before takes over again: {why}")

    async def _take_back(self, model: str) -> None:
        try:
            offer = await self._host.take_back(model)
        except SlyError as error:
            self._door.withdrawn(model, str(error))
            return
        if offer is None:
            self._door.withdrawn(model, "no release of it served before")
        else:
            self._door.hosted(offer)

    async def _install_agent(self, release: Release) -> None:
        await self._agent.install(release, {file.name: self._blobs.path_of(file.digest) for file in release.files})

    async def _give(self, effect: events.Give) -> None:
        generation, digest = self._generation, effect.artefact.digest
        try:
            data = await self._artefacts.piece(effect.artefact, effect.index)
        except SlyError as error:
            self.feed(events.Sent(effect.ticket, str(error)), generation)
            return
        topic = self._topics.ota_chunk(digest.hex())
        self._use_link(events.Say(Message(topic, encode_chunk(effect.index, data)), effect.ticket))

    # beside the loop

    async def _told(self, work: Coroutine[Any, Any, events.Event]) -> None:
        """What came of it, unless the attempt that it belongs to is over."""
        generation = self._generation
        self.feed(await work, generation)

    def _say(self, text: str) -> None:
        self._door.say(text)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._door.say(f"updates: {task.get_name()} failed: {error!r}")
