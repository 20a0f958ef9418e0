"""A board that lies about its load and its costs: the production node with another tongue."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from edge_agent.core.values import ModelOffer, ShapeCost
from edge_agent.gossip.record import BoardRecord
from edge_agent.node.node import Node
from edge_agent.sim.plans import Fault

_Cost = TypeVar("_Cost", ModelOffer, ShapeCost)


class LyingNode(Node):
    """A node whose records may tell others what is not so; what it decides itself is by the truth."""

    lie: Fault | None = None

    def _record(self, sequence: int, now_us: int) -> BoardRecord:
        record = super()._record(sequence, now_us)
        if self.lie is None:
            return record
        offers = tuple(replace(self._less(offer), shapes=tuple(map(self._less, offer.shapes))) for offer in record.offers)
        states = tuple(replace(state, queue_us=0, waits_us=(), running=0) for state in record.kv)
        return replace(record, queue_us=0, waits_us=(), offers=offers, kv=states)

    def _less(self, cost: _Cost) -> _Cost:
        assert self.lie is not None
        permille = self.lie.cost_permille
        return replace(cost, busy_us=max(1, cost.busy_us * permille // 1000), energy_uj=cost.energy_uj * permille // 1000)
