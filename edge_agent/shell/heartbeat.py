"""The agent's own rhythm: ticks of time, the watchdog, and the board's sensors.

Rules: the watchdog is fed by the very loop that does the work; a board's sensors are read beside it, unless they are emulated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from board_support.board import Board
from edge_agent.core.clock import Clock
from edge_agent.node.events import Event, Sensed, Tick
from edge_agent.service import notify, watchdog_period_s

TICK_S = 0.1
SENSE_S = 2.0


class Heartbeat:
    """``feed`` takes the node's events; ``idle`` says whether ticks may be rare."""

    def __init__(self, board: Board, clock: Clock, feed: Callable[[Event], None], idle: Callable[[], bool]) -> None:
        self._board, self._clock, self._feed, self._idle = board, clock, feed, idle

    async def tick_for_ever(self) -> None:
        watchdog_s = watchdog_period_s()
        fed_us = 0
        while True:
            self._feed(Tick(self._clock.wall_us()))
            now_us = self._clock.monotonic_us()
            if watchdog_s is not None and now_us - fed_us >= watchdog_s * 1e6:
                notify("WATCHDOG=1")
                fed_us = now_us
            await asyncio.sleep(TICK_S if not self._idle() else max(TICK_S, min(1.0, watchdog_s or 1.0)))

    async def sense_for_ever(self, sensed: Callable[[], None]) -> None:
        """``sensed`` is called after each reading."""
        while True:
            await asyncio.sleep(SENSE_S)
            await self.read_sensors()
            sensed()

    async def read_sensors(self) -> None:
        now_us = self._clock.monotonic_us()
        if self._board.emulated:
            sensors = self._board.read_sensors(now_us)
        else:
            sensors = await asyncio.to_thread(self._board.read_sensors, now_us)
        self._feed(Sensed(sensors.temperature_mdegc, sensors.trip_mdegc, sensors.power_mw))
