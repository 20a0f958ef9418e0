"""A board takes releases, and its power is cut at every change of its disk, and again while it recovers: nothing may be lost.

The disk is ``tests.virtual_disk`` (what was not fsynced is dropped, torn and reordered); over it run the real ``BlobStore``, the
real ``Staging`` and the real ``Records``.  ``Journal`` stands in for the ledger and assumes of SQLite (WAL, ``synchronous=FULL``)
what ``store.database`` rests on: a transaction is all or nothing; when its commit returned it is durable; cut during the commit
it is found whole or not at all; nothing of it survives a cut before.  (That of SQLite itself is shown by killing real processes:
``tests/test_power.py`` and ``tests/test_kill.py``.)

A *state* is a disk that may be found after a cut, on which a board was started and everything was checked: what had been
acknowledged is there (slots, floor, what is owed, the chain of receipts); what is not acknowledged is there in whole or not;
the release that runs, and those it may go back to, are whole, byte by byte; the cache keeps its budget.

``python -m tests.power N`` checks N states of ever other stories on all cores.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import chain
from multiprocessing import Pool
from pathlib import Path
from random import Random

from edge_agent.core.cbor import decode, encode
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import DIGEST_BYTES
from edge_agent.store.blobs import BlobStore
from edge_agent.store.files import PART_PREFIX
from edge_agent.store.staging import Receiving, Staging
from ota import records
from ota.records import Records
from ota.slots import Held, ModelSlots, State, confirm, give_up, go_back, roll_back, stage, try_
from tests.virtual_disk import Keeps, PowerCutError, VirtualDisk, mixture, survivals

records._opened = lru_cache(4096)(records._opened)  # pure; the same few records are read in every state

MODEL = "m"
CACHE, GROWING = Path("/state/models"), Path("/state/models/growing")
STEP_BYTES = 600
"""Of a piece: not a multiple of a sector, so that pieces share sectors."""
MOST_RELEASES = 6
"""Of one story."""
MAX_STARTS = 1000
"""Within a trial; that few of them end it is shown by ``tests/test_power.py`` and ``tests/test_slots.py``."""
COMMIT = "commit"
SECOND_CUTS = 8


@dataclass(frozen=True)
class File:
    """The bytes of a released file and their pieces, as ``ota.chunks.Artefact`` has them, but of small ones."""

    data: bytes
    step_bytes: int = STEP_BYTES

    @cached_property
    def digest(self) -> bytes:
        return sha256(self.data).digest()

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    @property
    def count(self) -> int:
        return -(-len(self.data) // self.step_bytes)

    def piece(self, index: int) -> bytes:
        return self.data[index * self.step_bytes : (index + 1) * self.step_bytes]

    def piece_bytes(self, index: int) -> int:
        return len(self.piece(index))

    def piece_digest(self, index: int) -> bytes:
        return sha256(self.piece(index)).digest()

    def check(self, index: int, data: bytes | memoryview) -> None:
        if bytes(data) != self.piece(index):
            raise RefusedError(f"piece {index}", "other bytes")


@dataclass(frozen=True)
class Published:
    """A release of two files, of which a piece is the same in all releases, and its manifest: the digests of its files."""

    number: int
    files: tuple[File, File]

    @cached_property
    def manifest(self) -> File:
        data = encode([self.number, *(each.digest for each in self.files)])
        return File(data + bytes(250 - len(data)), step_bytes=250)

    @property
    def held(self) -> Held:
        return Held(self.number, self.manifest.digest)


@lru_cache(64)
def published(number: int, seed: int) -> Published:
    random = Random(f"{seed}/{number}")
    same = Random(seed).randbytes(STEP_BYTES)
    large = random.randbytes(random.randint(1, STEP_BYTES)) if number % 2 else random.randbytes(STEP_BYTES)
    return Published(number, (File(same + large), File(random.randbytes(random.randint(1, STEP_BYTES)))))


@lru_cache(8)
def budget_bytes(seed: int) -> int:
    """Of the cache: for the three largest releases of a story and nothing more, so an older one has to give way to a new one."""
    releases = [published(number, seed) for number in range(1, MOST_RELEASES + 1)]
    sizes = [sum(file.size_bytes for file in (each.manifest, *each.files)) for each in releases]
    return sum(sorted(sizes)[-3:])


@dataclass(frozen=True)
class Book:
    """What the ledger holds; a commit replaces all of it."""

    documents: dict[str, bytes] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)
    owed: tuple[str, ...] = ()
    delivered: tuple[str, ...] = ()
    receipts: tuple[bytes, ...] = ()


class Mains(VirtualDisk):
    """The disk of the whole board: the files, and what was committed. A commit is one change, and the power may fail in it."""

    def __init__(self, cut_at: int | None = None) -> None:
        super().__init__(cut_at)
        self.book = Book()
        self.writing: Book | None = None

    def rebooted(self, keeps: Keeps, cut_at: int | None = None, kind: type[VirtualDisk] | None = None) -> Mains:
        new = super().rebooted(keeps, cut_at, kind)
        assert isinstance(new, Mains)
        new.book = self.writing if self.writing is not None and keeps(COMMIT) else self.book
        return new

    def killed(self) -> Mains:
        """As a killed process leaves it: SQLite finds what was being committed in whole, or not at all; here not at all."""
        super().killed()
        self.writing = None
        return self

    def commit(self, book: Book) -> None:
        self.writing = book
        self._change()
        self.book, self.writing = book, None


class Journal:
    """The ledger's stand-in: see the head of this file."""

    def __init__(self, disk: Mains) -> None:
        self._disk = disk
        self._open: Book | None = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        assert self._open is None, "transactions do not nest"
        book = self._disk.book
        self._open = replace(book, documents=dict(book.documents), marks=dict(book.marks))
        try:
            yield
            if self._open != book:
                self._disk.commit(self._open)
        finally:
            self._open = None

    @property
    def book(self) -> Book:
        return self._open or self._disk.book

    def document(self, name: str) -> bytes | None:
        return self.book.documents.get(name)

    def put_document(self, name: str, data: bytes) -> None:
        self._changing.documents[name] = data

    def high_water(self, name: str) -> int:
        return self.book.marks.get(name, 0)

    def raise_high_water(self, name: str, value: int) -> None:
        if value < self.high_water(name):
            raise RefusedError(f"high-water mark {name}", value, f"{self.high_water(name)} or more")
        self._changing.marks[name] = value

    def owe(self, key: str) -> None:
        if key not in self.book.owed + self.book.delivered:
            self._open = replace(self._changing, owed=(*self.book.owed, key))

    def deliver(self, key: str) -> None:
        owed = tuple(each for each in self.book.owed if each != key)
        self._open = replace(self._changing, owed=owed, delivered=(*self.book.delivered, key))

    def append(self, body: bytes) -> None:
        before = sha256(self.book.receipts[-1]).digest() if self.book.receipts else bytes(DIGEST_BYTES)
        self._open = replace(self._changing, receipts=(*self.book.receipts, before + body))

    @property
    def _changing(self) -> Book:
        assert self._open is not None, "a change outside a transaction"
        return self._open


