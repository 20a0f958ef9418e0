"""``sly chat`` and ``sly sessions`` as a person meets them: a real process, a real terminal, a board behind a real door."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from edge_agent import cli
from edge_agent.commands.conversation import for_people, status_line
from edge_agent.core.chat import ChatMessage, Finish, Tier
from edge_agent.core.config import GatewaySection
from edge_agent.core.printable import harmless
from edge_agent.core.values import DataClass, Limits, TrustTier
from tests.needs import needs_module
from tests.scripted_talker import END, LONG_S, OnSocket, Served, on_socket, served

SLY = (sys.executable, "-m", "edge_agent.cli")
ON_A_TERMINAL = (
    sys.executable, "-c",
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); me=sys.executable; os.execv(me, [me, *sys.argv[1:]])",
    "-m", "edge_agent.cli",
)  # fmt: skip


@pytest.fixture
def board(tmp_path: Path) -> Iterator[OnSocket]:
    with on_socket(tmp_path / "agent.sock") as board:
        yield board


@pytest.fixture
def door() -> Iterator[Served]:
    needs_module("uvicorn", "gateway")
    with served(GatewaySection(on=True, port=0, token="secret")) as door:
        yield door


def sly(*arguments: object, given: bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*SLY, *map(str, arguments)], input=given, capture_output=True, timeout=60, env={**os.environ, **environment}, check=False
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


# one question


def test_a_question_on_the_command_line_is_answered_on_stdout_and_its_cost_on_stderr(board: OnSocket) -> None:
    done = sly("chat", "--socket", board.path, "say", "hello", "world")
    assert (done.returncode, done.stdout) == (0, "hello world\n")
    assert done.stderr == (
        "2 tokens at 50.0/s; prompt 9: 6 held (disk), 1 recomputed; first token 12 ms; KV 63.3 KiB; guesses 3 of 4 right\n"
        "note: block 2 was damaged\n"
    )


def test_a_question_through_a_pipe_is_answered(board: OnSocket) -> None:
    done = sly("chat", "--socket", board.path, given="say grüß dich\n".encode())
    assert (done.returncode, done.stdout) == (0, "grüß dich\n")
    assert board.talker.turns[-1].messages == (ChatMessage("user", "say grüß dich"),)


@pytest.mark.parametrize(("given", "named"), [(b"", "nothing"), (b" \n", "nothing"), (b"\xff", "UTF-8"), (b"x" * 2**21, "bytes")])
def test_a_question_that_is_none_is_told_in_one_line(board: OnSocket, given: bytes, named: str) -> None:
    done = sly("chat", "--socket", board.path, given=given)
    assert (done.returncode, done.stdout) == (cli.USAGE_ERROR, "")
    assert done.stderr.startswith("sly: question: got ") and named in done.stderr and done.stderr.count("\n") == 1


def test_json_is_one_object_and_nothing_else(board: OnSocket) -> None:
    done = sly("chat", "--json", "--socket", board.path, "--session", "den", "--max-tokens", 3, "say a b c d")
    told = json.loads(done.stdout)
    assert (told["text"], told["finish"], told["session"], told["kv_bytes"]) == ("a b c", "length", "den", 64_800)
    assert (done.stderr, done.stdout.count("\n")) == ("", 1)


def test_what_was_asked_for_is_the_turn(board: OnSocket) -> None:
    sly(
        "chat",
        "--socket",
        board.path,
        "--session",
        "den",
        "--system",
        "be brief",
        "--temperature",
        0.7,
        "--max-tokens",
        5,
        "say a",
    )
    turn = board.talker.turns[-1]
    assert turn.messages == (ChatMessage("system", "be brief"), ChatMessage("user", "say a"))
    assert (turn.session, turn.max_tokens, turn.sampling.temperature_milli) == ("den", 5, 700)


TERMS = ("--data", "public", "--trust", "warning", "--quality", 700, "--energy-mj", 9, "--deadline-ms", 5000)
AS_TERMS = (DataClass.PUBLIC, Limits(5_000_000, 9000, 700, TrustTier.WARNING))


def test_limits_and_data_class_reach_the_board_through_either_door(board: OnSocket, door: Served, token: Path) -> None:
    assert sly("chat", "--socket", board.path, *TERMS, "say a").returncode == 0
    assert sly("chat", "--url", door.url, "--token-file", token, *TERMS, "say a").returncode == 0
    assert board.talker.terms == door.talker.terms == [AS_TERMS]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--temperature", "3"), "--temperature"),
        (("--temperature", "nan"), "--temperature"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--session", "~x"), "session"),
        (("--token-file", "x"), "--url"),
        (("--deadline-ms", "0"), "deadline"),
        (("--trust", "blind"), "blind"),
        (("--data", "secret"), "secret"),
    ],
)
def test_an_option_that_cannot_be_is_named(board: OnSocket, arguments: tuple[str, ...], named: str) -> None:
    done = sly("chat", "--socket", board.path, *arguments, "say a")
    assert done.returncode == cli.USAGE_ERROR and named in done.stderr and done.stderr.count("\n") == 1
    assert board.talker.turns == []


def test_a_refusal_is_one_line(board: OnSocket) -> None:
    done = sly("chat", "--socket", board.path, "refuse something")
    assert (done.returncode, done.stderr) == (cli.USAGE_ERROR, "sly: something: got this; allowed: that\n")


def test_an_agent_that_does_not_run_is_named(tmp_path: Path) -> None:
    done = sly("chat", "--socket", tmp_path / "none.sock", "say a")
    assert done.returncode == cli.USAGE_ERROR and "sly agent --config" in done.stderr


# over HTTP


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret\n")
    return path


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_a_board_is_talked_with_by_its_url(door: Served, token: Path, path: str) -> None:
    done = sly("chat", "--url", door.url + path, "--token-file", token, "--session", "den", "say hello world")
    assert (done.returncode, done.stdout) == (0, "hello world\n")
    assert "2 tokens at 50.0/s; prompt 9: 6 held (disk), 1 recomputed; first token 12 ms" in done.stderr
    assert "note: block 2 was damaged" in done.stderr
    assert door.talker.turns[-1].session == "den"


@pytest.mark.parametrize(
    ("script", "named"), [("late one", "it died"), ("refuse context length", "context length"), ("break it", "ask again")]
)
def test_an_error_over_http_is_one_line(door: Served, token: Path, script: str, named: str) -> None:
    done = sly("chat", "--url", door.url, "--token-file", token, script)
    assert done.returncode == cli.USAGE_ERROR and named in done.stderr
    assert done.stderr.startswith("sly: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("told", "named"),
    [
        (b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n', "cut off"),
        (b"data: half\n\n", "a JSON object"),
        (b"data: " + b"[" * 2**20 + b"\n\n", "an endless line"),
        (b'data: {"error": {"message": "a\\u001b[2Jb"}}\n\n', "a [2Jb"),
    ],
    ids=["cut off", "no JSON", "endless", "error"],
)
def test_a_server_that_breaks_its_word_is_told_in_one_line(told: bytes, named: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [*SLY, "chat", "--url", f"http://127.0.0.1:{server.getsockname()[1]}", "--model", "m", "say a"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
            client, _ = server.accept()
            with client:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + told)
                client.shutdown(socket.SHUT_WR)
                _, said = asking.communicate(timeout=60)
    assert asking.returncode == cli.USAGE_ERROR
    assert said.startswith("sly: ") and named in said and said.count("\n") == 1 and "\x1b" not in said


def test_without_its_token_a_board_refuses(door: Served) -> None:
    done = sly("chat", "--url", door.url, "say a")
    assert done.returncode == cli.USAGE_ERROR and "Authorization" in done.stderr


@pytest.mark.parametrize("url", ["kitchen:8080", "ftp://x", "http://", "http://a:99999", "http://u:p@x", "http://127.0.0.1:1"])
def test_a_url_that_cannot_be_is_told(url: str) -> None:
    done = sly("chat", "--url", url, "say a")
    assert done.returncode == cli.USAGE_ERROR and url in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"\xff", b"a\nb"])
def test_a_token_file_that_holds_none_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    done = sly("chat", "--url", "http://127.0.0.1:1", "--token-file", path, "say a")
    assert done.returncode == cli.USAGE_ERROR and "--token-file" in done.stderr


# at a terminal


class Terminal:
    """``sly`` at a terminal of its own; what it writes there is one text."""

    def __init__(self, *arguments: object, stdout: IO[bytes] | None = None, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        known = {**os.environ, "TERM": "xterm", **environment}
        command = [*ON_A_TERMINAL, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=stdout or theirs, stderr=theirs, env=known, start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def until(self, pattern: str) -> str:
        """What came since the last time, up to and with ``pattern``."""
        while (found := re.search(pattern, self.seen)) is None:
            if not (data := self._read()):
                raise AssertionError(f"it ended without {pattern!r}: {self.seen!r}")
            self.seen += data.decode()
        said, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return said

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def ended(self) -> int:
        while self._read():
            pass
        return self.process.wait(LONG_S)

    def interrupted(self) -> int:
        """Ctrl-C at a prompt; CPython's readline can miss one that comes while it draws the prompt, as a person would see."""
        self.type("\x03")
        while not select.select([self._ours], [], [], 1)[0]:
            self.type("\x03")
        return self.ended()

    def _read(self) -> bytes:
        """What it wrote; nothing once it ended."""
        ready, _, _ = select.select([self._ours], [], [], LONG_S)
        assert ready, f"nothing came for {LONG_S:g} s after {self.seen!r}"
        try:
            return os.read(self._ours, 4096)
        except OSError:
            return b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_a_conversation_is_told_whole_each_time_without_a_session(board: OnSocket) -> None:
    with Terminal("chat", "--socket", board.path, "--system", "be brief") as terminal:
        terminal.until("> ")
        terminal.type("say one\n")
        terminal.until(r"KV 63\.3 KiB.*\n")
        terminal.until("> ")
        terminal.type("\nsay two\n")
        terminal.until(r"KV 63\.3 KiB.*\n")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.ended() == 0
    assert board.talker.turns[-1].messages == (
        ChatMessage("system", "be brief"), ChatMessage("user", "say one"), ChatMessage("assistant", "one"),
        ChatMessage("user", "say two"),
    )  # fmt: skip


