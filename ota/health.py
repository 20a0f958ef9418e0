"""Is a release on trial sound?  First its golden input, then so many clean real inferences; one bad sign is enough.

Owns ``Trial``, and what is an unclean result.  Rules: pure, no NumPy, each pass over a tensor at the speed of a copy; the verdict
stands once it is reached; a sound release never becomes so by silence, and a request that is itself at fault is no sign at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from edge_agent.core.values import DIGEST_BYTES, InferenceResult, Status, Tensor, bounded
from ota.slots import MAX_WHY_CHARS

MAX_NEEDED = 10_000


class Health(StrEnum):
    OPEN = "open"
    SOUND = "sound"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Trial:
    """A release is sound after its golden answer and ``needed`` clean inferences.

    ``expected_golden``: the SHA-256 of the right answers to the golden input, empty where none is known: then any answer that
    is no bad sign will do.  Every event gives a new value: ``trial = trial.ran(why)``.
    """

    needed: int
    expected_golden: frozenset[bytes] = frozenset()
    golden: bytes = b""
    clean: int = 0
    why: str = ""

    def __post_init__(self) -> None:
        bounded("clean inferences needed", self.needed, 1, MAX_NEEDED)
        for each in self.expected_golden:
            bounded("expected golden digest, length", len(each), DIGEST_BYTES, DIGEST_BYTES, "bytes")

    @property
    def verdict(self) -> Health:
        if self.why:
            return Health.BAD
        return Health.SOUND if self.golden and self.clean >= self.needed else Health.OPEN

    def heard_golden(self, digest: bytes, why: str = "") -> Trial:
        """The answer to the golden input, or ``why`` there is none: a crash, a hang, NaN.

        One after the first stands for a real inference, on a board that has too few requests.
        """
        flaw = why or self._golden_flaw(digest)
        if self.golden or flaw:
            return self.ran(flaw)
        return self if self.verdict is Health.BAD else replace(self, golden=digest)

    def ran(self, why_unclean: str = "") -> Trial:
        """A real inference ended. What ran before the golden answer may condemn the release, and does not count for it."""
        if self.verdict is not Health.OPEN:
            return self
        if why_unclean:
            return replace(self, why=why_unclean[:MAX_WHY_CHARS])
        return replace(self, clean=self.clean + 1) if self.golden else self

    def _golden_flaw(self, digest: bytes) -> str:
        if len(digest) != DIGEST_BYTES:
            return "no answer to the golden input"
        if self.expected_golden and digest not in self.expected_golden:
            known = " or ".join(sorted(each.hex()[:16] for each in self.expected_golden))
            return f"wrong answer to the golden input: {digest.hex()[:16]}…, right is {known}…"
        return ""


def why_unclean(result: InferenceResult) -> str:
    """What speaks against the model that gave ``result``; empty for a clean one.

    A result that was refused or shed is unclean too, though the request or the board may be at fault: ask ``tells_of_model``.
    A first dimension of 0 is an answer like any other (nothing was found); 0 in a later one is not.
    """
    if result.status is not Status.OK:
        return f"{result.status.value}: {result.reason}"
    if not result.outputs:
        return "an answer without outputs"
    flaws = (_flaw(name, tensor) for name, tensor in result.outputs.items())
    return next(filter(None, flaws), "")


def tells_of_model(result: InferenceResult) -> bool:
    """Does it say anything of the model? Not if nothing ran; nor if it was refused, unless another model takes the same."""
    return result.status in (Status.OK, Status.FAILED)


_EXPONENT_OF_ALL_ONES = {
    "float16": (2, re.compile(rb"[\x7c-\x7f\xfc-\xff]"), 0),
    "float32": (4, re.compile(rb"[\x7f\xff]"), 0x80),
    "float64": (8, re.compile(rb"[\x7f\xff]"), 0xF0),
}
"""NaN and infinity (IEEE 754-2019, 3.4): bytes of an element, what its last byte then is, bits that are set in the one before."""


def _flaw(name: str, tensor: Tensor) -> str:
    if 0 in tensor.shape[1:]:
        return f"output {name}: {tensor} is empty"
    at = _not_finite(tensor)
    return "" if at is None else f"output {name}: element {at} of {tensor} is NaN or infinite"


def _not_finite(tensor: Tensor) -> int | None:
    """The index of the first element that is no finite number."""
    if tensor.dtype not in _EXPONENT_OF_ALL_ONES:
        return None
    size_bytes, last, before = _EXPONENT_OF_ALL_ONES[tensor.dtype]
    data = memoryview(tensor.data).cast("B")
    for found in last.finditer(bytes(data[size_bytes - 1 :: size_bytes])):
        if data[found.start() * size_bytes + size_bytes - 2] & before == before:
            return found.start()
    return None