@dataclass(frozen=True)
class Take:
    """An operator pushes a release: it is sound, or rolls back, or is given up while it is fetched."""

    number: int
    end: str = "sound"


@dataclass(frozen=True)
class Return:
    """The fleet goes back to the release before."""


@dataclass(frozen=True)
class Deliver:
    """What is owed is sent, one message after another."""


Deed = Take | Return | Deliver
Story = tuple[Deed, ...]
WHOLE_STORY: Story = (Take(2), Take(3, "bad"), Deliver(), Take(4, "dropped"), Take(4), Return(), Take(5), Deliver())


def told(seed: int) -> Story:
    """A story that can happen; that of seed 0 has everything in it."""
    if not seed:
        return WHOLE_STORY
    random, deeds, confirmed, number = Random(seed), list[Deed](), [1], 1
    for _ in range(5):
        deed = random.choice(("sound", "sound", "bad", "dropped", "return", "deliver"))
        if deed == "return" and len(confirmed) < 2 or deed == "deliver" and not deeds:
            deed = "sound"
        if deed == "return":
            deeds.append(Return())
            confirmed = confirmed[-2:-1]
        elif deed == "deliver":
            deeds.append(Deliver())
        else:
            number += 1
            deeds.append(Take(number, deed))
            confirmed += [number] * (deed == "sound")
    return tuple(deeds)


