"""Clients at every board of the demo, each asking one question after the other, and asking why it went where it went.

Rules: a client asks its own board first and the others when that one is gone, as any client would; what it is told of the reason
counts for nothing in the times.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

from edge_agent.client import Client, request_for_picture
from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import InferenceRequest, Limits
from edge_agent.demo.story import Served, Story, show_progress
from edge_agent.local_fleet import LocalFleet

TASK = "detect_faces"
CLIENTS_PER_BOARD = 2
DEADLINE_US = 20_000_000


class Act:
    """Clients at every board, asking until so many requests are answered; something may happen at the n-th answer."""

    def __init__(self, story: Story, fleet: LocalFleet, picture: bytes, name: str) -> None:
        self._story, self._fleet, self._picture, self._name = story, fleet, picture, name
        self._left = self._total = self._answered = 0
        self._lock = threading.Lock()
        self._at: tuple[int, Callable[[], object]] | None = None

    def at(self, answered: int, happening: Callable[[], object]) -> None:
        self._at = (answered, happening)

    async def serve(self, boards: list[str], requests: int) -> None:
        self._left = self._total = requests
        names = [(board, number) for number in range(CLIENTS_PER_BOARD) for board in boards]
        await asyncio.gather(*(asyncio.to_thread(self._ask, board, number, boards) for board, number in names))
        show_progress(self._answered, self._total, end="\n")

    def _ask(self, board: str, number: int, boards: list[str]) -> None:
        """One client: its own board first, the others when that one is gone."""
        sockets = [self._fleet.socket_of(each) for each in (board, *(b for b in boards if b != board))]
        with Client(*sockets) as client:
            while self._take():
                asked_s = self._story.now_s()
                result = client.submit(request(self._picture))
                answered_s = self._story.now_s()
                why = why_of(client, result.request_id)
                self._story.served.append(Served(self._name, f"{board}/{number}", asked_s, answered_s, result, why))
                self._count()

    def _take(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def _count(self) -> None:
        with self._lock:
            self._answered += 1
            happening = None
            if self._at is not None and self._answered >= self._at[0]:
                (_, happening), self._at = self._at, None
            show_progress(self._answered, self._total)
        if happening is not None:
            happening()


def why_of(client: Client, request_id: str) -> Mapping[str, Any] | None:
    try:
        why: Mapping[str, Any] = client.explain(request_id)["why"]
    except UnavailableError:
        return None
    return why


def request(picture: bytes) -> InferenceRequest:
    return request_for_picture(TASK, picture, limits=Limits(deadline_us=DEADLINE_US))
