"""The turns that are under way: into a ring slot, through the journal, to whoever asked, and into a new child after a death.

Rules: an event is written to the store before its text is shown; a store that fails ends the turn that it failed for, not the
others; a session is not synced while its prompt is read, so that the rows it had before stay; a turn's end is told when its
session is synced; a session stays busy until then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from edge_agent.core.chat import Finish, Tier
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.core.kv import KvFormat
from edge_agent.language.admission import Admitted
from edge_agent.language.child import ChildDiedError, LanguageChild, StepReply, TurnEvent
from edge_agent.language.hot import HotSlots
from edge_agent.language.journals import Journals
from edge_agent.language.live import LiveTurn, Phase
from edge_agent.language.plan import Plan, Source
from edge_agent.language.pump import Work
from edge_agent.store.kv_sessions import Held, Loaded, SessionStore

NOT_LOADED = Loaded(0, 0, b"", (), b"", Tier.NONE)


class Turns:
    """``freed`` is called when a turn has ended and its slot and session are free; ``spawn`` runs what may take a while.

    ``post`` has the child do something before whatever is asked of it later.
    """

    def __init__(
        self, store: SessionStore, hot: HotSlots, kv_format: KvFormat, speculate: bool,
        now_us: Callable[[], int], spawn: Callable[[Coroutine[Any, Any, None]], None],
        post: Callable[[Work[object]], None], freed: Callable[[LiveTurn], None],
    ) -> None:  # fmt: skip
        self._store, self._hot, self._speculate = store, hot, speculate
        self._now_us, self._spawn, self._post, self._freed = now_us, spawn, post, freed
        self._placed: dict[int, LiveTurn] = {}
        self._journals = Journals(store, kv_format, spawn)
        self.tokens_made = self.tokens_computed = self.tokens_cached = 0

    def live(self) -> int:
        return sum(each.phase is Phase.LIVE for each in self._placed.values())

    @property
    def count(self) -> int:
        """Turns that hold a slot."""
        return len(self._placed)

    def of(self, slot: int) -> LiveTurn | None:
        return self._placed.get(slot)

    # into a slot

    def place(self, live: LiveTurn, plan: Plan, held: Held | None, admitted: Admitted, need_bytes: int) -> None:
        """Give the turn its slot, and its session in the store with the prompt's ids: they are its own whatever becomes of it."""
        live.phase, live.session, live.slot = Phase.PLACED, plan.session, admitted.slot
        live.ids, live.prompt_tokens, live.kv_tokens = list(plan.ids), len(plan.ids), plan.keep_tokens
        self._placed[live.slot] = live
        self._hot.take(admitted, plan.session, need_bytes, self._now_us())
        for each in admitted.parked:
            self._close_slot(each.slot)
        for note in held.notes if held is not None and plan.source is not Source.NEW else ():
            live.note(note)
        if plan.source is Source.NEW:
            if self._store.look(plan.session) is None:
                self._store.create(plan.session)
        elif plan.source is Source.FORK:
            assert held is not None
            self._store.fork(held, plan.base_tokens, plan.session)
        elif plan.source is Source.REWOUND:
            self._store.rewind(plan.session, plan.base_tokens)
        self._store.pin(plan.session)
        live.pinned = True
        self._store.prompt(plan.session, plan.ids[plan.base_tokens :])

    async def begin(self, live: LiveTurn, plan: Plan, child: LanguageChild) -> None:
        """Open the slot if its ring does not hold the plan's KV already, and begin. May be done again with another child."""
        if live.phase is not Phase.PLACED:
            return
        kept = self._hot.tokens_of(plan.session)
        if kept and kept == plan.keep_tokens and plan.source is Source.OWN:
            live.tier = Tier.HOT
        else:
            kept = await self._open(live, plan.keep_tokens, child)
        live.kv_tokens = live.cached_tokens = kept
        live.recomputed_tokens = max(0, (plan.base_tokens - 1 if live.notes else plan.keep_tokens) - kept)
        live.times.begun_us = self._now_us()
        await self._begin_in(child, live)
        live.phase = Phase.LIVE

    async def _begin_in(self, child: LanguageChild, live: LiveTurn) -> None:
        turn = live.turn
        await child.begin(
            live.slot,
            live.ids[live.kv_tokens :],
            sampling=live.sampling,
            max_tokens=turn.max_tokens - live.made_tokens,
            stop=turn.stop,
            speculate=self._speculate,
            begun=turn.begun,
            answered=live.answered,
        )

    async def _open(self, live: LiveTurn, most_tokens: int, child: LanguageChild) -> int:
        """Bring the session's first ``most_tokens`` tokens into its slot, or as many as are sound; how many."""
        started_us = self._now_us()
        loaded = await self._loaded(live, most_tokens)
        try:
            await self._open_with(live, loaded, child)
        except RefusedError as error:
            live.note(f"what is stored of the session was refused, and it is computed anew: {error}")
            loaded = NOT_LOADED
            await self._open_with(live, loaded, child)
        self._hot.holds(live.slot, loaded.tokens)
        took_us = self._now_us() - started_us
        if loaded.tokens:
            live.tier, live.times.restore_us = loaded.tier, live.times.restore_us + took_us
            self._store.speeds = self._store.speeds.after_restore(loaded.tier, loaded.tokens, took_us)
        return loaded.tokens

    async def _open_with(self, live: LiveTurn, loaded: Loaded, child: LanguageChild) -> None:
        history = live.ids[: loaded.tokens]
        await child.open(live.slot, loaded.tokens, loaded.prelude, loaded.blocks, loaded.rows, history)

    async def _loaded(self, live: LiveTurn, most_tokens: int) -> Loaded:
        held = self._store.resume(live.session, most_tokens) if most_tokens else None
        if held is None or not held.tokens or not self._store.speeds.restoring_pays(held.tier):
            return NOT_LOADED
        for note in held.notes:
            live.note(note)
        loaded = await asyncio.to_thread(self._store.load, held)
        for note in loaded.notes:
            live.note(note)
        return loaded

    # what came out

    def take(self, reply: StepReply) -> None:
        """Journal and show what a step gave."""
        for event in reply.events:
            live = self._placed.get(event.slot)
            if live is not None and live.phase is Phase.LIVE:
                self._take(live, event)

    def _take(self, live: LiveTurn, event: TurnEvent) -> None:
        try:
            self._journal(live, event)
        except SlyError as error:
            self._close_slot(live.slot)
            self.fail(live, error)
            return
        if event.ids and not live.made_tokens - len(event.ids):
            self._first(live)
        live.drafted += event.drafted
        live.accepted += event.accepted
        live.show(event.text)
        if event.failed:
            self._over(live, UnavailableError("turn", event.failed))
        elif event.finish is not None:
            self._over(live, event.finish)
        elif event.sealed and live.made_tokens:
            self._journals.sync_soon(live.session)

    def _journal(self, live: LiveTurn, event: TurnEvent) -> None:
        self._journals.write(live.session, len(live.ids), event)
        live.ids += event.ids
        live.kv_tokens = event.tokens
        self.tokens_made += len(event.ids)
        self._hot.holds(live.slot, event.tokens)

    def _first(self, live: LiveTurn) -> None:
        live.times.first_us = self._now_us()
        computed = live.prompt_tokens - live.cached_tokens
        self.tokens_computed += computed
        self.tokens_cached += live.cached_tokens
        took_us = live.times.first_us - live.times.begun_us
        self._store.speeds = self._store.speeds.after_prefill(computed, took_us)

    # ends

    def _over(self, live: LiveTurn, outcome: Finish | SlyError) -> None:
        """The slot has no turn any more; its session is synced, then the end is told."""
        live.phase = Phase.ENDING
        self._spawn(self._finish(live, outcome))

    async def _finish(self, live: LiveTurn, outcome: Finish | SlyError) -> None:
        try:
            await self._journals.sync(live.session)
        except SlyError as error:
            outcome = error
        if live.phase is Phase.FREED:
            return
        self._hot.rests(live.slot, self._now_us())
        if isinstance(outcome, Finish):
            live.end(outcome, self._journals.parked_bytes(live.kv_tokens), self._now_us())
        else:
            live.fail(outcome)
        self._free(live)

    def _free(self, live: LiveTurn) -> None:
        live.phase = Phase.FREED
        self._placed.pop(live.slot, None)
        self._unpin(live)
        self._freed(live)

    def _close_slot(self, slot: int) -> None:
        self._post(lambda child: child.close_slot(slot))

    def _unpin(self, live: LiveTurn) -> None:
        if live.pinned:
            live.pinned = False
            self._store.unpin(live.session)

    async def cancel(self, live: LiveTurn, error: SlyError, child: LanguageChild) -> None:
        """End a turn with ``error``; what it acknowledged is kept."""
        if live.phase is Phase.LIVE:
            self._take(live, await child.cancel(live.slot))
            if live.phase is Phase.LIVE:
                self._over(live, error)
        elif live.phase is Phase.PLACED:
            await child.close_slot(live.slot)
            self.fail(live, error)

    def fail(self, live: LiveTurn, error: SlyError) -> None:
        """The turn is over at once, and what its ring holds is not to be used."""
        if live.phase is not Phase.FREED:
            self._hot.drop(live.slot)
            live.fail(error)
            self._free(live)

    def lose(self, error: SlyError) -> None:
        """End every turn that has a slot with ``error``; the rings are lost."""
        for live in list(self._placed.values()):
            self.fail(live, error)
        self._hot.lost()

    # a new child

    async def restore(self, child: LanguageChild) -> None:
        """Bring every live turn into a new, empty child: as it was when it showed its last id, or before its prompt was read.

        Of a prompt that is read the rows are not journaled yet: what was sealed of it is not the state that it was read in.
        """
        self._hot.lost()
        for live in [each for each in self._placed.values() if each.phase is Phase.LIVE]:
            try:
                most_tokens = len(live.ids) - 1 if live.made_tokens else live.cached_tokens
                live.kv_tokens = await self._open(live, most_tokens, child)
                await self._begin_in(child, live)
            except ChildDiedError:
                raise
            except SlyError as error:
                self.fail(live, error)
