"""The agent's heart: every decision of a board, with no socket, no clock and no process in sight.

``handle(event, now_us) -> effects``.  Rules:

* The only things that change outside this object are the ledger (inside the caller's transaction) and what the effects ask.
* A message is acknowledged by the same list of effects that makes it durable or finds it worthless.
* Bad data from a peer is dropped with one line in the log; a ledger that is full pushes back; neither raises out of
  ``handle``.  A disk that fails does, or fails the transaction: what this object believes is then ahead of the ledger, and the
  shell must end and begin anew from the ledger.
* Only the ingress board places a request; nobody re-routes another's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count

from edge_agent.core.kv import KvState
from edge_agent.core.values import ModelOffer, Status, TrustTier, failure
from edge_agent.gossip.presence import Standing
from edge_agent.gossip.record import BoardRecord
from edge_agent.gossip.state import FleetState
from edge_agent.node.agreement import Agreement
from edge_agent.node.announcer import Announcer
from edge_agent.node.arrivals import Arrivals
from edge_agent.node.events import (
    Abandoned,
    Cancel,
    Chartered,
    Drain,
    Effect,
    Endorsed,
    Event,
    Execute,
    Executed,
    Hosted,
    KvChanged,
    KvFound,
    KvGave,
    KvStored,
    Log,
    Measured,
    Partial,
    Publish,
    Sensed,
    Submitted,
    Subscribe,
    Tick,
    Withdrawn,
)
from edge_agent.node.execution import Execution
from edge_agent.node.inbound import Inbound
from edge_agent.node.ingress import LocalClient
from edge_agent.node.lanes import Job
from edge_agent.node.mailbox import Mailbox
from edge_agent.node.moves import Moves
from edge_agent.node.returns import Returns
from edge_agent.node.routing import PART_TICKET, Chooser, Router
from edge_agent.node.settings import NodeSettings
from edge_agent.node.told import Told, Waves
from edge_agent.node.trust import Trust
from edge_agent.node.voice import Voice, seconds
from edge_agent.placement.options import Decision, choose, why_not_trusted
from edge_agent.placement.thermal import Heat
from edge_agent.store.ledger import Ledger
from edge_agent.transport.link import Delivered, LinkDown, LinkUp, Message, Published, Rejected
from edge_agent.transport.topics import Kind


class Node:
    def __init__(self, settings: NodeSettings, ledger: Ledger, choose: Chooser = choose) -> None:
        self.settings = settings
        self.board = settings.board
        self.fleet = FleetState(settings.board)
        self.arrivals = Arrivals(settings.rules.policy.horizon_us)
        self.execution = Execution(settings.queue)
        self._told = Told(self.execution.costs)
        self.sensed = Sensed(None, None)
        self.heat = Heat()
        self._announcer = Announcer()
        self._voice = Voice(settings)
        self._waves = Waves()
        self.trust = Trust(settings, self.fleet, ledger, self._voice, self.execution)
        self.agreement = Agreement(settings, self.fleet, ledger, self._voice, self._announcer, self._waves, self.trust)
        tickets = count(-1, -1)
        self.mailbox = Mailbox(ledger, self._voice)
        self.returns = Returns(tickets)
        self.router = Router(
            settings,
            self.fleet,
            self.execution,
            self.mailbox,
            self._voice,
            tickets,
            choose,
            self.arrivals,
            self.agreement,
            self.trust,
        )
        self.moves = Moves(settings.board, settings.rules.policy, self.execution, self._voice, tickets)
        self._inbound = Inbound(
            settings, ledger, self.fleet, self.execution, self._announcer, self.mailbox, self.returns, self.router, self._voice,
            self.moves, self.agreement, self.trust,
        )  # fmt: skip
        self._handlers = {
            Submitted: self._submitted, Abandoned: self._abandoned, Partial: self._partial, Executed: self._executed,
            KvFound: self._kv, KvStored: self._kv, KvGave: self._kv, KvChanged: self._kv_changed,
            Hosted: self._hosted, Withdrawn: self._withdrawn, Sensed: self._sense,
            Measured: self._measured, Endorsed: self._endorsed, Chartered: self._chartered,
            Tick: self._tick, Drain: self._drain,
            LinkUp: self._link_up, LinkDown: self._link_down, Delivered: self._delivered, Published: self._published,
            Rejected: self._rejected,
        }  # fmt: skip

    def handle(self, event: Event, now_us: int) -> list[Effect]:
        """One event in, the effects out, in the order in which they must be carried out."""
        effects = self._handlers[type(event)](event, now_us)  # type: ignore[operator]
        return [*self._without_held(effects, now_us), *self._without_held(self._continue(now_us), now_us)]

    def recover(self, now_us: int) -> list[Effect]:
        """After a boot: take up what was accepted and not answered.

        Deadlines count anew, since no clock outlived the cut.  What another board had sent here is answered as failed: its
        ingress board has placed it elsewhere by now, or will on hearing this.
        """
        return [*self._inbound.recover(now_us), *self._continue(now_us)]

    @property
    def draining(self) -> bool:
        return self._inbound.draining

    @property
    def idle(self) -> bool:
        """Nothing pending and nothing running: a drained node may stop."""
        return self.execution.idle and not len(self.router.ingress)

    @property
    def forecast_mdegc(self) -> tuple[int, int, int] | None:
        """This board's temperature in 10, 30 and 60 s, as far as it can tell."""
        return self.heat.forecast_mdegc

    @property
    def at_rest(self) -> bool:
        """Nothing becomes due soon by itself: ticks may be rare."""
        return self.idle and not self.agreement.pending

    @property
    def link_up(self) -> bool:
        return not self.router.views.link_state

    @property
    def online_boards(self) -> int:
        """How many boards, this one included, are there as far as this one knows."""
        return 1 + sum(self.fleet.standing(record.board) is Standing.ONLINE for record in self.fleet.records())

    def offers_elsewhere(self) -> Iterator[ModelOffer]:
        """What the boards that are there host."""
        for record in self.fleet.records():
            if self.link_up and self.fleet.standing(record.board) is Standing.ONLINE:
                yield from record.offers

    @property
    def decisions(self) -> Mapping[str, Decision]:
        """Of the last requests, by request id."""
        return self.router.decisions

    def will(self) -> Message:
        """What the broker shall say when this board vanishes."""
        return self._voice.presence(Standing.OFFLINE)

    def farewell(self) -> Message:
        """What this board says when it stops cleanly."""
        return self._voice.presence(Standing.STOPPED)

    def _continue(self, now_us: int) -> Iterator[Effect]:
        """What any event or the time that passed may have made due: what is too late, the next job, what is owed, our word."""
        yield from self._heed_trust(now_us)
        yield from self._expire(now_us)
        yield from self._begin(now_us)
        yield from self.moves.go_on(now_us)
        if self.link_up:
            yield from self.router.flush_parts(now_us)
            if self._announcer.takes_birth(now_us):
                yield Publish(self._voice.presence(Standing.ONLINE))
            yield from self.mailbox.to_publish()
        if self.link_up or self.agreement.alone:
            yield from self._announce(now_us)
        yield from self.agreement.go_on(now_us)

    def _heed_trust(self, now_us: int) -> Iterator[Effect]:
        """What is due in showing and judging evidence, and what follows for boards that are contraindicated since."""
        yield from self.trust.go_on(now_us)
        for board in self.trust.take_contraindicated():
            reason = why_not_trusted(self.trust.tier(board), TrustTier.NONE, self.trust.why(board))
            yield Log(f"{board} gets nothing more: {reason}")
            self.moves.lose(board, now_us)
            yield from self.router.distrust(board, reason, now_us)

    def _announce(self, now_us: int) -> Iterator[Effect]:
        """The record that is due, to the others and into what this board itself reckons from."""
        if record := self._announcer.take_record(self._record, now_us):
            self.fleet.join(record, now_us)
            if self.link_up:
                yield Publish(self._voice.record(record))

    def _without_held(self, effects: Iterator[Effect], now_us: int) -> Iterator[Effect]:
        """A job that is broken off while it waits for its session's KV ends here: the engine never had it."""
        for effect in effects:
            if isinstance(effect, Cancel) and self.moves.break_off(effect.key):
                request_id = effect.key.split("/", 1)[1]
                ended = failure(request_id, Status.FAILED, self.board, "it was broken off before it began")
                yield from self._executed(Executed(effect.key, ended), now_us)
            else:
                yield effect

    def _kv_elsewhere(self, job: Execute) -> list[tuple[str, KvState]]:
        """What the boards say of the KV of a job's model that can be reached and are trusted as much as the job asks."""
        asked = job.request.limits.trust
        there = [record for record in self.fleet.records() if self.fleet.standing(record.board) is Standing.ONLINE]
        trusted = [each for each in there if not why_not_trusted(self.trust.tier(each.board), asked)]
        return [(record.board, state) for record in trusted for state in record.kv if state.model == job.model]

    def _expire(self, now_us: int) -> Iterator[Effect]:
        for job in self.execution.take_expired(now_us):
            if self.trust.is_check(job.key):
                yield from self.trust.checked(job.key, None)
            elif job.ingress != self.board:
                result = failure(
                    job.request.request_id, Status.FAILED, self.board, f"its deadline passed while it waited on {self.board}"
                )
                yield from self.mailbox.answer(job.key, job.ingress, result, 1)
        yield from self.router.expire(now_us)

    def _begin(self, now_us: int) -> Iterator[Effect]:
        """Begin what has room to run; what is given up here goes back to the board that placed it, and on from there."""
        given_up: list[tuple[Job, str]] | None = None
        while given_up is None or given_up:
            while begin := self.execution.start_next(now_us):
                yield from self.moves.start(begin, self._kv_elsewhere(begin), now_us)
            given_up = self.execution.take_given_up()
            for job, reason in given_up:
                result = failure(job.request.request_id, Status.FAILED, self.board, reason, job.model)
                if self.trust.is_check(job.key):
                    yield from self.trust.checked(job.key, None)
                elif job.ingress == self.board:
                    yield from self.router.outcome(result, self.board, now_us)
                else:
                    yield Log(f"request {job.request.request_id} of {job.ingress} is given up: {reason}")
                    yield from self.mailbox.answer(job.key, job.ingress, result, seconds(job.deadline_us - now_us))

    # this board: its clients, its engine, its sensors, its time

    def _submitted(self, event: Submitted, now_us: int) -> Iterator[Effect]:
        yield from self.router.admit(event.request, LocalClient(event.handle), now_us, refusal=self._inbound.stopping)

    def _abandoned(self, event: Abandoned, now_us: int) -> Iterator[Effect]:
        yield from self.router.abandon(event.handle)

    def _partial(self, event: Partial, now_us: int) -> Iterator[Effect]:
        job = self.execution.running_job(event.key)
        if job is None:
            yield Log(f"the engine made a part of {event.key}, which is not running: dropped")
        elif job.ingress == self.board:
            yield from self.router.partial(event.part, self.board, now_us)
        else:
            yield from self.router.send_part(job.key, job.ingress, event.part, now_us)

    def _executed(self, event: Executed, now_us: int) -> Iterator[Effect]:
        run = self.execution.finish(event.key, event.result, now_us)
        if run is None:
            yield Log(f"the engine answered {event.key}, which is not running: dropped")
            return
        job, result = run.job, event.result
        if self.trust.is_check(job.key):
            yield from self.trust.checked(job.key, result)
            return
        if not self._is_cloud(job.model):
            result = self.trust.proven(job.request, result, run.began_us)
        if job.ingress == self.board:
            yield from self.router.outcome(result, self.board, now_us)
        else:
            self.router.streams.end(job.key)
            yield from self.mailbox.answer(job.key, job.ingress, result, seconds(job.deadline_us - now_us))

    def _is_cloud(self, model: str) -> bool:
        offer = self.execution.offers.get(model)
        return offer is not None and offer.cloud

    def _hosted(self, event: Hosted, now_us: int) -> Iterator[Effect]:
        self.execution.host(event.offer)
        yield Log(f"hosting {event.offer.model} for {event.offer.task}: about {event.offer.busy_us} µs an inference")

    def _withdrawn(self, event: Withdrawn, now_us: int) -> Iterator[Effect]:
        self.execution.withdraw(event.model, event.reason)
        yield Log(f"{event.model} is withdrawn: {event.reason}")

    def _kv_changed(self, event: KvChanged, now_us: int) -> Iterator[Effect]:
        self.execution.kv[event.state.model] = event.state
        yield from ()

    def _kv(self, event: KvFound | KvStored | KvGave, now_us: int) -> Iterator[Effect]:
        yield from self.moves.heard_of_store(event, now_us)

    def _sense(self, event: Sensed, now_us: int) -> Iterator[Effect]:
        self.sensed = event
        busy_permille = self.execution.take_busy_permille(now_us)
        self.heat.observe(now_us, event.temperature_mdegc, event.trip_mdegc, event.power_mw, busy_permille)
        self.router.views.headroom_mdegc = self.heat.headroom_mdegc
        yield from ()

    def _measured(self, event: Measured, now_us: int) -> Iterator[Effect]:
        self.trust.measured(event.measurements, now_us)
        yield from ()

    def _endorsed(self, event: Endorsed, now_us: int) -> Iterator[Effect]:
        yield from self.trust.endorsed(event, now_us)

    def _chartered(self, event: Chartered, now_us: int) -> Iterator[Effect]:
        """Who belongs to the fleet may have changed: what newcomers said before is asked of the broker again, and what this board
        listens to as a verifier. A board with another key is another one."""
        before, now = dict(self.settings.members), event.settings.members
        gone = sorted(board for board, key in before.items() if board != self.board and now.get(board) != key)
        newcomers = sorted(board for board, key in now.items() if board != self.board and before.get(board) != key)
        self.settings.adopt(event.settings)
        self.moves.policy = self.settings.rules.policy
        stay = {*now, self.board} - {*newcomers}
        self.fleet.keep_only(stay)
        self.trust.recharter(now_us)
        self.agreement.recharter(stay, now_us)
        self._announcer.repeat()
        for board in gone:
            reason = "its key is another one now" if board in now else "it does not belong to the fleet any more"
            yield Log(f"{board} is no board of the fleet: {reason}")
            self.moves.lose(board, now_us)
            yield from self.router.distrust(board, reason, now_us)
        if newcomers:
            yield Log(f"new in the fleet: {', '.join(newcomers)}")
        if (newcomers or gone) and self.link_up:
            yield from self._listen()

    def _tick(self, event: Tick, now_us: int) -> Iterator[Effect]:
        self.trust.told_wall_us(event.wall_us, now_us)
        self.mailbox.retry()
        yield from self.returns.retry()

    def _drain(self, event: Drain, now_us: int) -> Iterator[Effect]:
        self._inbound.draining = True
        self.agreement.keep()
        self.trust.drain(now_us)
        yield Log(f"draining: {len(self.router.ingress)} requests pending")

    # the link

    def _link_up(self, event: LinkUp, now_us: int) -> Iterator[Effect]:
        self.router.views.link_state, self.moves.link_up = "", True
        self.mailbox.restart()
        self.returns.restart()
        self._announcer.connected()
        self.agreement.connected(now_us)
        self.trust.connected()
        yield Log("connected to the broker")
        yield from self._listen()

    def _listen(self) -> Iterator[Effect]:
        topics = self._voice.topics
        yield Subscribe(topics.every(Kind.ONLINE))
        yield Subscribe(topics.every(Kind.RECORD))
        yield Subscribe(topics.every(Kind.DIGEST))
        yield Subscribe(topics.replies_to(self.board))
        yield Subscribe(topics.request(self.board))
        yield Subscribe(topics.cancel(self.board))
        yield Subscribe(topics.kv_of(self.board))
        yield from map(Subscribe, self.trust.topic_filters())

    def _link_down(self, event: LinkDown, now_us: int) -> Iterator[Effect]:
        if self.link_up:
            yield Log(f"lost the broker: {event.reason}; going on alone")
        self.router.views.link_state, self.moves.link_up = event.reason or "no reason given", False
        self.agreement.link_up = False
        self.trust.disconnected()
        self.returns.restart()
        yield from self.router.lose_boards(f"the broker link went down ({event.reason})", now_us)

    def _delivered(self, event: Delivered, now_us: int) -> Iterator[Effect]:
        yield from self._inbound.hear(event, now_us)

    def _published(self, event: Published, now_us: int) -> Iterator[Effect]:
        self.mailbox.confirmed(event.ticket)
        self.router.delivered(event.ticket)
        yield from self.returns.confirmed(event.ticket)

    def _rejected(self, event: Rejected, now_us: int) -> Iterator[Effect]:
        if event.ticket == PART_TICKET:
            return
        yield Log(f"not sent{' (subscription ' + event.topic_filter + ')' if event.topic_filter else ''}: {event.reason}")
        self.mailbox.rejected(event.ticket)
        self.returns.rejected(event.ticket)
        if not event.ticket and not event.topic_filter:
            self._announcer.repeat()
            self.agreement.repeat()
            self.trust.repeat()
        yield from self.router.undelivered(event.ticket, event.reason, now_us)

    @property
    def _told_of(self) -> list[str]:
        """The models that others may use here: not those that this board has elsewhere itself."""
        return sorted(name for name, offer in self.execution.offers.items() if not offer.cloud)

    def _record(self, sequence: int, now_us: int) -> BoardRecord:
        may_change = self._waves.are_open(now_us)
        temperature_mdegc, forecast_mdegc = self._told.heat(
            self.sensed.temperature_mdegc, self.forecast_mdegc, self.sensed.trip_mdegc
        )
        return BoardRecord(
            board=self.board,
            boot_epoch=self.settings.boot_epoch,
            sequence=sequence,
            hardware=self.settings.hardware,
            emulated=self.settings.emulated,
            serving=not self.draining,
            queue_us=self.execution.queue_us(now_us),
            waits_us=self.execution.waits_us(now_us),
            temperature_mdegc=temperature_mdegc,
            trip_mdegc=self.sensed.trip_mdegc,
            kv=self._told.states(self.execution.kv_states(now_us), now_us, may_change),
            offers=self._told.offers(self._told_of, may_change),
            demand=self.arrivals.demand(now_us, may_change),
            forecast_mdegc=forecast_mdegc,
        )