@dataclass
class Witness:
    """Stands outside and is not hit by the power cut: what was acknowledged, and what was being written."""

    sure: Book = Book()
    perhaps: Book | None = None
    starts: int = 0

    def copy(self) -> Witness:
        return replace(self)

    @contextmanager
    def seeing(self, journal: Journal) -> Iterator[None]:
        """A transaction of ``journal``, and what it acknowledges."""
        with journal.transaction():
            yield
            self.perhaps = journal.book
        self.sure, self.perhaps = journal.book, None


class Board:
    """A start of the agent on a disk, and what it does from there; it knows of before what is on the disk, and nothing else."""

    def __init__(self, disk: Mains, seed: int, witness: Witness) -> None:
        self.disk, self.seed, self.witness = disk, seed, witness
        self.journal = Journal(disk)
        self.records = Records(self.journal)
        self.slots = self.records.count_start(MAX_STARTS, [MODEL])[MODEL]
        self.blobs = BlobStore(CACHE, budget_bytes(seed), disk)
        self.staging = Staging(GROWING, self.blobs, disk)
        self.pinned: list[bytes] = []
        self.pin()
        self.staging.sweep(self.fetched())

    def release(self, number: int) -> Published:
        return published(number, self.seed)

    def pin(self) -> None:
        """Keep what the slots hold, as far as it is here."""
        for digest in self.pinned:
            self.blobs.unpin(digest)
        files = [file for held in self.slots.held for file in self.parts(held.number)]
        self.pinned = [file.digest for file in files if self.blobs.contains(file.digest)]
        for digest in self.pinned:
            self.blobs.pin(digest)

    def parts(self, number: int) -> tuple[File, ...]:
        release = self.release(number)
        return (release.manifest, *release.files) if number % 2 else (*release.files, release.manifest)

    def fetched(self) -> list[bytes]:
        """What may grow beside the cache."""
        candidate = self.slots.candidate if self.slots.state is State.STAGING else None
        return [file.digest for file in self.parts(candidate.number)] if candidate else []

    @property
    def done(self) -> int:
        """How many deeds of the story are behind it, by its own book."""
        return int(self.journal.document("story") or 0)

    def go_on(self, story: Story) -> None:
        """All that is still to be done of ``story``."""
        for index in range(self.done, len(story)):
            match story[index]:
                case Take(number, end):
                    self.take(self.release(number), end)
                case Return():
                    self.save(go_back(self.slots), f"returned {index}", index + 1)
                case Deliver():
                    self.deliver(index + 1)

    def take(self, release: Published, end: str) -> None:
        index = self.done
        if self.slots.state in (State.EMPTY, State.ROLLED_BACK):
            self.save(stage(self.slots, release.held), f"staging {index}")
        if self.slots.state is State.STAGING:
            for part in self.parts(release.number):
                if end == "dropped" and part is not release.manifest:
                    self.drop(part, index)
                    return
                self.fetch(part)
            self.save(try_(self.slots), f"trial {index}")
        check_whole(self, release.held)
        if end == "sound":
            self.save(confirm(self.slots), f"confirmed {index}", index + 1)
        else:
            self.save(roll_back(self.slots, "NaN"), f"rolled back {index}", index + 1)

    def fetch(self, file: File) -> None:
        """A file grows piece by piece; a manifest of an even release comes in one go, as what set-up brings does."""
        if file.step_bytes != STEP_BYTES and self.slots.candidate and self.slots.candidate.number % 2 == 0:
            self.blobs.add([file.data], file.digest, file.size_bytes)
        elif not self.blobs.contains(file.digest):
            receiving = self.begun(file)
            for index in reversed(range(file.count)):
                receiving.put(index, file.piece(index))
            receiving.finish()
        self.pin()

    def drop(self, file: File, index: int) -> None:
        if not self.blobs.contains(file.digest):
            receiving = self.begun(file)
            receiving.put(file.count - 1, file.piece(file.count - 1))
            receiving.close()
        self.save(give_up(self.slots), f"given up {index}", index + 1)
        self.staging.sweep([])

    def begun(self, file: File) -> Receiving:
        receiving = self.staging.open(file)
        for held in self.slots.held:
            for part in self.release(held.number).files:
                receiving.seed(part.digest)
        return receiving

    def save(self, slots: ModelSlots, said: str, done: int | None = None) -> None:
        """Slots, a report that is owed and a receipt, in one transaction."""
        with self.witness.seeing(self.journal):
            self.records.save(slots)
            self.journal.owe(said)
            self.journal.append(said.encode())
            if done is not None:
                self.journal.put_document("story", b"%d" % done)
        self.slots = slots
        self.pin()

    def deliver(self, done: int) -> None:
        for key in self.journal.book.owed:
            with self.witness.seeing(self.journal):
                self.journal.deliver(key)
        with self.witness.seeing(self.journal):
            self.journal.put_document("story", b"%d" % done)

    def content(self, digest: bytes) -> bytes:
        fd = self.blobs.open_verified(digest)
        try:
            return self.disk.read(fd, budget_bytes(self.seed))
        finally:
            self.disk.close(fd)


