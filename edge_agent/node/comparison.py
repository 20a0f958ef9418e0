"""Is an answer the same as that of a second run? The rule by which spot checks judge; pure, without an array library.

Rules:

* Equal bytes are equal, whatever they are.  Other names or dtypes than the second run's are wrong without doubt: one model
  has one signature.
* Integers of an answer that holds nothing else must be equal where both ran on like engines (the same interpreter library and
  delegate, byte for byte).  On unlike engines a quantized value may be off by ``QUANTA``, as kernels may round halves
  differently.
* Floats may differ by ``RELATIVE`` of the larger plus ``ABSOLUTE``: sums of a few thousand float32 terms in another order
  differ by about 1e-5 of their size, a half-precision delegate rounds to 5e-4 (IEEE 754 binary16 has 11 bits), and a box of
  an input of 128 or more pixels is then off by no more than a hundredth.
* What was made of floats by a threshold (how many faces, which label comes first) may differ where a score is near it: such a
  difference speaks against an answer and proves nothing, and neither does one beyond the tolerance of floats.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan

from edge_agent.core.values import Tensor

QUANTA = 1
RELATIVE, ABSOLUTE = 1e-2, 1e-2
MAX_COMPARED_BYTES = 2**18
"""Of one answer: 65,536 floats, some 10 ms on a slow board."""

_FORMATS = {
    "float16": "e", "float32": "f", "float64": "d",
    "int8": "b", "int16": "h", "int32": "i", "int64": "q",
    "uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q", "bool": "B",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """How an answer differs from that of the second run. ``exact``: no honest board could give it."""

    exact: bool
    what: str


def difference(given: Mapping[str, Tensor], again: Mapping[str, Tensor], *, like_engines: bool) -> Difference | None:
    """What is wrong with the answer ``given``, by the answer of a second run on the same model and inputs; ``None`` if nothing.

    Raises ``ValueError`` for answers of more than ``MAX_COMPARED_BYTES``.
    """
    if max(sum(each.size_bytes for each in answer.values()) for answer in (given, again)) > MAX_COMPARED_BYTES:
        raise ValueError(f"answers of more than {MAX_COMPARED_BYTES} bytes are not compared")
    kinds = {name: each.dtype for name, each in given.items()}, {name: each.dtype for name, each in again.items()}
    if kinds[0] != kinds[1]:
        return Difference(True, f"it holds {_listed(kinds[0])}, the model gives {_listed(kinds[1])}")
    floats = any(dtype.startswith("float") for dtype in kinds[1].values())
    found = [
        each
        for name in sorted(again)
        if (each := _of_tensor(name, given[name], again[name], not floats, like_engines)) is not None
    ]
    return max(found, key=lambda each: each.exact, default=None)


def _of_tensor(name: str, given: Tensor, again: Tensor, integers_only: bool, like_engines: bool) -> Difference | None:
    if given.shape != again.shape:
        return Difference(integers_only and like_engines, f"{name} is {given}, a second run gives {again}")
    if bytes(given.data) == bytes(again.data):
        return None
    pairs = list(zip(_numbers(given), _numbers(again), strict=True))
    if again.dtype.startswith("float"):
        off = sum(not _near(a, b) for a, b in pairs)
        return _off(name, off, len(pairs), False) if off else None
    allowed = 0 if integers_only and like_engines else QUANTA
    off = sum(abs(a - b) > allowed for a, b in pairs)
    return _off(name, off, len(pairs), integers_only and like_engines) if off else None


def _off(name: str, off: int, count: int, exact: bool) -> Difference:
    return Difference(exact, f"{off} of {count} values of {name} are not those of a second run")


def _near(a: float, b: float) -> bool:
    """NaN is near nothing but NaN, infinity near nothing but itself."""
    if not (isfinite(a) and isfinite(b)):
        return a == b or (isnan(a) and isnan(b))
    return abs(a - b) <= ABSOLUTE + RELATIVE * max(abs(a), abs(b))


def _numbers(tensor: Tensor) -> Sequence[float]:
    code = _FORMATS[tensor.dtype]
    return struct.unpack(f"<{tensor.size_bytes // struct.calcsize(code)}{code}", tensor.data)


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(kinds.items())) or "nothing"
