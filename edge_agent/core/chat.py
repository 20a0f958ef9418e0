"""A turn of talk with a language model: what is asked, the parts that stream, and how it ended.

Rules: frozen, validated when built, bounded; no floats, so that a turn is the same CBOR on every board.  ``Turn.encode`` is what
travels as the one input tensor ``turn`` of a request with the task ``chat``; ``TurnEnd.encode`` is the output tensor ``turn``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import SESSION_NAME, bounded, checked

CHAT = "chat"
"""The task of a request whose one input ``turn`` is an encoded ``Turn``."""
TURN = "turn"
MAX_TURN_BYTES = 2**20
MAX_MESSAGES = 512
MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_NEW_TOKENS = 8192
DEFAULT_NEW_TOKENS = 256
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RefusedError("message role", self.role, ", ".join(ROLES))
        _text("message content", self.content)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. ``temperature_milli`` 0 is greedy; ``top_k`` 0 and ``top_p_milli`` 1000 keep every token.

    ``seed`` makes a draw repeatable; ``None`` lets the board choose.
    """

    temperature_milli: int = 0
    top_k: int = 0
    top_p_milli: int = 1000
    seed: int | None = None

    def __post_init__(self) -> None:
        bounded("temperature_milli", self.temperature_milli, 0, 2000)
        bounded("top_k", self.top_k, 0, 10**6)
        bounded("top_p_milli", self.top_p_milli, 1, 1000)
        if self.seed is not None:
            bounded("seed", self.seed, 0, 2**63 - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature_milli == 0


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn. ``messages`` are rendered by the model's template; ``prompt`` is raw text instead: exactly one of the two.

    ``session`` pins a named session: the messages are then new ones after those it holds, unless they begin with them.
    ``begun`` is the beginning of the answer, given elsewhere already: the answer goes on after it.
    """

    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None
    session: str = ""
    max_tokens: int = DEFAULT_NEW_TOKENS
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    begun: str = ""

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.prompt is not None):
            raise RefusedError("messages", "none" if not self.messages else "messages and a prompt", "messages, or a prompt")
        bounded("number of messages", len(self.messages), 0, MAX_MESSAGES)
        if self.prompt is not None:
            _text("prompt", self.prompt)
        if self.prompt == "":
            raise RefusedError("prompt", "an empty text", "at least one character")
        if self.session:
            checked(SESSION_NAME, "session", self.session)
        bounded("max_tokens", self.max_tokens, 1, MAX_NEW_TOKENS, "tokens")
        bounded("number of stop texts", len(self.stop), 0, MAX_STOPS)
        for stop in self.stop:
            _text("stop text", stop)
            bounded("length of a stop text", len(stop), 1, MAX_STOP_CHARS, "characters")
        _text("begun", self.begun)
        size_bytes = len(self.prompt or "") + len(self.begun) + sum(len(each.content) for each in self.messages)
        bounded("length of the prompt", size_bytes, 1 if self.prompt is not None else 0, MAX_TURN_BYTES // 4, "characters")

    def encode(self) -> bytes:
        sampling = self.sampling
        known: dict[int, object] = {
            1: [[each.role, each.content] for each in self.messages], 2: self.prompt, 3: self.session, 4: self.max_tokens,
            5: [sampling.temperature_milli, sampling.top_k, sampling.top_p_milli, sampling.seed], 6: list(self.stop),
            7: self.begun,
        }  # fmt: skip
        return encode({key: value for key, value in known.items() if value is not None})

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Turn:
        """Inverse of ``encode``. Raises ``RefusedError`` for anything else."""
        entry = fields(decode(data, MAX_TURN_BYTES, subject="turn"), "turn", _TURN, {2: ("prompt", str)})
        messages = [_pair(each) for each in list_of(entry.pop("messages"), "turn messages", list, MAX_MESSAGES)]
        sampling = entry.pop("sampling")
        if len(sampling) != 4:
            raise RefusedError("turn sampling", sampling, "temperature_milli, top_k, top_p_milli, seed")
        stop = list_of(entry.pop("stop"), "turn stop", str, MAX_STOPS)
        return cls(tuple(messages), sampling=Sampling(*sampling), stop=tuple(stop), **entry)


_TURN = {
    1: ("messages", list), 3: ("session", str), 4: ("max_tokens", int), 5: ("sampling", list), 6: ("stop", list),
    7: ("begun", str),
}  # fmt: skip


def _pair(value: list[object]) -> ChatMessage:
    if len(value) != 2 or not all(isinstance(each, str) for each in value):
        raise RefusedError("turn message", value, "role and content")
    return ChatMessage(str(value[0]), str(value[1]))


def _text(subject: str, value: object) -> None:
    if not isinstance(value, str):
        raise RefusedError(subject, value, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RefusedError(subject, "half of a surrogate pair", "text that UTF-8 can hold") from None


class Finish(StrEnum):
    STOP = "stop"
    """The model ended its answer, or a stop text came."""
    LENGTH = "length"
    """``max_tokens`` were made."""


class Tier(StrEnum):
    """Where the KV of a session's past lay when its turn began."""

    NONE = "none"
    HOT = "hot"
    RAM = "ram"
    DISK = "disk"
    PEER = "peer"


@dataclass(frozen=True, slots=True)
class TurnPart:
    """Text that follows what came before; ``tokens`` is how many were made for it."""

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The whole answer and what it took. ``prompt_tokens`` = ``cached_tokens`` (KV found) + those that were computed.

    ``recomputed_tokens`` are those of the prompt that this session had held before and that had to be computed again.
    ``kv_bytes``: of the whole session as parked.  ``first_token_us``: from the turn's arrival to its first token.
    """

    text: str
    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    recomputed_tokens: int = 0
    kv_bytes: int = 0
    tier: Tier = Tier.NONE
    first_token_us: int = 0
    restore_us: int = 0
    prefill_us: int = 0
    decode_us: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    session: str = ""
    notes: tuple[str, ...] = field(default=())
    """What a person should know: a block that was damaged, a session that is new because of an update."""
    receipt: bytes = field(default=b"", repr=False)
    """What the board that made the last of it signed (``attest.receipts``); empty on its way from the engine."""

    def encode(self) -> bytes:
        return encode([getattr(self, name) if name != "notes" else list(self.notes) for name in self.__dataclass_fields__])

    @classmethod
    def decode(cls, data: bytes | memoryview) -> TurnEnd:
        """Inverse of ``encode``. Raises ``RefusedError`` for anything else."""
        values = decode(data, 8 * MAX_TURN_BYTES, subject="end of a turn")
        names = tuple(cls.__dataclass_fields__)
        if not isinstance(values, list) or len(values) != len(names):
            raise RefusedError("end of a turn", values, f"a list of {len(names)}")
        entry = dict(zip(names, values, strict=True))
        for name, value in entry.items():
            kind = _END_TYPES.get(name, int)
            if type(value) is not kind or (isinstance(value, int) and value < 0):
                raise RefusedError(f"end of a turn, {name}", value, f"a value of type {kind.__name__}")
        try:
            entry["finish"], entry["tier"] = Finish(entry["finish"]), Tier(entry["tier"])
        except ValueError as error:
            raise RefusedError("end of a turn", str(error), "a known finish and tier") from None
        entry["notes"] = tuple(list_of(entry["notes"], "notes", str, 64))
        return cls(**entry)


_END_TYPES: dict[str, type] = {"text": str, "finish": str, "tier": str, "session": str, "notes": list, "receipt": bytes}
