"""The HTTP door over a real server on loopback: what an OpenAI client gets, what bad input gets, and that nothing stays held.

The board behind it is scripted (``tests/scripted_talker.py``); the server, the sockets and the official client are real.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import re
import socket
import sys
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import pytest

from edge_agent.core.chat import MAX_NEW_TOKENS, ChatMessage, Sampling, Turn
from edge_agent.core.config import GatewaySection
from edge_agent.core.errors import ConfigError, UnavailableError
from edge_agent.core.values import DataClass, Limits, TrustTier
from edge_agent.gateway.errors import ApiError
from edge_agent.gateway.http import HttpGateway
from edge_agent.gateway.metrics import GatewayMetrics, Histogram
from edge_agent.gateway.openai_request import read_request
from edge_agent.gateway.talker import CONTEXT_LENGTH, DRAINING, KV_ROOM, SESSION_BUSY, UNKNOWN_MODEL, Figure
from edge_agent.gateway.terms import TALK_DEADLINE_US, Terms
from tests.needs import needs_module
from tests.scripted_talker import LONG_S, MODEL, ScriptedTalker, Served, served

needs_module("uvicorn", "gateway")
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TOKEN = "s3cret-of-the-kitchen"


@pytest.fixture(scope="module")
def door() -> Iterator[Served]:
    with served() as door:
        yield door


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.data = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> dict[str, Any]:
        """The one member of an error's body; its shape is the same for every error."""
        assert list(self.json) == ["error"]
        error: dict[str, Any] = self.json["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["message"] and error["code"] and "Traceback" not in error["message"]
        return error

    def events(self) -> list[Any]:
        lines = self.data.decode().split("\n\n")
        assert lines.pop() == ""
        assert all(line.startswith("data: ") for line in lines)
        return [line if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")) for line in lines]


def ask(door: Served, method: str, path: str, body: object = None, **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", door.gateway.port, timeout=LONG_S)
    known = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        known = {"Content-Type": "application/json"} | known
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, data, known)
        return Answer(connection.getresponse())
    finally:
        connection.close()


def chat(text: str = "say hello big world", **more: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


# what a client gets


def test_an_answer_is_openais_chat_completion_with_usage_and_what_it_took(door: Served) -> None:
    answer = ask(door, "POST", CHAT, chat())
    body = answer.json
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert (body["object"], body["model"], body["id"][:9]) == ("chat.completion", MODEL, "chatcmpl-")
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "hello big world", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"] == {
        "prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 6},
    }  # fmt: skip
    assert body["sly"]["tier"] == "disk" and body["sly"]["kv_bytes"] == 64_800 and body["sly"]["recomputed_tokens"] == 1
    assert body["sly"]["first_token_us"] == 12_000 and body["sly"]["tokens_per_s"] == 100.0
    assert body["sly"]["notes"] == ["block 2 was damaged"] and b64decode(body["sly"]["receipt"]) == b"signed"


def test_a_stream_is_a_role_then_texts_then_an_end_then_usage_then_done(door: Served) -> None:
    answer = ask(door, "POST", CHAT, chat(stream=True, stream_options={"include_usage": True}))
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    *chunks, done = answer.events()
    assert done == "data: [DONE]"
    assert len({(c["id"], c["object"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1
    *told, usage = chunks
    assert [c["choices"][0]["delta"] for c in told] == [
        {"role": "assistant", "content": ""}, {"content": "hello"}, {"content": " big"}, {"content": " world"}, {},
    ]  # fmt: skip
    assert [c["choices"][0]["finish_reason"] for c in told] == [None] * 4 + ["stop"]
    assert all(c["usage"] is None for c in told)
    assert usage["choices"] == [] and usage["usage"]["prompt_tokens_details"]["cached_tokens"] == 6
    assert usage["sly"]["session"] == "~ab12"


def test_without_include_usage_a_stream_says_nothing_of_it(door: Served) -> None:
    chunks = ask(door, "POST", CHAT, chat(stream=True)).events()[:-1]
    assert all("usage" not in chunk and len(chunk["choices"]) == 1 for chunk in chunks)


def test_every_stream_ends_with_the_receipt_of_the_board_that_served_it(door: Served) -> None:
    *parts, end = ask(door, "POST", CHAT, chat(stream=True)).events()[:-1]
    assert b64decode(end["sly"]["receipt"]) == b"signed" and not any("sly" in part for part in parts)


def test_texts_of_a_stream_come_one_by_one_while_the_turn_goes_on(door: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", door.gateway.port, timeout=LONG_S)
    connection.request("POST", CHAT, json.dumps(chat("hold first second", stream=True)), {"Content-Type": "application/json"})
    response = connection.getresponse()
    first = b""
    while b"first" not in first:
        first += response.read1(4096)
    assert b"second" not in first
    door.do(door.talker.go_on)
    assert b"second" in response.read()
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_older_endpoint_completes_a_text(door: Served, stream: bool) -> None:
    answer = ask(door, "POST", COMPLETION, {"model": MODEL, "prompt": "say to be", "stream": stream})
    bodies = answer.events()[:-1] if stream else [answer.json]
    assert {body["object"] for body in bodies} == {"text_completion"}
    assert "".join(body["choices"][0]["text"] for body in bodies) == "to be"
    assert bodies[-1]["choices"][0]["finish_reason"] == "stop"
    assert door.talker.turns[-1] == Turn(prompt="say to be", max_tokens=16)


def test_what_a_request_asks_for_is_the_turn_that_is_served(door: Served) -> None:
    body = {
        "model": MODEL,
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": "say d e f g"},
        ],
        "max_completion_tokens": 2, "temperature": 0.7, "top_p": 0.9, "seed": -1, "stop": "\n", "user": "me",
    }  # fmt: skip
    answer = ask(door, "POST", CHAT, body, X_Sly_Session="kitchen:1")
    assert answer.json["choices"][0]["finish_reason"] == "length"
    assert answer.headers["X-Sly-Session"] == "kitchen:1"
    messages = (
        ChatMessage("system", "be brief"), ChatMessage("user", "ab"), ChatMessage("assistant", "c"),
        ChatMessage("user", "say d e f g"),
    )  # fmt: skip
    sampling = Sampling(temperature_milli=700, top_p_milli=900, seed=2**63 - 1)
    assert door.talker.turns[-1] == Turn(messages, session="kitchen:1", max_tokens=2, sampling=sampling, stop=("\n",))


def test_without_a_temperature_an_answer_is_greedy(door: Served) -> None:
    ask(door, "POST", CHAT, chat())
    assert door.talker.turns[-1].sampling.greedy


HARMLESS: dict[str, object] = {
    "n": 1, "logprobs": False, "presence_penalty": 0.0, "frequency_penalty": 0, "response_format": {"type": "text"},
    "tools": None, "tool_choice": "auto", "logit_bias": {}, "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
    "parallel_tool_calls": True, "what_is_this": [1, {"x": None}], "modalities": ["text"], "temperature": None, "stop": None,
}  # fmt: skip


def test_fields_that_ask_for_nothing_are_ignored_known_or_not(door: Served) -> None:
    assert ask(door, "POST", CHAT, chat(**HARMLESS)).status == 200
    assert door.talker.turns[-1] == Turn((ChatMessage("user", "say hello big world"),))


def test_models_are_listed_and_told_one_by_one(door: Served) -> None:
    listed = ask(door, "GET", "/v1/models").json
    assert [model["id"] for model in listed["data"]] == [MODEL, "other"]
    assert ask(door, "GET", f"/v1/models/{MODEL}").json == listed["data"][0]
    assert ask(door, "GET", "/v1/models/gpt-9/x").status == 404


# the official client


def test_the_official_client_chats_streams_completes_and_lists(door: Served) -> None:
    needs_module("openai", "dev")
    import openai

    with openai.OpenAI(base_url=f"{door.url}/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [MODEL, "other"]
        whole = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "say hello you"}])
        assert whole.choices[0].message.content == "hello you"
        assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
        assert whole.usage.prompt_tokens_details.cached_tokens == 6
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "say hello you"}],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello you"
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 2
        terms = {"slyos": {"data": "public", "deadline_ms": 9000}}
        assert client.completions.create(model=MODEL, prompt="say hi", extra_body=terms).choices[0].text == "hi"
        assert door.talker.terms[-1] == (DataClass.PUBLIC, Limits(9_000_000))


def test_the_official_client_raises_the_error_that_was_meant(door: Served) -> None:
    needs_module("openai", "dev")
    import openai

    with openai.OpenAI(base_url=f"{door.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "say x"}])
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as overflow:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": f"refuse {CONTEXT_LENGTH}"}])
        assert overflow.value.code == "context_length_exceeded"
        stream = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "late x"}], stream=True)
        with pytest.raises(openai.APIError, match="it died"):
            list(stream)


