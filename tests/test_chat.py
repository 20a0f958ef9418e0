"""Turns of talk: what may be asked, and that a turn and its end survive the wire."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.cbor import decode, encode
from edge_agent.core.chat import ChatMessage, Finish, Sampling, Tier, Turn, TurnEnd
from edge_agent.core.errors import RefusedError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
MESSAGES = st.lists(st.builds(ChatMessage, st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=5)
SAMPLING = st.builds(
    Sampling, st.integers(0, 2000), st.integers(0, 100), st.integers(1, 1000), st.none() | st.integers(0, 2**63 - 1)
)
TURNS = st.builds(
    Turn,
    MESSAGES.map(tuple),
    session=st.sampled_from(["", "kitchen", "a:b.c_d-9"]),
    max_tokens=st.integers(1, 8192),
    sampling=SAMPLING,
    stop=st.lists(TEXT.filter(bool), max_size=4).map(tuple),
    begun=TEXT,
)
ENDS = st.builds(
    TurnEnd, TEXT, st.sampled_from(list(Finish)), *[st.integers(0, 2**40)] * 5, st.sampled_from(list(Tier)),
    *[st.integers(0, 2**40)] * 6, session=TEXT, notes=st.lists(TEXT, max_size=3).map(tuple),
)  # fmt: skip
HELLO = (ChatMessage("user", "hello"),)


@given(TURNS)
def test_a_turn_survives_the_wire(turn: Turn) -> None:
    assert Turn.decode(turn.encode()) == turn


def test_a_raw_prompt_survives_the_wire() -> None:
    turn = Turn(prompt="Once upon a time")
    assert Turn.decode(turn.encode()) == turn


@given(ENDS)
def test_an_end_survives_the_wire(end: TurnEnd) -> None:
    again = TurnEnd.decode(end.encode())
    assert again == end
    assert type(again.finish) is Finish and type(again.tier) is Tier


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "messages, or a prompt"),
        ({"messages": HELLO, "prompt": "x"}, "messages, or a prompt"),
        ({"prompt": ""}, "at least one character"),
        ({"prompt": "x" * (2**18 + 1)}, "length of the prompt"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": -5}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 10**6}, "max_tokens"),
        ({"messages": HELLO, "session": "../etc"}, "session"),
        ({"messages": HELLO, "stop": ("",)}, "length of a stop text"),
        ({"messages": HELLO, "stop": ("a",) * 5}, "number of stop texts"),
        ({"messages": HELLO, "begun": "\ud800"}, "surrogate"),
    ],
)
def test_a_turn_that_cannot_be_served_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        Turn(**asked)


@pytest.mark.parametrize(
    "values", [{"temperature_milli": -1}, {"temperature_milli": 2001}, {"top_p_milli": 0}, {"seed": -1}, {"top_k": 1.5}]
)
def test_sampling_out_of_bounds_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        Sampling(**values)


def test_a_message_has_a_known_role_and_text() -> None:
    with pytest.raises(RefusedError, match="system, user, assistant"):
        ChatMessage("tool", "x")
    with pytest.raises(RefusedError, match="surrogate"):
        ChatMessage("user", "\udfff")


@given(TURNS, st.data())
def test_a_turn_with_any_field_of_another_type_is_refused(turn: Turn, data: st.DataObject) -> None:
    entry: Any = decode(turn.encode())
    key = data.draw(st.sampled_from(sorted(entry)))
    entry[key] = data.draw(st.sampled_from([None, True, b"x", [[1]], {1: 2}, -1]))
    with pytest.raises(RefusedError):
        Turn.decode(encode(entry))


def test_an_end_with_a_wrong_field_is_refused() -> None:
    values: Any = decode(TurnEnd("x", Finish.STOP, 1, 0, 1).encode())
    for index in range(len(values)):
        with pytest.raises(RefusedError):
            TurnEnd.decode(encode([*values[:index], -1, *values[index + 1 :]]))
    with pytest.raises(RefusedError):
        TurnEnd.decode(encode(values[:-1]))
    with pytest.raises(RefusedError, match="finish"):
        TurnEnd.decode(encode([values[0], "tired", *values[2:]]))