def test_a_named_session_says_what_it_holds_and_is_sent_only_what_is_new(board: OnSocket) -> None:
    board.sessions = [["den", 1234, 8_000_000, "disk", 60]]
    with Terminal("chat", "--socket", board.path, "--session", "den") as terminal:
        assert "session den holds 1234 tokens, 7.6 MiB of KV in tier disk" in terminal.until("> ")
        for word in ("one", "two"):
            terminal.type(f"say {word}\n")
            terminal.until(r"KV 63\.3 KiB.*\n")
            terminal.until("> ")
        terminal.type("\x04")
        assert terminal.ended() == 0
    assert [turn.messages for turn in board.talker.turns] == [(ChatMessage("user", f"say {word}"),) for word in ("one", "two")]


def test_a_conversation_into_a_file_has_the_answers_alone_on_stdout(board: OnSocket, tmp_path: Path) -> None:
    with (tmp_path / "said").open("wb") as file, Terminal("chat", "--socket", board.path, stdout=file) as terminal:
        for word in ("one", "two"):
            terminal.until("> ")
            terminal.type(f"say {word}\n")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.ended() == 0
    assert (tmp_path / "said").read_text() == "one\ntwo\n"


def test_ctrl_c_stops_the_answer_and_then_the_talk(board: OnSocket) -> None:
    with Terminal("chat", "--socket", board.path) as terminal:
        terminal.until("> ")
        terminal.type("hold first second\n")
        terminal.until(r"\nfirst")
        assert board.talker.began.acquire(timeout=LONG_S)
        terminal.type("\x03")
        terminal.until("stopped")
        assert board.talker.freed.acquire(timeout=LONG_S)
        terminal.until("> ")
        terminal.type("say again\n")
        terminal.until(r"KV 63\.3 KiB.*\n")
        terminal.until("> ")
        assert terminal.interrupted() == cli.INTERRUPTED
    assert board.talker.turns[-1].messages[1] == ChatMessage("assistant", "first")