# bad input


BAD_FIELDS: list[tuple[dict[str, object], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ["hello"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0]"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "x"}] * 513}, "messages"),
    ({"model": None}, "model"),
    ({"model": 7}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "12"}, "max_tokens"),
    ({"max_tokens": MAX_NEW_TOKENS + 1}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 1e400}, None),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x" * 65]}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": [1]}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"slyos": "public"}, "slyos"),
    ({"slyos": []}, "slyos"),
    ({"slyos": {"dta": "public"}}, "slyos.dta"),
    ({"slyos": {"data": "secret"}}, "slyos.data"),
    ({"slyos": {"data": ["public"]}}, "slyos.data"),
    ({"slyos": {"data": None}}, "slyos.data"),
    ({"slyos": {"trust": "contraindicated"}}, "slyos.trust"),
    ({"slyos": {"trust": 3}}, "slyos.trust"),
    ({"slyos": {"deadline_ms": 0}}, "slyos.deadline_ms"),
    ({"slyos": {"deadline_ms": 1.5}}, "slyos.deadline_ms"),
    ({"slyos": {"deadline_ms": 3_600_001}}, "slyos.deadline_ms"),
    ({"slyos": {"quality": 1001}}, "slyos.quality"),
    ({"slyos": {"quality": True}}, "slyos.quality"),
    ({"slyos": {"energy_mj": 0}}, "slyos.energy_mj"),
    ({"slyos": {"energy_mj": 10**10}}, "slyos.energy_mj"),
]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("given", "terms"),
    [
        (None, Terms()),
        ({}, Terms()),
        ({"data": "public", "trust": "warning"}, Terms(Limits(TALK_DEADLINE_US, trust=TrustTier.WARNING), DataClass.PUBLIC)),
        (
            {"deadline_ms": 1500, "quality": 700, "energy_mj": 3, "trust": "none", "data": "local"},
            Terms(Limits(1_500_000, 3000, 700), DataClass.LOCAL),
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_turn_may_cost_and_how_far_it_may_travel_reaches_the_board(
    door: Served, given: object, terms: Terms, stream: bool
) -> None:
    assert ask(door, "POST", CHAT, chat(slyos=given, stream=stream)).status == 200
    assert door.talker.terms[-1] == (terms.data, terms.limits)


def test_terms_keep_their_meaning_through_both_of_their_forms() -> None:
    for terms in (Terms(), Terms(Limits(2_500_000, 9_000_000, 5, TrustTier.AFFIRMING), DataClass.LOCAL)):
        assert Terms.from_json(terms.as_json()) == Terms.from_list(terms.as_list()) == terms
    rounded = Terms(Limits(1_999, 999)).as_json()
    assert rounded == {"deadline_ms": 1, "energy_mj": 1}, "limits are rounded down, but not to nothing"


@pytest.mark.parametrize(("change", "param"), BAD_FIELDS, ids=lambda value: str(value)[:60])
def test_a_field_that_cannot_be_served_is_named_and_nothing_is_asked_of_the_board(
    door: Served, change: dict[str, object], param: str | None
) -> None:
    before = len(door.talker.turns)
    answer = ask(door, "POST", CHAT, chat() | change)
    assert answer.status == 400
    assert (answer.error["param"], answer.error["type"]) == (param, "invalid_request_error")
    assert len(door.talker.turns) == before


@pytest.mark.parametrize(
    "change",
    [{"prompt": ""}, {"prompt": None}, {"prompt": ["a", "b"]}, {"prompt": [1, 2]}, {"echo": True}, {"suffix": "x"},
     {"best_of": 2}, {"logprobs": 0}],
    ids=str,
)  # fmt: skip
def test_a_completion_that_cannot_be_served_is_named(door: Served, change: dict[str, object]) -> None:
    answer = ask(door, "POST", COMPLETION, {"model": MODEL, "prompt": "say x"} | change)
    assert (answer.status, answer.error["param"]) == (400, next(iter(change)))


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'{"model": NaN}', "invalid_json"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
        (b"\xff\xfe{}", "invalid_encoding"),
        (json.dumps(chat()).encode()[:-3] + b"\xc3\x28", "invalid_encoding"),
        (json.dumps(chat()).encode("utf-16"), "invalid_encoding"),
    ],
    ids=range(11),
)
def test_a_body_that_is_no_json_object_in_utf_8_is_refused(door: Served, body: bytes, code: str) -> None:
    answer = ask(door, "POST", CHAT, body)
    assert (answer.status, answer.error["code"]) == (400, code)


