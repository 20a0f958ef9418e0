"""The demo's talk: a language model reads a text and is asked about it, its plug is pulled, and it goes on where it was.

Owns that act and its table.  Rules: the agents are the ones that run on boards, and one is ended by SIGKILL; its twin, which
is asked the same and never stops, says what the answer has to be; what a full prefill costs is not reckoned but measured, by
telling the twin the whole conversation under a system text that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_agent.client import Client
from edge_agent.core.chat import ChatMessage, TurnEnd
from edge_agent.demo.story import Story, say
from edge_agent.local_fleet import LocalFleet, Member
from models.calibration import PROSE

LANGUAGE_MODEL = "smollm2"
SESSION = "harbour"
FIRST = PROSE + "\nWhat did the grandfather say about a lighthouse?"
SECOND = "What are the four things to check before a storm?"
THIRD = "And what is the capital of Portugal?"
ANSWER_TOKENS = 48
AFTER_KILL = "after the restart"
MOST_RECOMPUTED = 64
UNKNOWN = "You are a careful reader who answers in one sentence."
HOME, TWIN = Member("kitchen", "raspberry_pi_5"), Member("twin", "raspberry_pi_5")


@dataclass(frozen=True, slots=True)
class Asked:
    """One turn as its client saw it."""

    what: str
    question: str
    end: TurnEnd

    @property
    def computed_tokens(self) -> int:
        """Of the prompt; what was not held had to be read."""
        return self.end.prompt_tokens - self.end.cached_tokens


def converse(folder: Path, story: Story) -> list[Asked]:
    """Play the act and judge it. Raises ``SlyError`` for what keeps it from starting."""
    say(f"Act 4: {LANGUAGE_MODEL} reads a text and is asked about it; its plug is pulled; it is asked again")
    with LocalFleet(folder / "talk", [HOME, TWIN], [LANGUAGE_MODEL], 0, name="talk") as fleet:
        fleet.start()
        asked = list(_play(fleet))
        codes = fleet.stop()
    story.promise(codes == [0, 0], f"both agents drain and end cleanly (codes {codes})")
    _judge(story, asked)
    return asked


def _play(fleet: LocalFleet) -> Iterator[Asked]:
    with Client(fleet.socket_of(HOME.board)) as client:
        past = [_told(_ask(client, "reads the text", FIRST)), _told(_ask(client, "is asked again", SECOND))]
    yield from past
    fleet.kill(HOME.board)
    say(f"  {HOME.board} is killed (SIGKILL) and started again")
    fleet.start([HOME.board])
    with Client(fleet.socket_of(HOME.board)) as client:
        yield _told(_ask(client, AFTER_KILL, THIRD))
    with Client(fleet.socket_of(TWIN.board)) as client:
        for question in (FIRST, SECOND):
            _ask(client, "twin", question)
        yield _ask(client, "never stopped", THIRD)
        yield _ask(client, "all read anew", THIRD, past)


def _ask(client: Client, what: str, question: str, past: Iterable[Asked] | None = None) -> Asked:
    """One turn: of the session, or, with a ``past``, of a conversation that is told whole."""
    messages = [ChatMessage("system", UNKNOWN)] if past is not None else []
    for each in past or ():
        messages += [ChatMessage("user", each.question), ChatMessage("assistant", each.end.text)]
    messages.append(ChatMessage("user", question))
    reply = client.chat(messages, session="" if past is not None else SESSION, max_tokens=ANSWER_TOKENS)
    reply.text()
    assert reply.end is not None, "text() waits for it"
    return Asked(what, question, reply.end)


def _told(asked: Asked) -> Asked:
    """Let the person who watches read along."""
    say(f"  {asked.question.splitlines()[-1]}")
    say(f"    {' '.join(asked.end.text.split())}")
    return asked


def _judge(story: Story, asked: list[Asked]) -> None:
    _, _, resumed, twin, anew = asked
    end = resumed.end
    story.promise(
        end.recomputed_tokens <= MOST_RECOMPUTED,
        f"after kill -9 a session of {end.cached_tokens} tokens goes on with {end.recomputed_tokens} of them recomputed",
    )
    story.promise(end.text == twin.end.text, "it says what its twin says, which never stopped")
    story.promise(
        end.first_token_us < anew.end.first_token_us,
        f"its first token comes after {end.first_token_us / 1000:.0f} ms; "
        f"reading all {anew.computed_tokens} tokens anew takes {anew.end.first_token_us / 1000:.0f} ms",
    )


def talk_table(asked: Iterable[Asked]) -> str:
    """What each turn took, for a person."""
    heads = ("turn", "prompt", "held", "read", "recomputed", "first token ms", "tokens/s", "session KiB", "from")
    form = "{:<18} {:>7} {:>6} {:>6} {:>11} {:>15} {:>9} {:>12} {:>6}"
    return "\n".join(["", form.format(*heads), *(form.format(*_cells(each)) for each in asked)])


def _cells(asked: Asked) -> tuple[object, ...]:
    end = asked.end
    rate = (end.completion_tokens - 1) * 1e6 / end.decode_us if end.decode_us else 0.0
    first_ms = f"{end.first_token_us / 1000:.0f}"
    return (
        asked.what, end.prompt_tokens, end.cached_tokens, asked.computed_tokens, end.recomputed_tokens, first_ms,
        f"{rate:.0f}", f"{end.kv_bytes / 1024:.0f}", end.tier.value,
    )  # fmt: skip


def talk_json(asked: Iterable[Asked]) -> list[dict[str, object]]:
    return [
        {
            "turn": each.what, "question": each.question.splitlines()[-1], "answer": each.end.text,
            "prompt_tokens": each.end.prompt_tokens, "cached_tokens": each.end.cached_tokens,
            "recomputed_tokens": each.end.recomputed_tokens, "first_token_us": each.end.first_token_us,
            "kv_bytes": each.end.kv_bytes, "tier": each.end.tier.value,
        }
        for each in asked
    ]  # fmt: skip
