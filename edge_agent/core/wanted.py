"""What placement looks at in a request: no payload, no name, only what decides where it may run and what it costs there.

Owns ``Wanted`` and its rounding to a *request class*, the unit that demand is counted in and that the agreed table ranks options
for.  Rules: pure; a class is never more lenient than the requests in it (deadlines are rounded down, sizes up), so that what is
feasible for a class is feasible for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge_agent.core.chat import CHAT
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import (
    INVOKE,
    MAX_COST,
    MAX_DEADLINE_US,
    MAX_SHAPE,
    MODEL_NAME,
    TASK_NAME,
    DataClass,
    InferenceRequest,
    ModelOffer,
    TrustTier,
    bounded,
    checked,
)

TALK_SHAPE = 64
"""Shapes from here on are of talk: ``TALK_SHAPE`` plus the bits of the longest answer; below it, the bits of the input's size."""
TYPICAL_ANSWER_TOKENS = 256
MAX_SIZE_BYTES = 2**40
MAX_RATE_MHZ = 10**9
MAX_DEMANDS = 32
"""Request classes that a board tells of: those that came most."""


@dataclass(frozen=True, slots=True, order=True)
class Wanted:
    """``model`` empty: any that does ``task``. ``energy_uj`` 0: no ceiling. ``size_bytes`` of all inputs."""

    task: str
    model: str
    shape: int
    size_bytes: int
    deadline_us: int
    quality_permille: int = 0
    energy_uj: int = 0
    trust: TrustTier = TrustTier.NONE
    data: DataClass = DataClass.PRIVATE

    def __post_init__(self) -> None:
        checked(TASK_NAME, "wanted task", self.task)
        if self.model != "":
            checked(MODEL_NAME, "wanted model", self.model)
        elif self.task == INVOKE:
            raise RefusedError("wanted model", "none for the task 'invoke'", "a model name")
        bounded("wanted shape", self.shape, 0, MAX_SHAPE)
        bounded("wanted size_bytes", self.size_bytes, 0, MAX_SIZE_BYTES, "bytes")
        bounded("wanted deadline_us", self.deadline_us, 1, MAX_DEADLINE_US, "µs")
        bounded("wanted quality_permille", self.quality_permille, 0, 1000)
        bounded("wanted energy_uj", self.energy_uj, 0, MAX_COST, "µJ")

    @classmethod
    def of(cls, request: InferenceRequest) -> Wanted:
        """What ``request`` wants, exactly."""
        limits = request.limits
        return cls(
            request.task, request.model or "", shape_of(request), request.size_bytes, limits.deadline_us,
            limits.quality_permille, limits.energy_uj or 0, limits.trust, request.data,
        )  # fmt: skip

    def classed(self) -> Wanted:
        """The class that this belongs to: sizes rounded up to powers of two, deadlines and energies down, quality up to tens."""
        return replace(
            self,
            size_bytes=_power_above(self.size_bytes),
            deadline_us=_power_below(self.deadline_us),
            quality_permille=min(1000, -(-self.quality_permille // 10) * 10),
            energy_uj=_power_below(self.energy_uj),
        )

    def served_by(self, offer: ModelOffer) -> bool:
        """Does this model do the task (raw ``invoke`` works on every model), and is it the pinned one if any?"""
        return self.task in (offer.task, INVOKE) and self.model in ("", offer.model)

    @property
    def talks(self) -> bool:
        return self.task == CHAT


@dataclass(frozen=True, slots=True, order=True)
class Demand:
    """Requests of one class that come in at one board: ``rate_mhz`` thousandths of a request a second."""

    wanted: Wanted
    rate_mhz: int

    def __post_init__(self) -> None:
        bounded("demand rate_mhz", self.rate_mhz, 1, MAX_RATE_MHZ, "mHz")
        if self.wanted != self.wanted.classed():
            raise RefusedError("demand", self.wanted, "a request class: sizes, deadlines and energies are powers of two")


def shape_of(request: InferenceRequest) -> int:
    """What the cost of a request depends on, besides the model and the board, as a small number."""
    if request.task == CHAT:
        return TALK_SHAPE + (request.answer_tokens or TYPICAL_ANSWER_TOKENS).bit_length()
    return min(request.size_bytes.bit_length(), TALK_SHAPE - 1)


def answer_tokens_of(shape: int) -> int:
    """The longest answer of a shape of talk, in tokens."""
    return (1 << max(0, shape - TALK_SHAPE)) - 1


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 1 else number


def _power_below(number: int) -> int:
    return 1 << number.bit_length() - 1 if number else 0
