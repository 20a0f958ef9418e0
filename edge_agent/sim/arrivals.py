"""The requests of a simulated run, one after the other, from traces, drawn processes and cameras.

Owns when each comes, at which board, and what it asks for.  Rules: everything follows from the scenario and the seed; streams,
so that memory is bounded however long the run; a client comes in at its home board, but for ``roam_permille`` of its requests; a
client that talks sends the whole talk so far, as OpenAI's API has it.  A trace is begun at a moment that the seed draws, and
repeated when it ends before the run does.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from random import Random

from edge_agent.core.chat import CHAT, MAX_NEW_TOKENS, TURN, Turn
from edge_agent.core.values import MAX_DEADLINE_US, DataClass, InferenceRequest, Limits, Tensor, TrustTier
from edge_agent.placement.kv import BYTES_A_TOKEN
from edge_agent.sim.scenario import TRACES, ArrivalPlan, Scenario
from edge_agent.sim.statistics import OWN_RATE_MHZ, STATISTICS, TraceStatistics, draw_length
from edge_agent.sim.traces import Row, read_trace, trace_extent, trace_file


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request at ``at_us`` after the load began. ``prompt_tokens`` of the whole talk so far; both 0 for perception."""

    at_us: int
    ingress: str
    request: InferenceRequest
    prompt_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Draft:
    """A request before it has a name. ``client`` decides where it comes in, unless ``ingress`` does."""

    at_us: int
    client: str = ""
    session: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    ingress: str = ""


def arrivals(scenario: Scenario, seed: int) -> Iterator[Arrival]:
    """All requests in the order of their times. Raises ``RefusedError`` or ``UnavailableError`` for a trace as it is read."""
    streams = [_of_plan(scenario, plan, number, seed) for number, plan in enumerate(scenario.arrivals)]
    merged = heapq.merge(*streams, key=lambda each: (each.at_us, each.request.request_id))
    return islice(merged, scenario.limit or None)


def sources(scenario: Scenario) -> list[str]:
    """For people: where the requests come from that a trace should give."""
    said = []
    for kind in sorted({plan.kind for plan in scenario.arrivals} & set(TRACES)):
        path = trace_file(kind, scenario.traces)
        said.append(
            f"{kind}: replayed from {path.name}" if path else f"{kind}: no trace found, drawn with its summary statistics"
        )
    return said


def _of_plan(scenario: Scenario, plan: ArrivalPlan, number: int, seed: int) -> Iterator[Arrival]:
    random = Random(f"{seed} arrivals {number}")
    doors = plan.ingress or tuple(board.id for board in scenario.boards)
    end_us = min(scenario.duration_us, plan.to_ms * 1000)
    drafts = _kind_of(scenario, plan, random, doors, end_us)
    for count, draft in enumerate(islice(drafts, plan.limit or None)):
        at_us = plan.from_ms * 1000 + draft.at_us
        if at_us >= end_us:
            return
        request_id = sha256(f"{seed} {number} {count}".encode()).digest()[:16].hex()
        request = _request(plan, draft, request_id, f"{number}")
        yield Arrival(
            at_us, draft.ingress or _door(draft, doors, plan, random), request, draft.prompt_tokens, draft.answer_tokens
        )


def _kind_of(scenario: Scenario, plan: ArrivalPlan, random: Random, doors: tuple[str, ...], end_us: int) -> Iterator[_Draft]:
    if plan.kind == "camera":
        return heapq.merge(*(_camera(plan, random, door) for door in doors), key=lambda each: (each.at_us, each.ingress))
    if plan.kind in TRACES and (path := trace_file(plan.kind, scenario.traces)):
        return _replayed(plan, path, random, end_us - plan.from_ms * 1000)
    if plan.kind in TRACES:
        statistics = STATISTICS[plan.kind]
        rate_mhz = plan.rate_mhz or statistics.rate_mhz
        return _drawn(plan, random, rate_mhz, statistics.cv_permille, statistics.turns_permille, statistics)
    cv_permille = plan.cv_permille if plan.kind == "bursty" else 1000
    return _drawn(plan, random, plan.rate_mhz, cv_permille, plan.turns * 1000, STATISTICS["azure"])


def _camera(plan: ArrivalPlan, random: Random, door: str) -> Iterator[_Draft]:
    period_us = plan.period_ms * 1000
    at_us = random.randrange(period_us)
    while True:
        yield _Draft(at_us, ingress=door)
        at_us += period_us


