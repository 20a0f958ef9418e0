"""The routes of the HTTP door, and the life of a turn that came through it.

Rules: a turn lives no longer than its client waits for it; an error before the first text has its own status, one after it
is the stream's last event; a stop tells the clients whose turns it ends; whatever fails, the place of a request is free
afterwards.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_agent.core.chat import TurnEnd, TurnPart
from edge_agent.core.config import GatewaySection
from edge_agent.core.errors import RefusedError, SlyError, shown
from edge_agent.core.values import SESSION_NAME, checked
from edge_agent.gateway.access import Access
from edge_agent.gateway.body import read_body
from edge_agent.gateway.errors import RETRY_S, SESSION_HEADER, ApiError, bad_request, draining, told
from edge_agent.gateway.metrics import CONTENT_TYPE, GatewayMetrics
from edge_agent.gateway.openai import Writer, model_list, model_object
from edge_agent.gateway.openai_request import Asked, read_request
from edge_agent.gateway.outgoing import Out, error_response, http_error_response, json_response, stream
from edge_agent.gateway.talker import Talker

READY_S = 10.0
READY_FRESH_S = 1.0


class Door:
    """The routes over one ``Talker``. ``app`` is the ASGI application."""

    def __init__(self, section: GatewaySection, access: Access, talker: Talker, say: Callable[[str], None]) -> None:
        self._max_requests, self._max_body_bytes = section.max_requests, section.max_body_bytes
        self._access, self._talker, self._say = access, talker, say
        self._started = int(time.time())
        self.metrics = GatewayMetrics()
        self.stopping, self.ending, self.empty = asyncio.Event(), asyncio.Event(), asyncio.Event()
        """Nothing new is taken; turns in work are ended; no turn is in work."""
        self.empty.set()
        self._readiness: tuple[float, str] = (float("-inf"), "")
        self._probe = asyncio.Lock()
        self._routes = Starlette(routes=self._table(), exception_handlers=self._handlers())  # type: ignore[arg-type]
        self.app: ASGIApp = self._enter

    def _table(self) -> list[Route]:
        return [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", _Post(self, chat=True), methods=["POST"]),
            Route("/v1/completions", _Post(self, chat=False), methods=["POST"]),
            Route("/healthz", self._health),
            Route("/readyz", self._ready),
            Route("/metrics", self._metrics),
        ]

    def _handlers(self) -> dict[object, object]:
        return {ApiError: error_response, HTTPException: http_error_response, Exception: self._fault}

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests[_label(path), message["status"]] += 1
            await send(message)

        request = Request(scope, receive)
        headers = request.headers
        try:
            self._access.check(path, headers.get("host", "localhost"), headers.get("authorization", ""))
        except ApiError as error:
            await error_response(request, error)(scope, receive, counted)
            return
        await self._routes(scope, receive, counted)

    # small routes

    async def _models(self, request: Request) -> Response:
        return json_response(model_list(self._talker.models(), self._started))

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return json_response(model_object(request.path_params["name"], self._started))

    def _check_model(self, name: str) -> None:
        known = self._talker.models()
        if name not in known:
            message = f"model: got {shown(name)}; allowed: {', '.join(known) or 'none, no language model is hosted'}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, "model_not_found", "model")

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(self._talker.figures()), media_type=CONTENT_TYPE)

    async def _health(self, request: Request) -> Response:
        return self._probed(request, await self._why_not())

    async def _ready(self, request: Request) -> Response:
        if self.stopping.is_set():
            return self._probed(request, "stopping")
        if self.metrics.served_now >= self._max_requests:
            return self._probed(request, f"all {self._max_requests} requests are in work")
        return self._probed(request, await self._why_not())

    def _probed(self, request: Request, why_not: str) -> Response:
        """The reason is for those who have the token."""
        if not why_not:
            return PlainTextResponse("ok\n")
        reason = why_not if self._access.authorized(request.headers.get("authorization", "")) else "not ready"
        return PlainTextResponse(f"{reason}\n", HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": str(RETRY_S)})

    async def _why_not(self) -> str:
        """The agent's own word, asked for at most once in ``READY_FRESH_S`` however many probe."""
        async with self._probe:
            asked_s, word = self._readiness
            if time.monotonic() - asked_s > READY_FRESH_S:
                word = await _word_of(self._talker)
                self._readiness = (time.monotonic(), word)
            return word

    # turns

    async def serve(self, request: Request, send: Send, chat: bool) -> None:
        """One POST: within the number of requests, and only as long as its client is there."""
        if self.stopping.is_set():
            raise draining()
        if self.metrics.served_now >= self._max_requests:
            message = f"{self._max_requests} requests are in work; ask again"
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, "too_many_requests", retry_s=RETRY_S)
        arrived_s = time.monotonic()
        self.metrics.served_now += 1
        self.empty.clear()
        try:
            asked = read_request(await read_body(request, self._max_body_bytes), chat, _session(request))
            self._check_model(asked.model)
            await self._while_wanted(request, Out(send), asked, arrived_s)
        except ClientDisconnect:
            self.metrics.turns["cancelled"] += 1
        finally:
            self.metrics.served_now -= 1
            if not self.metrics.served_now:
                self.empty.set()

    async def _while_wanted(self, request: Request, out: Out, asked: Asked, arrived_s: float) -> None:
        """Answer until it is done, the client has gone or the door ends its turns, whichever comes first."""
        work = asyncio.ensure_future(self._answer(out, asked, arrived_s))
        gone = asyncio.ensure_future(_gone(request.receive))
        ending = asyncio.ensure_future(self.ending.wait())
        try:
            await asyncio.wait((work, gone, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            unwanted = not work.done()
            for task in (work, gone, ending):
                task.cancel()
            await asyncio.wait((work, gone, ending))
        if unwanted and work.cancelled():
            self.metrics.turns["cancelled"] += 1
            if gone.cancelled():
                await out.fail(draining())
        else:
            work.result()

    async def _answer(self, out: Out, asked: Asked, arrived_s: float) -> None:
        headers = {SESSION_HEADER: asked.turn.session} if asked.turn.session else {}
        writer = Writer(asked, f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time()))
        try:
            async with aclosing(self._parts(asked, arrived_s)) as parts:
                if asked.stream:
                    await stream(out, writer, parts, headers)
                else:
                    end = [part async for part in parts if isinstance(part, TurnEnd)][0]
                    await out.whole(json_response(writer.whole(end), headers=headers))
        except SlyError as error:
            self.metrics.turns["refused" if isinstance(error, RefusedError) else "failed"] += 1
            await out.fail(told(error))

    async def _parts(self, asked: Asked, arrived_s: float) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        """The talker's parts, counted; the last one is a ``TurnEnd``."""
        last_s, terms = 0.0, asked.terms
        async with aclosing(self._talker.talk(asked.turn, asked.model, data=terms.data, limits=terms.limits)) as parts:
            async for part in parts:
                now_s = time.monotonic()
                if isinstance(part, TurnEnd):
                    self.metrics.ended(part)
                    yield part
                    return
                if not last_s:
                    self.metrics.first_token_s.observe(now_s - arrived_s)
                elif part.tokens:
                    self.metrics.between_tokens_s.observe((now_s - last_s) / part.tokens, part.tokens)
                last_s = now_s
                yield part
        raise RuntimeError("a turn ended without its end")

    async def _fault(self, request: Request, error: Exception) -> Response:
        self._say(f"gateway: {request.method} {request.scope['path']} failed: {error!r}")
        message = "this board failed; its log says how"
        return error_response(request, ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, "internal_error"))


class _Post:
    """A route that sends its own answer, so that it can stream and be cancelled."""

    def __init__(self, door: Door, chat: bool) -> None:
        self._door, self._chat = door, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._door.serve(Request(scope, receive), send, self._chat)


async def _word_of(talker: Talker) -> str:
    try:
        async with asyncio.timeout(READY_S):
            return await talker.ready()
    except TimeoutError:
        return f"no answer within {READY_S:g} s"
    except SlyError as error:
        return str(error)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _session(request: Request) -> str:
    name = request.headers.get(SESSION_HEADER, "")
    try:
        return name and checked(SESSION_NAME, SESSION_HEADER, name)
    except RefusedError as error:
        raise bad_request(str(error), SESSION_HEADER) from error


def _label(path: str) -> str:
    """A path as a label: one of the routes, whatever a client asks for."""
    known = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/healthz", "/readyz", "/metrics")
    return next((route for route in known if path == route or path.startswith(f"{route}/")), "other")
