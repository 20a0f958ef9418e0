"""Answers in parts: whatever the network does to them, text is shown in order, each character once, and none is missing."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.chat import CHAT, Sampling, Turn
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import (
    MAX_ANSWER_CHARS,
    MAX_PART_CHARS,
    AnswerPart,
    InferenceRequest,
    InferenceResult,
    Limits,
    Status,
    Tensor,
)
from edge_agent.node.streams import (
    MAX_AHEAD,
    PERIOD_US,
    Assembly,
    PartStreams,
    all_shown,
    counted,
    end_of,
    end_tensor,
    taken_up,
    turn_of,
    turn_request,
)
from tests.scripted_speaker import end_of_turn

REQUEST_ID = "ab" * 16
TEXT = "".join(chr(97 + i % 26) for i in range(200))
cuts = st.lists(st.integers(1, len(TEXT) - 1), max_size=30, unique=True).map(sorted)


def part(offset: int, text: str, tokens: int = 0) -> AnswerPart:
    return AnswerPart(REQUEST_ID, offset, text, tokens)


def parts_of(cuts: list[int], repeat: int = 0) -> list[AnswerPart]:
    """TEXT in pieces, each beginning ``repeat`` characters early."""
    ends = [*cuts, len(TEXT)]
    starts = [max(0, at - repeat) for at in [0, *cuts]]
    return [part(start, TEXT[start:end], number + 1) for number, (start, end) in enumerate(zip(starts, ends, strict=True))]


def shown(assembly: Assembly, *parts: AnswerPart) -> str:
    text, length = "", assembly.length
    for each in parts:
        for fresh in assembly.take(each):
            assert fresh.offset == length + len(text)
            text += fresh.text
    return text


@given(cuts, st.integers(0, 40), st.randoms(use_true_random=False))
def test_parts_in_any_order_and_more_than_once_give_the_text_once(cuts: list[int], repeat: int, random: Random) -> None:
    parts = parts_of(cuts, repeat) * 2
    random.shuffle(parts)
    assembly = Assembly()
    assert shown(assembly, *parts) == TEXT == assembly.text
    assert assembly.tokens == len(cuts) + 1 and assembly.rest(TEXT) == ""


@given(cuts, st.sets(st.integers(0, 30)))
def test_what_a_lost_part_lacked_follows_from_the_result(cuts: list[int], lost: set[int]) -> None:
    assembly = Assembly()
    text = shown(assembly, *(each for number, each in enumerate(parts_of(cuts)) if number not in lost))
    assert text + (assembly.rest(TEXT) or "") == TEXT


def test_an_answer_that_does_not_begin_with_what_was_shown_is_told_apart() -> None:
    assembly = Assembly("be")
    assert shown(assembly, part(2, "gun")) == "gun" and assembly.text == "begun"
    assert assembly.rest("began anew") is None


def test_parts_far_ahead_are_bounded() -> None:
    assembly = Assembly()
    for number in range(10 * MAX_AHEAD):
        assert shown(assembly, part(1 + number, "x")) == ""
    assert len(assembly._ahead) == MAX_AHEAD
    assert len(shown(assembly, part(0, "x"))) == 1 + MAX_AHEAD


@pytest.mark.parametrize(
    "wrong",
    [(-1, "x", 0), (MAX_ANSWER_CHARS + 1, "x", 0), (0, "", 0), (0, "x" * (MAX_PART_CHARS + 1), 0), (0, "x", -1)],
)
def test_a_part_that_cannot_be_is_refused(wrong: tuple[int, str, int]) -> None:
    with pytest.raises(RefusedError, match="part's"):
        part(*wrong)


# on their way out


def sent(streams: PartStreams, pieces: list[str], every_us: int) -> list[tuple[int, AnswerPart]]:
    """What goes out, and when, of pieces that are made one ``every_us``."""
    out, offset, now_us = [], 0, 0
    for number, piece in enumerate(pieces):
        out += [(now_us, each) for _, each in streams.add("k", "b", part(offset, piece, number + 1), now_us)]
        offset, now_us = offset + len(piece), now_us + every_us
    for _ in range(3):
        out += [(now_us, each) for _, each in streams.flush(now_us)]
        now_us += PERIOD_US
    return out


@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=200), st.integers(1, 200_000), st.data())
def test_a_stream_is_gathered_and_bears_the_loss_of_any_one_message_in_two(
    pieces: list[str], every_us: int, data: st.DataObject
) -> None:
    out = sent(PartStreams(), pieces, every_us)
    times = [time_us for time_us, _ in out]
    assert all(later - earlier >= PERIOD_US for earlier, later in zip(times, times[1:], strict=False))
    lost = data.draw(st.integers(0, 1))
    kept = [each for number, (_, each) in enumerate(out) if number % 2 != lost or number == len(out) - 1]
    assert shown(Assembly(), *kept) == "".join(pieces)


def test_a_flood_of_text_leaves_in_parts_that_fit() -> None:
    pieces = ["x" * MAX_PART_CHARS] * 5
    out = [each for _, each in sent(PartStreams(), pieces, 1)]
    assert shown(Assembly(), *out) == "".join(pieces)


def test_what_waits_when_the_answer_goes_out_is_not_sent() -> None:
    streams = PartStreams()
    assert list(streams.add("k", "b", part(0, "x"), 0)) and not list(streams.add("k", "b", part(1, "y"), 1))
    streams.end("k")
    assert not list(streams.flush(10 * PERIOD_US)) and not len(streams)


# taken up by another board


def asked(tokens: int = 10, begun: str = "") -> InferenceRequest:
    return turn_request(REQUEST_ID, Turn(prompt="hello", max_tokens=tokens, begun=begun, session="s"), None, Limits())


def test_another_board_goes_on_after_what_was_shown_with_the_tokens_that_are_left() -> None:
    request, assembly = asked(), Assembly()
    shown(assembly, part(0, "hello0ü ", 1), part(8, "hello1 ", 2))
    again = taken_up(request, assembly)
    assert turn_of(again) == replace(turn_of(request), begun="hello0ü hello1 ", max_tokens=8)
    assert (again.request_id, again.session, again.limits) == (request.request_id, "s", request.limits)


def test_the_result_of_the_last_board_counts_the_tokens_of_those_before() -> None:
    request, assembly = asked(), Assembly()
    shown(assembly, part(0, "hello0ü ", 1))
    assembly.handed_over()
    turn = turn_of(taken_up(request, assembly))
    assert shown(assembly, part(8, "hello1 ", 1)) and assembly.tokens == 2
    result = InferenceResult(REQUEST_ID, Status.OK, "b", "parrot", outputs=end_tensor(end_of_turn(turn)))
    end = end_of(counted(result, assembly.base_tokens, request))
    assert end.completion_tokens == 10 and end.text == end_of_turn(turn_of(request)).text
    assert end_of(counted(result, 5, request)).completion_tokens == 10, "never more than were asked for"


def test_an_answer_whose_last_token_was_shown_has_ended_whoever_was_lost() -> None:
    assembly = Assembly()
    shown(assembly, part(0, "all", 9))
    assert all_shown(asked(), assembly) is None
    shown(assembly, part(3, " of it", 10))
    end = all_shown(asked(), assembly)
    assert end is not None and (end.text, end.completion_tokens, end.session) == ("all of it", 10, "s")


def test_a_beginning_too_long_to_be_passed_on_is_refused() -> None:
    assembly = Assembly()
    for number in range(20):
        shown(assembly, part(number * MAX_PART_CHARS, "x" * MAX_PART_CHARS, 1))
    with pytest.raises(RefusedError, match="length of the prompt"):
        taken_up(asked(), assembly)


def test_a_sampled_turn_gets_a_seed_from_its_request_and_keeps_its_own() -> None:
    drawn = Turn(prompt="x", sampling=Sampling(800))
    first, again = (turn_of(turn_request(REQUEST_ID, drawn, None, Limits())) for _ in range(2))
    assert first == again and first.sampling.seed is not None
    assert turn_of(turn_request("cd" * 16, drawn, None, Limits())).sampling.seed != first.sampling.seed
    own = replace(drawn, sampling=Sampling(800, seed=3))
    assert turn_of(turn_request(REQUEST_ID, own, None, Limits())) == own


@pytest.mark.parametrize(
    "inputs",
    [{}, {"text": Tensor("uint8", (1,), b"x")}, {"turn": Tensor("int8", (1,), b"x")}, {"turn": Tensor("uint8", (1,), b"x")}],
)
def test_what_is_no_turn_is_refused(inputs: dict[str, Tensor]) -> None:
    with pytest.raises(RefusedError):
        turn_of(InferenceRequest(REQUEST_ID, CHAT, inputs))
