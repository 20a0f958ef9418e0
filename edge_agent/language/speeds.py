"""What this board measured of itself: how fast KV is restored from each tier, and how fast prompts are computed.

Rules: learned integers, tokens a second; nothing is claimed before it was measured; what is too small to be measured well is not.
"""

from __future__ import annotations

from edge_agent.core.chat import Tier

LEAST_PREFILLED, LEAST_RESTORED = 256, 32
"""Fewer tokens say more about the overhead than about the speed."""
MARGIN = 2
"""Computing again must promise to be so many times faster than restoring, which gives the very same bytes back."""


class Speeds:
    def __init__(self) -> None:
        self.prefill = 0
        """Tokens a second; 0 before anything was measured."""
        self.restore: dict[Tier, int] = {}

    def prefilled(self, tokens: int, took_us: int) -> None:
        if tokens >= LEAST_PREFILLED:
            self.prefill = learned(self.prefill, _a_second(tokens, took_us))

    def restored(self, tier: Tier, tokens: int, took_us: int) -> None:
        if tokens >= LEAST_RESTORED:
            self.restore[tier] = learned(self.restore.get(tier, 0), _a_second(tokens, took_us))

    def restore_us(self, tokens: int, tier: Tier = Tier.RAM) -> int:
        """What bringing so many tokens back is expected to take; before anything was measured, a microsecond a token."""
        return tokens * 10**6 // max(1, self.restore.get(tier, 10**6))

    def restoring_pays(self, tier: Tier, tokens: int) -> bool:
        """The tier rule: restoring beats recomputing iff it gives more tokens a second. What was never measured, pays."""
        known = self.restore.get(tier, 0)
        return not known or not self.prefill or MARGIN * known > self.prefill


def learned(old: int, new: int) -> int:
    """A measured speed after one more measurement: one part in four is new."""
    return new if not old else (3 * old + new) // 4


def _a_second(tokens: int, took_us: int) -> int:
    return tokens * 10**6 // max(1, took_us)
