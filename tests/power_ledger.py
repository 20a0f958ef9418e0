"""A stand-in for the ledger on a disk whose power may be cut: see ``tests/power.py`` for what it assumes of SQLite.

Rules: a commit is one change of the disk, and the power may fail in it; a transaction replaces the whole book.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import DIGEST_BYTES
from tests.virtual_disk import Keeps, VirtualDisk

COMMIT = "commit"


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
