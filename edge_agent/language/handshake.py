"""The first words between the agent and the engine child of a language model: what to load and how, and the account of it.

Rules: the order is trusted, for the agent speaks first; the account is decoded as strictly as all that a child says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from edge_agent.core.cbor import list_of
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import BLOCK_TOKENS
from edge_agent.core.model_shape import ModelShape
from edge_agent.core.values import bounded
from edge_agent.language.batching import MAX_CURVE_POINTS, MAX_STEP_US, CostCurve
from edge_agent.language.events import MAX_BURST_IDS, checked_ids
from edge_agent.language.speculation import MAX_GUESSES
from edge_agent.runtime.doorbell import items, natural, printable

MAX_STOP_IDS = 64
MAX_LAYERS = 16
Curve = tuple[tuple[int, int], ...]
"""Of what steps cost: (rows, µs), ascending."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to load: ``digest`` (SHA-256) of the stages' file, ``runtime`` by name. The tokenizer's bytes are the call's bulk."""

    model: str
    digest: bytes
    runtime: str
    threads: int
    memory_bytes: int
    invoke_limit_us: int
    unsafe_without_seccomp: bool
    shape: ModelShape
    window_blocks: int
    slots: int
    curve: Curve = ()

    def to_body(self) -> dict[str, object]:
        return asdict(self) | {"shape": asdict(self.shape), "curve": [list(point) for point in self.curve]}

    @classmethod
    def from_body(cls, body: object) -> Order:
        assert isinstance(body, dict), "the agent speaks first, and is trusted"
        curve = tuple((rows, us) for rows, us in body["curve"])
        return cls(**body | {"shape": ModelShape(**body["shape"]), "curve": curve})


def step_bytes(shape: ModelShape, slots: int) -> int:
    """The most bulk bytes of one call's events: rows and a block a turn, and one prompt's end with all unsealed rows."""
    turn = (1 + MAX_GUESSES) * shape.row_bytes + shape.block_bytes
    return slots * turn + (MAX_BURST_IDS + 2 * BLOCK_TOKENS) * shape.row_bytes + shape.block_bytes + shape.prelude_bytes


@dataclass(frozen=True, slots=True)
class Account:
    """A child's account of itself once its model is loaded and has passed its self-test.

    ``curve``: what a step of so many rows costs, (rows, µs) ascending.  ``stop_ids``: what ends an answer.
    """

    library: str
    confinement: tuple[str, ...]
    resident_bytes: int
    stop_ids: tuple[int, ...]
    curve: Curve

    def to_body(self) -> list[object]:
        curve = [list(point) for point in self.curve]
        return [self.library, list(self.confinement), self.resident_bytes, list(self.stop_ids), curve]

    @classmethod
    def from_body(cls, body: object, vocabulary: int) -> Account:
        """Raises ``RefusedError`` for anything that a sound child would not say."""
        library, layers, resident_bytes, stop_ids, curve = items(body, "account", 5)
        confinement = tuple(printable(layer) for layer in list_of(layers, "account confinement", str, MAX_LAYERS))
        stops = checked_ids(list_of(stop_ids, "account stop_ids", int, MAX_STOP_IDS), vocabulary)
        return cls(printable(library), confinement, natural(resident_bytes), stops, checked_curve(curve))


def checked_curve(value: object) -> Curve:
    """The points of a cost curve. Raises ``RefusedError`` for anything that is none."""
    points = tuple(_point(each) for each in list_of(value, "cost curve", list, MAX_CURVE_POINTS))
    try:
        CostCurve(points)
    except ValueError as error:
        raise RefusedError("cost curve", str(error), "an ascending curve") from error
    return points


def _point(value: object) -> tuple[int, int]:
    rows, us = items(value, "account curve point", 2)
    return bounded("curve rows", rows, 1, 2**20, "rows"), bounded("curve cost", us, 1, MAX_STEP_US, "µs")
