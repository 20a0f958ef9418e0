"""Answers on their way out: whole, or event by event, or as the error that there is instead.

Rules: nothing of a stream is begun before there is a first part, so that a refusal keeps its status; a stream that fails later
says so in its last event, without ``[DONE]``.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from edge_agent.core.chat import TurnPart
from edge_agent.core.errors import shown
from edge_agent.gateway.errors import ApiError
from edge_agent.gateway.openai import DONE, Writer, event, to_json
from edge_agent.gateway.talker import Parts


class Out:
    """The answer to one POST on its way out: whole, or event by event."""

    def __init__(self, send: Send) -> None:
        self._send, self._begun = send, False

    async def whole(self, response: Response) -> None:
        await self._begin(response.status_code, response.raw_headers)
        await self._data(bytes(response.body), more=False)

    async def events(self, *values: dict[str, object]) -> None:
        await self._data(b"".join(map(event, values)), more=True)

    async def beginstream(self, headers: dict[str, str]) -> None:
        known = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        raw = Response(None, HTTPStatus.OK, known, "text/event-stream").raw_headers
        await self._begin(HTTPStatus.OK, [(name, value) for name, value in raw if name != b"content-length"])

    async def done(self) -> None:
        await self._data(DONE, more=False)

    async def fail(self, error: ApiError) -> None:
        """The error as a status if that is still possible (raised for the handler), else as the last event."""
        if not self._begun:
            raise error
        await self._data(event(error.body()), more=False)

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._begun = True
        await self._send({"type": "http.response.start", "status": int(status), "headers": headers})

    async def _data(self, data: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


async def stream(out: Out, writer: Writer, parts: Parts, headers: dict[str, str]) -> None:
    """Every part as an event. Nothing is begun before there is a first part, so that a refusal keeps its status."""
    part = await anext(parts)
    await out.beginstream(headers)
    await out.events(*writer.beginning())
    told_chars = 0
    while isinstance(part, TurnPart):
        if part.text:
            told_chars += len(part.text)
            await out.events(writer.part(part.text))
        part = await anext(parts)
    if rest := part.text[told_chars:]:
        await out.events(writer.part(rest))
    await out.events(*writer.ending(part))
    await out.done()


def json_response(
    value: dict[str, object], status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None
) -> Response:
    return Response(to_json(value), status, headers, "application/json")


def error_response(request: Request, error: ApiError) -> Response:
    headers = error.headers()
    if error.status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
        headers["Connection"] = "close"
    return json_response(error.body(), error.status, headers)


def http_error_response(request: Request, error: HTTPException) -> Response:
    status = HTTPStatus(error.status_code)
    message = f"{request.method} {shown(request.scope['path'])}: {status.phrase.lower()}"
    response = json_response(ApiError(status, message, status.phrase.lower().replace(" ", "_")).body(), status)
    response.headers.update(error.headers or {})
    return response
