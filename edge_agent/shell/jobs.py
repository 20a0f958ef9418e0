"""What runs on this board's models for the node: jobs, and sessions that move.

Rules: every job ends with one ``Executed``, also one that is broken off; only a language model's job can be broken off; what a
language model says of its KV is told when it has changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from edge_agent.core.chat import CHAT
from edge_agent.core.kv import KvState
from edge_agent.core.values import Status, failure
from edge_agent.hosting import Host
from edge_agent.node.events import Event, Execute, Executed, KvChanged, KvFind, KvGive, KvPut, Partial, Withdrawn
from edge_agent.shell.tasks import Tasks


class Jobs:
    """``feed`` takes the node's events. ``board``: this board's id."""

    def __init__(self, host: Host, tasks: Tasks, feed: Callable[[Event], None], board: str) -> None:
        self._host, self._tasks, self._feed, self._board = host, tasks, feed, board
        self._jobs: dict[str, asyncio.Task[None]] = {}
        """Of language, by key: what can be broken off."""
        self._broken_off: set[str] = set()
        self._kv: dict[str, KvState] = {}

    def begin(self, job: Execute) -> None:
        task = self._tasks.spawn(self._execute(job), f"job {job.key}")
        if job.request.task == CHAT:
            self._jobs[job.key] = task
            task.add_done_callback(lambda done: self._forget(job, done))

    def cancel(self, key: str) -> None:
        """Break the job off, if it is one that can be."""
        if key in self._jobs:
            self._broken_off.add(key)
            self._jobs[key].cancel()

    def move(self, effect: KvFind | KvPut | KvGive) -> None:
        """Do a session's next step on its way here or from here."""
        self._tasks.spawn(self._move(effect), "a session moves")

    def tell_kv(self) -> None:
        """The language models' word on their KV, when it has changed."""
        for model, speaker in self._host.speakers.items():
            state = speaker.kv_state()
            if state is not None and state != self._kv.get(model):
                self._kv[model] = state
                self._feed(KvChanged(state))

    async def _execute(self, job: Execute) -> None:
        result = await self._host.execute(job, lambda part: self._feed(Partial(job.key, part)))
        if job.request.task != CHAT and self._host.quarantined(job.model):
            self._feed(Withdrawn(job.model, result.reason))
        self._feed(Executed(job.key, result))
        if job.request.task == CHAT:
            self.tell_kv()

    def _forget(self, job: Execute, task: asyncio.Task[None]) -> None:
        self._jobs.pop(job.key, None)
        if job.key in self._broken_off:
            self._broken_off.discard(job.key)
            if task.cancelled():
                reason = "nobody waits for it any more"
                result = failure(job.request.request_id, Status.FAILED, self._board, reason, job.model)
                self._feed(Executed(job.key, result))

    async def _move(self, effect: KvFind | KvPut | KvGive) -> None:
        match effect:
            case KvFind():
                self._feed(await self._host.find(effect))
            case KvPut():
                self._feed(await self._host.put(effect))
            case KvGive():
                self._feed(await self._host.give(effect))
        self.tell_kv()
