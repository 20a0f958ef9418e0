"""What a check of the fleet's signed metadata is asked and what it answers, as values and as bytes between two processes.

Owns ``Target``, ``Question``, ``Answer`` and their CBOR.  Rules: no I/O and no python-tuf, so that the agent can hold it; every
count and length is bounded on both sides, because the one who answers has parsed what came from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import DIGEST_BYTES, bounded

MAX_DOCUMENTS = 1_000
"""Metadata documents that are offered at once: all roots of a fleet and the last two of the other roles."""
MAX_OFFERED_BYTES = 16 * 2**20
MAX_NAME_CHARS = 160
MAX_PATH_CHARS = 512
MAX_PATHS = 16_384
"""Targets that one fleet lists."""
MAX_WANTED = 256
MAX_MARKS = 1_000
"""Each rotation of a role's keys adds one."""
MAX_NOTES = 16
MAX_NOTE_CHARS = 600
MAX_TARGET_BYTES = 4 * 2**30
MAX_VERSION = 2**63 - 1
MAX_TIME_S = 253_402_300_799
"""The last second of the year 9999, the last that TUF can write."""
MAX_QUESTION_BYTES = MAX_OFFERED_BYTES + 2 * 2**20
MAX_ANSWER_BYTES = 16 * 2**20
MAX_ANSWER_ITEMS = 5 * MAX_PATHS


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """A file that the fleet has signed for; ``digest``: its SHA-256.

    Raises ``RefusedError`` for a path that is empty, too long or not printable, and a size or digest of an impossible length.
    """

    path: str
    size_bytes: int
    digest: bytes

    def __post_init__(self) -> None:
        bounded("target path, length", len(self.path), 1, MAX_PATH_CHARS, "characters")
        if not self.path.isprintable():
            raise RefusedError("target path", self.path, "printable characters")
        bounded(f"size of target {self.path}", self.size_bytes, 0, MAX_TARGET_BYTES, "bytes")
        bounded(f"digest of target {self.path}, length", len(self.digest), DIGEST_BYTES, DIGEST_BYTES, "bytes")


@dataclass(frozen=True, slots=True)
class Checked:
    """What the fleet's metadata says, all of it verified.

    ``targets``: those that were wanted and exist, by path; ``paths``: the names of all.  ``marks``: the versions that were
    accepted, to be kept as floors for ever.  ``signed_s``: when the publisher signed the timestamp, in seconds since 1970, 0 if
    it does not say.  ``notes``: what was odd and did no harm.
    """

    targets: Mapping[str, Target]
    marks: Mapping[str, int]
    signed_s: int
    root_version: int
    paths: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """``folder``: where verified metadata is kept; ``root``: the root that this board was enrolled with; ``offered``: documents
    by the names that they have on ``ota/meta/``, or ``url``: where to fetch them; ``want``: target paths, ``*`` stands for any
    part of a path between slashes; ``floors``: marks of earlier checks; ``not_before_s``: a time that has passed for sure."""

    folder: Path
    root: bytes
    offered: Mapping[str, bytes] = field(default_factory=dict)
    want: tuple[str, ...] = ()
    floors: Mapping[str, int] = field(default_factory=dict)
    not_before_s: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        bounded("metadata documents, count", len(self.offered), 0, MAX_DOCUMENTS)
        bounded("metadata documents, length", sum(map(len, self.offered.values())), 0, MAX_OFFERED_BYTES, "bytes")
        for name in self.offered:
            bounded("metadata document's name, length", len(name), 1, MAX_NAME_CHARS, "characters")
        bounded("wanted targets, count", len(self.want), 0, MAX_WANTED)
        bounded("floors, count", len(self.floors), 0, MAX_MARKS)
        bounded("not_before_s", self.not_before_s, 0, MAX_TIME_S, "s")


_QUESTION = {
    1: ("folder", str), 2: ("root", bytes), 3: ("offered", list), 4: ("want", list),
    5: ("floors", list), 6: ("not_before_s", int), 7: ("url", str),
}  # fmt: skip
_ANSWER = {
    1: ("targets", list), 2: ("marks", list), 3: ("signed_s", int), 4: ("root_version", int), 5: ("paths", list),
    6: ("notes", list),
}  # fmt: skip
_REFUSED, _UNAVAILABLE = 8, 9
_REFUSAL = {_REFUSED: ("refused", list)}
_ABSENCE = {_UNAVAILABLE: ("unavailable", list)}


