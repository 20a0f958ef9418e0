"""How long a model takes on a machine of given arithmetic rate and bandwidth: an op-level roofline, in integers.

Owns ``Profile`` (a machine), ``ModelWork`` (a model's arithmetic and traffic) and ``estimate``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OpWork:
    """One operator: multiply-accumulates, constant bytes it reads, activation bytes it reads and writes."""

    kind: str
    macs: int
    weight_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class ModelWork:
    """A model as work: its operators in execution order, one inference, batch 1."""

    ops: tuple[OpWork, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """A machine."""

    name: str
    active_mw: int
    idle_mw: int