def test_a_model_that_is_not_hosted_is_told_with_those_that_are(door: Served) -> None:
    answer = ask(door, "POST", CHAT, chat() | {"model": "gpt-9"})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert MODEL in answer.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("PUT", COMPLETION, 405, "method_not_allowed"),
    ],
)
def test_a_way_that_is_not_there_is_told_as_an_error_object(door: Served, method: str, path: str, status: int, code: str) -> None:
    answer = ask(door, method, path)
    assert (answer.status, answer.error["code"]) == (status, code)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_a_body_of_another_kind_is_refused(door: Served, kind: str) -> None:
    assert ask(door, "POST", CHAT, chat(), Content_Type=kind).status == 415


@pytest.mark.parametrize("name", ["~ab12", "a b", "x" * 65, "../x", "-x", "é"])
def test_a_session_name_that_cannot_be_is_refused(door: Served, name: str) -> None:
    answer = ask(door, "POST", CHAT, chat(), X_Sly_Session=name)
    assert (answer.status, answer.error["param"]) == (400, "X-Sly-Session")


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (f"refuse {UNKNOWN_MODEL}", 404, "model_not_found"),
        (f"refuse {CONTEXT_LENGTH}", 400, "context_length_exceeded"),
        (f"refuse {SESSION_BUSY}", 409, "session_busy"),
        ("refuse something", 400, "invalid_value"),
        (f"break {KV_ROOM}", 503, "overloaded"),
        (f"break {DRAINING}", 503, "draining"),
        ("break engine", 503, "unavailable"),
        (f"break request 12 was failed by barn: {KV_ROOM}", 503, "overloaded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_text_has_its_own_status(
    door: Served, script: str, status: int, code: str, stream: bool
) -> None:
    answer = ask(door, "POST", CHAT, chat(script, stream=stream))
    assert (answer.status, answer.error["code"]) == (status, code)
    assert (answer.headers["Retry-After"] is not None) == (status in (409, 503))


