"""The body of a POST, bounded while it is read.

Rules: never more than the bound is kept; a little more is read and thrown away, so that an ordinary client gets to read why
it was refused; one that is slow, or sends for ever, is not waited for.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.requests import Request

from edge_agent.core.errors import shown
from edge_agent.gateway.errors import ApiError

BODY_S = 30.0
MAX_DISCARDED_BYTES = 8 * 2**20
MAX_LENGTH_DIGITS = 18


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, of JSON. Raises ``ApiError``: 415, 413 for more than ``max_bytes``, 408 after ``BODY_S``."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"Content-Type: got {shown(kind)}; allowed: application/json"
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message, "unsupported_media_type")
    size_bytes = _declared(request)
    asks_first = request.headers.get("expect", "").lower() == "100-continue"
    if size_bytes > (max_bytes if asks_first else MAX_DISCARDED_BYTES):
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(BODY_S):
            return await _received(request, max_bytes)
    except TimeoutError:
        message = f"body: not all of it came within {BODY_S:g} s"
        raise ApiError(HTTPStatus.REQUEST_TIMEOUT, message, "request_timeout") from None


async def _received(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    received_bytes = 0
    async for data in request.stream():
        received_bytes += len(data)
        if received_bytes > max_bytes + MAX_DISCARDED_BYTES:
            raise _too_large(max_bytes)
        if received_bytes <= max_bytes:
            body += data
    if received_bytes > max_bytes:
        raise _too_large(max_bytes)
    return bytes(body)


def _declared(request: Request) -> int:
    """What ``Content-Length`` says; 0 for a chunked body, which is only counted."""
    digits = request.headers.get("content-length", "")
    return int(digits) if digits.isdecimal() and len(digits) <= MAX_LENGTH_DIGITS else 0


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body: more than {max_bytes} bytes", "request_too_large")
