"""A talk at the terminal: asking, showing the answer as it comes, and what it took.

Rules: the answer and nothing else goes to stdout; a model's words never reach the terminal as control codes; a stopped or
failed answer ends neither the talk nor the session; no colour where nobody looks, or ``NO_COLOR`` is set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from base64 import b64encode
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent.client import Reply
from edge_agent.commands.limits import data_of, limits_of
from edge_agent.core.cbor import list_of
from edge_agent.core.chat import MAX_TURN_BYTES, ChatMessage, Finish, Sampling, Tier, Turn, TurnEnd, TurnPart
from edge_agent.core.errors import ConfigError, RefusedError, SlyError
from edge_agent.core.printable import harmless
from edge_agent.gateway.local import LocalConnection
from edge_agent.gateway.local_talk import talk_over
from edge_agent.gateway.terms import Terms

MAX_SESSIONS = 4096
MAX_TOKEN_BYTES = 4096
PROMPT = "> "

Way = Callable[[Turn], Generator[TurnPart, None, TurnEnd]]


@dataclass(frozen=True, slots=True)
class KeptSession:
    """A session that a board keeps. ``idle_s`` is how long ago it was used."""

    name: str
    tokens: int
    kv_bytes: int
    tier: str
    idle_s: int

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def talk(arguments: argparse.Namespace) -> int:
    """``sly chat``: one question from the command line or a pipe, or a conversation at a terminal."""
    if isinstance(arguments.token_file, Path) and arguments.url is None:
        raise ConfigError("--token-file", "without --url", "with --url", "a socket needs no token")
    if arguments.receipt is not None and arguments.socket is None:
        raise ConfigError("--receipt", "without --socket", "with --socket", "it tells what boards show of themselves")
    way, close = _way(arguments)
    try:
        conversation = Conversation(arguments, way)
        if arguments.text or not sys.stdin.isatty():
            conversation.answer(" ".join(arguments.text) or _piped())
        else:
            conversation.hold()
    finally:
        close()
    if arguments.receipt is not None:
        _prove(arguments, conversation.receipts)
    return 0


def _prove(arguments: argparse.Namespace, receipts: Sequence[bytes]) -> None:
    from edge_agent.attest.proof import write_proof
    from edge_agent.client import Client

    with Client(arguments.socket) as client:
        write_proof(arguments.receipt, client.proof(receipts))


class Conversation:
    """Question after question to one board. Without a session name the history is kept here and told whole each time."""

    def __init__(self, arguments: argparse.Namespace, way: Way) -> None:
        self._way, self._session, self._json = way, arguments.session, arguments.json
        self._max_tokens = arguments.max_tokens
        self._sampling = Sampling(_milli(arguments.temperature))
        self._history: tuple[ChatMessage, ...] = ()
        self.receipts: list[bytes] = []
        """Of the answers that came with one."""
        held = _held(arguments)
        if held is not None:
            _note(f"session {held.name} holds {held.tokens} tokens, {for_people(held.kv_bytes)} of KV in tier {held.tier}")
        if arguments.system and held is None:
            self._history = (ChatMessage("system", arguments.system),)
        elif arguments.system:
            _note("it goes on as it began: --system is for a new one")

    def hold(self) -> None:
        """Ask the person until there is no more question."""
        for question in _questions():
            try:
                self.answer(question)
            except KeyboardInterrupt:
                _note("stopped")
            except SlyError as error:
                print(f"sly: {error}", file=sys.stderr)

    def answer(self, question: str) -> None:
        """One turn, shown. Raises ``SlyError``, and ``KeyboardInterrupt`` after the board was told to stop."""
        asked = (*self._history, ChatMessage("user", question))
        turn = Turn(asked, session=self._session, max_tokens=self._max_tokens, sampling=self._sampling)
        reply = Reply(self._way(turn))
        said = ""
        try:
            for text in reply:
                said += text
                self._show(text)
        finally:
            reply.close()
            self._close_line(said)
            if said or reply.end is not None:
                self._history = () if self._session else (*asked, ChatMessage("assistant", said))
        assert reply.end is not None
        if reply.end.receipt:
            self.receipts.append(reply.end.receipt)
        self._tell(reply.end)

    def _show(self, text: str) -> None:
        if not self._json:
            sys.stdout.write(harmless(text))
            sys.stdout.flush()

    def _close_line(self, said: str) -> None:
        if said and not self._json and not said.endswith("\n"):
            print(flush=True)

    def _tell(self, end: TurnEnd) -> None:
        if self._json:
            receipt = {"receipt": b64encode(end.receipt).decode()}
            print(json.dumps(dataclasses.asdict(end) | receipt | {"tokens_per_s": _tokens_per_s(end)}), flush=True)
            return
        _note(status_line(end))
        for note in end.notes:
            _note(f"note: {note}")


def status_line(end: TurnEnd) -> str:
    """What a turn took, in one line."""
    held = f"{end.cached_tokens} held" + (f" ({end.tier.value})" if end.tier is not Tier.NONE else "")
    parts = [
        f"{end.completion_tokens} tokens at {_tokens_per_s(end):.1f}/s",
        f"prompt {end.prompt_tokens}: {held}, {end.recomputed_tokens} recomputed",
        f"first token {end.first_token_us / 1000:.0f} ms",
        f"KV {for_people(end.kv_bytes)}",
    ]
    if end.drafted_tokens:
        parts.append(f"guesses {end.accepted_tokens} of {end.drafted_tokens} right")
    if end.finish is Finish.LENGTH:
        parts.append("cut off: --max-tokens")
    return "; ".join(parts)


def for_people(size_bytes: int) -> str:
    """A number of bytes with its binary unit."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    if size_bytes < 2**20:
        return f"{size_bytes / 2**10:.1f} KiB"
    return f"{size_bytes / 2**20:.1f} MiB"


