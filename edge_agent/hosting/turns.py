"""A turn's way through a language model: parts to whoever asked, then its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from edge_agent.core.chat import TurnEnd
from edge_agent.core.values import MAX_PART_CHARS, AnswerPart
from edge_agent.node.events import Execute
from edge_agent.node.streams import turn_of

if TYPE_CHECKING:
    from edge_agent.speaking import Speaker


async def heard_out(speaker: Speaker, job: Execute, emit: Callable[[AnswerPart], None]) -> TurnEnd:
    """Pass on the parts of a turn; its end."""
    turn, tokens = turn_of(job.request), 0
    offset = len(turn.begun)
    async with aclosing(speaker.talk(turn)) as parts:
        async for part in parts:
            if isinstance(part, TurnEnd):
                return part
            tokens += part.tokens
            for start in range(0, len(part.text), MAX_PART_CHARS):
                text = part.text[start : start + MAX_PART_CHARS]
                emit(AnswerPart(job.request.request_id, offset, text, tokens))
                offset += len(text)
    raise RuntimeError(f"a turn of {job.model} ended without its end")
