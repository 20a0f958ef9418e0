"""Deterministic CBOR (RFC 8949 section 4.2.1): the one encoder and the one decoder of the whole agent.

Owns the value domain of the wire and the reading of it.  Rules:

* A value is None, a bool, an int of [-2**64, 2**64 - 1], a float, bytes, text, a list, a dict whose keys are int, text or
  bytes, or a ``Tag``.  Nothing else is written or read: no other simple value, no bignum, no NaN with a payload.
* A value has one encoding: shortest heads, shortest floats, definite lengths, map entries in the bytewise order of their
  encoded keys.  cbor2's ``canonical=True`` sorts shorter keys first (RFC 7049 section 3.9), so bytes are written here.
* Reading costs what its bounds say, whoever sent it: bytes, items, entries of a map and depth are counted on the heads
  alone, before cbor2 builds one object.
* What cbor2 built is written again and must give the input: two readers have to agree on every byte.
* Every tag is refused that the caller did not name, and a named one comes as a ``Tag``: cbor2's own tag decoders never run.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from operator import itemgetter
from typing import Any, TypeVar

import cbor2

from edge_agent.core.errors import MAX_SHOWN_CHARS, RefusedError, shown

MAX_CBOR_BYTES = 4 * 2**20
MAX_ITEMS = 16_384
"""Data items of one message, keys and values counted alike."""
MAX_MAP_ENTRIES = 1_024
"""Integer keys can be made to collide in CPython's dict: 1,020 cost 0.9 ms, 10,900 (76 KB) cost 126 ms, and it is quadratic."""
MAX_DEPTH = 16
"""Arrays, maps and tags that may stand inside one another."""

Tag = cbor2.CBORTag
"""A tagged value: ``Tag(number, value)`` with the attributes ``tag`` and ``value``."""

T = TypeVar("T")

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _MAJOR_7 = range(8)
_ARGUMENT_BYTES = (0,) * 24 + (1, 2, 4, 8) + (-1,) * 4
"""By the low five bits of the initial byte; -1 for the reserved and the indefinite forms."""
_FALSE, _TRUE, _NULL, _NAN = b"\xf4", b"\xf5", b"\xf6", b"\xf9\x7e\x00"
_SIMPLE_AND_FLOAT = frozenset(b"\xf4\xf5\xf6\xf9\xfa\xfb")


def encode(value: object) -> bytes:
    """The one deterministic encoding of ``value``; tuples count as lists, bytearray and memoryview as bytes.

    Raises ``ValueError`` for what is outside the domain: a type, an integer past 64 bits, a map over ``MAX_MAP_ENTRIES``,
    nesting over ``MAX_DEPTH``, text with a lone surrogate.
    """
    parts: list[bytes | memoryview] = []
    _write(value, parts, MAX_DEPTH)
    return b"".join(parts)


def decode(
    data: bytes | bytearray | memoryview,
    max_bytes: int = MAX_CBOR_BYTES,
    *,
    max_items: int = MAX_ITEMS,
    tags: Collection[int] = (),
    subject: str = "message",
) -> object:
    """The value whose deterministic encoding is ``data``, all of it; ``tags`` names those that may occur.

    ``encode(decode(data)) == data`` for everything that is returned.  Raises ``RefusedError`` naming ``subject`` and, where
    there is one, the offset of the first bad byte.  Source: RFC 8949 sections 4.2.1 and 5.
    """
    size_bytes = data.nbytes if isinstance(data, memoryview) else len(data)
    if size_bytes > max_bytes:
        raise RefusedError(f"{subject} length", f"{size_bytes} bytes", f"at most {max_bytes} bytes")
    raw = data if type(data) is bytes else bytes(data)
    _scan(raw, max_items, tags, subject)
    value = _built(raw, tags, subject)
    _must_be_rewritten_alike(raw, value, subject)
    return value


