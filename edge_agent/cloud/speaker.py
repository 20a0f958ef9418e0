"""A language model outside the fleet, as this board hosts it: its turns, its price, and whether it can be had now.

Owns one exchange with the endpoint for each turn, and the watch over the endpoint.  Rules: a turn that ends, however, ends its
exchange; after a failure that is not the turn's own the model is withdrawn, and the endpoint is asked, with a back-off, until it
answers, so that turns do not wait for what is not there; an answer says that it came from the cloud.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing

from edge_agent.cloud.chat_api import DONE, Answer, Events, body_of, garbage, why_not
from edge_agent.cloud.endpoint import Endpoint, EndpointError
from edge_agent.cloud.exchange import SILENT_S, Exchange, Head, connected
from edge_agent.core.chat import Turn, TurnEnd, TurnPart
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import KvAsk, KvItem
from edge_agent.core.values import ModelOffer
from edge_agent.gateway.talker import Figure
from edge_agent.node.events import Hosted, Withdrawn
from edge_agent.transport.backoff import Backoff, BackoffLimits

LIMITS = BackoffLimits(base_us=1_000_000, cap_us=300_000_000)
OK = 200
NOT_NOW = (401, 403, 408, 429)
"""Answers to a probe that tell that no turn would be served, besides those from 500 on."""


class CloudSpeaker:
    """A ``Speaker`` over ``endpoint``; ``offer`` is what the node is told. ``watch`` must run for it to be hosted."""

    def __init__(self, endpoint: Endpoint, offer: ModelOffer) -> None:
        self.offer, self._endpoint = offer, endpoint
        self._backoff = Backoff(LIMITS)
        self._failed: EndpointError | None = None
        self._fails = asyncio.Event()
        self._served = False
        self._spent_us = 0
        self._turns = Counter[str]()

    async def talk(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        """Serve one turn. Raises ``EndpointError``."""
        if self._failed is not None:
            raise EndpointError(self._failed.reason, self._failed.remedy)
        if refusal := why_not(turn):
            raise EndpointError(refusal, of_turn=True)
        outcome = "broken_off"
        try:
            async with aclosing(self._answer(turn)) as parts:
                async for part in parts:
                    if isinstance(part, TurnEnd):
                        outcome, self._served = "served", True
                    yield part
        except EndpointError as error:
            outcome = "failed"
            self._fail(error)
            raise
        finally:
            self._turns[outcome] += 1

    async def _answer(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        began_s, first_s, answer = time.monotonic(), 0.0, Answer(turn.max_tokens)
        async with connected(self._endpoint) as exchange:
            head = await exchange.ask("POST", "/chat/completions", body_of(turn, self._endpoint.model))
            await _must_stream(exchange, head)
            self._spent_us += self.offer.price_us
            async with aclosing(_events(exchange)) as events:
                async for data in events:
                    if data == DONE:
                        break
                    if text := answer.take(data):
                        first_s = first_s or time.monotonic()
                        yield TurnPart(text, 1)
        if answer.finish is None:
            raise garbage("half an answer")
        yield self._end(answer, began_s, first_s)

    def _end(self, answer: Answer, began_s: float, first_s: float) -> TurnEnd:
        note = f"from the cloud: {self._endpoint.model} at {self._endpoint.authority}, for {self.offer.price_us} µs"
        cut = (f"the cloud ended it by {answer.cut_by}",) if answer.cut_by else ()
        ended_s = time.monotonic()
        assert answer.finish is not None
        return TurnEnd(
            answer.text, answer.finish, answer.prompt_tokens, answer.cached_tokens, answer.tokens,
            first_token_us=int((first_s - began_s) * 1e6) if first_s else 0,
            decode_us=int((ended_s - first_s) * 1e6) if first_s else 0,
            notes=(note, *cut),
        )  # fmt: skip

    def _fail(self, error: EndpointError) -> None:
        if not error.of_turn and self._failed is None:
            self._failed = error
            self._fails.set()

    # whether it can be had

    async def watch(self, feed: Callable[[Hosted | Withdrawn], None]) -> None:
        """Host the model while its endpoint answers, for ever."""
        told = ""
        while True:
            self._failed = await self._probe()
            if self._failed is None:
                self._fails.clear()
                feed(Hosted(self.offer))
                told = ""
                await self._fails.wait()
            assert self._failed is not None
            if str(self._failed) != told:
                told = str(self._failed)
                feed(Withdrawn(self.offer.model, told))
            await asyncio.sleep(self._wait_us(self._failed) / 1e6)

    async def _probe(self) -> EndpointError | None:
        try:
            async with connected(self._endpoint) as exchange:
                head = await exchange.ask("GET", "/models")
                if head.status >= 500 or head.status in NOT_NOW:
                    return await exchange.refusal(head)
        except EndpointError as error:
            return error
        return None

    def _wait_us(self, error: EndpointError) -> int:
        """A turn that was served makes the next failure a first one."""
        limits = self._backoff.limits
        wait_us = self._backoff.after(limits.sound_us if self._served else 0)
        self._served = False
        return max(wait_us, min(error.retry_s * 1_000_000, limits.cap_us))

    async def ready(self) -> str:
        return str(self._failed or "")

    def figures(self) -> Iterable[Figure]:
        model = ("model", self.offer.model)
        for outcome in ("served", "failed", "broken_off"):
            labels = (model, ("outcome", outcome))
            yield Figure("cloud_turns_total", "turns that went to the cloud", self._turns[outcome], "counter", labels)
        about = "what turns in the cloud cost, in seconds of the policy's exchange rates"
        yield Figure("cloud_price_seconds_total", about, self._spent_us / 1e6, "counter", (model,))

    # a model without KV of ours

    def kv_state(self) -> None:
        return None

    def sessions(self) -> list[tuple[str, int, int, str, int]]:
        return []

    async def drop(self, name: str) -> bool:
        return False

    async def adopt(self, session: str, manifest: bytes) -> tuple[tuple[bytes, ...], bool]:
        raise _keeps_nothing(session)

    async def put(self, session: str, item: KvItem, name: bytes, payload: bytes) -> None:
        raise _keeps_nothing(session)

    async def give(self, ask: KvAsk) -> bytes:
        raise _keeps_nothing("of another board")

    async def close(self) -> None:
        """Nothing outlives its turn."""


async def _must_stream(exchange: Exchange, head: Head) -> None:
    if head.status != OK:
        raise await exchange.refusal(head)
    if head.kind != "text/event-stream":
        raise garbage("something else than a stream of events")


async def _events(exchange: Exchange) -> AsyncGenerator[str, None]:
    """The events of an answer; each must be whole within ``SILENT_S`` after the one before it."""
    events, now_s = Events(), asyncio.get_running_loop().time
    heard_s = now_s()
    while piece := await exchange.read(heard_s + SILENT_S - now_s()):
        for data in events.feed(piece):
            yield data
            heard_s = now_s()


def _keeps_nothing(session: str) -> RefusedError:
    return RefusedError("session", session, "none: a cloud keeps no session of this fleet")
