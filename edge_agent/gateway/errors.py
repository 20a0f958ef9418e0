"""What an HTTP client is told when it gets no answer: a status and OpenAI's error object.

Rules: ``{"error": {"message", "type", "param", "code"}}`` and nothing else; what may be asked again later says when
(``Retry-After``); which refusal it was is read from the subject that its text begins with (``talker``), because the text is
all that comes from another process or board.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from edge_agent.core.errors import RefusedError, SlyError
from edge_agent.gateway.talker import CONTEXT_LENGTH, DRAINING, KV_ROOM, SESSION_BUSY, UNKNOWN_MODEL

RETRY_S = 1
RETRY_AFTER_DRAINING_S = 10
SESSION_HEADER = "X-Sly-Session"


class ApiError(Exception):
    """An answer that is an error. ``param`` names the field of the request at fault; ``code`` is for programs."""

    def __init__(self, status: HTTPStatus, message: str, code: str, param: str | None = None, retry_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_s = status, message, code, param, retry_s

    @property
    def kind(self) -> str:
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"

    def body(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {"Retry-After": str(self.retry_s)} if self.retry_s else {}
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, code, param)


def unsupported(param: str, why: str) -> ApiError:
    return bad_request(f"{param}: {why}", param, "unsupported_parameter")


def draining() -> ApiError:
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE, "this board is stopping; ask again", "draining", retry_s=RETRY_AFTER_DRAINING_S
    )


def told(error: SlyError) -> ApiError:
    """The error of a turn, or of the values in a request, as HTTP tells it."""
    text = str(error)
    for subject, (status, code, param, retry_s) in _BY_SUBJECT.items():
        if f"{subject}:" in text:
            return ApiError(status, text, code, param, retry_s)
    if isinstance(error, RefusedError):
        return bad_request(text, _PARAM_OF.get(error.subject))
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, text, "unavailable", retry_s=RETRY_S)


_BY_SUBJECT: Mapping[str, tuple[HTTPStatus, str, str | None, int]] = {
    UNKNOWN_MODEL: (HTTPStatus.NOT_FOUND, "model_not_found", "model", 0),
    CONTEXT_LENGTH: (HTTPStatus.BAD_REQUEST, "context_length_exceeded", "messages", 0),
    "length of the prompt": (HTTPStatus.BAD_REQUEST, "context_length_exceeded", "messages", 0),
    SESSION_BUSY: (HTTPStatus.CONFLICT, "session_busy", SESSION_HEADER, RETRY_S),
    KV_ROOM: (HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", None, RETRY_S),
    DRAINING: (HTTPStatus.SERVICE_UNAVAILABLE, "draining", None, RETRY_AFTER_DRAINING_S),
}
_PARAM_OF = {
    "message role": "messages",
    "message content": "messages",
    "number of messages": "messages",
    "messages": "messages",
    "prompt": "prompt",
    "max_tokens": "max_tokens",
    "session": SESSION_HEADER,
    "stop text": "stop",
    "number of stop texts": "stop",
    "length of a stop text": "stop",
}