def fields(
    value: object,
    subject: str,
    required: Mapping[int, tuple[str, type]],
    optional: Mapping[int, tuple[str, type]] | None = None,
) -> dict[str, Any]:
    """A decoded map with integer keys as ``{name: value}``, ready for a dataclass: ``Point(**fields(value, "point", POINT))``.

    ``required`` and ``optional`` say ``{key: (name, type)}``; the type ``object`` takes anything.  An optional key that is
    absent is left out, so that the dataclass's default holds.  A bool is no int here.  Raises ``RefusedError`` naming the
    field for a value that is not a map, and a key that is missing, unknown or of another type.
    """
    entries = _of_type(value, subject, dict)
    known = {**required, **(optional or {})}
    allowed = ", ".join(f"{key} ({name})" for key, (name, _) in known.items())
    for key in entries:
        if type(key) is not int or key not in known:
            raise RefusedError(f"{subject}: unknown key", shown(key), allowed)
    for key, (name, _) in required.items():
        if key not in entries:
            raise RefusedError(f"{subject}: key {key} ({name}) is missing", allowed=allowed)
    return {name: _of_type(entries[key], f"{subject} {name}", kind) for key, (name, kind) in known.items() if key in entries}


def list_of(value: object, subject: str, kind: type[T], max_items: int) -> list[T]:
    """A decoded list whose items are all of ``kind``. Raises ``RefusedError`` naming ``subject`` and the item's index."""
    items = _of_type(value, subject, list)
    if len(items) > max_items:
        raise RefusedError(f"{subject} length", f"{len(items)} items", f"at most {max_items}")
    return [_of_type(item, f"{subject}[{index}]", kind) for index, item in enumerate(items)]


def map_of(value: object, subject: str, kind: type[T], max_entries: int) -> dict[str, T]:
    """A decoded map of text to ``kind``. Raises ``RefusedError`` naming ``subject`` and the entry's key."""
    entries = _of_type(value, subject, dict)
    if len(entries) > max_entries:
        raise RefusedError(f"{subject} size", f"{len(entries)} entries", f"at most {max_entries}")
    return {
        _of_type(key, f"{subject} key", str): _of_type(item, f"{subject} {shown(key)}", kind) for key, item in entries.items()
    }


def _of_type(value: object, subject: str, kind: type[T]) -> T:
    if kind is object or type(value) is kind:
        return value  # type: ignore[return-value]
    came = "null" if value is None else type(value).__name__
    raise RefusedError(subject, f"a value of type {came}", kind.__name__)


def _write(value: object, parts: list[bytes | memoryview], levels: int) -> None:
    if value is None:
        parts.append(_NULL)
    elif isinstance(value, bool):
        parts.append(_TRUE if value else _FALSE)
    elif isinstance(value, int):
        parts.append(_head(_UNSIGNED, value) if value >= 0 else _head(_NEGATIVE, -1 - value))
    elif isinstance(value, str):
        text = value.encode("utf-8")
        parts += _head(_TEXT, len(text)), text
    elif isinstance(value, bytes | bytearray | memoryview):
        flat = memoryview(value).cast("B") if not isinstance(value, bytes) else value
        parts += _head(_BYTES, len(flat)), flat
    elif isinstance(value, float):
        parts.append(_float(value))
    elif levels == 0:
        raise ValueError(f"nested over {MAX_DEPTH} levels deep, or within itself")
    elif isinstance(value, list | tuple):
        parts.append(_head(_ARRAY, len(value)))
        for item in value:
            _write(item, parts, levels - 1)
    elif isinstance(value, Mapping):
        _write_map(value, parts, levels - 1)
    elif isinstance(value, Tag):
        parts.append(_head(_TAG, value.tag))
        _write(value.value, parts, levels - 1)
    else:
        raise ValueError(f"{type(value).__name__} has no place on the wire")


def _write_map(entries: Mapping[Any, object], parts: list[bytes | memoryview], levels: int) -> None:
    if len(entries) > MAX_MAP_ENTRIES:
        raise ValueError(f"a map of {len(entries)} entries; at most {MAX_MAP_ENTRIES}")
    parts.append(_head(_MAP, len(entries)))
    for key, item in sorted(((_key(key), item) for key, item in entries.items()), key=itemgetter(0)):
        parts.append(key)
        _write(item, parts, levels)


def _key(key: object) -> bytes:
    if isinstance(key, bool) or not isinstance(key, int | str | bytes):
        raise ValueError(f"{type(key).__name__} cannot be the key of a map: int, text or bytes can")
    return encode(key)


def _head(major: int, argument: int) -> bytes:
    if argument < 24:
        return bytes((major << 5 | argument,))
    for info, size_bytes in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if argument < 1 << 8 * size_bytes:
            return bytes((major << 5 | info,)) + argument.to_bytes(size_bytes, "big")
    raise ValueError(f"integer of {argument.bit_length()} bits; at most 64 fit")


