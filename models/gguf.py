"""GGUF files (versions 2 and 3): metadata and tensors, read in place.

Rules: the file is mapped, never read whole; a tensor's bytes are looked at only when it is asked for.  The file is hostile until
shown otherwise: every count, length and offset has a bound below and is checked before it is used, a key or a tensor that
comes twice is refused, and whatever is wrong is a ``RefusedError`` that names the place.
Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.errors import RefusedError, UnavailableError
from models.gguf_types import TYPES, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_FILE_BYTES = 2**32
MAX_KEYS = 4096
MAX_TENSORS = 16_384
MAX_STRING_BYTES = 2**20
MAX_ARRAY_ITEMS = 2**21
MAX_RANK = 4
MAX_ALIGNMENT_BYTES = 2**16
DEFAULT_ALIGNMENT_BYTES = 32

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]

_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_SMALLEST_BYTES = {_BOOL: 1, _STRING: 8, **{kind: struct.calcsize(form) for kind, form in _NUMBERS.items()}}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. ``shape`` is in C order: rows first (GGUF writes it the other way round)."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class Gguf:
    """An open file: ``metadata`` and ``tensors`` by name. Use as a context manager, or ``close`` it."""

    def __init__(self, path: Path) -> None:
        """Raises ``UnavailableError`` when the file cannot be opened and ``RefusedError`` when it is no sound GGUF."""
        self.path = path
        self._bytes = _mapped(path)
        try:
            reader = _Reader(self._bytes, f"GGUF file {path.name}")
            keys, tensors = reader.head()
            self.metadata: Mapping[str, Value] = MappingProxyType(reader.metadata(keys))
            self.tensors: Mapping[str, TensorEntry] = MappingProxyType(reader.tensors(tensors, self.metadata))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if isinstance(self._bytes, mmap.mmap):
            self._bytes.close()

    def __enter__(self) -> Gguf:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def entry(self, name: str) -> TensorEntry:
        """Raises ``RefusedError`` for a tensor that is not there."""
        if name not in self.tensors:
            raise RefusedError(f"tensor {name} of {self.path.name}", "no such tensor", "one of the tensors of the file")
        return self.tensors[name]

    def rows(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """Rows ``first`` to ``last`` of a tensor as float32 [last - first, columns], a vector as [columns].

        Raises ``RefusedError`` for a tensor that is not there or holds a number that is not finite.
        """
        entry = self.entry(name)
        columns = entry.shape[-1]
        count = prod(entry.shape[:-1])
        last = count if last is None else last
        if not 0 <= first <= last <= count:
            raise ValueError(f"rows {first} to {last} of {count}")
        row_bytes = entry.type.bytes_of(columns)
        at = entry.offset + first * row_bytes
        # A copy, so that no view of the map outlives it: a map with views cannot be closed.
        raw = np.frombuffer(self._bytes[at : at + (last - first) * row_bytes], np.uint8)
        with np.errstate(all="ignore"):
            values = entry.type.decode(raw).reshape(last - first, columns)
        if not np.isfinite(values).all():
            raise RefusedError(f"tensor {name} of {self.path.name}", "a number that is not finite", "finite numbers")
        return values[0] if len(entry.shape) == 1 else values


def _mapped(path: Path) -> mmap.mmap | bytes:
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, 2)
            if size_bytes > MAX_FILE_BYTES:
                raise RefusedError(f"GGUF file {path.name}", f"{size_bytes} bytes", f"at most {MAX_FILE_BYTES} bytes")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size_bytes else b""
    except OSError as error:
        raise UnavailableError(f"GGUF file {path}", error.strerror or str(error), "give the path of a GGUF file") from error


class _Reader:
    """A place in the file that only moves forward, and never past the end."""

    def __init__(self, data: mmap.mmap | bytes, subject: str) -> None:
        self.data, self.subject, self.at = data, subject, 0

    def refuse(self, got: object, allowed: str) -> RefusedError:
        return RefusedError(f"{self.subject} at byte {self.at}", got, allowed)

    def take(self, size_bytes: int) -> bytes:
        if size_bytes > len(self.data) - self.at:
            raise self.refuse(f"{len(self.data) - self.at} bytes left", f"{size_bytes} bytes more: the file is cut short")
        self.at += size_bytes
        return self.data[self.at - size_bytes : self.at]

    def number(self, form: str) -> int | float:
        value: int | float = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def count(self, form: str, what: str, most: int) -> int:
        value = int(self.number(form))
        if value > most:
            raise self.refuse(f"{what} {value}", f"at most {most}")
        return value

    def string(self) -> str:
        raw = self.take(self.count("<Q", "a text of bytes", MAX_STRING_BYTES))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.refuse(raw[:32], "text in UTF-8") from None

    def head(self) -> tuple[int, int]:
        """How many keys and tensors follow."""
        magic = self.take(4)
        if magic != MAGIC:
            raise self.refuse(magic, f"the magic {MAGIC!r}")
        version = int(self.number("<I"))
        if version not in VERSIONS:
            raise self.refuse(f"version {version}", " or ".join(map(str, VERSIONS)) + ", little endian")
        tensors = self.count("<Q", "a number of tensors", MAX_TENSORS)
        return self.count("<Q", "a number of keys", MAX_KEYS), tensors

    def metadata(self, keys: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for _ in range(keys):
            key = self.string()
            if key in found:
                raise self.refuse(f"key {key} twice", "each key once")
            kind = int(self.number("<I"))
            found[key] = self.array() if kind == _ARRAY else self.scalar(kind)
        return found

    def array(self) -> list[Scalar]:
        kind = int(self.number("<I"))
        items = self.count("<Q", "an array of items", MAX_ARRAY_ITEMS)
        if kind not in _SMALLEST_BYTES:
            raise self.refuse(f"an array of type {kind}", "numbers, booleans or texts")
        if items * _SMALLEST_BYTES[kind] > len(self.data) - self.at:
            raise self.refuse(f"an array of {items} items", "as many as the file has room for")
        if kind in _NUMBERS:
            return list(struct.unpack(f"<{items}{_NUMBERS[kind][1]}", self.take(items * _SMALLEST_BYTES[kind])))
        return [self.scalar(kind) for _ in range(items)]

    def scalar(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self.string()
        if kind == _BOOL:
            return bool(self.count("<B", "a boolean", 1))
        if kind not in _NUMBERS:
            raise self.refuse(f"a value of type {kind}", "a type of the specification (0 to 12)")
        return self.number(_NUMBERS[kind])

    def tensors(self, count: int, metadata: Mapping[str, Value]) -> dict[str, TensorEntry]:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES)
        if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT_BYTES or alignment & (alignment - 1):
            raise self.refuse(f"general.alignment {alignment}", f"a power of two from 8 to {MAX_ALIGNMENT_BYTES} bytes")
        infos = [self.tensor_info() for _ in range(count)]
        start = -(-self.at // alignment) * alignment
        found: dict[str, TensorEntry] = {}
        for name, kind, shape, offset in infos:
            if name in found:
                raise self.refuse(f"tensor {name} twice", "each tensor once")
            if offset % alignment:
                raise self.refuse(f"tensor {name} at offset {offset}", f"a multiple of {alignment}")
            found[name] = self.placed(name, kind, shape, start + offset)
        return found

    def tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.string()
        rank = self.count("<I", "a rank of", MAX_RANK)
        shape = tuple(self.count("<Q", f"a side of tensor {name} of", len(self.data) * 8) for _ in range(rank))
        return name, int(self.number("<I")), shape[::-1], int(self.number("<Q"))

    def placed(self, name: str, kind: int, shape: tuple[int, ...], offset: int) -> TensorEntry:
        if kind not in TYPES:
            known = ", ".join(f"{each.name} ({number})" for number, each in TYPES.items())
            raise self.refuse(f"tensor {name} of type {kind}", known)
        tensor_type = TYPES[kind]
        if not shape or 0 in shape or shape[-1] % tensor_type.block_items:
            raise self.refuse(f"tensor {name} of shape {shape}", f"rows of a multiple of {tensor_type.block_items} items")
        size_bytes = tensor_type.bytes_of(prod(shape))
        if offset + size_bytes > len(self.data):
            raise self.refuse(f"tensor {name} to byte {offset + size_bytes}", f"at most the file's {len(self.data)} bytes")
        return TensorEntry(name, tensor_type, shape, offset, size_bytes)
