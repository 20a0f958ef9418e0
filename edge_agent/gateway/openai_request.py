"""What a request in OpenAI's form asks for: a body in, a turn of talk out. Pure.

Rules: what the board can do is served; what would change the answer and cannot be done is refused by name (tools, logprobs,
pictures, more than one choice); what changes nothing is ignored, known or not, as OpenAI does, but in the extension ``slyos``
nothing is ignored.  ``null`` is the same as absent.
Without ``temperature`` the answer is greedy, not drawn at OpenAI's 1: small models are at their best so, the answer is the
same each time, and guessing ahead works.  Source: the public API reference of OpenAI, "Chat" and "Completions (legacy)".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from edge_agent.core.chat import DEFAULT_NEW_TOKENS, MAX_NEW_TOKENS, MAX_STOPS, ChatMessage, Sampling, Turn
from edge_agent.core.errors import RefusedError, shown
from edge_agent.gateway.errors import bad_request, told, unsupported
from edge_agent.gateway.terms import FIELD, Terms

COMPLETION_NEW_TOKENS = 16
"""OpenAI's own default of the older endpoint; chat has none there and ``DEFAULT_NEW_TOKENS`` here."""
MAX_SEED = 2**63 - 1
ROLE_OF = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_ABSENT: tuple[object, ...] = (None, False, [], {}, "")
_WORTHLESS: Mapping[str, tuple[object, ...]] = {
    "tools": _ABSENT, "functions": _ABSENT, "tool_choice": (*_ABSENT, "none", "auto"),
    "function_call": (*_ABSENT, "none", "auto"), "logprobs": (None, False), "top_logprobs": (None, False, 0),
    "logit_bias": _ABSENT, "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "n": (None, 1), "best_of": (None, 1),
    "response_format": (None, {"type": "text"}), "modalities": (None, [], ["text"]), "audio": _ABSENT, "echo": _ABSENT,
    "suffix": _ABSENT, "web_search_options": (None,),
}  # fmt: skip
"""Fields that would change the answer and cannot be served, with the values that ask for nothing."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it will be served."""

    turn: Turn
    model: str
    chat: bool
    stream: bool
    include_usage: bool
    terms: Terms = Terms()


def read_request(body: bytes, chat: bool, session: str = "") -> Asked:
    """What the body of a POST asks for; ``session`` is the header's. Raises ``ApiError`` (400) naming the field at fault."""
    given = _object(body)
    for name, worthless in _WORTHLESS.items():
        if name in given and not _asks_for_nothing(given[name], worthless):
            raise unsupported(name, f"{shown(given[name])} is not supported by this board; leave it out")
    stream = _flag(given, "stream")
    options = given.get("stream_options")
    if options is not None and not (stream and isinstance(options, dict)):
        raise bad_request("stream_options: an object, and only with stream: true", "stream_options")
    words = {"messages": _messages(given)} if chat else {"prompt": _prompt(given)}
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("model: name one of GET /v1/models", "model", "missing_required_parameter")
    try:
        turn = Turn(
            **words,
            session=session,
            max_tokens=_max_tokens(given, DEFAULT_NEW_TOKENS if chat else COMPLETION_NEW_TOKENS),
            sampling=_sampling(given),
            stop=_stop(given),
        )
    except RefusedError as error:
        raise told(error) from error
    return Asked(turn, model, chat, stream, _flag(options or {}, "include_usage"), _terms(given))


def _terms(given: Mapping[str, Any]) -> Terms:
    if given.get(FIELD) is None:
        return Terms()
    try:
        return Terms.from_json(given[FIELD])
    except RefusedError as error:
        raise bad_request(str(error), error.subject) from error