class LostError(AssertionError):
    """Something that was acknowledged is not there, or something is there that cannot be."""


def must(holds: object, lost: str) -> None:
    if not holds:
        raise LostError(lost)


def started(disk: Mains, seed: int, witness: Witness) -> Board:
    """The board after a start on ``disk``. Raises ``LostError`` when it does not start."""
    try:
        return Board(disk, seed, witness)
    except (RefusedError, UnavailableError) as error:
        raise LostError(f"the board does not start: {error}") from error


def check(board: Board) -> None:
    """Everything that must hold after any start."""
    must(board.records.take_notes() == [], "a record is damaged")
    check_book(board.journal.book, board.witness)
    board.blobs.reserve("what comes next", 0)  # a blob that gave way may be found again: it goes before the next byte comes
    must(board.blobs.used_bytes <= budget_bytes(board.seed), "the cache is over its budget")
    slots = board.slots
    must(board.journal.high_water(f"ota/{MODEL}") == slots.floor, "the security floor is not a mark of its own")
    on_trial = slots.candidate if slots.state is State.TRIAL else None
    for held in (slots.confirmed, slots.previous, on_trial):
        if held is not None and held.number:
            check_whole(board, held)
    growing = {digest.hex() for digest in board.fetched() if not board.blobs.contains(digest)}
    must(not [name for name in board.disk.names(CACHE) if name.startswith(PART_PREFIX)], "a part is left for ever")
    must(set(board.disk.names(GROWING)) <= growing, "something grows that nobody fetches")


def check_book(found: Book, witness: Witness) -> None:
    """It is what was acknowledged, or that and the transaction that was under way; starts within a trial are counted on top."""
    allowed = [without_starts(book) for book in (witness.sure, witness.perhaps) if book is not None]
    must(without_starts(found) in allowed, "the book is neither what was acknowledged nor what was being written")
    must(found.marks.get(f"ota/{MODEL}", 0) >= witness.sure.marks.get(f"ota/{MODEL}", 0), "the security floor sank")
    before = bytes(DIGEST_BYTES)
    for receipt in found.receipts:
        must(receipt.startswith(before), "the chain of receipts is broken")
        before = sha256(receipt).digest()


def without_starts(book: Book) -> tuple[object, ...]:
    slots = slots_in(tuple(sorted(book.documents.items())), book.marks.get(f"ota/{MODEL}", 0))
    return (slots, book.marks, book.owed, book.delivered, book.receipts, book.documents.get("story"))


@lru_cache(64)
def slots_in(documents: tuple[tuple[str, bytes], ...], floor: int) -> ModelSlots:
    disk = Mains()
    disk.book = Book(dict(documents), {f"ota/{MODEL}": floor})
    return replace(Records(Journal(disk)).load(MODEL), boots=0)


def check_whole(board: Board, held: Held) -> None:
    try:
        manifest = board.content(held.manifest).rstrip(b"\0")
        number, *digests = decode(manifest)  # type: ignore[misc]
        must(number == held.number, "another release under this manifest")
        must(
            [board.content(digest) for digest in digests] == [file.data for file in board.release(held.number).files],
            "other files",
        )
    except (RefusedError, UnavailableError) as error:
        raise LostError(f"release {held.number} cannot run: {error}") from error


def at_first(seed: int) -> tuple[Mains, Witness]:
    """A board on which release 1 was confirmed, as durable as can be."""
    disk, witness = Mains(), Witness()
    board = Board(disk, seed, witness)
    board.take(board.release(1), "sound")
    with board.journal.transaction():
        board.journal.put_document("story", b"0")
    return disk.rebooted(lambda _: True), Witness(board.journal.book)


