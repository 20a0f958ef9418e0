"""How long a model takes on a machine of given arithmetic rate and bandwidth: an op-level roofline, in integers.

Owns ``ModelWork`` (a model's arithmetic and traffic) and ``estimate``; ``Profile`` (a machine) is in ``profile``.  Rules:
no floats, so that two boards of unlike make compute the same cost to the last bit; no array library, because the agent
itself calls this.

The model of an operator is the roofline (Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009): the larger of its
arithmetic time and its traffic time, plus a launch.  A matrix product of ``positions x depth`` by ``depth x outputs`` runs
on the MAC array weight-stationary: ``ceil(depth / rows) * ceil(outputs / columns)`` tiles, through each of which all
positions stream one a cycle, so that a product which does not fill its edge tiles pays for the idle cells; several arrays
share tiles and positions evenly.  On-chip memory
first takes the largest activations, at most half of it; the rest keeps weights, in operator order, from one invocation to
the next.  What does not fit crosses the memory bus every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from board_support.profile import FORMATS, Profile, Trip, load_profile, profile_names
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import bounded

__all__ = ["Cost", "ModelWork", "OpWork", "Profile", "Trip", "estimate", "load_profile", "profile_names"]

MAX_OPS = 20_000
MAX_WORK = 2**53
"""Bound of every count in a work: MACs, bytes, dimensions."""
MAX_KIND_CHARS = 64
OP_FIELDS = 9


@dataclass(frozen=True, slots=True)
class OpWork:
    """One operator: multiply-accumulates, constant bytes it reads, activation bytes it reads and writes.

    An operator that multiplies is ``repeats`` matrix products ``[positions, depth] x [depth, outputs]``; with ``positions``
    0 its shape is unknown, and it fills the array. ``number_format`` is one of ``FORMATS``.
    """

    kind: str
    macs: int
    weight_bytes: int
    activation_bytes: int
    positions: int = 0
    depth: int = 0
    outputs: int = 0
    repeats: int = 1
    number_format: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not 0 < len(self.kind) <= MAX_KIND_CHARS:
            raise RefusedError("work op kind", self.kind, f"text of 1 to {MAX_KIND_CHARS} characters")
        if self.number_format not in FORMATS:
            raise RefusedError("work op number_format", self.number_format, ", ".join(FORMATS))
        for name in ("macs", "weight_bytes", "activation_bytes", "positions", "depth", "outputs", "repeats"):
            bounded(f"work op {name}", getattr(self, name), 0, MAX_WORK)

    def to_list(self) -> list[int | str]:
        """Plain values in the order of the fields, for CBOR."""
        return [
            self.kind, self.macs, self.weight_bytes, self.activation_bytes,
            self.positions, self.depth, self.outputs, self.repeats, self.number_format,
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelWork:
    """A model as work: its operators in execution order, one inference, batch 1.

    ``io_bytes`` are its inputs and outputs, which cross the memory bus however large the chip's own memory is.
    """

    ops: tuple[OpWork, ...]
    io_bytes: int = 0

    def __post_init__(self) -> None:
        bounded("work operators", len(self.ops), 0, MAX_OPS)
        bounded("work io_bytes", self.io_bytes, 0, MAX_WORK, "bytes")

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.ops)

    @property
    def weight_bytes(self) -> int:
        return sum(op.weight_bytes for op in self.ops)

    def to_list(self) -> list[object]:
        """``[io_bytes, [op, ...]]``, plain values for CBOR."""
        return [self.io_bytes, [op.to_list() for op in self.ops]]

    @classmethod
    def from_list(cls, values: object) -> ModelWork:
        """The inverse of ``to_list`` for values from outside. Raises ``RefusedError``."""
        if not isinstance(values, Sequence) or len(values) != 2 or not isinstance(values[1], Sequence):
            raise RefusedError("work", values, "[io_bytes, [operator, ...]]")
        io_bytes, ops = values
        bounded("work operators", len(ops), 0, MAX_OPS)
        if any(not isinstance(op, Sequence) or isinstance(op, str | bytes) or len(op) != OP_FIELDS for op in ops):
            raise RefusedError("work operator", ops, f"lists of {OP_FIELDS} values")
        return cls(tuple(OpWork(*op) for op in ops), io_bytes)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one invocation takes: time the machine is busy, and energy."""

    busy_us: int
    energy_uj: int