def test_an_error_after_the_first_text_is_the_last_event_and_there_is_no_done(door: Served) -> None:
    events = ask(door, "POST", CHAT, chat("late one", stream=True)).events()
    assert events[1]["choices"][0]["delta"] == {"content": "one"}
    assert events[-1]["error"]["message"] == "engine: it died"
    assert "data: [DONE]" not in events


def test_a_bug_is_a_500_without_its_traceback_and_is_told_to_the_log(door: Served, caplog: pytest.LogCaptureFixture) -> None:
    answer = ask(door, "POST", CHAT, chat("bug"))
    assert (answer.status, answer.error["code"], answer.error["type"]) == (500, "internal_error", "server_error")
    assert "LookupError" not in answer.error["message"]
    assert "LookupError('a bug')" in door.said[-1]


# bounds


def test_a_prompt_of_a_megabyte_is_refused_with_an_answer_that_can_be_read(door: Served) -> None:
    answer = ask(door, "POST", CHAT, chat("x" * 2**20))
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert ask(door, "POST", CHAT, chat()).status == 200


def test_a_prompt_that_fits_the_body_and_no_model_is_a_context_overflow() -> None:
    with served(GatewaySection(on=True, port=0, max_body_bytes=2**21)) as door:
        answer = ask(door, "POST", CHAT, chat("x" * 2**20))
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")


