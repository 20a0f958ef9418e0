"""This board's part in the agreed table: when it is made anew, what is said of it to the others, and where it is kept.

Rules:

* The table is a function of published records (this board's own among them), of who is there, and of what all boards are
  configured with: never of this board's live sensors, clock or queue.
* It is made anew only when the rounded facts changed, at most once in ``MAKE_PERIOD_US``; its digest is said on every change,
  every 15 s without one, and every 5 s while somebody reckons from other facts; who does so for 2 s is told the versions held
  here, so that what was lost is said again (``node.peers``).
* Without a link the last table stays as it is, and what it plans for boards out of reach is for the live choice to leave out;
  only a board that knows of no other goes on making a table of itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from edge_agent.core.errors import RefusedError
from edge_agent.gossip.agreement import BoardDigest, Version
from edge_agent.gossip.presence import Standing
from edge_agent.gossip.record import BoardRecord
from edge_agent.gossip.state import FleetState
from edge_agent.node.announcer import QUIET_PERIOD_US, Announcer
from edge_agent.node.events import Effect, Log, Publish
from edge_agent.node.peers import AGREES, Peers
from edge_agent.node.settings import NodeSettings
from edge_agent.node.told import Waves
from edge_agent.node.trust import Trust
from edge_agent.node.voice import Voice
from edge_agent.placement.facts import BoardFacts, rules_digest
from edge_agent.placement.table import EMPTY, Entry, Table, TableMaker
from edge_agent.store.ledger import Ledger

DOCUMENT = "placement_table"
MAKE_PERIOD_US = 1_000_000
SAY_PERIOD_US = 1_000_000
"""A digest is said no more often, whatever others do."""
DIFFERING_PERIOD_US = 5_000_000
KEEP_PERIOD_US = 60_000_000


class Agreement:
    """``table`` is the one in force: the last that was made here, or the one that the ledger kept; ``digest`` is its SHA-256."""

    def __init__(
        self,
        settings: NodeSettings,
        fleet: FleetState,
        ledger: Ledger,
        voice: Voice,
        announcer: Announcer,
        waves: Waves,
        trust: Trust,
    ) -> None:
        self._settings, self._fleet, self._ledger, self._voice, self._waves = settings, fleet, ledger, voice, waves
        self._trust = trust
        self._board = settings.board
        self._maker = TableMaker(settings.rules)
        self._rules = rules_digest(settings.rules)
        self._peers = Peers(settings.board, fleet, announcer, self._rules)
        self._rounded: dict[str, tuple[BoardRecord, BoardFacts]] = {}
        self._facts: tuple[BoardFacts, ...] | None = None
        self._seen_changes = -1
        self._made_us = -MAKE_PERIOD_US
        self._said: BoardDigest | None = None
        self._said_us = -SAY_PERIOD_US
        self._sequence = 0
        self._owes_word = self._settled = False
        """Settled: the table was looked at since the link came up."""
        self._notes: list[str] = []
        self._kept_us: int | None = None
        self.link_up = False
        self._set_table(self._of_ledger())
        self._peers.reckon(self.table.facts_digest, self.digest, 0)
        self._kept, self.from_ledger = self.table, self.table is not EMPTY

    def recharter(self, stay: Collection[str], now_us: int) -> None:
        """The settings have other members or rules: the table is made anew. Of boards that do not ``stay`` nothing was heard."""
        self._rules = rules_digest(self._settings.rules)
        self._peers.keep_only(stay)
        self._set_table(self.table)
        self._maker = TableMaker(self._settings.rules)
        self._peers.rule(self._rules, now_us)
        self._rounded.clear()
        was_made, self._facts, self._owes_word = self._facts is not None, None, True
        if was_made:
            self._make(now_us)

    @property
    def alone(self) -> bool:
        """No other board is known, by a record or by the table: this one is a fleet of its own."""
        return not self._fleet.knows_others and not self._names_others

    @property
    def pending(self) -> bool:
        """Something is due within a second or two: ticks should be frequent."""
        return self._may_make or (self.link_up and self._settled and (self._has_news or self._peers.pending))

    def connected(self, now_us: int) -> None:
        """What the broker holds of the others is about to come in, and they know nothing of this board."""
        self.link_up, self._owes_word, self._settled = True, True, False
        self._made_us, self._said_us, self._seen_changes = now_us, now_us - SAY_PERIOD_US, -1
        self._peers.restart()

    def repeat(self) -> None:
        """Something that was said was not sent: say it again."""
        self._owes_word = True

    def hear(self, said: BoardDigest, now_us: int) -> Iterator[Effect]:
        """Another board's word on its table."""
        if news := self._peers.hear(said, now_us):
            yield Log(news)

    def go_on(self, now_us: int) -> Iterator[Effect]:
        """What the facts and the time that passed have made due."""
        while self._notes:
            yield Log(self._notes.pop(0))
        if self._may_make and now_us - self._made_us >= MAKE_PERIOD_US:
            self._make(now_us)
        self._keep_by_and_by(now_us)
        if self.link_up and self._is_due(now_us):
            yield Publish(self._voice.digest(self._next_word(now_us)))

    def keep(self) -> None:
        """Put the table in force into the ledger."""
        if self.table == self._kept:
            return
        self._kept = self.table
        try:
            self._ledger.put_document(DOCUMENT, self.table.encode())
        except RefusedError as error:
            self._notes.append(f"the agreed table is not kept: {error}")

    # the table

    @property
    def _may_make(self) -> bool:
        return self._changes != self._seen_changes and (self.link_up or self.alone)

    @property
    def _changes(self) -> int:
        """Moves when a board says something new, and when it is trusted otherwise."""
        return self._fleet.changes + self._trust.changes

    def _make(self, now_us: int) -> None:
        self._seen_changes, self._made_us, self._settled = self._changes, now_us, True
        facts = tuple(self._present_facts())
        if facts != self._facts:
            self._facts = facts
            self._waves.moved(now_us)
            self._set_table(self._maker.make(facts))
            self.from_ledger = False
        self._peers.reckon(self.table.facts_digest, self.digest, now_us)

    def _present_facts(self) -> Iterator[BoardFacts]:
        """Of every board that is there, from its newest record."""
        rounded, self._rounded = self._rounded, {}
        for record in self._present():
            last, facts = rounded.get(record.board, (None, None))
            trust = self._trust.agreed_tier(record.board)
            if last is not record or facts is None or facts.trust is not trust:
                facts = BoardFacts.rounded(
                    record.board, up=record.serving, trust=trust,
                    headroom_mdegc=record.headroom_mdegc, offers=record.offers, kv=record.kv, demand=record.demand,
                )  # fmt: skip
            self._rounded[record.board] = record, facts
            yield facts

    def _present(self) -> Iterator[BoardRecord]:
        for record in self._fleet.all_records():
            if record.board == self._board or self._fleet.standing(record.board) is Standing.ONLINE:
                yield record

    def _set_table(self, table: Table) -> None:
        named = {entry.ingress for entry in table.entries} | {booking.board for booking in table.bookings}
        named |= {option.board for entry in table.entries for option in entry.options}
        self.table, self.digest = table, table.digest
        self._names_others = any(board != self._board and board in self._settings.members for board in named)

    # the ledger

    def _of_ledger(self) -> Table:
        """The table that was kept; one that cannot be read is as good as none."""
        kept = self._ledger.document(DOCUMENT)
        try:
            return EMPTY if kept is None else Table.decode(kept)
        except RefusedError as error:
            self._notes.append(f"the table in the ledger is left out: {error}")
            return EMPTY

    def _keep_by_and_by(self, now_us: int) -> None:
        if self._kept_us is None:
            self._kept_us = now_us - KEEP_PERIOD_US if self.table is EMPTY else now_us
        if now_us - self._kept_us >= KEEP_PERIOD_US and self.table is not self._kept:
            self._kept_us = now_us
            self.keep()

    # what is said

    def _is_due(self, now_us: int) -> bool:
        since_us = now_us - self._said_us
        if since_us < SAY_PERIOD_US or not self._settled:
            return False
        if self._has_news or (self._peers.owes_versions and self._peers.impatient(now_us)):
            return True
        return since_us >= (DIFFERING_PERIOD_US if self._peers.differing(now_us) else QUIET_PERIOD_US)

    @property
    def _has_news(self) -> bool:
        last = self._said
        if last is None or self._owes_word or self._peers.has_to_pass_on:
            return True
        return (last.facts, last.table) != (self.table.facts_digest, self.digest)

    def _next_word(self, now_us: int) -> BoardDigest:
        present = list(self._present())
        versions: tuple[Version, ...] = ()
        if self._peers.impatient(now_us):
            versions = tuple(Version(each.board, *each.version) for each in present)
            self._peers.owes_versions = False
        self._sequence += 1
        self._said = BoardDigest(
            self._board, self._settings.boot_epoch, self._sequence, self.table.facts_digest, self.digest, self._rules,
            len(present), versions, tuple(self._peers.take_passed_on()),
        )  # fmt: skip
        self._said_us, self._owes_word = now_us, False
        return self._said

    # for people

    def report(self, now_us: int) -> dict[str, object]:
        """The table, and who agrees with it: plain values for ``sly fleet table``."""
        table = self.table
        own = {
            "board": self._board, "standing": Standing.ONLINE.value, "agrees": True, "why": AGREES,
            "said_ago_us": now_us - self._said_us if self._said else None, "digest": self.digest.hex(),
        }  # fmt: skip
        return {
            "entries": [_told(entry) for entry in table.entries],
            "bookings": [
                {"board": each.board, "total_us": each.total_us, "by_ingress": dict(each.by_ingress)} for each in table.bookings
            ],
            "horizon_us": self._settings.rules.policy.horizon_us,
            "digest": self.digest.hex(),
            "facts": table.facts_digest.hex(),
            "moves": table.moves,
            "move_bound": table.move_bound,
            "from": "kept in the ledger" if self.from_ledger else "made here",
            "boards": [own, *self._peers.report(now_us)],
        }


def _told(entry: Entry) -> dict[str, object]:
    wanted = entry.wanted
    return {
        "ingress": entry.ingress,
        "task": wanted.task,
        "model": wanted.model,
        "shape": wanted.shape,
        "size_bytes": wanted.size_bytes,
        "deadline_us": wanted.deadline_us,
        "quality_permille": wanted.quality_permille,
        "trust": wanted.trust.name.lower(),
        "data": wanted.data.value,
        "rate_mhz": entry.rate_mhz,
        "options": [
            {"board": each.board, "model": each.model, "share_permille": each.share_permille, "cost_us": each.cost_us}
            for each in entry.options
        ],
    }