def estimate(work: ModelWork, profile: Profile, clock_permille: int = 1000, *, cold: bool = False) -> Cost:
    """The cost of one invocation of ``work`` on ``profile`` with its clock at ``clock_permille`` of the rating.

    ``cold``: no weights are on the chip yet, all of them cross the memory bus. Raises ``ValueError`` for a clock outside
    1..1000.
    """
    if not 1 <= clock_permille <= 1000:
        raise ValueError(f"clock_permille {clock_permille}: 1 to 1000")
    activation_room, weight_room = _share_sram(work, profile)
    busy_ns, traffic_bytes, array_fj = _moved_ns(work.io_bytes, profile.sustained_bytes_per_us), work.io_bytes, 0
    for op in work.ops:
        resident = min(op.weight_bytes, weight_room)
        weight_room -= resident
        spilled = max(op.activation_bytes - activation_room, 0)
        op_bytes = op.weight_bytes - (0 if cold else resident) + spilled
        traffic_ns = _moved_ns(op_bytes, profile.sustained_bytes_per_us)
        chip_ns = _moved_ns(op.activation_bytes - spilled, profile.sram_bytes_per_us)
        busy_ns += max(_arithmetic_ns(op, profile, clock_permille), traffic_ns, chip_ns) + profile.launch_ns
        traffic_bytes += op_bytes
        array_fj += _mac_fj(op, profile) * op.macs
    busy_us = -(-busy_ns // 1000)
    dynamic_uj = -(-(array_fj + traffic_bytes * profile.byte_fj) // 10**9)
    return Cost(busy_us, dynamic_uj + profile.idle_mw * busy_us // 1000)


def _share_sram(work: ModelWork, profile: Profile) -> tuple[int, int]:
    """Bytes of on-chip memory for activations and for weights."""
    largest = max((op.activation_bytes for op in work.ops), default=0)
    activation_room = min(largest, profile.sram_bytes // 2)
    return activation_room, profile.sram_bytes - activation_room


def _moved_ns(moved_bytes: int, bytes_per_us: int) -> int:
    return -(-moved_bytes * 1000 // bytes_per_us)


def _arithmetic_ns(op: OpWork, profile: Profile, clock_permille: int) -> int:
    if not op.macs:
        return 0
    rate = profile.rate_permille(op.number_format)
    if not rate:
        return -(-op.macs * 1000 // profile.host_macs_per_us)
    cycles = array_cycles(op, profile)
    # cycles / clock, slowed by the format's rate, the sustained fraction and the throttle: three factors of 1/1000
    return -(-cycles * 10**15 // (profile.clock_khz * rate * profile.efficiency_permille * clock_permille))


def array_cycles(op: OpWork, profile: Profile) -> int:
    """Cycles that ``op`` occupies the MAC arrays at the format rate of 1000 permille."""
    cells = profile.array_rows * profile.array_columns
    if not op.positions:
        return -(-op.macs // (profile.arrays * cells))
    tiles = op.repeats * -(-op.depth // profile.array_rows) * -(-op.outputs // profile.array_columns)
    return -(-tiles * op.positions // profile.arrays) + -(-tiles // profile.arrays) * profile.pass_cycles


def _mac_fj(op: OpWork, profile: Profile) -> int:
    """Energy of one MAC: a format at half the rate takes twice the energy."""
    return profile.mac_fj * 1000 // (profile.rate_permille(op.number_format) or 1000)
