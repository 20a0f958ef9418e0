"""What a turn asks, as token ids: the whole conversation, and the same messages as new ones after a past.

Rules: the template and the tokenizer are the child's; a conversation that is too long is a matter of context, whoever noticed it.
"""

from __future__ import annotations

from edge_agent.core.chat import ChatMessage, Turn
from edge_agent.core.errors import RefusedError
from edge_agent.gateway.talker import CONTEXT_LENGTH
from edge_agent.language.child import LanguageChild
from edge_agent.language.plan import Asked

ASSISTANT = "assistant"
OVERLONG = ("prompt", "length of the text")
"""What the child's worker and its tokenizer refuse ids for when they are too many."""


async def asked_ids(child: LanguageChild, turn: Turn, limit: int) -> Asked:
    """Raises ``RefusedError`` (``CONTEXT_LENGTH``) for a turn of more than ``limit`` tokens."""
    try:
        return await _asked(child, turn, limit)
    except RefusedError as error:
        if error.subject in OVERLONG:
            raise RefusedError(CONTEXT_LENGTH, error.got, f"at most {limit} tokens", "send less") from error
        raise


async def _asked(child: LanguageChild, turn: Turn, limit: int) -> Asked:
    if turn.prompt is not None:
        ids = await child.encode(turn.prompt, begun=turn.begun, limit=limit)
        return Asked(ids, ids)
    whole = await child.encode(messages=turn.messages, begun=turn.begun, limit=limit)
    if not turn.session:
        return Asked(whole)
    following = await child.encode(messages=turn.messages, continuing=True, begun=turn.begun, limit=limit)
    first = _before_assistant(turn.messages) or (turn.messages if turn.begun else ())
    opening = len(await child.encode(messages=first, limit=limit)) if first else 0
    bare = await child.encode(messages=turn.messages, continuing=True, limit=limit) if turn.begun else ()
    return Asked(whole, following, opening, bare)


def _before_assistant(messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
    """What comes before the assistant's first message; nothing if there is none."""
    roles = [each.role for each in messages]
    return messages[: roles.index(ASSISTANT)] if ASSISTANT in roles else ()
