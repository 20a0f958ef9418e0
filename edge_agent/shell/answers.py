"""Clients in this process that wait for one result each.

Rules: a handle is given once; whoever stops waiting abandons the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from edge_agent.core.values import InferenceRequest, InferenceResult
from edge_agent.node.events import Abandoned, Event, Submitted


class Answers:
    """``feed`` takes the node's events."""

    def __init__(self, feed: Callable[[Event], None]) -> None:
        self._feed = feed
        self._waiting: dict[int, asyncio.Future[InferenceResult]] = {}
        self._handles = 0

    def new_handle(self) -> int:
        self._handles += 1
        return self._handles

    async def submit(self, request: InferenceRequest) -> InferenceResult:
        """Serve one request; the answer is a result, whatever happens."""
        handle = self.new_handle()
        answer: asyncio.Future[InferenceResult] = asyncio.get_running_loop().create_future()
        self._waiting[handle] = answer
        try:
            self._feed(Submitted(request, handle))
            return await answer
        except asyncio.CancelledError:
            self._feed(Abandoned(handle))
            raise
        finally:
            self._waiting.pop(handle, None)

    def answer(self, handle: int, result: InferenceResult) -> None:
        """Nothing if nobody waits behind ``handle``."""
        waiting = self._waiting.get(handle)
        if waiting is not None and not waiting.done():
            waiting.set_result(result)
