"""What is shown of an answer: whole characters, and never what turns out to be a stop text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.language.text import TextStream

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def shown(pieces: list[bytes], stops: list[str] | tuple[str, ...] = (), begun: str = "") -> tuple[list[str], bool]:
    stream = TextStream(stops, begun)
    parts = [stream.feed(piece) for piece in pieces]
    return [*parts, stream.end()], stream.stopped


def test_half_a_character_waits_for_its_other_half() -> None:
    euro = "€".encode()
    assert shown([euro[:1], euro[1:2], euro[2:] + b"!"])[0] == ["", "", "€!", ""]


def test_a_character_that_never_ends_is_one_replacement_at_the_end() -> None:
    assert shown([b"a", "€".encode()[:2]])[0] == ["a", "", "\ufffd"]
    assert shown([b"a\xffb"])[0] == ["a\ufffdb", ""]


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=10))
def test_any_bytes_cut_anywhere_are_the_text_that_the_whole_would_be(data: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[low:high] for low, high in zip(edges, edges[1:], strict=False)]
    assert "".join(shown(pieces)[0]) == data.decode("utf-8", "replace")


def test_the_beginning_of_a_stop_text_is_held_back_until_it_is_known_to_be_none() -> None:
    assert shown([b"hi #", b"#", b"x"], ["##!"])[0] == ["hi ", "", "##x", ""]
    assert shown([b"hi #", b"#", b"!never"], ["##!"]) == (["hi ", "", "", ""], True)
    assert shown([b"hi #"], ["##!"])[0] == ["hi ", "#"]


@given(st.text("abc", max_size=40), STOPS, st.lists(st.integers(0, 40), max_size=12))
def test_an_answer_ends_before_the_stop_text_that_is_complete_first(text: str, stops: list[str], cuts: list[int]) -> None:
    ends = [(at + len(stop), at) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    expected = text[: min(ends)[1]] if ends else text
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts, stopped = shown([text[low:high].encode() for low, high in zip(edges, edges[1:], strict=False)], stops)
    if len(edges) - 1 == len(text) or not ends:
        assert "".join(parts) == expected
    assert stopped == bool(ends)
    assert expected.startswith("".join(parts)) or "".join(parts) == expected


@given(st.text("ab", max_size=12), st.text("ab", max_size=12), STOPS)
@example("a", "aaa", ["aaaa"])
@example("b", "ab", ["bab"])
def test_what_was_shown_before_counts_as_the_answers_beginning(begun: str, more: str, stops: list[str]) -> None:
    if any(stop in begun for stop in stops):
        return
    parts, stopped = shown([bytes((each,)) for each in more.encode()], stops, begun)
    text = begun + more
    ends = [(at + len(stop), at) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    assert stopped == bool(ends)
    assert "".join(parts) == (text[len(begun) : max(len(begun), min(ends)[1])] if ends else more)


def test_a_stop_text_that_was_shown_whole_before_stops_nothing_now() -> None:
    assert shown([b"c"], ["b", "xxxx"], "ab") == (["c", ""], False)


@pytest.mark.parametrize("stops", [[], ["x"]])
def test_after_the_stop_nothing_is_shown_any_more(stops: list[str]) -> None:
    stream = TextStream(stops)
    assert (stream.feed(b"axb"), stream.feed(b"c"), stream.end()) == (("a", "", "") if stops else ("axb", "c", ""))
