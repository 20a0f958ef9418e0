"""This board's part in the agreed table: when it is made anew, what is said of it to the others, and where it is kept.

Rules:

* The table is a function of published records (this board's own among them), of who is there, and of what all boards are
  configured with: never of this board's live sensors, clock or queue.
* It is made anew only when the rounded facts changed, at most once in ``MAKE_PERIOD_US``; its digest is said on every change,
  every 15 s without one, and every 5 s while somebody differs.
* Who reckons from other facts for longer than ``PATIENCE_US`` is told the versions held here; a board that hears of an older
  record of its own says it again, and what its writer does not repeat is passed on as its writer signed it.
* Without a link the last table stays as it is, and what it plans for boards out of reach is for the live choice to leave out;
  only a board that knows of no other goes on making a table of itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier
from edge_agent.gossip.agreement import MAX_PASSED_ON, MAX_PASSED_ON_BYTES, BoardDigest, Version
from edge_agent.gossip.presence import Standing
from edge_agent.gossip.record import BoardRecord
from edge_agent.gossip.state import FleetState
from edge_agent.node.announcer import QUIET_PERIOD_US, Announcer
from edge_agent.node.events import Effect, Log, Publish
from edge_agent.node.settings import NodeSettings
from edge_agent.node.voice import Voice
from edge_agent.placement.facts import BoardFacts, rules_digest
from edge_agent.placement.table import EMPTY, Table, TableMaker
from edge_agent.store.ledger import Ledger

DOCUMENT = "placement_table"
MAKE_PERIOD_US = 1_000_000
SAY_PERIOD_US = 1_000_000
"""A digest is said no more often, whatever others do."""
DIFFERING_PERIOD_US = 5_000_000
PATIENCE_US = 2_000_000
SILENT_US = 2 * QUIET_PERIOD_US
SETTLING_US = 3_000_000
"""A record that came in so lately is on its way to the others too."""
KEEP_PERIOD_US = 60_000_000
AGREES, OTHER_RULES, OTHER_FACTS = "", "other rules", "other facts"
OTHER_TABLE = "other table from the same facts"
NONE = (-1, -1)
"""The version of no record."""


class Agreement:
    """``table`` is the one in force: the last that was made here, or the one that the ledger kept."""

    def __init__(self, settings: NodeSettings, fleet: FleetState, ledger: Ledger, voice: Voice, announcer: Announcer) -> None:
        self._settings, self._fleet, self._ledger, self._voice, self._announcer = settings, fleet, ledger, voice, announcer
        self._board = settings.board
        self._maker = TableMaker(settings.rules)
        self._rules = rules_digest(settings.rules)
        self._rounded: dict[str, tuple[BoardRecord, BoardFacts]] = {}
        self._facts: tuple[BoardFacts, ...] | None = None
        self._seen_changes = -1
        self._made_us = -MAKE_PERIOD_US
        self._heard: dict[str, tuple[BoardDigest, int]] = {}
        """By board: the newest digest, and when it came in."""
        self._differs_us: dict[str, int] = {}
        """Boards that are there and reckon from other facts, each with since when."""
        self._told: dict[str, str] = {}
        """Boards that the log says cannot agree, and why."""
        self._said: BoardDigest | None = None
        self._said_us = -SAY_PERIOD_US
        self._sequence = 0
        self._owes_word = self._owes_versions = self._settled = False
        self._to_pass_on: dict[str, None] = {}
        self._notes: list[str] = []
        self._kept_us: int | None = None
        self.link_up = False
        self._set_table(self._of_ledger())
        self._kept, self.from_ledger = self.table, self.table is not EMPTY

    @property
    def alone(self) -> bool:
        """No other board is known, by a record or by the table: this one is a fleet of its own."""
        return not self._fleet.knows_others and not self._names_others

    def connected(self, now_us: int) -> None:
        """What the broker holds of the others is about to come in, and they know nothing of this board."""
        self.link_up, self._owes_word, self._owes_versions = True, True, True
        self._made_us, self._said_us, self._seen_changes, self._settled = now_us, now_us - SAY_PERIOD_US, -1, False
        self._differs_us.clear()

    def repeat(self) -> None:
        """Something that was said was not sent: say it again."""
        self._owes_word = True

    def go_on(self, now_us: int) -> Iterator[Effect]:
        """What the facts and the time that passed have made due."""
        while self._notes:
            yield Log(self._notes.pop(0))
        if self._may_make and now_us - self._made_us >= MAKE_PERIOD_US:
            self._make(now_us)
        self._keep_by_and_by(now_us)
        if self.link_up and self._is_due(now_us):
            yield Publish(self._voice.digest(self._next_word(now_us)))

    @property
    def pending(self) -> bool:
        """Something is due within a second or two: ticks should be frequent."""
        return self._may_make or (
            self.link_up and self._settled and (self._has_news or (self._owes_versions and bool(self._differs_us)))
        )

    @property
    def _may_make(self) -> bool:
        return self._fleet.changes != self._seen_changes and (self.link_up or self.alone)

    def hear(self, said: BoardDigest, now_us: int) -> Iterator[Effect]:
        """Another board's word on its table."""
        held = self._heard.get(said.board)
        if said.board == self._board or (held is not None and held[0].version >= said.version):
            return
        self._heard[said.board] = said, now_us
        self._compare(said.board, now_us)
        if said.versions:
            self._answer_versions(said, now_us)
        yield from self._tell(said.board)

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

    def _make(self, now_us: int) -> None:
        self._seen_changes, self._made_us, self._settled = self._fleet.changes, now_us, True
        facts = tuple(self._present_facts())
        if facts != self._facts:
            self._facts = facts
            self._set_table(self._maker.make(facts))
            self.from_ledger = False
        for board in list(self._heard):
            self._compare(board, now_us)

    def _present_facts(self) -> Iterator[BoardFacts]:
        """Of every board that is there, from its newest record."""
        rounded, self._rounded = self._rounded, {}
        for record in self._present():
            last, facts = rounded.get(record.board, (None, None))
            if last is not record or facts is None:
                facts = BoardFacts.rounded(
                    record.board, up=record.serving, trust=self._settings.trust.get(record.board, TrustTier.NONE),
                    queue_us=record.queue_us, headroom_mdegc=record.headroom_mdegc, offers=record.offers, kv=record.kv,
                    demand=record.demand,
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
        self._names_others = bool(named - {self._board})

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
        if self._has_news or (self._owes_versions and self._impatient(now_us)):
            return True
        return since_us >= (DIFFERING_PERIOD_US if self._who_differs(now_us) else QUIET_PERIOD_US)

    @property
    def _has_news(self) -> bool:
        last = self._said
        if last is None or self._owes_word or self._to_pass_on:
            return True
        return (last.facts, last.table) != (self.table.facts_digest, self.digest)

    def _next_word(self, now_us: int) -> BoardDigest:
        present = list(self._present())
        versions: tuple[Version, ...] = ()
        if self._impatient(now_us):
            versions, self._owes_versions = tuple(Version(each.board, *each.version) for each in present), False
        self._sequence += 1
        self._said = BoardDigest(
            self._board, self._settings.boot_epoch, self._sequence, self.table.facts_digest, self.digest, self._rules,
            len(present), versions, tuple(self._take_passed_on()),
        )  # fmt: skip
        self._said_us, self._owes_word = now_us, False
        return self._said

    def _take_passed_on(self) -> Iterator[bytes]:
        size_bytes = 0
        for board in list(self._to_pass_on)[:MAX_PASSED_ON]:
            message = self._fleet.signed(board)
            size_bytes += len(message)
            if size_bytes > MAX_PASSED_ON_BYTES:
                return
            del self._to_pass_on[board]
            if message:
                yield message

    def _impatient(self, now_us: int) -> bool:
        return any(now_us - self._differs_us[board] >= PATIENCE_US for board in self._who_differs(now_us))

    def _who_differs(self, now_us: int) -> list[str]:
        """Those that are heard of, so that one that died unseen is not talked to for ever."""
        return [board for board in self._differs_us if now_us - self._heard[board][1] < SILENT_US]

    # what others say

    def _compare(self, board: str, now_us: int) -> None:
        if self._why(board) != OTHER_FACTS:
            self._differs_us.pop(board, None)
        elif board not in self._differs_us:
            self._differs_us[board] = now_us
            self._owes_versions = True

    def _tell(self, board: str) -> Iterator[Effect]:
        """A person should know of a board that cannot agree; that facts are on their way is no news."""
        why, told = self._why(board), self._told.get(board, AGREES)
        if why in (OTHER_RULES, OTHER_TABLE) and why != told:
            self._told[board] = why
            yield Log(f"{board} holds {_explained(why)}")
        elif why == AGREES and told:
            del self._told[board]
            yield Log(f"{board} holds the same table again")

    def _why(self, board: str) -> str | None:
        """Why the table of a board differs; empty if it does not; ``None`` if it said nothing, or is not there."""
        if board not in self._heard or self._fleet.standing(board) is not Standing.ONLINE:
            return None
        said = self._heard[board][0]
        if said.table == self.digest:
            return AGREES
        if said.rules != self._rules:
            return OTHER_RULES
        return OTHER_FACTS if said.facts != self.table.facts_digest else OTHER_TABLE

    def _answer_versions(self, said: BoardDigest, now_us: int) -> None:
        """What ``said.board`` lacks is said again: this board's record by itself, another's when that board has had its time."""
        listed = {version.board: version.number for version in said.versions}
        if self._board not in listed:
            self._announcer.repeat()
        elif listed[self._board] < self._fleet.version(self._board):
            self._announcer.repeat_record()
        for board, (boot_epoch, _) in listed.items():
            presence = self._fleet.presence(board)
            if presence and presence.standing is not Standing.ONLINE and presence.boot_epoch >= boot_epoch:
                self._to_pass_on[board] = None
        for record in self._present():
            settled = now_us - self._fleet.heard_us(record.board) >= SETTLING_US
            if settled and record.board not in (self._board, said.board) and listed.get(record.board, NONE) < record.version:
                self._to_pass_on[record.board] = None

    # for people

    def report(self, now_us: int) -> dict[str, object]:
        """The table, and who agrees with it: plain values for ``sly fleet table``."""
        table = self.table
        return {
            "entries": [
                {
                    "ingress": entry.ingress,
                    "task": entry.wanted.task,
                    "model": entry.wanted.model,
                    "shape": entry.wanted.shape,
                    "size_bytes": entry.wanted.size_bytes,
                    "deadline_us": entry.wanted.deadline_us,
                    "quality_permille": entry.wanted.quality_permille,
                    "trust": entry.wanted.trust.name.lower(),
                    "data": entry.wanted.data.value,
                    "rate_mhz": entry.rate_mhz,
                    "options": [
                        {"board": each.board, "model": each.model, "share_permille": each.share_permille, "cost_us": each.cost_us}
                        for each in entry.options
                    ],
                }
                for entry in table.entries
            ],
            "bookings": [
                {"board": each.board, "total_us": each.total_us, "by_ingress": dict(each.by_ingress)} for each in table.bookings
            ],
            "horizon_us": self._settings.rules.policy.horizon_us,
            "digest": self.digest.hex(),
            "facts": table.facts_digest.hex(),
            "moves": table.moves,
            "move_bound": table.move_bound,
            "from": "kept in the ledger" if self.from_ledger else "made here",
            "boards": [self._own_word(now_us), *(self._word_of(board, now_us) for board in self._others())],
        }

    def _others(self) -> list[str]:
        return sorted({record.board for record in self._fleet.records()} | set(self._heard))

    def _own_word(self, now_us: int) -> dict[str, object]:
        said_ago_us = now_us - self._said_us if self._said else None
        return {
            "board": self._board, "standing": Standing.ONLINE.value, "agrees": True, "why": AGREES, "said_ago_us": said_ago_us,
            "digest": self.digest.hex(),
        }  # fmt: skip

    def _word_of(self, board: str, now_us: int) -> dict[str, object]:
        why = self._why(board)
        said, heard_us = self._heard.get(board, (None, 0))
        return {
            "board": board,
            "standing": self._fleet.standing(board).value,
            "agrees": None if why is None else why == AGREES,
            "why": why or "",
            "said_ago_us": now_us - heard_us if said else None,
            "digest": said.table.hex() if said else "",
        }


def _explained(why: str) -> str:
    if why == OTHER_RULES:
        return f"{why}: its [policy] or the models that it knows as released are not those here; the tables cannot agree"
    return f"{why}: the two run different versions of the placement"
