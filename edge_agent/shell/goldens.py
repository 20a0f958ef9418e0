"""Golden inputs: what each picture model here gives for the input that follows from its signature (``attest.golden``).

Rules: one at a time; first soon after the model was loaded, then about every ``PERIOD_US``, and never so often that it takes more
than a thousandth of the time; only while no model has anything to do, or at last, when that never comes, while its own engine has
nothing to do.  One that goes wrong leaves what was known; a model that refuses its golden input has none.  What one release of a
model gave says nothing of the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from edge_agent.core.clock import Clock
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.hosting import Host

PERIOD_US = 600_000_000
LOOK_S = 1.0
REST_FACTOR = 1000
"""A golden input that took so long is not run again before this many times as long."""
NEVER_US = 2**62


class Goldens:
    """``told`` is called when ``digests`` (by model) have changed: what the release gave that serves, or last served."""

    def __init__(self, host: Host, clock: Clock, told: Callable[[], None]) -> None:
        self._host, self._clock, self._told = host, clock, told
        self.digests: dict[str, bytes] = {}
        self._due_us: dict[str, int] = {}
        self._of: dict[str, bytes] = {}
        """By model: the digest of the release that this is of."""

    def digest_of(self, model: str, offered: bytes) -> bytes:
        """What the release of a model gave that is offered by this digest; empty if it was not run yet."""
        return self.digests.get(model, b"") if self._of.get(model) == offered else b""

    async def run_for_ever(self) -> None:
        while True:
            await self.run_due()
            await asyncio.sleep(LOOK_S)

    async def run_due(self) -> None:
        """Run those that are due and may run now."""
        picture_models = self._host.picture_models()
        before = dict(self.digests)
        here = {(model, self._host.offered(model)) for model in picture_models}
        for gone, _ in self._of.items() - here:
            del self._of[gone]
            self._due_us.pop(gone, None)
            self.digests.pop(gone, None)
        for model in picture_models:
            if self._may_run(model):
                await self._run(model)
        if self.digests != before:
            self._told()

    def _may_run(self, model: str) -> bool:
        late_us = self._clock.monotonic_us() - self._due_us.get(model, 0)
        if late_us < 0 or not self._host.resting(model):
            return False
        return self._host.at_rest or (model in self._due_us and late_us > PERIOD_US)

    async def _run(self, model: str) -> None:
        took_us, self._of[model] = 0, self._host.offered(model)
        try:
            digest, took_us = await self._host.golden(model)
        except RefusedError:
            self._due_us[model] = NEVER_US
            return
        except UnavailableError:
            digest = self.digests.get(model, b"")
        if self._host.offered(model) != self._of[model]:
            return
        self._due_us[model] = self._clock.monotonic_us() + max(PERIOD_US, REST_FACTOR * took_us)
        self.digests[model] = digest