def raw(door: Served, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", door.gateway.port), timeout=LONG_S)
    connection.sendall(data)
    return connection


def head(path: str = CHAT, *lines: str) -> bytes:
    return "\r\n".join((f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines, "", "")).encode()


def all_of(connection: socket.socket) -> bytes:
    with connection:
        data = b""
        while received := connection.recv(65536):
            data += received
    return data


@pytest.mark.parametrize("length", ["99999999999", "9" * 18])
def test_a_body_that_says_it_is_huge_is_refused_before_it_is_read(door: Served, length: str) -> None:
    assert b" 413 " in all_of(raw(door, head(CHAT, f"Content-Length: {length}")))


def test_a_client_that_asks_first_is_refused_before_it_sends(door: Served) -> None:
    said = all_of(raw(door, head(CHAT, "Content-Length: 700000", "Expect: 100-continue")))
    assert said.startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_without_end_is_cut_off(door: Served) -> None:
    connection = raw(door, head(CHAT, "Transfer-Encoding: chunked"))
    sent_bytes = 0
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with pytest.raises(OSError):
        while sent_bytes < 2**30:
            connection.sendall(chunk)
            sent_bytes += 65536
    connection.close()
    assert sent_bytes < 32 * 2**20
    assert ask(door, "POST", CHAT, chat()).status == 200


def test_a_body_that_comes_drop_by_drop_is_not_waited_for(door: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.gateway.body.BODY_S", 0.05)
    said = all_of(raw(door, head(CHAT, "Content-Length: 100") + b'{"model"'))
    assert b" 408 " in said and b"request_timeout" in said


def test_a_head_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.gateway.server.HEAD_S", 0.05)
    with served() as door:
        for beginning in (b"", b"POST /v1/chat"):
            assert all_of(raw(door, beginning)) == b""


def test_loopback_has_two_addresses() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with served(GatewaySection(on=True, host="::1", port=0)) as door:
        connection = http.client.HTTPConnection("::1", door.gateway.port, timeout=LONG_S)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 200
        connection.close()


def test_a_head_that_is_huge_is_refused(door: Served) -> None:
    assert b" 400 " in all_of(raw(door, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 40_000))


def test_more_requests_than_the_bound_get_429_and_the_place_is_free_afterwards() -> None:
    with served(GatewaySection(on=True, port=0, max_requests=1)) as door:
        first = raw(door, head(CHAT, f"Content-Length: {len(HOLD)}") + HOLD)
        assert door.talker.began.acquire(timeout=LONG_S)
        second = ask(door, "POST", CHAT, chat())
        assert (second.status, second.error["code"], second.headers["Retry-After"]) == (429, "too_many_requests", "1")
        assert ask(door, "GET", "/readyz").status == 503
        assert ask(door, "GET", "/healthz").status == 200
        first.close()
        assert door.talker.freed.acquire(timeout=LONG_S)
        assert served_again(door)


HOLD = json.dumps(chat("hold x", stream=True)).encode()
WAIT = json.dumps(chat("wait x")).encode()


def served_again(door: Served) -> bool:
    """Its place is given back just after the turn ended; whoever comes meanwhile is told when to ask again."""
    while (status := ask(door, "POST", CHAT, chat()).status) == 429:
        pass
    return status == 200


@pytest.mark.parametrize("body", [HOLD, WAIT, json.dumps(chat("wait x", stream=True)).encode()], ids=["stream", "whole", "early"])
def test_a_client_that_vanishes_cancels_its_turn_and_frees_its_place(body: bytes) -> None:
    with served(GatewaySection(on=True, port=0, max_requests=1)) as door:
        connection = raw(door, head(CHAT, f"Content-Length: {len(body)}") + body)
        assert door.talker.began.acquire(timeout=LONG_S)
        connection.close()
        assert door.talker.freed.acquire(timeout=LONG_S)
        assert door.talker.live == 0
        assert served_again(door)
        assert 'sly_gateway_turns_total{outcome="cancelled"} 1' in ask(door, "GET", "/metrics").data.decode()


def test_a_client_that_vanishes_amid_its_body_leaves_nothing_behind(door: Served) -> None:
    raw(door, head(CHAT, "Content-Length: 100") + b'{"model"').close()
    assert ask(door, "POST", CHAT, chat()).status == 200


def test_a_client_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.gateway.server.STALLED_S", 0.05)
    with served() as door:
        body = json.dumps(chat("say " + "x " * 100_000, stream=True, max_tokens=8192)).encode()
        with raw(door, head(CHAT, f"Content-Length: {len(body)}") + body):
            assert door.talker.freed.acquire(timeout=LONG_S)
        assert door.talker.live == 0


# the token


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with served(GatewaySection(on=True, port=0, token=TOKEN)) as door:
        yield door


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/metrics", "/nothing"])
@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"])
def test_without_the_token_there_is_nothing_to_see(locked: Served, path: str, given: str | None) -> None:
    answer = ask(locked, "GET", path) if given is None else ask(locked, "GET", path, Authorization=given)
    assert (answer.status, answer.error["code"], answer.headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")


def test_with_the_token_it_is_open(locked: Served) -> None:
    assert ask(locked, "GET", "/v1/models", Authorization=f"Bearer {TOKEN}").status == 200
    assert ask(locked, "POST", CHAT, chat(), Authorization=f"bearer {TOKEN}").status == 200


def test_the_token_is_asked_for_before_a_body_is_read(locked: Served) -> None:
    with raw(locked, head(CHAT, "Content-Length: 100000")) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_a_host_that_looks_like_an_open_path_opens_nothing(locked: Served) -> None:
    with raw(locked, b"GET /v1/models HTTP/1.1\r\nHost: x/healthz?\r\n\r\n") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_health_is_told_without_the_token_and_its_reason_only_with_it(locked: Served) -> None:
    assert ask(locked, "GET", "/readyz").data == b"ok\n"
    with served(GatewaySection(on=True, port=0, token=TOKEN)) as door:
        door.talker.why_not = "the child died"
        stranger, owner = ask(door, "GET", "/readyz"), ask(door, "GET", "/healthz", Authorization=f"Bearer {TOKEN}")
        assert (stranger.status, stranger.data) == (503, b"not ready\n")
        assert (owner.status, owner.data) == (503, b"the child died\n")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1"]
)
def test_without_a_token_a_name_made_up_by_a_web_page_leads_nowhere(door: Served, host: str) -> None:
    assert ask(door, "GET", "/v1/models", Host=host).status == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "127.0.0.2", "[::1]:80"])