def _drawn(
    plan: ArrivalPlan, random: Random, rate_mhz: int, cv_permille: int, turns_permille: int, statistics: TraceStatistics
) -> Iterator[_Draft]:
    """A renewal process with Gamma distributed gaps: a Poisson process at ``cv_permille`` 1000, bursts above."""
    shape = (1000 / cv_permille) ** 2
    mean_us, at_us = 10**9 / rate_mhz, 0.0
    talks = _Talks(plan, random, turns_permille)
    while True:
        at_us += random.gammavariate(shape, mean_us / shape)
        if plan.task != CHAT:
            yield _Draft(int(at_us), client=f"c{random.randrange(plan.clients)}")
            continue
        prompt = _scaled(draw_length(statistics.prompt, random), plan.prompt_permille)
        answer = _scaled(draw_length(statistics.answer, random), plan.answer_permille)
        yield talks.next_turn(int(at_us), prompt, answer)


class _Talks:
    """The open talks of drawn clients: each has ``turns_permille`` / 1000 turns on average."""

    def __init__(self, plan: ArrivalPlan, random: Random, turns_permille: int) -> None:
        self._plan, self._random, self._turns_permille = plan, random, turns_permille
        self._open: list[tuple[str, int]] = []
        self._begun = 0

    def next_turn(self, at_us: int, prompt_tokens: int, answer_tokens: int) -> _Draft:
        plan, random = self._plan, self._random
        answer_tokens = min(answer_tokens, MAX_NEW_TOKENS)
        if self._turns_permille <= 1000:
            client = f"c{random.randrange(plan.clients)}"
            return _Draft(at_us, client, "", min(prompt_tokens, plan.max_prompt_tokens), answer_tokens)
        name, past = "", 0
        if self._open and random.randrange(self._turns_permille) >= 1000:
            name, past = self._open.pop(random.randrange(len(self._open)))
        if not name or past + prompt_tokens > plan.max_prompt_tokens:
            self._begun += 1
            name, past = f"t{self._begun}", 0
        sent = min(past + prompt_tokens, plan.max_prompt_tokens)
        self._open.append((name, sent + answer_tokens))
        if len(self._open) > plan.clients:
            self._open.pop(0)
        return _Draft(at_us, name, name, sent, answer_tokens)


def _replayed(plan: ArrivalPlan, path: Path, random: Random, needed_us: int) -> Iterator[_Draft]:
    span_us, count = trace_extent(plan.kind, path)
    own_mhz = max(1, count * 10**9 // span_us) if count > 1 else OWN_RATE_MHZ[plan.kind]
    rate_mhz = plan.rate_mhz or own_mhz
    begin_us = random.randrange(max(1, span_us - needed_us * rate_mhz // own_mhz))
    lap = 0
    while count:
        for row in read_trace(plan.kind, path):
            at_us = (lap * span_us + row.at_us - begin_us) * own_mhz // rate_mhz
            if at_us >= 0:
                yield _of_row(plan, row, at_us, lap, random)
        lap += 1


def _of_row(plan: ArrivalPlan, row: Row, at_us: int, lap: int, random: Random) -> _Draft:
    session = f"t{lap}-{row.session}" if row.session else ""
    prompt = min(_scaled(row.prompt_tokens, plan.prompt_permille), plan.max_prompt_tokens)
    answer = min(_scaled(row.answer_tokens, plan.answer_permille), MAX_NEW_TOKENS)
    return _Draft(at_us, session or f"c{random.randrange(plan.clients)}", session, prompt, answer)


def _scaled(tokens: int, permille: int) -> int:
    return max(1, tokens * permille // 1000)


def _door(draft: _Draft, doors: tuple[str, ...], plan: ArrivalPlan, random: Random) -> str:
    """The client's home board, or now and then another one."""
    if random.randrange(1000) < plan.roam_permille:
        return doors[random.randrange(len(doors))]
    return doors[int.from_bytes(sha256(draft.client.encode()).digest()[:8]) % len(doors)]


def _request(plan: ArrivalPlan, draft: _Draft, request_id: str, stream: str) -> InferenceRequest:
    deadline_us = min(MAX_DEADLINE_US, plan.deadline_ms * 1000 + draft.answer_tokens * plan.deadline_token_us)
    limits = Limits(deadline_us, plan.energy_mj * 1000 or None, plan.quality_permille, TrustTier[plan.trust.upper()])
    if plan.task != CHAT:
        picture = Tensor("uint8", (plan.size_bytes,), bytes(plan.size_bytes))
        return InferenceRequest(request_id, plan.task, {"image": picture}, plan.model or None, limits, data=DataClass(plan.data))
    session = f"{stream}-{draft.session}" if draft.session else ""
    turn = Turn(prompt="x" * (draft.prompt_tokens * BYTES_A_TOKEN), session=session, max_tokens=draft.answer_tokens).encode()
    inputs = {TURN: Tensor("uint8", (len(turn),), turn)}
    longest = 1 << (draft.answer_tokens - 1).bit_length()
    return InferenceRequest(request_id, CHAT, inputs, plan.model or None, limits, session, DataClass(plan.data), longest)