def _asks_for_nothing(value: object, worthless: tuple[object, ...]) -> bool:
    """``1.0`` is as good as ``1``; ``true`` is not."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in worthless)


def _object(body: bytes) -> dict[str, Any]:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"body: not UTF-8 at byte {error.start}", code="invalid_encoding") from None
    try:
        value = json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise bad_request(f"body: not JSON: {error.msg} ({where})", code="invalid_json") from None
    except RecursionError:
        raise bad_request("body: nested too deeply", code="invalid_json") from None
    except ValueError:
        raise bad_request("body: a number that cannot be", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("body: a JSON object is needed", code="invalid_json")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _messages(given: Mapping[str, Any]) -> tuple[ChatMessage, ...]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages: a list of at least one message is needed", "messages", "missing_required_parameter")
    return tuple(_message(entry, f"messages[{at}]") for at, entry in enumerate(messages))


def _message(entry: object, where: str) -> ChatMessage:
    if not isinstance(entry, dict):
        raise bad_request(f"{where}: an object with role and content is needed", where)
    for name in ("tool_calls", "function_call", "audio"):
        if entry.get(name):
            raise unsupported(f"{where}.{name}", "not supported by this board")
    role = entry.get("role")
    if role in ("tool", "function"):
        raise unsupported(f"{where}.role", "tools are not supported by this board")
    if not isinstance(role, str) or role not in ROLE_OF:
        raise bad_request(f"{where}.role: got {shown(role)}; allowed: {', '.join(ROLE_OF)}", f"{where}.role")
    try:
        return ChatMessage(ROLE_OF[role], _content(entry.get("content"), f"{where}.content"))
    except RefusedError as error:
        raise bad_request(f"{where}: {error}", where) from error


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad_request(f"{where}: text, or a list of text parts, is needed", where)
    return "".join(_text_part(part, f"{where}[{at}]") for at, part in enumerate(content))


def _text_part(part: object, where: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            raise unsupported(where, f"parts of type {shown(kind)} are not supported by this board; text is")
    raise bad_request(f'{where}: {{"type": "text", "text": ...}} is needed', where)


def _prompt(given: Mapping[str, Any]) -> str:
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt:
        raise unsupported("prompt", "several prompts, or token ids, are not supported by this board; send one text")
    if not isinstance(prompt, str) or not prompt:
        raise bad_request("prompt: a text that is not empty is needed", "prompt", "missing_required_parameter")
    return prompt


def _max_tokens(given: Mapping[str, Any], default: int) -> int:
    newer = given.get("max_completion_tokens") is not None
    if newer and given.get("max_tokens") is not None:
        raise bad_request("max_tokens: not together with max_completion_tokens", "max_tokens")
    return _whole(given, "max_completion_tokens" if newer else "max_tokens", 1, MAX_NEW_TOKENS, default)


def _sampling(given: Mapping[str, Any]) -> Sampling:
    seed = given.get("seed")
    return Sampling(
        temperature_milli=round(1000 * _number(given, "temperature", 2, 0.0)),
        top_k=_whole(given, "top_k", 0, 10**6, 0),
        top_p_milli=max(1, round(1000 * _number(given, "top_p", 1, 1.0))),
        seed=None if seed is None else _whole(given, "seed", -MAX_SEED - 1, MAX_SEED, 0) & MAX_SEED,
    )


def _stop(given: Mapping[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(each, str) for each in stop):
        raise bad_request(f"stop: a text, or a list of at most {MAX_STOPS}, is allowed", "stop")
    return tuple(stop)


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{name}: got {shown(value)}; allowed: true or false", name)
    return bool(value)


def _whole(given: Mapping[str, Any], name: str, low: int, high: int, default: int) -> int:
    value = given.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise bad_request(f"{name}: got {shown(value)}; allowed: a whole number from {low} to {high}", name)
    return value


def _number(given: Mapping[str, Any], name: str, high: int, default: float) -> float:
    value = given.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 <= value <= high or not math.isfinite(value):
        raise bad_request(f"{name}: got {shown(value)}; allowed: a number from 0 to {high}", name)
    return float(value)
