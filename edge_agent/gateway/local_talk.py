"""Turns of talk over the local socket: the streaming verb ``talk``, both ends.

Rules: the call's body is ``[Turn.encode(), model, terms]`` with an empty model for the default, and without terms for theirs; a
part is ``[text, tokens]``; the answer is ``TurnEnd.encode()``; what cannot be read is refused on either side.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import aclosing

from edge_agent.core.cbor import list_of
from edge_agent.core.chat import Turn, TurnEnd, TurnPart
from edge_agent.core.errors import RefusedError
from edge_agent.gateway.local import LocalConnection, SendPart, Streamer
from edge_agent.gateway.talker import Talker
from edge_agent.gateway.terms import Terms

TALK = "talk"


def talk_stream(talker: Talker) -> Streamer:
    """The agent's side: ``LocalServer(path, handler, streams={TALK: talk_stream(agent)})``."""

    async def serve(body: object, send: SendPart) -> object:
        turn, model, terms = _asked(body)
        async with aclosing(talker.talk(turn, model, data=terms.data, limits=terms.limits)) as parts:
            async for part in parts:
                if isinstance(part, TurnEnd):
                    return part.encode()
                await send([part.text, part.tokens])
        raise RuntimeError("a turn ended without its end")

    return serve


def talk_over(
    connection: LocalConnection, turn: Turn, model: str = "", terms: Terms | None = None
) -> Generator[TurnPart, None, TurnEnd]:
    """The client's side: parts as they come; the generator's return value is the end. Closing it cancels the turn.

    Raises ``UnavailableError`` if the agent goes away, ``RefusedError`` for what it refuses.
    """
    stream = connection.stream(TALK, [turn.encode(), model, *([terms.as_list()] if terms else [])])
    try:
        while True:
            yield _part(next(stream))
    except StopIteration as ended:
        if not isinstance(ended.value, bytes):
            raise RefusedError("end of a turn", ended.value, "bytes") from None
        return TurnEnd.decode(ended.value)
    finally:
        stream.close()


def _asked(body: object) -> tuple[Turn, str | None, Terms]:
    match body:
        case [bytes(turn), str(model)]:
            return Turn.decode(turn), model or None, Terms()
        case [bytes(turn), str(model), terms]:
            return Turn.decode(turn), model or None, Terms.from_list(terms)
    raise RefusedError("talk", body, "[turn, model], or [turn, model, terms]")


def _part(value: object) -> TurnPart:
    match list_of(value, "part of a turn", object, 2):
        case [str(text), int(tokens)]:
            return TurnPart(text, tokens)
    raise RefusedError("part of a turn", value, "[text, tokens]")