def _float(value: float) -> bytes:
    """The shortest of 16, 32 and 64 bits that holds the value (RFC 8949 section 4.2.1, rule 2 of 4.2.2 for NaN)."""
    if value != value:
        return _NAN
    for initial, form in ((b"\xf9", ">e"), (b"\xfa", ">f")):
        try:
            packed = struct.pack(form, value)
        except OverflowError:
            continue
        if struct.unpack(form, packed)[0] == value:
            return initial + packed
    return b"\xfb" + struct.pack(">d", value)


def _scan(data: bytes, max_items: int, tags: Collection[int], subject: str) -> None:
    """Walk the heads, build nothing, and refuse what breaks a bound, so that what follows has a known cost."""
    owed, at, items = [1], 0, 0
    while owed:
        if owed[-1] == 0:
            owed.pop()
            continue
        owed[-1] -= 1
        items += 1
        initial, argument, body = _head_at(data, at, subject)
        major = initial >> 5
        flaw = _flaw(initial, argument, len(data) - body, tags)
        if items > max_items:
            flaw = "one more item", f"at most {max_items} items"
        if _ARRAY <= major <= _TAG:
            owed.append({_ARRAY: argument, _MAP: 2 * argument, _TAG: 1}[major])
            if len(owed) > MAX_DEPTH + 1:
                flaw = "one more level of nesting", f"at most {MAX_DEPTH} levels"
        if flaw:
            raise RefusedError(f"{subject} at byte {at}", *flaw)
        at = body + argument if major in (_BYTES, _TEXT) else body
    if at != len(data):
        raise RefusedError(f"{subject} at byte {at}", f"{len(data) - at} trailing bytes", "one value and nothing after it")


def _head_at(data: bytes, at: int, subject: str) -> tuple[int, int, int]:
    """The head at ``at``: its initial byte, its argument, and where what it announces begins."""
    if at < len(data):
        initial = data[at]
        size_bytes = _ARGUMENT_BYTES[initial & 31]
        if size_bytes == 0:
            return initial, initial & 31, at + 1
        if size_bytes < 0:
            raise RefusedError(f"{subject} at byte {at}", f"initial byte {initial:#04x}", "definite lengths, no reserved form")
        body = at + 1 + size_bytes
        if body <= len(data):
            return initial, int.from_bytes(data[at + 1 : body], "big"), body
    raise RefusedError(f"{subject} at byte {at}", "the end of the data", "a whole value")


def _flaw(initial: int, argument: int, rest_bytes: int, tags: Collection[int]) -> tuple[str, str] | None:
    """What is wrong with one head, as what came and what is allowed."""
    major = initial >> 5
    if _BYTES <= major <= _MAP and argument > rest_bytes:
        return f"a length of {argument}", f"at most the {rest_bytes} bytes that follow"
    if major == _MAP and argument > MAX_MAP_ENTRIES:
        return f"a map of {argument} entries", f"at most {MAX_MAP_ENTRIES}"
    if major == _TAG and argument not in tags:
        return f"tag {argument}", " or ".join(f"tag {tag}" for tag in sorted(tags)) or "no tag"
    if major == _MAJOR_7 and initial not in _SIMPLE_AND_FLOAT:
        return f"simple value {argument}", "false, true, null and floats"
    return None


def _built(data: bytes, tags: Collection[int], subject: str) -> object:
    as_tags = {tag: lambda value, _immutable, tag=tag: Tag(tag, value) for tag in tags}
    try:
        return cbor2.loads(
            data, max_depth=MAX_DEPTH, allow_indefinite=False, allow_duplicate_keys=False, semantic_decoders=as_tags
        )
    except cbor2.CBORError as error:
        raise RefusedError(subject, str(error)[:MAX_SHOWN_CHARS], "deterministic CBOR (RFC 8949 section 4.2)") from error


def _must_be_rewritten_alike(data: bytes, value: object, subject: str) -> None:
    """``encode(value) == data``, compared in place: a tensor's bytes are not copied once more.

    A whole value that begins ``data`` is all of it, for ``_scan`` found exactly one value there.
    """
    parts: list[bytes | memoryview] = []
    try:
        _write(value, parts, MAX_DEPTH)
    except ValueError as error:
        raise RefusedError(subject, str(error), "the values of this protocol") from error
    at = 0
    for part in parts:
        if not data.startswith(part, at):
            raise RefusedError(f"{subject} at byte {at}", "another encoding", "the deterministic one (RFC 8949 section 4.2.1)")
        at += len(part)
