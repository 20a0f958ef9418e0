"""A client of the HTTP door: turns of talk with a board, or with anything that speaks OpenAI's chat, by its URL.

Rules: only the standard library; every line and body that comes is bounded; what a server says in an error is told as one
printable line; closing the iterator drops the connection, which cancels the turn.
"""

from __future__ import annotations

import http.client
import json
from base64 import b64decode
from collections.abc import Generator, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from edge_agent.core.chat import Finish, Tier, Turn, TurnEnd, TurnPart
from edge_agent.core.errors import ConfigError, RefusedError, UnavailableError
from edge_agent.core.values import MAX_RECEIPT_BYTES
from edge_agent.gateway.terms import FIELD, Terms

MAX_LINE_BYTES = 2**20
MAX_ANSWER_BYTES = 2**20
CONNECT_S = 10.0
LATER = (429, 502, 503, 504)


class HttpBoard:
    """A board's door at ``url``: ``http://host:port``, with or without a path that ends in ``/v1``.

    Raises ``ConfigError`` for a URL that cannot be one.
    """

    def __init__(self, url: str, token: str = "", timeout_s: float | None = None) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise ConfigError("--url", url, "a port from 0 to 65535") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username is not None:
            raise ConfigError("--url", url, "http://HOST[:PORT] or https://HOST[:PORT]")
        self._url, self._secure, self._host, self._port = url, parts.scheme == "https", parts.hostname, port
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._timeout_s = timeout_s

    def models(self) -> list[str]:
        """The models by name. Raises ``RefusedError`` or ``UnavailableError``, as ``talk`` does."""
        connection, response = self._ask("GET", "/v1/models")
        try:
            listed = self._read(response).get("data")
        finally:
            connection.close()
        names = [entry.get("id") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        return [name for name in names if isinstance(name, str)]

    def talk(self, turn: Turn, model: str, terms: Terms | None = None) -> Generator[TurnPart, None, TurnEnd]:
        """Parts as they come; the generator's return value is the end, with what the board told of it."""
        body = json.dumps(_asked(turn, model) | _extension(terms))
        headers = {"X-Sly-Session": turn.session} if turn.session else {}
        connection, response = self._ask("POST", "/v1/chat/completions", body, headers)
        text, finish = "", Finish.STOP
        told: dict[str, Any] = {}
        try:
            for event in self._events(response):
                told = event if event.get("usage") else told
                for piece, ended in _choices(event):
                    finish = ended or finish
                    if piece:
                        text += piece
                        yield TurnPart(piece, 1)
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"board at {self._url}", f"it went away ({error})", "ask again") from error
        finally:
            response.close()
            connection.close()
        return _end(text, finish, told, turn.session)

    def _ask(
        self, method: str, path: str, body: str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(self._timeout_s)
            data = None if body is None else body.encode("utf-8")
            connection.request(method, self._base + path, data, {**self._headers, **(headers or {})})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            connection.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise UnavailableError(f"board at {self._url}", reason, "is its [gateway] on?") from error
        if response.status != http.client.OK:
            try:
                self._refuse(response)
            finally:
                connection.close()
        return connection, response

    def _refuse(self, response: http.client.HTTPResponse) -> None:
        try:
            said = self._read(response).get("error")
        except RefusedError:
            said = None
        message = said.get("message") if isinstance(said, dict) else None
        text = str(message or f"HTTP {response.status} {response.reason}")
        if response.status in LATER:
            raise UnavailableError(f"board at {self._url}", _one_line(text), "ask again")
        raise RefusedError(_one_line(text))

    def _read(self, response: http.client.HTTPResponse) -> dict[str, Any]:
        try:
            data = response.read(MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"board at {self._url}", f"it went away ({error})", "ask again") from error
        if len(data) > MAX_ANSWER_BYTES:
            raise RefusedError(f"answer of {self._url}", f"over {MAX_ANSWER_BYTES} bytes", f"at most {MAX_ANSWER_BYTES} bytes")
        return self._object(data)

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """Server-sent events until ``[DONE]``; a stream that ends without it was cut off."""
        while line := response.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise RefusedError(f"answer of {self._url}", "an endless line", f"lines of at most {MAX_LINE_BYTES} bytes")
            name, _, data = line.strip().partition(b":")
            if name != b"data":
                continue
            if data.strip() == b"[DONE]":
                return
            event = self._object(data)
            if isinstance(failed := event.get("error"), dict):
                raise UnavailableError(f"board at {self._url}", _one_line(str(failed.get("message"))))
            yield event
        raise UnavailableError(f"board at {self._url}", "the answer was cut off", "ask again")

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise RefusedError(f"answer of {self._url}", data[:40], "a JSON object")
        return value


def _asked(turn: Turn, model: str) -> dict[str, object]:
    sampling = turn.sampling
    return {
        "model": model,
        "messages": [{"role": each.role, "content": each.content} for each in turn.messages],
        "max_tokens": turn.max_tokens,
        "temperature": sampling.temperature_milli / 1000,
        "top_p": sampling.top_p_milli / 1000,
        "seed": sampling.seed,
        "stop": list(turn.stop) or None,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _extension(terms: Terms | None) -> dict[str, object]:
    """Nothing where nothing is asked for, so that any server that speaks OpenAI's chat understands."""
    told = terms.as_json() if terms else {}
    return {FIELD: told} if told else {}


def _choices(event: Mapping[str, Any]) -> Iterator[tuple[str, Finish | None]]:
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict):
            text = _dict(choice, "delta").get("content")
            ended = Finish.LENGTH if choice.get("finish_reason") == "length" else None
            yield text if isinstance(text, str) else "", ended


def _end(text: str, finish: Finish, told: Mapping[str, Any], session: str) -> TurnEnd:
    """What a board, or another server that tells less, said of the turn; 0 for what it did not say."""
    usage, more = _dict(told, "usage"), _dict(told, "sly")
    tier = more.get("tier")
    counts: dict[str, Any] = {name: _count(more, name) for name in _COUNTS}
    return TurnEnd(
        text,
        finish,
        prompt_tokens=_count(usage, "prompt_tokens"),
        cached_tokens=_count(_dict(usage, "prompt_tokens_details"), "cached_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        tier=Tier(tier) if isinstance(tier, str) and tier in set(Tier) else Tier.NONE,
        session=session,
        notes=tuple(_one_line(str(note)) for note in _list(more, "notes")),
        receipt=_bytes(more, "receipt"),
        **counts,
    )


_COUNTS = (
    "recomputed_tokens", "kv_bytes", "first_token_us", "restore_us", "prefill_us", "decode_us", "drafted_tokens",
    "accepted_tokens",
)  # fmt: skip


def _dict(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _list(value: Mapping[str, Any], name: str) -> list[object]:
    found = value.get(name)
    return found[:64] if isinstance(found, list) else []


def _count(value: Mapping[str, Any], name: str) -> int:
    found = value.get(name)
    return found if type(found) is int and found >= 0 else 0


def _bytes(value: Mapping[str, Any], name: str) -> bytes:
    found = value.get(name)
    try:
        return b64decode(found, validate=True)[:MAX_RECEIPT_BYTES] if isinstance(found, str) else b""
    except ValueError:
        return b""


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:1000]
