"""Answers that come in parts: joined where they arrive, gathered where they leave, and taken up again by another board.

Rules: parts are best effort and the result is the truth, so a part that is late, doubled or missing costs smoothness and
nothing else.  Whoever shows text shows it in order, each character once.  What leaves for the broker is gathered for
``PERIOD_US``, and begins with the last ``OVERLAP_CHARS`` that were sent before, so that lost messages leave no gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256

from edge_agent.core.chat import CHAT, TURN, Finish, Turn, TurnEnd
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import (
    MAX_PART_CHARS,
    AnswerPart,
    DataClass,
    InferenceRequest,
    InferenceResult,
    Limits,
    Status,
    Tensor,
)

PERIOD_US = 50_000
OVERLAP_CHARS = 256
"""About a second of a small model's talk."""
MAX_AHEAD = 32
"""Parts that came before their turn and wait for those between."""


def turn_request(
    request_id: str, turn: Turn, model: str | None, limits: Limits, data: DataClass = DataClass.PRIVATE
) -> InferenceRequest:
    """The request of a turn, telling how long its answer may be.

    A sampled turn without a seed gets one, so that another board draws the same tokens.
    """
    if not turn.sampling.greedy and turn.sampling.seed is None:
        seed = int.from_bytes(sha256(request_id.encode()).digest()[:8], "little") >> 1
        turn = replace(turn, sampling=replace(turn.sampling, seed=seed))
    inputs = {TURN: _tensor(turn.encode())}
    return InferenceRequest(request_id, CHAT, inputs, model, limits, turn.session, data, turn.max_tokens)


def turn_of(request: InferenceRequest) -> Turn:
    """The turn in a request of the task ``chat``. Raises ``RefusedError`` if there is none."""
    tensor = request.inputs.get(TURN)
    if tensor is None or tensor.dtype != "uint8" or len(request.inputs) != 1:
        raise RefusedError("inputs of a chat request", ", ".join(request.inputs), f"one input {TURN!r} of uint8: an encoded turn")
    return Turn.decode(tensor.data)


def end_of(result: InferenceResult) -> TurnEnd:
    """The end of a turn in an OK result. Raises ``RefusedError`` if there is none."""
    tensor = result.outputs.get(TURN)
    if tensor is None or tensor.dtype != "uint8":
        raise RefusedError(f"answer of {result.board}", ", ".join(result.outputs) or "no outputs", f"an output {TURN!r} of uint8")
    return TurnEnd.decode(tensor.data)


def end_tensor(end: TurnEnd) -> dict[str, Tensor]:
    """The outputs of an OK result that hold ``end``."""
    return {TURN: _tensor(end.encode())}


def taken_up(request: InferenceRequest, shown: Assembly) -> InferenceRequest:
    """The request for a board that shall go on where another one was lost; ask ``all_shown`` first.

    Raises ``RefusedError`` if it grows too long.
    """
    turn = turn_of(request)
    turn = replace(turn, begun=shown.text, max_tokens=turn.max_tokens - shown.tokens)
    return replace(request, inputs={TURN: _tensor(turn.encode())}, answer_tokens=turn.max_tokens)


def all_shown(request: InferenceRequest, shown: Assembly) -> TurnEnd | None:
    """The end of an answer whose last token was shown before its board was lost; ``None`` if there is more to come."""
    turn = turn_of(request)
    if shown.tokens < turn.max_tokens:
        return None
    note = "the board that gave this answer was lost before it could say what it took"
    return TurnEnd(shown.text, Finish.LENGTH, 0, 0, shown.tokens, session=turn.session, notes=(note,))


def counted(result: InferenceResult, base_tokens: int, request: InferenceRequest) -> InferenceResult:
    """The result of a board that went on with an answer, counting the tokens of the boards before it too.

    A board that had this request in an earlier life of its ingress repeats the answer of then, which may have gone on from
    elsewhere: so the count is at most what was asked for.
    """
    if not base_tokens or result.status is not Status.OK:
        return result
    end = end_of(result)
    tokens = min(end.completion_tokens + base_tokens, turn_of(request).max_tokens)
    return replace(result, outputs=end_tensor(replace(end, completion_tokens=tokens)))