def test_an_answer_that_fails_does_not_end_the_talk(board: OnSocket) -> None:
    with Terminal("chat", "--socket", board.path) as terminal:
        terminal.until("> ")
        terminal.type("refuse something\n")
        terminal.until("sly: something: got this; allowed: that")
        terminal.until("> ")
        terminal.type("say fine\n")
        terminal.until(r"\nfine\r?\n")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.ended() == 0
    assert board.talker.turns[-1].messages == (ChatMessage("user", "say fine"),)


@pytest.mark.parametrize(("environment", "dim"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_the_status_is_dim_on_a_terminal_that_shows_it(board: OnSocket, environment: dict[str, str], dim: bool) -> None:
    with Terminal("chat", "--socket", board.path, "say a", **environment) as terminal:
        assert ("\x1b[2m" in terminal.until(r"guesses.*\n")) == dim


def test_a_models_control_codes_are_shown_and_not_obeyed(board: OnSocket) -> None:
    evil = "a\x1b]0;owned\x07\x1b[2J\x9b31mb\x7f\x08c"
    done = sly("chat", "--socket", board.path, given=f"say {evil}".encode())
    assert done.stdout == "a␛]0;owned␇␛[2J�31mb␡␈c\n"
    assert harmless("tab\tline\nend 😀 ü") == "tab\tline\nend 😀 ü"
    assert not any(
        char < " " or "\x7f" <= char < "\xa0"
        for char in harmless("".join(map(chr, range(256))).replace("\n\t", ""))
        if char not in "\n\t"
    )


def test_interrupting_one_question_ends_the_command(board: OnSocket) -> None:
    command = [*SLY, "chat", "--socket", str(board.path), "hold first"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.read(5) == b"first"
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == cli.INTERRUPTED
        assert running.stderr is not None and b"Traceback" not in running.stderr.read()
    assert board.talker.freed.acquire(timeout=LONG_S)


# sessions


def test_sessions_are_listed_for_people_and_as_json(board: OnSocket, capsys: pytest.CaptureFixture[str]) -> None:
    board.sessions = [["den", 1234, 8_000_000, "disk", 60], ["attic", 5, 900, "hot", 0]]
    assert cli.main(["sessions", "list", "--socket", str(board.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["den", "1234", "7.6", "MiB", "disk", "60", "s", "ago"]
    assert cli.main(["sessions", "list", "--json", "--socket", str(board.path)]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {
        "name": "attic", "tokens": 5, "kv_bytes": 900, "tier": "hot", "idle_s": 0,
    }  # fmt: skip


def test_a_session_can_be_dropped_once(board: OnSocket, capsys: pytest.CaptureFixture[str]) -> None:
    board.sessions = [["den", 1234, 8_000_000, "disk", 60]]
    assert cli.main(["sessions", "drop", "den", "--socket", str(board.path)]) == 0
    assert board.sessions == []
    assert cli.main(["sessions", "drop", "den", "--socket", str(board.path)]) == cli.USAGE_ERROR
    assert "den" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [["den"], ["den", "5", 1, "hot", 0], {}, None], ids=str)
def test_a_list_that_cannot_be_is_refused(board: OnSocket, capsys: pytest.CaptureFixture[str], entry: object) -> None:
    board.sessions = [entry]  # type: ignore[list-item]
    assert cli.main(["sessions", "list", "--socket", str(board.path)]) == cli.USAGE_ERROR
    assert "session" in capsys.readouterr().err


def test_the_status_line_says_only_what_there_is() -> None:
    plain = replace(END, drafted_tokens=0, tier=Tier.NONE, finish=Finish.LENGTH, completion_tokens=5)
    assert status_line(plain) == (
        "5 tokens at 200.0/s; prompt 9: 6 held, 1 recomputed; first token 12 ms; KV 63.3 KiB; cut off: --max-tokens"
    )
    assert [for_people(size) for size in (0, 1023, 1024, 2**20 - 1, 2**20, 3 * 2**29)] == [
        "0 B", "1023 B", "1.0 KiB", "1024.0 KiB", "1.0 MiB", "1536.0 MiB",
    ]  # fmt: skip
