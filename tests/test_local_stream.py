"""Answers in parts on a board's own socket: order, back pressure, cancelling, and what a client may rely on."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_agent.client import Client
from edge_agent.core.cbor import encode
from edge_agent.core.chat import ChatMessage, Finish, Turn
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import DataClass, Limits, TrustTier
from edge_agent.gateway.local import LENGTH_BYTES, MAX_PART_BYTES, LocalConnection, LocalServer, SendPart
from edge_agent.gateway.local_talk import TALK, talk_over
from edge_agent.gateway.terms import Terms
from tests.needs import needs_module
from tests.scripted_talker import LONG_S, MODEL, OnSocket, on_socket


@pytest.fixture
def board(tmp_path: Path) -> Iterator[OnSocket]:
    with on_socket(tmp_path / "agent.sock") as board:
        yield board


def question(text: str, session: str = "") -> Turn:
    return Turn((ChatMessage("user", text),), session=session)


# what a user writes


def test_a_talk_in_eight_lines(board: OnSocket) -> None:
    said = []
    with Client(board.path) as client:
        reply = client.chat("say hello big world", session="kitchen")
        for text in reply:
            said.append(text)
    assert said == ["hello", " big", " world"]
    assert reply.end is not None and (reply.end.text, reply.end.finish) == ("hello big world", Finish.STOP)
    assert reply.end.cached_tokens == 6 and reply.end.session == "kitchen"


def test_the_whole_text_can_be_waited_for(board: OnSocket) -> None:
    with Client(board.path) as client:
        history = [ChatMessage("system", "brief"), ChatMessage("user", "say a b")]
        assert client.chat(history, model=MODEL, max_tokens=9).text() == "a b"
    assert board.talker.turns == [Turn(tuple(history), max_tokens=9)]


def test_an_agent_that_is_not_there_is_passed_over(board: OnSocket, tmp_path: Path) -> None:
    with Client(tmp_path / "none.sock", board.path) as client:
        assert client.chat("say a").text() == "a"
    with Client(tmp_path / "none.sock") as client, pytest.raises(UnavailableError, match="no agent answers"):
        client.chat("say a").text()


def test_a_refusal_is_not_taken_to_the_next_agent(board: OnSocket) -> None:
    with Client(board.path, board.path) as client, pytest.raises(RefusedError, match="something"):
        client.chat("refuse something").text()
    assert len(board.talker.turns) == 1


def test_limits_and_data_class_of_a_talk_reach_the_board(board: OnSocket) -> None:
    limits = Limits(5_000_001, 7, 800, TrustTier.WARNING)
    with Client(board.path) as client:
        client.chat("say a", limits=limits, data=DataClass.PUBLIC).text()
        client.chat("say a").text()
    assert board.talker.terms == [(DataClass.PUBLIC, limits), (DataClass.PRIVATE, Terms().limits)]


@pytest.mark.parametrize(
    "terms",
    [None, [], ["public"], ["public", 1, 5, 0, 0, 0], ["secret", 1, 5, 0, 0], ["public", 0, 5, 0, 0], ["public", 1, 0, 0, 0]],
    ids=str,
)
def test_terms_that_are_none_are_refused(board: OnSocket, terms: object) -> None:
    with LocalConnection(board.path) as connection:
        stream = connection.stream(TALK, [question("say a").encode(), "", terms])
        with pytest.raises(RefusedError):
            next(stream)
    assert board.talker.turns == []


# parts


def test_parts_come_while_the_turn_goes_on(board: OnSocket) -> None:
    with LocalConnection(board.path) as connection:
        parts = talk_over(connection, question("hold one two"))
        assert next(parts).text == "one"
        assert board.talker.live == 1
        board.do(board.talker.go_on)
        assert next(parts).text == " two"
        with pytest.raises(StopIteration) as ended:
            next(parts)
    assert ended.value.value.completion_tokens == 2


def test_a_connection_serves_the_next_call_after_a_stream(board: OnSocket) -> None:
    with LocalConnection(board.path) as connection:
        for _ in range(2):
            assert [part.text for part in talk_over(connection, question("say a b"))] == ["a", " b"]
            assert connection.call("sessions") == []


def test_an_error_after_a_part_is_told_after_it(board: OnSocket) -> None:
    with LocalConnection(board.path) as connection:
        parts = talk_over(connection, question("late one"))
        assert next(parts).text == "one"
        with pytest.raises(RefusedError, match="it died"):
            next(parts)
        assert connection.call("sessions") == []


def test_a_stream_that_is_closed_cancels_its_turn_and_the_connection_serves_again(board: OnSocket) -> None:
    with LocalConnection(board.path) as connection:
        parts = talk_over(connection, question("hold x"))
        next(parts)
        parts.close()
        assert board.talker.freed.acquire(timeout=LONG_S)
        assert board.talker.live == 0
        assert [part.text for part in talk_over(connection, question("say a"))] == ["a"]


def test_a_reply_that_is_thrown_away_cancels_its_turn(board: OnSocket) -> None:
    with Client(board.path) as client:
        reply = client.chat("hold x")
        assert next(iter(reply)) == "x"
        del reply
        gc.collect()
        assert board.talker.freed.acquire(timeout=LONG_S)


@pytest.mark.parametrize("script", ["hold x", "wait x"])
def test_a_client_that_vanishes_cancels_its_turn(board: OnSocket, script: str) -> None:
    connection = LocalConnection(board.path)
    connection.connect()
    assert connection._socket is not None
    data = encode({0: 1, 1: "talk", 2: [question(script).encode(), ""]})
    connection._socket.sendall(len(data).to_bytes(LENGTH_BYTES, "big") + data)
    assert board.talker.began.acquire(timeout=LONG_S)
    connection.close()
    assert board.talker.freed.acquire(timeout=LONG_S)
    assert board.talker.live == 0


def test_talks_of_one_board_run_side_by_side(board: OnSocket) -> None:
    with LocalConnection(board.path) as first, LocalConnection(board.path) as second:
        waits = talk_over(first, question("hold one two"))
        assert next(waits).text == "one"
        assert [part.text for part in talk_over(second, question("say a"))] == ["a"]
        board.do(board.talker.go_on)
        assert [part.text for part in waits] == [" two"]


@pytest.mark.parametrize("body", [None, b"", [b"", ""], [question("x").encode()], [question("x").encode(), None], {}], ids=str)
def test_a_turn_that_cannot_be_read_is_refused(board: OnSocket, body: object) -> None:
    with LocalConnection(board.path) as connection, pytest.raises(RefusedError, match="turn|talk"):
        for _ in connection.stream("talk", body):
            pass
    assert board.talker.turns == []


def test_a_client_that_takes_nothing_holds_back_the_parts_and_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back pressure: what waits in memory is a few parts, not the whole answer."""
    monkeypatch.setattr("edge_agent.gateway.local.STALLED_S", 0.2)
    sent = 0

    async def play() -> None:
        ended = asyncio.Event()

        async def pour(body: object, send: SendPart) -> object:
            nonlocal sent
            try:
                while True:
                    await send(bytes(MAX_PART_BYTES - 100))
                    sent += 1
            finally:
                ended.set()

        async def handle(verb: str, body: object) -> object:
            return None

        server = LocalServer(tmp_path / "s", handle, {"pour": pour})
        await server.start()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s", limit=1)
        data = encode({0: 1, 1: "pour", 2: None})
        writer.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
        async with asyncio.timeout(LONG_S):
            await ended.wait()
        writer.close()
        await server.close()

    asyncio.run(play())
    assert sent < 8


