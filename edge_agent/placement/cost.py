"""What an option costs, in integer microseconds-equivalents, and how estimates learn.

Rules: integers only, so that every board computes the same bits; no clocks; no state beyond what is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.core.config import PolicySection

LEARNING_SHIFT = 3
"""A measurement moves its estimate by 1/8 of the difference: half-way after about five inferences."""


@dataclass(frozen=True, slots=True)
class CostParts:
    """One option's cost, taken apart for ``sly explain``; ``total_us`` is what is compared."""

    busy_us: int
    wait_us: int
    transfer_us: int
    energy_us: int
    lateness_us: int
    quality_us: int
    kv_us: int = 0
    """Bringing the past of a session to where its next turn runs."""
    congestion_us: int = 0
    """What its busy time takes from others, on a board that is booked by the agreed table."""
    price_us: int = 0
    """Of the cloud."""

    @property
    def latency_us(self) -> int:
        return self.busy_us + self.wait_us + self.transfer_us + self.kv_us

    @property
    def total_us(self) -> int:
        return self.latency_us + self.energy_us + self.lateness_us + self.quality_us + self.congestion_us + self.price_us


def option_cost(
    policy: PolicySection,
    *,
    busy_us: int,
    energy_uj: int,
    queue_us: int,
    payload_bytes: int,
    remote: bool,
    budget_us: int,
    quality_permille: int,
    kv_us: int = 0,
    booked_us: int = 0,
    price_us: int = 0,
) -> CostParts:
    """The cost of one (model, board) option: its work, the work before it, the way there, the way of its session's KV
    (``kv_us``), and what it falls short in.

    ``payload_bytes`` travel only when ``remote``; ``budget_us`` is what is left of the deadline; ``booked_us`` is the work that
    the board is booked for within the policy's horizon.
    """
    transfer_us = policy.link_latency_us + payload_bytes * 1000 // policy.link_bytes_per_ms if remote else 0
    late_us = max(0, busy_us + queue_us + transfer_us + kv_us - budget_us)
    return CostParts(
        busy_us=busy_us,
        wait_us=queue_us,
        transfer_us=transfer_us,
        energy_us=energy_uj * policy.energy_us_per_mj // 1000,
        lateness_us=late_us * policy.lateness_factor,
        quality_us=(1000 - quality_permille) * policy.quality_us_per_permille,
        kv_us=kv_us,
        congestion_us=policy.congestion_factor * busy_us * booked_us // policy.horizon_us,
        price_us=price_us,
    )


def corrected(estimate: int, measured: int) -> int:
    """The estimate after one more measurement: an exponential average in integers that reaches what stays constant."""
    difference = measured - estimate
    step = abs(difference) >> LEARNING_SHIFT
    return estimate + (max(step, 1) if difference > 0 else -max(step, 1) if difference < 0 else 0)
