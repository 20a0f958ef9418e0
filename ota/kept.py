"""What the updates of a board keep in its ledger beside the slots: how far it is with each plan, rollouts, the names of floors.

Owns the documents ``ota/charter``, ``ota/progress``, ``ota/rollout/<model>`` and ``ota/marks``.  Rules: nothing of it keeps a
board from starting: what cannot be read counts as never written, with one line that says so, and is written anew with the next
change; the names of the floors lie there twice, because a name that is lost is a floor that is not asked for; the floors
themselves are high-water marks, which never go down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import DIGEST_BYTES
from ota.charter import Charter, decode_charter
from ota.checked import MAX_MARKS
from ota.records import Books
from ota.rollout import MAX_ROLLOUTS, Progress, Step

CHARTER, CHARTER_SERIAL = "ota/charter", "ota/charter_serial"
PROGRESS, ROLLOUT = "ota/progress", "ota/rollout/"
MARKS = ("ota/marks", "ota/marks/again")
ROOT_MARK = "tuf/root"
MAX_KEPT_BYTES = 160 * 2**10
"""Of one of these documents."""

_PROGRESS = {1: ("model", str), 2: ("serial", int), 3: ("step", str), 4: ("why", str), 5: ("failed", bool)}


class Kept:
    """``notes``: what was found damaged, a line each. Every method raises as the ledger's do."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self.notes: list[str] = []
        self._names = {ROOT_MARK}
        self._names_kept = False
        self._told: dict[str, Progress] = {}
        """Of what was asked last whether it is worth a write."""
        self._floors: dict[str, int] | None = None
        self.progress = self._read_progress()
        self._read_names()

    # how far this board is

    def put_progress(self, progress: Mapping[str, Progress]) -> None:
        """Keep how far each model is, if that is worth a write: of what was fetched the staging knows itself."""
        if progress == self._told:
            return
        self._told = dict(progress)
        kept = {model: each.at(each.step, 0, each.why) for model, each in progress.items()}
        if kept == self.progress:
            return
        self.progress = kept
        newest = sorted(kept.values(), key=lambda each: (each.serial, each.model))[-MAX_ROLLOUTS:]
        entries = [{key: getattr(each, name) for key, (name, _) in _PROGRESS.items()} | {3: each.step.value} for each in newest]
        self._books.put_document(PROGRESS, encode(entries))

    def _read_progress(self) -> dict[str, Progress]:
        data = self._books.document(PROGRESS)
        try:
            return {each.model: each for each in _progress(data)} if data is not None else {}
        except RefusedError as error:
            self.notes.append(f"how far this board was with its rollouts is lost: {error}")
            return {}

    # the rollouts that name this board

    def put_rollout(self, model: str, signed: bytes) -> None:
        self._books.put_document(ROLLOUT + model, signed)

    def rollouts(self, models: Iterable[str]) -> dict[str, bytes]:
        """As they were signed, of those of ``models`` that have one."""
        found = {model: self._books.document(ROLLOUT + model) for model in sorted(set(models))}
        return {model: signed for model, signed in found.items() if signed is not None}

    # the floors of the metadata

    @property
    def floors(self) -> dict[str, int]:
        """What no metadata may be below."""
        if self._floors is None:
            marks = {name: self._books.high_water(name) for name in sorted(self._names)}
            self._floors = {name: mark for name, mark in marks.items() if mark}
        return self._floors

    def raise_floors(self, marks: Mapping[str, int]) -> None:
        """Metadata with these marks holds. Raises ``RefusedError``, and raises nothing, if one is below its floor; that floor
        is asked for from then on."""
        new = marks.keys() - self._names
        self._names |= new
        self._floors = None
        for name, mark in marks.items():
            floor = self._books.high_water(name)
            if mark < floor:
                raise RefusedError(f"metadata, {name}", mark, f"{floor} or more", "this is a rollback")
        for name, mark in marks.items():
            self._books.raise_high_water(name, mark)
        if new or not self._names_kept:
            self._put_names(marks.keys())

    def _put_names(self, now: Iterable[str]) -> None:
        """Those that count now, and as many of the rest as there may be."""
        newest = {*now, ROOT_MARK}
        rest = sorted(self._names - newest)[: max(0, MAX_MARKS - len(newest))]
        self._names, self._names_kept = newest | set(rest), True
        for document in MARKS:
            self._books.put_document(document, encode(sorted(self._names)))

    def _read_names(self) -> None:
        copies = [self._books.document(document) for document in MARKS]
        self._names_kept = all(copies)
        for document, data in zip(MARKS, copies, strict=True):
            try:
                self._names |= set(_names(data)) if data is not None else set()
            except RefusedError as error:
                self._names_kept = False
                self.notes.append(f"the list of floors {document} cannot be read: {error}")


@dataclass(frozen=True, slots=True)
class KeptCharter:
    """``charter``: the one in force, and its digest; ``why``: there should be one, and it cannot be had."""

    charter: Charter | None = None
    digest: bytes = b""
    why: str = ""


def kept_charter(books: Books, blob: Callable[[bytes], bytes]) -> KeptCharter:
    """The charter that the ledger names; ``blob`` gives the bytes of a digest, checked, nothing where they are lost.

    Raises as the ledger does, and never for what is damaged.
    """
    digest = books.document(CHARTER)
    if digest is None:
        return KeptCharter()
    subject = "the charter that was in force cannot be read, and is fetched again: "
    if len(digest) != DIGEST_BYTES:
        return KeptCharter(why=f"{subject}its name of {len(digest)} bytes is no digest")
    data = blob(digest)
    if not data:
        return KeptCharter(why=f"{subject}{digest.hex()[:16]}… is not in the cache")
    try:
        return KeptCharter(decode_charter(data), digest)
    except RefusedError as error:
        return KeptCharter(why=f"{subject}{error}")


def _progress(data: bytes) -> list[Progress]:
    entries = list_of(decode(data, MAX_KEPT_BYTES, subject="kept progress"), "kept progress", dict, MAX_ROLLOUTS)
    found = []
    for each in entries:
        entry = fields(each, "kept progress", _PROGRESS)
        if entry["step"] not in list(Step):
            raise RefusedError("kept progress, step", shown(entry["step"]), ", ".join(Step))
        found.append(Progress(**{**entry, "step": Step(entry["step"])}))
    return found


def _names(data: bytes) -> list[str]:
    return list_of(decode(data, MAX_KEPT_BYTES, subject="list of floors"), "list of floors", str, MAX_MARKS)