class Assembly:
    """The text of one answer so far, out of parts that come in any order, more than once, or not at all; after ``begun``."""

    def __init__(self, begun: str = "") -> None:
        self.length, self.tokens = len(begun), 0
        self._pieces = [begun]
        self._ahead: dict[int, AnswerPart] = {}
        self.base_tokens = 0
        """Made by the boards before the one that makes the answer now."""

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def take(self, part: AnswerPart) -> Iterator[AnswerPart]:
        """What can be shown now that ``part`` has come, in order: nothing, or text that follows what was shown."""
        if part.offset > self.length:
            if part.offset in self._ahead or len(self._ahead) < MAX_AHEAD:
                self._ahead[part.offset] = part
            return
        yield from self._append(part)
        while self._ahead and (first := min(self._ahead)) <= self.length:
            yield from self._append(self._ahead.pop(first))

    def rest(self, whole: str) -> str | None:
        """What of the whole answer was not shown yet; ``None`` if something else was shown."""
        return whole[self.length :] if whole.startswith(self.text) else None

    def handed_over(self) -> None:
        """Another board goes on from here: it counts its own tokens from 0."""
        self.base_tokens = self.tokens
        self._ahead.clear()

    def _append(self, part: AnswerPart) -> Iterator[AnswerPart]:
        if part.end <= self.length:
            return
        fresh = part.text[self.length - part.offset :]
        offset, self.length = self.length, part.end
        self.tokens = max(self.tokens, self.base_tokens + part.tokens)
        self._pieces.append(fresh)
        yield AnswerPart(part.request_id, offset, fresh, self.tokens)


@dataclass(slots=True)
class _Leaving:
    """What one addressee gets of one answer. ``waiting`` follows ``before``, the last that was sent already."""

    addressee: str
    request_id: str
    sent_us: int
    before: str = ""
    waiting: str = ""
    offset: int = 0
    """Of ``waiting``."""
    tokens: int = 0


class PartStreams:
    """The parts on their way out over the broker, by a key of the caller's: gathered, so that the broker is not flooded."""

    def __init__(self) -> None:
        self._leaving: dict[str, _Leaving] = {}

    def __len__(self) -> int:
        return len(self._leaving)

    def add(self, key: str, addressee: str, part: AnswerPart, now_us: int) -> Iterator[tuple[str, AnswerPart]]:
        """A part for ``addressee``; what comes out, that one with its addressee, is to be sent now."""
        leaving = self._leaving.get(key)
        if leaving is None:
            leaving = self._leaving[key] = _Leaving(addressee, part.request_id, now_us - PERIOD_US, offset=part.offset)
        if part.offset != leaving.offset + len(leaving.waiting):
            leaving.before, leaving.waiting, leaving.offset = "", "", part.offset
        leaving.waiting += part.text
        leaving.tokens = part.tokens
        if now_us - leaving.sent_us >= PERIOD_US or len(leaving.waiting) >= MAX_PART_CHARS // 2:
            yield from _sent(leaving, now_us)

    def flush(self, now_us: int) -> Iterator[tuple[str, AnswerPart]]:
        """What has waited long enough."""
        for leaving in self._leaving.values():
            if leaving.waiting and now_us - leaving.sent_us >= PERIOD_US:
                yield from _sent(leaving, now_us)

    def end(self, key: str) -> None:
        """The answer itself goes out: it holds all that still waits."""
        self._leaving.pop(key, None)


def _sent(leaving: _Leaving, now_us: int) -> Iterator[tuple[str, AnswerPart]]:
    before, text, offset = leaving.before, leaving.waiting, leaving.offset
    while text:
        piece, text = text[: MAX_PART_CHARS - len(before)], text[MAX_PART_CHARS - len(before) :]
        yield leaving.addressee, AnswerPart(leaving.request_id, offset - len(before), before + piece, leaving.tokens)
        before, offset = "", offset + len(piece)
    leaving.before = (leaving.before + leaving.waiting)[-OVERLAP_CHARS:]
    leaving.offset, leaving.waiting, leaving.sent_us = offset, "", now_us


def _tensor(data: bytes) -> Tensor:
    return Tensor("uint8", (len(data),), data)
