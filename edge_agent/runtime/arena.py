"""The shared memory that one engine's tensors, or a call's bulk bytes, cross in: a sealed memfd, and where in it a tensor lies.

Rules: the agent makes it, sizes it and seals the size, so that nobody can shrink it under a mapping (SIGBUS).  The child
may write anything anywhere in it at any time; so structure never lies in it, only elements, and what is taken out is
copied first and checked after.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import DTYPE_BYTES, MAX_NAME_CHARS, MAX_RANK, MAX_TENSOR_BYTES, MAX_TENSORS, Tensor

ALIGNMENT_BYTES = 64
KEPT_BYTES = 4 * 2**20
"""What stays allocated between requests; pages above it are given back when a request touched them."""

Place = tuple[str, str, tuple[int, ...], int]
"""A tensor in the arena as it travels in a doorbell: name, dtype, shape, offset."""


def aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor in the arena: checked, and known to lie wholly inside."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    end: int


def placed(place: object, arena_bytes: int) -> Placed:
    """``place`` if it is well formed and inside the arena; raises ``RefusedError`` otherwise."""
    if not (isinstance(place, list) and len(place) == 4):
        raise RefusedError("tensor place", place, "name, dtype, shape, offset")
    name, dtype, shape, offset = place
    if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and isinstance(dtype, str) and dtype in DTYPE_BYTES):
        raise RefusedError("tensor place", place, "a name and a known dtype")
    if not (isinstance(shape, list) and len(shape) <= MAX_RANK and all(type(n) is int and n >= 0 for n in shape)):
        raise RefusedError(f"shape of {name}", shape, f"at most {MAX_RANK} dimensions, each 0 or more")
    size = prod(shape) * DTYPE_BYTES[dtype]
    if (
        type(offset) is not int
        or offset < 0
        or offset % ALIGNMENT_BYTES
        or offset + size > arena_bytes
        or size > MAX_TENSOR_BYTES
    ):
        raise RefusedError(f"place of {name}", f"{size} bytes at {offset}", f"inside the arena's {arena_bytes} bytes")
    return Placed(name, dtype, tuple(shape), offset, offset + size)


def places(value: object, arena_bytes: int) -> tuple[Placed, ...]:
    """Every place in a doorbell's list. Raises ``RefusedError`` for a bad one, a repeated name, or too many."""
    if not isinstance(value, list) or len(value) > MAX_TENSORS:
        raise RefusedError("tensor places", value, f"a list of at most {MAX_TENSORS}")
    found = tuple(placed(place, arena_bytes) for place in value)
    if len({place.name for place in found}) != len(found):
        raise RefusedError("tensor places", [place.name for place in found], "each name once")
    return found


def sealed_memfd(name: str, size_bytes: int) -> int:
    """A descriptor of shared memory whose size nobody can change any more. Raises ``OSError`` if there is none to be had."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


class Arena:
    """The agent's end. ``fd`` goes to the child."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self._used_bytes = size_bytes, 0
        self.fd = sealed_memfd("sly-arena", size_bytes)
        try:
            self._map = mmap.mmap(self.fd, size_bytes)
        except OSError:
            os.close(self.fd)
            raise

    def put(self, inputs: Mapping[str, Tensor]) -> tuple[Place, ...]:
        """Copy ``inputs`` in. Raises ``RefusedError`` if they do not fit."""
        offset = 0
        found: list[Place] = []
        for name, tensor in inputs.items():
            end = offset + tensor.size_bytes
            if end > self.size_bytes:
                raise RefusedError(f"input {name!r}", f"{end} bytes of inputs", f"at most {self.size_bytes} bytes a request")
            self._map[offset:end] = tensor.data
            found.append((name, tensor.dtype, tuple(tensor.shape), offset))
            offset = aligned(end)
        self._used_bytes = offset
        return tuple(found)

    def take(self, place: Placed) -> Tensor:
        self._used_bytes = max(self._used_bytes, place.end)
        return Tensor(place.dtype, place.shape, self._map[place.offset : place.end])

    def write(self, parts: Iterable[bytes | memoryview]) -> int:
        """Copy ``parts`` in, one after another from the beginning; how many bytes. Raises ``RefusedError`` if they do not fit."""
        end = 0
        for part in parts:
            start, end = end, end + len(part)
            if end > self.size_bytes:
                raise RefusedError("bulk of a call", f"{end} bytes or more", f"at most {self.size_bytes} bytes")
            self._map[start:end] = part
        self._used_bytes = max(self._used_bytes, end)
        return end

    def head(self, size_bytes: int) -> bytes:
        """A copy of the first ``size_bytes``, where the child leaves its handshake and the bulk of its answers."""
        self._used_bytes = max(self._used_bytes, size_bytes)
        return self._map[:size_bytes]

    def trim(self) -> None:
        """Give the pages above ``KEPT_BYTES`` back to the system, if the last request used more."""
        if self._used_bytes > KEPT_BYTES:
            self._map.madvise(mmap.MADV_REMOVE, KEPT_BYTES, self.size_bytes - KEPT_BYTES)
            self._used_bytes = 0

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)
