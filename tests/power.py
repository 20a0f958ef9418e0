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
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from itertools import chain
from multiprocessing import Pool
from pathlib import Path
from random import Random

from edge_agent.core.cbor import decode
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import DIGEST_BYTES
from edge_agent.store.blobs import BlobStore
from edge_agent.store.files import PART_PREFIX
from edge_agent.store.staging import Receiving, Staging
from ota import records
from ota.records import Records
from ota.slots import Held, ModelSlots, State, confirm, give_up, go_back, roll_back, stage, try_
from tests.power_ledger import Book, Journal, Mains
from tests.power_stories import STEP_BYTES, Deliver, File, Published, Return, Story, Take, budget_bytes, published, told
from tests.virtual_disk import Keeps, PowerCutError, mixture, survivals

records._opened = lru_cache(4096)(records._opened)  # pure; the same few records are read in every state

MODEL = "m"
CACHE, GROWING = Path("/state/models"), Path("/state/models/growing")
MAX_STARTS = 1000
"""Within a trial; that few of them end it is shown by ``tests/test_slots.py``."""
SECOND_CUTS = 8


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
        number, _, *digests = decode(board.content(held.manifest))  # type: ignore[misc]
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
            if why:
                lost.append(f"story {seed}, state {more + 1}: {why}")
                sys.stderr.write(f"\r{lost[-1]}\n")
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