def test_a_part_over_its_bound_is_a_bug_that_ends_the_connection(tmp_path: Path) -> None:
    faults: list[str] = []

    async def play() -> None:
        async def pour(body: object, send: SendPart) -> object:
            await send(bytes(MAX_PART_BYTES + 1))
            return None

        async def handle(verb: str, body: object) -> object:
            return None

        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(str(context["exception"])))
        server = LocalServer(tmp_path / "s", handle, {"pour": pour})
        await server.start()

        def ask() -> None:
            with LocalConnection(tmp_path / "s") as connection, pytest.raises(UnavailableError):
                list(connection.stream("pour"))

        await asyncio.to_thread(ask)
        await server.close()

    asyncio.run(play())
    assert len(faults) == 1 and "at most" in faults[0]


# what a client makes of a server that lies


@contextmanager
def lies(tmp_path: Path, *frames: object) -> Iterator[LocalConnection]:
    ours, theirs = socket.socketpair()
    connection = LocalConnection(tmp_path / "none")
    connection._socket = ours
    with theirs:
        for frame in frames:
            data = frame if isinstance(frame, bytes) else encode(frame)
            theirs.sendall(len(data).to_bytes(LENGTH_BYTES, "big") + data)
        theirs.shutdown(socket.SHUT_WR)
        yield connection
        connection.close()


@pytest.mark.parametrize(
    "frames",
    [
        [{0: 2, 3: ["x", 1]}],
        [{0: 1, 3: ["x", 1], 4: 0}],
        [{0: 1, 3: ["x"]}],
        [{0: 1, 3: [7, 1]}],
        [{0: 1, 3: None}],
        [{0: 1, 1: "", 2: None}],
        [{0: 1, 1: "", 2: b"\xa0"}],
        [{0: 2, 1: "", 2: b""}],
        [b"\xff"],
        [[]],
    ],
    ids=str,
)
def test_a_frame_that_cannot_be_is_refused(tmp_path: Path, frames: list[object]) -> None:
    with lies(tmp_path, *frames) as connection, pytest.raises(RefusedError):
        list(talk_over(connection, question("x")))


@pytest.mark.parametrize("frames", [[], [{0: 1, 3: ["x", 1]}]], ids=str)
def test_an_agent_that_goes_away_amid_a_stream_is_told(tmp_path: Path, frames: list[object]) -> None:
    with lies(tmp_path, *frames) as connection, pytest.raises(UnavailableError, match="went away"):
        list(talk_over(connection, question("x")))


def test_parts_and_calls_of_talk_are_as_the_protocol_says() -> None:
    needs_module("pycddl", "dev")
    from tests.test_protocol import is_a

    assert is_a("part", encode({0: 1, 3: ["text", 1]}))
    assert is_a("call", encode({0: 1, 1: "talk", 2: [question("x").encode(), ""]}))
    assert is_a("call", encode({0: 1, 1: "sessions", 2: None}))
    assert is_a("terms", encode(Terms(Limits(1, 2, 3, TrustTier.WARNING), DataClass.LOCAL).as_list()))
    assert not is_a("part", encode({0: 1, 1: "", 2: None}))
