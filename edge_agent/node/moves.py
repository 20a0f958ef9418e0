"""Jobs that wait for the KV of their session: held back until it is here, or will not come.

Owns the decision to fetch, and the way of what ``moving`` says onto the broker.  Rules: a job is held only while it is worth it
by the same prices that placed it; whatever becomes of a fetch, its job runs or ends, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from edge_agent.core.chat import CHAT
from edge_agent.core.config import PolicySection
from edge_agent.core.kv import KvAnswer, KvAsk, KvState, session_hash
from edge_agent.node.events import Effect, Execute, KvFound, KvGave, KvStored, Publish
from edge_agent.node.execution import Execution
from edge_agent.node.moving import Moving, Said
from edge_agent.node.voice import Voice
from edge_agent.placement.kv import KvAction, holdings, plan_kv
from edge_agent.transport.link import MAX_PAYLOAD_BYTES, Message


class Moves:
    def __init__(self, board: str, policy: PolicySection, execution: Execution, voice: Voice, tickets: Iterator[int]) -> None:
        self._board, self.policy, self._execution, self._voice, self._tickets = board, policy, execution, voice, tickets
        self._moving = Moving()
        self._held: dict[str, Execute] = {}
        self.link_up = False

    def __len__(self) -> int:
        """How many jobs are held back."""
        return len(self._held)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Sessions that moved here, fetches given up, sessions that moved away."""
        return self._moving.moved_in, self._moving.given_up, self._moving.moved_out

    def start(self, job: Execute, others: Iterable[tuple[str, KvState]], now_us: int) -> Iterator[Effect]:
        """Begin a job: at once, or with a fetch if another board holds its session and that is the cheapest way.

        ``others``: the KV of the job's model on the boards that can be reached.
        """
        state = self._execution.kv.get(job.model)
        source = self._source(job, state, others) if state and self.link_up else ""
        if not source or state is None:
            yield job
            return
        self._held[job.key] = job
        session = job.request.session
        yield from self._out(
            self._moving.begin(job.key, session, job.model, state.fingerprint, source, now_us, job.budget_us // 2)
        )

    def _source(self, job: Execute, state: KvState, others: Iterable[tuple[str, KvState]]) -> str:
        if job.request.task != CHAT or not job.request.session:
            return ""
        held = holdings(session_hash(job.request.session), [(self._board, state), *others])
        plan = plan_kv(self._board, state, job.request.size_bytes, held, self.policy)
        return plan.source if plan.action is KvAction.PEER else ""

    def break_off(self, key: str) -> bool:
        """Nobody wants the job of this key any more; whether it was held back, and so never runs."""
        self._moving.forget(key)
        return self._held.pop(key, None) is not None

    def asked(self, board: str, ask: KvAsk) -> Iterator[Effect]:
        yield from self._moving.asked(board, ask)

    def answered(self, board: str, answer: KvAnswer, now_us: int) -> Iterator[Effect]:
        yield from self._out(self._moving.answered(board, answer, now_us))

    def heard_of_store(self, event: KvFound | KvStored | KvGave, now_us: int) -> Iterator[Effect]:
        match event:
            case KvFound():
                yield from self._out(self._moving.found(event, now_us))
            case KvStored():
                yield from self._out(self._moving.stored(event, now_us))
            case KvGave():
                yield from self._out(self._moving.gave(event))

    def lose(self, board: str, now_us: int) -> None:
        self._moving.lose(board, now_us)

    def go_on(self, now_us: int) -> Iterator[Effect]:
        """What time has made due: lost messages are asked for again, and jobs whose fetch is over run."""
        if self.link_up:
            yield from self._out(self._moving.retry(now_us))
        for key, source in self._moving.take_ended(now_us):
            job = self._held.pop(key)
            running = self._execution.running_job(key)
            if running is not None:
                yield replace(job, budget_us=max(1, running.deadline_us - now_us), moved_from=source)

    def _out(self, said: Iterator[Said | Effect] | Iterator[Said]) -> Iterator[Effect]:
        for each in said:
            if not isinstance(each, tuple):
                yield each
            elif self.link_up:
                yield Publish(self._message(*each), next(self._tickets))

    def _message(self, board: str, said: KvAsk | KvAnswer) -> Message:
        if isinstance(said, KvAnswer) and len(said.payload) > MAX_PAYLOAD_BYTES - 2**12:
            refusal = f"{len(said.payload)} bytes do not fit into one message"
            said = KvAnswer(said.session, said.item, said.name, refusal=refusal)
        return self._voice.kv(said, board)