def test_loopback_by_any_of_its_names_is_served_without_a_token(door: Served, host: str) -> None:
    assert ask(door, "GET", "/v1/models", Host=host).status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "board.lan"])
def test_beyond_loopback_there_is_no_door_without_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match=r"\[gateway\] token.*loopback"):
        HttpGateway(GatewaySection(on=True, host=host), ScriptedTalker(), print)


@pytest.mark.parametrize("token", ["a b", "é", "a\n"])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII"):
        HttpGateway(GatewaySection(on=True, token=token), ScriptedTalker(), print)


# health, figures


def test_many_probes_ask_the_board_once() -> None:
    with served() as door:
        assert {ask(door, "GET", "/readyz").status for _ in range(5)} == {200}
        assert door.talker.probes == 1


def test_a_board_that_does_not_answer_a_probe_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.gateway.app.READY_S", 0.05)

    async def never() -> str:
        await asyncio.Event().wait()
        return ""

    with served() as door:
        door.talker.ready = never  # type: ignore[method-assign]
        answer = ask(door, "GET", "/readyz")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1") and b"no answer within" in answer.data


def test_figures_are_what_prometheus_reads() -> None:
    with served() as door:
        ask(door, "POST", CHAT, chat())
        ask(door, "GET", "/made/up/1")
        ask(door, "GET", "/made/up/2")
        answer = ask(door, "GET", "/metrics")
    text = answer.data.decode()
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'sly_gateway_requests_total{route="other",status="404"} 2\n' in text
    assert 'sly_gateway_tokens_total{kind="cached"} 6\n' in text
    assert "sly_gateway_first_token_seconds_count 1\n" in text
    assert "sly_gateway_between_tokens_seconds_count 2\n" in text
    assert text.count("# TYPE sly_kv_bytes gauge") == 1
    assert 'sly_kv_bytes{tier="d\\"\\\\k\\n"} 8192\n' in text
    assert "gateway_requests_served_now 0\n" in text


