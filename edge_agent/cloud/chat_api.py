"""OpenAI's chat API from the client's side: the body of a request, and the events of its streamed answer. Pure.

Rules: what comes is an outsider's: every length is bounded, every field is looked at before it is used, and nothing of it is in
an error; an answer is whole when a finish reason came.  Sources: the public API reference of OpenAI, "Chat", and the WHATWG HTML
standard, "Server-sent events" (of its line ends, LF and CRLF are read).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from edge_agent.cloud.endpoint import EndpointError
from edge_agent.core.chat import Finish, Turn
from edge_agent.core.values import MAX_ANSWER_CHARS, MAX_ANSWER_TOKENS

MAX_EVENT_BYTES = 256 * 2**10
MAX_STREAM_BYTES = 32 * 2**20
MAX_TOKEN_CHARS = 128
DONE = "[DONE]"
FINISHES = {"stop": Finish.STOP, "length": Finish.LENGTH}


def why_not(turn: Turn) -> str:
    """Why this turn cannot be served there; empty if it can."""
    if turn.begun:
        return "its answer was begun already, and the chat API cannot go on after given words"
    if turn.session:
        return "it belongs to a named session, of which the cloud knows nothing"
    return "it is raw text, the cloud takes messages" if turn.prompt is not None else ""


def body_of(turn: Turn, model: str) -> bytes:
    """The JSON of the request. ``top_k`` is not in this API and is left out."""
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": each.role, "content": each.content} for each in turn.messages],
        "max_tokens": turn.max_tokens,
        "temperature": turn.sampling.temperature_milli / 1000,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if not turn.sampling.greedy:
        body["top_p"] = turn.sampling.top_p_milli / 1000
    if turn.sampling.seed is not None:
        body["seed"] = turn.sampling.seed
    if turn.stop:
        body["stop"] = list(turn.stop)
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


class Events:
    """The data of server-sent events out of bytes in any pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._size_bytes = self._stream_bytes = 0

    def feed(self, piece: bytes) -> Iterator[str]:
        """The events that are whole now. Raises ``EndpointError`` for too long a one, or one that is not UTF-8."""
        self._stream_bytes += len(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            yield from self._line(line.removesuffix(b"\r"))
        if len(self._rest) + self._size_bytes > MAX_EVENT_BYTES or self._stream_bytes > MAX_STREAM_BYTES:
            raise garbage(f"more than {MAX_EVENT_BYTES} bytes in an event, or {MAX_STREAM_BYTES} in all")

    def _line(self, line: bytes) -> Iterator[str]:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            self._size_bytes += len(line)
        elif not line and self._data:
            data, self._data, self._size_bytes = b"\n".join(self._data), [], 0
            try:
                yield data.decode()
            except UnicodeDecodeError:
                raise garbage("an event that is not UTF-8") from None


@dataclass(slots=True)
class Answer:
    """One streamed answer, as far as it has come; ``tokens`` are the pieces of text until ``usage`` tells better."""

    max_tokens: int
    finish: Finish | None = None
    cut_by: str = ""
    """A finish reason that is neither a stop nor the length."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    length: int = 0
    _pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def take(self, data: str) -> str:
        """The text in an event, often none. Raises ``EndpointError`` for what is no event of this API, or an error."""
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise garbage("an event that is not JSON") from None
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise garbage("an error in the middle of its answer" if isinstance(chunk, dict) else "an event that is no object")
        self._count(chunk.get("usage"))
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not all(isinstance(each, dict) for each in choices):
            raise garbage("an event without choices")
        return "".join(self._choice(each) for each in choices[:1])

    def _choice(self, choice: dict[str, Any]) -> str:
        delta, reason = choice.get("delta"), choice.get("finish_reason")
        text = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(reason, str):
            self.finish = FINISHES.get(reason, Finish.STOP)
            self.cut_by = reason if reason in ("content_filter", "tool_calls", "function_call") else ""
        if not text:
            return ""
        return self._add(text)

    def _add(self, text: object) -> str:
        if not isinstance(text, str) or any("\ud800" <= each <= "\udfff" for each in text):
            raise garbage("words that are no text")
        self.length += len(text)
        if self.length > min(MAX_ANSWER_CHARS, self.max_tokens * MAX_TOKEN_CHARS):
            raise garbage(f"more than {self.max_tokens} tokens can be")
        self._pieces.append(text)
        self.tokens = min(self.tokens + 1, self.max_tokens)
        return text

    def _count(self, usage: object) -> None:
        if not isinstance(usage, dict):
            return
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else 0
        prompt, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if _is_count(prompt) and _is_count(made):
            self.prompt_tokens, self.tokens = prompt, made
            self.cached_tokens = min(cached, prompt) if _is_count(cached) else 0


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_ANSWER_TOKENS


def garbage(what: str) -> EndpointError:
    return EndpointError(f"its endpoint sent {what}")