def encode_question(question: Question) -> bytes:
    return encode({
        1: str(question.folder), 2: question.root, 3: _pairs(question.offered), 4: question.want,
        5: _pairs(question.floors), 6: question.not_before_s, 7: question.url,
    })  # fmt: skip


def decode_question(data: bytes) -> Question:
    """Raises ``RefusedError`` for anything that ``encode_question`` does not write."""
    values = fields(decode(data, MAX_QUESTION_BYTES, subject="question"), "question", _QUESTION)
    return Question(
        folder=Path(values["folder"]),
        root=values["root"],
        offered=_mapping(values["offered"], "offered", bytes, MAX_DOCUMENTS),
        want=tuple(list_of(values["want"], "want", str, MAX_WANTED)),
        floors=_mapping(values["floors"], "floors", int, MAX_MARKS),
        not_before_s=values["not_before_s"],
        url=values["url"],
    )


def encode_answer(checked: Checked) -> bytes:
    targets = [[each.path, each.size_bytes, each.digest] for each in checked.targets.values()]
    notes = [note[:MAX_NOTE_CHARS] for note in checked.notes[:MAX_NOTES]]
    return encode({
        1: targets, 2: _pairs(checked.marks), 3: checked.signed_s, 4: checked.root_version, 5: checked.paths, 6: notes,
    })  # fmt: skip


def encode_refused(error: RefusedError) -> bytes:
    got = "" if error.got is None else str(error.got)
    return encode({_REFUSED: [each[:MAX_NOTE_CHARS] for each in (error.subject, got, error.allowed, error.remedy)]})


def encode_unavailable(subject: str, reason: str, remedy: str) -> bytes:
    return encode({_UNAVAILABLE: [each[:MAX_NOTE_CHARS] for each in (subject, reason, remedy)]})


def decode_answer(data: bytes) -> Checked | tuple[str, ...]:
    """What was checked; four texts for a refusal, three for something that could not be reached.

    Raises ``RefusedError`` for bytes that are neither.
    """
    value = decode(data, MAX_ANSWER_BYTES, max_items=MAX_ANSWER_ITEMS, subject="answer")
    if isinstance(value, dict) and (_REFUSED in value or _UNAVAILABLE in value):
        refused = _REFUSED in value
        words = fields(value, "answer", _REFUSAL if refused else _ABSENCE)["refused" if refused else "unavailable"]
        texts = tuple(list_of(words, "answer", str, 4))
        bounded("answer's texts, count", len(texts), 4 if refused else 3, 4 if refused else 3)
        return texts
    values = fields(value, "answer", _ANSWER)
    targets = [_target(each) for each in list_of(values["targets"], "answer's targets", list, MAX_PATHS)]
    return Checked(
        targets={each.path: each for each in targets},
        marks=_mapping(values["marks"], "answer's marks", int, MAX_MARKS),
        signed_s=bounded("answer's signed_s", values["signed_s"], 0, MAX_TIME_S, "s"),
        root_version=bounded("answer's root version", values["root_version"], 1, MAX_VERSION),
        paths=tuple(list_of(values["paths"], "answer's paths", str, MAX_PATHS)),
        notes=tuple(list_of(values["notes"], "answer's notes", str, MAX_NOTES)),
    )


def _pairs(entries: Mapping[str, object]) -> list[list[object]]:
    return [[name, value] for name, value in entries.items()]


def _mapping(value: object, subject: str, kind: type[T], max_entries: int) -> dict[str, T]:
    pairs = [list_of(each, subject, object, 2) for each in list_of(value, subject, list, max_entries)]
    names = list_of([each[0] for each in pairs if len(each) == 2], f"{subject} names", str, max_entries)
    values = list_of([each[1] for each in pairs if len(each) == 2], subject, kind, max_entries)
    if len(set(names)) != len(pairs):
        raise RefusedError(subject, f"{len(pairs)} entries, {len(set(names))} names", "every name once, with one value")
    return dict(zip(names, values, strict=True))


def _target(value: list[object]) -> Target:
    match value:
        case [str(path), int(size_bytes), bytes(digest)] if not isinstance(size_bytes, bool):
            return Target(path, size_bytes, digest)
    raise RefusedError("answer's target", "another form", "[path, size, digest]")
