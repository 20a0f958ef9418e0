"""A process that serves a language model is killed with SIGKILL in the middle of a chat, again and again.

After each kill the session is there with every id that was shown, its next turn computes no more than 64 tokens again, and what
it says is what a session says that never stopped.  The process prints what was shown to it; when it is killed is decided by how
many lines it has printed and a short random wait, and nothing here depends on that wait.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from edge_agent.core.chat import ChatMessage, Turn
from edge_agent.core.kv import unpacked_ids
from edge_agent.language.service import LanguageService, runtime_of
from models.language_card import LanguageCard
from tests.fetched import smollm2
from tests.speaking import answer, chat_turn, run, serving, tiny

CYCLES, MANY_CYCLES, REAL_CYCLES, MOST_TIMES = 12, 50, 3, 4
MAX_WAIT_S = 0.02
MOST_RECOMPUTED = 64
EXACT_RUNTIME = "ai_edge_litert"
"""On tflite-runtime what was generated and is read again has other last bits, and a kill may leave such ids (ADR 5): there it is
not asked whether the same is said afterwards, only that nothing is lost or computed again."""
ROOT = Path(__file__).resolve().parents[1]

CHAT = """
import asyncio, sys
from pathlib import Path
from edge_agent.core.kv import packed_ids
from models.language_card import find
from edge_agent.language import pump
from tests.speaking import chat_turn, new_service

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

async def chat(state, folder, name):
    first = int(sys.stdin.readline())
    if name != "smollm2":
        pump.BURST_US //= 10  # a tiny model's steps take a tenth: so there are a few in each burst, as with a real one
    service = new_service(state, of=(find(name, folder), folder))
    await service.start()
    number = first
    while True:
        held = service.store.resume("chat")
        say("holds", number, packed_ids(held.ids).hex() if held else "")
        made = 0
        async for said in service.talk(chat_turn(number)):
            if hasattr(said, "finish"):
                say("ends", number, said.prompt_tokens, said.cached_tokens, said.completion_tokens)
            else:
                made += said.tokens
                say("shows", number, made)
        number += 1

asyncio.run(chat(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
"""


@dataclass
class Heard:
    """What all processes said. ``held``: the session's ids before each turn.  ``shown``: the most ids that a turn showed."""

    held: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    shown: dict[int, int] = field(default_factory=dict)
    recomputed: list[int] = field(default_factory=list)

    def take(self, lines: list[str]) -> None:
        for words in (line.split() for line in lines if line.endswith("\n")):
            number = int(words[1])
            if words[0] == "holds":
                self.held.append((number, unpacked_ids(bytes.fromhex(words[2] if len(words) > 2 else ""))))
            elif words[0] == "shows":
                self.shown[number] = int(words[2])
            else:
                cached, before = int(words[3]), len(self.held[-1][1])
                self.shown[number] = int(words[4])
                self.recomputed.append(max(0, before - 1 - cached))

    @property
    def next_turn(self) -> int:
        return self.held[-1][0] + 1 if self.held else 0


Chatter = subprocess.Popen[str]


def chatter(state: Path, model: tuple[Path, str]) -> Chatter:
    """A process that has all its code and waits for the number of its first turn; it has touched nothing yet."""
    command = [sys.executable, "-c", CHAT, str(state), *map(str, model)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def killed_while(child: Chatter, first: int, lines: int, wait_s: float) -> list[str]:
    """Have ``child`` chat from turn ``first`` on, and kill it some time after it printed ``lines`` lines and then, if it soon
    does, shows something; all that it printed."""
    with child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(f"{first}\n")
        child.stdin.flush()
        printed = [child.stdout.readline() for _ in range(lines)]
        while lines % 4 and len(printed) < 2 * lines and not printed[-1].startswith("shows"):
            printed.append(child.stdout.readline())
        time.sleep(wait_s)
        child.send_signal(signal.SIGKILL)
        printed += child.stdout.readlines()
        child.wait()
    assert child.returncode == -signal.SIGKILL, "the child ended by itself"
    return printed


def turns_of(held: list[tuple[int, tuple[int, ...]]]) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Each turn with the ids before it and after it."""
    for (number, before), (_, after) in zip(held, held[1:], strict=False):
        yield number, before, after


async def never_stopped(service: LanguageService, heard: Heard) -> None:
    """The same chat in one session that nothing happens to: each turn makes as many ids as it made before its kill."""
    unanswered: list[ChatMessage] = []
    past: tuple[int, ...] = ()
    exact = runtime_of("auto") == EXACT_RUNTIME
    for number, before, after in turns_of(heard.held):
        assert after[: len(before)] == before, f"turn {number} lost ids that were there before"
        messages = [*unanswered, *chat_turn(number).messages]
        made = await _made(service, tuple(messages), past, after)
        assert made >= heard.shown.get(number, 0), f"turn {number} lost ids that were shown"
        if len(after) == len(before):
            continue
        if made == 0:
            unanswered = [*messages, ChatMessage("assistant", "")]
            continue
        unanswered, past = [], after
        if not exact:
            continue
        turn = chat_turn(number)
        await answer(service, Turn(tuple(messages), session="chat", max_tokens=made, sampling=turn.sampling))
        ids = service.store.resume("chat")
        assert ids is not None
        assert tuple(ids.ids) == after, f"turn {number} says something else than a session that never stopped"


async def _made(
    service: LanguageService, messages: tuple[ChatMessage, ...], past: tuple[int, ...], after: tuple[int, ...]
) -> int:
    """How many of the last ids in ``after`` are the answer to ``messages`` that came after ``past``."""
    ids = await service.pump.call(lambda child: child.encode(messages=messages, continuing=bool(past), limit=4096))
    if past and ids[0] == past[-1]:
        ids = ids[1:]
    return max(0, len(after) - len(past) - len(ids))


def survives_kills(folder: Path, model: tuple[LanguageCard, Path], cycles: int) -> None:
    """At least so many kills, and more until a third of them came in the middle of an answer."""
    random, heard, interrupted, done = Random(1), Heard(), 0, 0
    state, files = folder / "killed", (model[1], model[0].name)
    with ExitStack() as stack:
        spare = chatter(state, files)
        stack.callback(lambda: _ended(spare))
        while done < cycles or (interrupted <= cycles // 3 and done < MOST_TIMES * cycles):
            child, spare = spare, chatter(state, files)
            lines = killed_while(child, heard.next_turn, random.randint(1, 40), random.uniform(0, MAX_WAIT_S))
            heard.take(lines)
            interrupted += lines[-1].startswith("shows")
            done += 1
    assert len(heard.held) >= cycles
    assert interrupted > cycles // 3, "most kills came in the middle of an answer"
    assert max(heard.recomputed) <= MOST_RECOMPUTED

    async def work() -> None:
        async with serving(folder / "whole", of=model) as service:
            await never_stopped(service, heard)

    run(work())


def _ended(child: Chatter) -> None:
    """A child that waits for its turn is not needed."""
    with child:
        child.kill()


@pytest.mark.parametrize("cycles", [CYCLES, pytest.param(MANY_CYCLES, marks=pytest.mark.long)])
def test_a_kill_at_any_moment_of_a_chat_loses_nothing_and_changes_nothing(tmp_path: Path, cycles: int) -> None:
    survives_kills(tmp_path, tiny(), cycles)


def test_the_real_model_survives_kills_as_well(tmp_path: Path) -> None:
    real = smollm2()
    survives_kills(tmp_path, (real.card, real.folder), REAL_CYCLES)