def kept_sessions(socket: Path) -> list[KeptSession]:
    """What the agent keeps. Raises ``UnavailableError`` when it is not there, ``RefusedError`` for what it refuses."""
    with LocalConnection(socket) as connection:
        entries = list_of(connection.call("sessions", timeout_s=60), "sessions", list, MAX_SESSIONS)
    return [_kept(entry) for entry in entries]


def _kept(entry: object) -> KeptSession:
    match entry:
        case [str(name), int(tokens), int(kv_bytes), str(tier), int(idle_s)]:
            return KeptSession(name, tokens, kv_bytes, tier, idle_s)
    raise RefusedError("session", entry, "[name, tokens, kv_bytes, tier, idle_s]")


def _held(arguments: argparse.Namespace) -> KeptSession | None:
    """The session that is taken up again, as far as the board tells; over HTTP the first answer tells."""
    if not arguments.session or arguments.socket is None:
        return None
    try:
        kept = kept_sessions(arguments.socket)
    except RefusedError as error:
        _note(f"what session {arguments.session} holds is not told: {error}")
        return None
    return next((each for each in kept if each.name == arguments.session), None)


def _way(arguments: argparse.Namespace) -> tuple[Way, Callable[[], None]]:
    terms = Terms(limits_of(arguments), data_of(arguments))
    if arguments.url is None:
        connection = LocalConnection(arguments.socket)
        return lambda turn: talk_over(connection, turn, arguments.model, terms), connection.close
    from edge_agent.gateway.http_talk import HttpBoard

    board = HttpBoard(arguments.url, _token(arguments.token_file))
    model = arguments.model or next(iter(board.models()), "")
    if not model:
        raise RefusedError(f"board at {arguments.url}", "no language model", "a board that hosts one")
    return lambda turn: board.talk(turn, model, terms), lambda: None


def _token(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            token = file.read(MAX_TOKEN_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--token-file", str(error), "a file that holds the board's token") from error
    if not token.isprintable() or not token:
        raise ConfigError("--token-file", "no token in it" if not token else "a line break in it", "the token and nothing else")
    return token


def _questions() -> Iterator[str]:
    """What the person types, line by line, until Ctrl-D; Ctrl-C is theirs to end with."""
    import readline  # noqa: F401  gives input() its line editing

    while True:
        try:
            question = _line().strip()
        except (EOFError, KeyboardInterrupt) as ending:
            print(file=sys.stderr)
            if isinstance(ending, EOFError):
                return
            raise
        except UnicodeDecodeError:
            print("sly: question: got bytes that are not UTF-8; allowed: text", file=sys.stderr)
            continue
        if question:
            yield question


def _line() -> str:
    """A line with editing; stdout stays clean for the answers when it is no terminal."""
    if sys.stdout.isatty():
        return input(PROMPT)
    print(PROMPT, end="", file=sys.stderr, flush=True)
    if line := sys.stdin.readline():
        return line
    raise EOFError


def _piped() -> str:
    data = sys.stdin.buffer.read(MAX_TURN_BYTES + 1)
    if len(data) > MAX_TURN_BYTES:
        raise RefusedError("question", f"more than {MAX_TURN_BYTES} bytes", f"at most {MAX_TURN_BYTES} bytes")
    try:
        question = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise RefusedError("question", f"not UTF-8 at byte {error.start}", "UTF-8 text") from None
    if not question:
        raise RefusedError("question", "nothing", "a text, as TEXT or through a pipe")
    return question


def _milli(temperature: float) -> int:
    if not 0 <= temperature <= 2:
        raise ConfigError("--temperature", str(temperature), "a number from 0 to 2")
    return round(1000 * temperature)


def _tokens_per_s(end: TurnEnd) -> float:
    from edge_agent.gateway.openai import tokens_per_s

    return tokens_per_s(end)


def _note(text: str) -> None:
    """A line for the person, dim where a terminal shows it."""
    line = harmless(text)
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb":
        line = f"\x1b[2m{line}\x1b[0m"
    print(line, file=sys.stderr, flush=True)
