"""Is a release on trial sound?  First its golden input, then so many clean real inferences; one bad sign is enough.

Owns ``Trial``, and what is an unclean result.  Rules: pure, no NumPy; the verdict stands once it is reached; no release becomes
sound by silence, and a request that is itself at fault is no sign at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from edge_agent.core.values import DIGEST_BYTES, InferenceResult, Status, Tensor, bounded
from edge_agent.runtime.signature import first_non_finite
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
    answered: bool = False
    """The golden input, well."""
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
        return Health.SOUND if self.answered and self.clean >= self.needed else Health.OPEN

    def heard_golden(self, digest: bytes, why: str = "") -> Trial:
        """The answer to the golden input, or ``why`` it is bad: a crash, a hang, NaN. No digest and no reason: the model has no
        golden input.

        An answer after the first stands for a real inference, on a board that has too few requests.
        """
        flaw = why or self._golden_flaw(digest)
        if self.verdict is Health.OPEN and not self.answered and not flaw:
            return replace(self, answered=True)
        return self.ran(flaw) if digest or flaw else self

    def ran(self, why_unclean: str = "") -> Trial:
        """A real inference ended. What ran before the golden answer may condemn the release, and does not count for it."""
        if self.verdict is not Health.OPEN:
            return self
        if why_unclean:
            return replace(self, why=why_unclean[:MAX_WHY_CHARS])
        return replace(self, clean=self.clean + 1) if self.answered else self

    def _golden_flaw(self, digest: bytes) -> str:
        if len(digest) not in (0, DIGEST_BYTES):
            return f"an answer to the golden input of {len(digest)} bytes, not {DIGEST_BYTES}"
        if self.expected_golden and digest not in self.expected_golden:
            if not digest:
                return "no answer to the golden input"
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
    return unsound(result.outputs)


def unsound(outputs: Mapping[str, Tensor]) -> str:
    """Why no sound model gives this, whatever it was asked; empty if one may."""
    if not outputs:
        return "an answer without outputs"
    flaws = (_flaw(name, tensor) for name, tensor in outputs.items())
    return next(filter(None, flaws), "")


def tells_of_model(result: InferenceResult) -> bool:
    """Does it say anything of the model? Not if nothing ran; nor if it was refused, unless another model takes the same."""
    return result.status in (Status.OK, Status.FAILED)


def _flaw(name: str, tensor: Tensor) -> str:
    if 0 in tensor.shape[1:]:
        return f"output {name}: {tensor} is empty"
    at = first_non_finite(tensor)
    return "" if at is None else f"output {name}: element {at} of {tensor} is NaN or infinite"