SAMPLE = re.compile(
    r'([a-z_]+)(\{[a-z]+="(?:[^"\\\n]|\\[\\"n])*"(?:,[a-z]+="(?:[^"\\\n]|\\[\\"n])*")*\})? (\d+(\.\d+)?(e-?\d+)?)'
)
"""A line of the text format as far as it is written here; labels escape the backslash, the quote and the line end."""


def test_every_line_of_the_figures_is_of_the_format_and_families_are_whole() -> None:
    metrics = GatewayMetrics()
    metrics.requests["/metrics", 200] += 1
    metrics.first_token_s.observe(0.03)
    odd = [Figure("x_total", "a\nb \\ c", 1.5, "counter", (("tier", 'q"'), ("model", "m"))), Figure("y", "y", 2)]
    lines = metrics.text(odd).removesuffix("\n").split("\n")
    family, seen = "", []
    for line in lines:
        if line.startswith("# HELP "):
            family = line.split(" ")[2]
            seen.append(family)
        elif not line.startswith(f"# TYPE {family} "):
            sample = SAMPLE.fullmatch(line)
            assert sample is not None, line
            assert re.fullmatch(f"{family}(_bucket|_sum|_count)?", sample[1]), line
    assert len(seen) == len(set(seen)) and {"sly_x_total", "sly_y"} < set(seen)
    assert "# HELP sly_x_total a\\nb \\\\ c" in lines


def test_a_value_on_a_bound_is_counted_under_it_and_one_past_all_in_the_last() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 1.5, 9.0):
        histogram.observe(value, 2)
    assert list(histogram.lines("x")) == [
        'x_bucket{le="1.0"} 2', 'x_bucket{le="2.0"} 4', 'x_bucket{le="+Inf"} 6', "x_sum 23.0", "x_count 6",
    ]  # fmt: skip


# the door's life


def test_a_port_that_is_taken_is_told_when_the_door_opens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gateway = HttpGateway(GatewaySection(on=True, port=taken.getsockname()[1]), ScriptedTalker(), print)
        with pytest.raises(UnavailableError, match="address already in use.*another .gateway. host or port"):
            asyncio.run(gateway.start())


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "edge_agent.gateway.app", raising=False)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    gateway = HttpGateway(GatewaySection(on=True, port=0), ScriptedTalker(), print)
    with pytest.raises(ConfigError, match=r"pip install 'slyos-edge\[gateway\]'"):
        asyncio.run(gateway.start())


def test_stopping_waits_for_the_turns_in_work_and_takes_nothing_new() -> None:
    with served() as door:
        connection = raw(door, head(CHAT, f"Content-Length: {len(HOLD)}", "Connection: close") + HOLD)
        idle = http.client.HTTPConnection("127.0.0.1", door.gateway.port, timeout=LONG_S)
        idle.request("GET", "/healthz")
        idle.getresponse().read()
        assert door.talker.began.acquire(timeout=LONG_S)
        door.close_soon(LONG_S)
        idle.request("POST", CHAT, json.dumps(chat()), {"Content-Type": "application/json"})
        refused = Answer(idle.getresponse())
        assert (refused.status, refused.error["code"]) == (503, "draining")
        assert refused.headers["Retry-After"] is not None
        door.do(door.talker.go_on)
        assert b"data: [DONE]" in all_of(connection)
        idle.close()


@pytest.mark.parametrize("body", [HOLD, WAIT], ids=["stream", "whole"])
def test_stopping_ends_turns_that_take_too_long_and_tells_their_clients(body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with served() as door:
        connection = raw(door, head(CHAT, f"Content-Length: {len(body)}", "Connection: close") + body)
        assert door.talker.began.acquire(timeout=LONG_S)
        door.close(0)
        assert b'"code":"draining"' in all_of(connection)
        assert door.talker.live == 0
        with pytest.raises(ConnectionRefusedError):
            ask(door, "GET", "/healthz")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_door_leaves_the_signals_to_the_agent() -> None:
    import signal

    async def play() -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        gateway = HttpGateway(GatewaySection(on=True, port=0), ScriptedTalker(), print)
        await gateway.start()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        await gateway.close()
        await gateway.close()

    asyncio.run(play())


def test_reading_a_request_raises_only_what_a_client_can_be_told() -> None:
    with pytest.raises(ApiError):
        read_request(b"\x00", chat=True)