def runs(start: Mains, seed: int, story: Story, witness: Witness) -> Iterator[tuple[Mains, Witness]]:
    """The board on ``start`` goes on with ``story``, cut at its first change, its second, ...; the disk as the cut leaves it."""
    cut_at, cut = 1, True
    while cut:
        disk, seen = start.rebooted(lambda _: True, cut_at), witness.copy()
        try:
            Board(disk, seed, seen).go_on(story)
            cut = False
        except PowerCutError:
            pass
        yield disk, seen
        cut_at += 1


def states(seed: int, random_ones: int = 3, second_cuts: int = SECOND_CUTS) -> Iterator[None]:
    """Check one state after another of the story of ``seed``. Raises ``LostError``."""
    story, random = told(seed), Random(seed)
    start, witness = at_first(seed)
    for crashed, seen in runs(start, seed, story, witness):
        found = [crashed.rebooted(keeps) for keeps in survivors(random, random_ones)]
        for disk in found:
            check(started(copied(disk), seed, seen.copy()))
            yield
            yield from second(disk, seed, story, seen, random, second_cuts)
        check_end(random.choice(found), seed, story, seen)
        yield


def second(found: Mains, seed: int, story: Story, seen: Witness, random: Random, cuts: int) -> Iterator[None]:
    """The power fails again, at one of the first changes after the start or at any later one."""
    for cut_at in range(1, cuts + 1):
        disk, again = found.rebooted(lambda _: True, cut_at), seen.copy()
        again.perhaps, again.sure = None, disk.book
        try:
            Board(disk, seed, again).go_on(story)
            return
        except PowerCutError:
            after = disk.rebooted(mixture(random))
            check(started(after, seed, again))
            yield


def after_kills(seed: int, later_cuts: int = SECOND_CUTS) -> Iterator[None]:
    """First the process is killed: what it wrote is seen by the next one, and is still not durable; then the power fails."""
    story, random = told(seed), Random(seed)
    start, witness = at_first(seed)
    total = sum(1 for _ in runs(start, seed, story, witness))
    for killed_at in range(1, total):
        for cut_at in range(1, later_cuts + 1):
            disk, seen = start.rebooted(lambda _: True, killed_at), witness.copy()
            with suppress(PowerCutError):
                Board(disk, seed, seen).go_on(story)
            seen.sure, seen.perhaps = disk.killed().book, None
            disk.cut_at = disk.changes + cut_at
            with suppress(PowerCutError):
                Board(disk, seed, seen).go_on(story)
            for keeps in (nothing, mixture(random)):
                check(started(disk.rebooted(keeps), seed, seen.copy()))
                yield


def nothing(_: str) -> bool:
    return False


def check_end(found: Mains, seed: int, story: Story, seen: Witness) -> None:
    """Nothing is cut any more: the story comes to its end, whatever had happened before, and the end is durable."""
    disk, again = copied(found), seen.copy()
    again.sure, again.perhaps = disk.book, None
    Board(disk, seed, again).go_on(story)
    board = started(disk.rebooted(nothing), seed, again)
    check(board)
    must(board.done == len(story), "the story did not come to its end")
    delivered = board.journal.book.delivered
    must(len(set(delivered)) == len(delivered), "delivered twice")


def survivors(random: Random, random_ones: int) -> Iterator[Keeps]:
    yield from survivals(0)
    for _ in range(random_ones):
        yield mixture(random)


def copied(disk: Mains) -> Mains:
    return disk.rebooted(lambda _: True)


def _one(seed: int) -> tuple[int, int, str]:
    checked = 0
    try:
        for _ in chain(states(seed), after_kills(seed, later_cuts=2)):
            checked += 1
    except LostError as error:
        return seed, checked, str(error)
    return seed, checked, ""


def main(count: int) -> int:
    began, checked, lost = time.monotonic(), 0, list[str]()
    with Pool() as pool:
        for seed, more, why in pool.imap_unordered(_one, range(count)):
            checked += more
            lost += [f"story {seed}, state {more + 1}: {why}"] if why else []
            seconds = time.monotonic() - began
            sys.stderr.write(f"\r{checked:,} states, {len(lost)} losses, {checked / seconds:,.0f} states/s ")
            sys.stderr.flush()
            if checked >= count or len(lost) > 20:
                pool.terminate()
                break
    sys.stderr.write("\n")
    print("\n".join(lost) or f"{checked:,} states, no loss, in {seconds:.0f} s on {os.cpu_count()} cores")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000))
