"""The jobs of this board: in each lane some run, the others wait in the order of ``placement.admission``.

Owns the local queue, the offers of the hosted models and how their cost estimates learn.  Rules: the queue is bounded in
requests and bytes over all lanes; a job whose deadline has passed is never started, nor one that cannot be done in time by all
that was measured; what is given up comes out of ``take_given_up`` once, with its reason; the models of perception share one lane
in which one job runs at a time, because one accelerator serves one inference at a time; a language model has a lane of its own,
in which ``parallel`` jobs run at once, because its engine shares each step among them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from edge_agent.core.chat import CHAT
from edge_agent.core.config import PolicySection, QueueSection
from edge_agent.core.kv import KvState, session_hash
from edge_agent.core.values import MAX_COST, InferenceResult, ModelOffer, Status
from edge_agent.core.waits import SLACKS_US
from edge_agent.node.deadlines import Deadlines
from edge_agent.node.events import Execute
from edge_agent.node.lanes import Job, Lane, Run, advance, answering_us
from edge_agent.placement.admission import TRIED_EVERY, Waiter, Waiting, least_us, why_hopeless
from edge_agent.placement.cost import CostBook, shared
from edge_agent.placement.kv import Holding, plan_kv


class Execution:
    def __init__(self, limits: QueueSection) -> None:
        self.limits = limits
        self.costs = CostBook()
        self.withdrawn: dict[str, str] = {}
        self.kv: dict[str, KvState] = {}
        """Of the language models, as they last said."""
        self._waiting = Waiting(limits)
        self._jobs: dict[str, tuple[Job, int]] = {}
        """Those that wait, each with what it has to do before it begins to answer."""
        self._lanes: dict[str, Lane] = {}
        self._running: set[str] = set()
        self._deadlines = Deadlines()
        self._new: list[str] = []
        """Keys that nobody has looked at yet."""
        self._given_up: list[tuple[Job, str]] = []
        self._hopeless: Counter[tuple[str, int]] = Counter()
        """Of each model and shape, how many were found hopeless since one was done."""
        self._tried: set[str] = set()
        """Keys of hopeless jobs that are to run nevertheless."""
        self._busy_us = self._counted_us = self._told_us = 0

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting_bytes(self) -> int:
        return self._waiting.size_bytes

    @property
    def offers(self) -> dict[str, ModelOffer]:
        """The hosted models, at what they cost here by all that was measured."""
        return self.costs.offers

    def host(self, offer: ModelOffer) -> None:
        self.costs.host(offer)
        self.withdrawn.pop(offer.model, None)

    def withdraw(self, model: str, reason: str) -> None:
        self.costs.withdraw(model)
        self.kv.pop(model, None)
        self.withdrawn[model] = reason

    @property
    def idle(self) -> bool:
        return not self._running and not len(self) and not self._given_up

    def take_busy_permille(self, now_us: int) -> int:
        """For how much of the time since this was last asked something ran."""
        self._count_busy(now_us)
        interval_us, busy_us = now_us - self._told_us, self._busy_us
        self._told_us, self._busy_us = now_us, 0
        return min(1000, 1000 * busy_us // max(1, interval_us))

    def full(self, size_bytes: int, origin: str = "") -> str:
        """Why a job of this size cannot wait here; empty if it can, for a job of ``origin`` perhaps in the place of others."""
        return self._waiting.full(size_bytes, origin)

    def queue_us(self, now_us: int, lane: str = "", due_us: int | None = None) -> int:
        """The modelled work that a new job of a lane would wait for, which is due at ``due_us``, or later than all that waits:
        none while one more may run at once."""
        running_us, waiting_us = self._work_us(now_us, lane)
        if due_us is not None:
            waiting_us = waiting_us * self._waiting.due_permille(lane, due_us) // 1000
        left_us = running_us // max(1, self.running_in(lane)) + waiting_us
        return min(shared(left_us, self._parallel(lane)), MAX_COST)

    def waits_us(self, now_us: int, lane: str = "") -> tuple[int, ...]:
        """What a new job of a lane waits for that is due within each of ``core.waits.SLACKS_US``; none if all wait alike."""
        waits = tuple(self.queue_us(now_us, lane, now_us + slack_us) for slack_us in SLACKS_US)
        return waits if waits[0] != self.queue_us(now_us, lane) else ()

    def kv_states(self, now_us: int) -> list[KvState]:
        """Of the language models that are hosted, with what a new turn waits."""
        hosted = [self.kv[model] for model in sorted(self.kv) if model in self.offers]
        return [
            replace(
                state,
                queue_us=self.queue_us(now_us, state.model),
                waits_us=self.waits_us(now_us, state.model),
                running=self.running_in(state.model),
            )
            for state in hosted
        ]

    def enqueue(self, job: Job) -> None:
        """Let a job wait; where the queue is full, in the place of others, which are given up.

        Raises ``RuntimeError`` if there is no place for it or the key waits already: ask ``full`` first.
        """
        if job.key in self._waiting or self.full(job.size_bytes, job.ingress):
            reason = self.full(job.size_bytes, job.ingress) or "it is there already"
            raise RuntimeError(f"job {job.key} may not be queued: {reason}")
        for key in self._waiting.giving_way(job.size_bytes, job.ingress):
            loser, _ = self._jobs[key]
            self._give_up(key, self._waiting.why_displaced(loser.ingress, job.ingress))
        before_us = self._before_answer_us(job)
        busy_us = self._estimate_us(job.model, job.shape) + before_us
        least = self._least_us(job)
        self._waiting.add(Waiter(job.key, job.lane, job.ingress, job.deadline_us, job.size_bytes, busy_us, least))
        self._jobs[job.key] = job, before_us
        lane = self._lanes.setdefault(job.lane, Lane())
        lane.waiting_for[job.model, job.shape] += 1
        lane.before_answers_us += before_us
        self._deadlines.set(job.key, job.deadline_us)
        self._new.append(job.key)

    def forget(self, key: str) -> Job | None:
        """Take a job out of the queue; ``None`` if it is not waiting (it may be running, and then goes on)."""
        if self._waiting.remove(key) is None:
            return None
        job, before_us = self._jobs.pop(key)
        lane, kind = self._lanes[job.lane], (job.model, job.shape)
        lane.waiting_for[kind] -= 1
        if not lane.waiting_for[kind]:
            del lane.waiting_for[kind]
        lane.before_answers_us -= before_us
        self._deadlines.discard(key)
        self._tried.discard(key)
        return job

    def running_job(self, key: str) -> Job | None:
        """The job of this key if it runs."""
        return next((lane.running[key].job for lane in self._lanes.values() if key in lane.running), None)

    def start_next(self, now_us: int) -> Execute | None:
        """Begin the next waiting job of a lane that has room, if its time is not up; what is hopeless is given up."""
        self._look_at_new(now_us)
        for name, lane in self._lanes.items():
            if len(lane.running) >= self._parallel(name):
                continue
            if (job := self._next_of(name, now_us)) is None:
                continue
            _, before_us = self._jobs[job.key]
            self.forget(job.key)
            self._count_busy(now_us)
            self._running.add(job.key)
            lane.running[job.key] = Run(job, now_us, before_us, lane.alone, lane.share)
            return Execute(job.key, job.request, job.model, job.deadline_us - now_us)
        return None

    def take_expired(self, now_us: int) -> list[Job]:
        """The waiting jobs whose deadline has passed, which wait no more."""
        expired = [self.forget(key) for key in self._deadlines.take_due(now_us)]
        return [job for job in expired if job is not None]

    def take_given_up(self) -> list[tuple[Job, str]]:
        """The jobs that wait no more because they cannot be done in time or gave way to others, each with why."""
        given_up, self._given_up = self._given_up, []
        return given_up

    def finish(self, key: str, result: InferenceResult, now_us: int) -> Run | None:
        """A running job is done: how it ran; learn from a good one. ``None`` if ``key`` is not what runs.

        What is learned is how long it takes, and what energy, while nothing else runs: what ran beside it is reckoned out.  That
        is more than the engine's own time when a picture had to be decoded, or an emulated board is slower than what it emulates.
        Of talk it is the part from the first token on: what comes before depends on where the session lies, and the placement
        adds it by its KV plan.
        """
        lane = next((each for each in self._lanes.values() if key in each.running), None)
        if lane is None:
            return None
        self._count_busy(now_us)
        run = lane.running.pop(key)
        self._running.discard(key)
        job = run.job
        if result.status is Status.OK:
            done_us, had_us = lane.done_us(run), max(1, lane.had_us(run))
            alone_us = answering_us(result, done_us, now_us - run.began_us, run.before_us) if job.talks else done_us
            self.costs.learn(job.model, job.shape, alone_us, result.energy_uj * max(done_us, had_us) // had_us)
            self._hopeless.pop((job.model, job.shape), None)
        return run

    def running_in(self, lane: str) -> int:
        """How many jobs of a lane run."""
        return len(self._lanes[lane].running) if lane in self._lanes else 0

    def _count_busy(self, now_us: int) -> None:
        """Call before what runs changes."""
        if self._running:
            self._busy_us += now_us - self._counted_us
            advance(self._lanes.values(), now_us - self._counted_us)
        self._counted_us = now_us

    def _next_of(self, lane: str, now_us: int) -> Job | None:
        """The next job of a lane that can run now. A request that was asked for again waits for the end of its first run."""
        hopeless: list[tuple[str, str]] = []
        chosen = None
        for key in self._waiting.in_order(lane):
            job, _ = self._jobs[key]
            if key in self._running or job.deadline_us <= now_us:
                continue
            reason = self._why_hopeless(job, 0, now_us)
            if not reason:
                chosen = job
                break
            hopeless.append((key, reason))
        for key, reason in hopeless:
            self._give_up(key, reason)
        return chosen

    def _look_at_new(self, now_us: int) -> None:
        """Give up at once what comes too late by the work that is before it, so that there is time left to do it elsewhere."""
        new, self._new = self._new, []
        for key in new:
            job, _ = self._jobs.get(key, (None, 0))
            if job is None or self._parallel(job.lane) > 1 or not (running := self._lanes[job.lane].running):
                continue
            left_us = sum(max(0, self._least_us(each.job) - (now_us - each.began_us)) for each in running.values())
            if reason := self._why_hopeless(job, left_us + self._waiting.before_us(key), now_us):
                self._give_up(key, reason)

    def _why_hopeless(self, job: Job, before_us: int, now_us: int) -> str:
        if not self.limits.shed_late or job.key in self._tried:
            return ""
        reason = why_hopeless(self._least_us(job), before_us, job.deadline_us - now_us)
        if reason:
            self._hopeless[job.model, job.shape] += 1
            if self._hopeless[job.model, job.shape] % TRIED_EVERY == 0:
                self._tried.add(job.key)
                return ""
        return reason

    def _give_up(self, key: str, reason: str) -> None:
        job = self.forget(key)
        if job is not None:
            self._given_up.append((job, reason))

    def _least_us(self, job: Job) -> int:
        """What a job takes at least, once it has begun to answer."""
        if job.model not in self.offers:
            return 0
        cost = self.costs.cost(job.model, job.shape)
        return least_us(cost.busy_us, self.costs.spread_us(job.model, job.shape), cost.measured)

    def _before_answer_us(self, job: Job) -> int:
        """What a turn takes until its first token, by what is here of its session."""
        state = self.kv.get(job.model)
        if job.request.task != CHAT or state is None:
            return 0
        home = state.home(session_hash(job.request.session)) if job.request.session else None
        held = [Holding("", state.fingerprint, home)] if home else []
        plan = plan_kv("", state, job.size_bytes, held, PolicySection())
        return plan.kv_us + plan.prefill_us

    def _work_us(self, now_us: int, lane: str) -> tuple[int, int]:
        """What is left of the work that runs in a lane, and what waits; none while one more may run at once."""
        queue = self._lanes.get(lane)
        if queue is None or len(queue.running) + self._waiting.count(lane) < self._parallel(lane):
            return 0, 0
        self._count_busy(now_us)
        left_us = [
            max(0, self._estimate_us(run.job.model, run.job.shape) + run.before_us - queue.done_us(run))
            for run in queue.running.values()
        ]
        waiting_us = sum(self._estimate_us(*kind) * count for kind, count in queue.waiting_for.items())
        return sum(left_us), waiting_us + queue.before_answers_us

    def _parallel(self, lane: str) -> int:
        offer = self.offers.get(lane) if lane else None
        return offer.parallel if offer else 1

    def _estimate_us(self, model: str, shape: int) -> int:
        return self.costs.cost(model, shape).busy_us if model in self.offers else 0
