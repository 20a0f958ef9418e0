"""What the other boards say of their tables: who agrees, who does not and why, and what somebody lacks.

Rules: a board's newest digest counts; one that reckons from other facts is waited for, one with other rules or another table from
the same facts is named; what a board lacks is said again by whose word it is, and passed on, as it was signed, when its writer is
gone or has had its time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from edge_agent.gossip.agreement import MAX_PASSED_ON, MAX_PASSED_ON_BYTES, BoardDigest
from edge_agent.gossip.presence import Standing
from edge_agent.gossip.state import FleetState
from edge_agent.node.announcer import QUIET_PERIOD_US, Announcer

PATIENCE_US = 2_000_000
SILENT_US = 2 * QUIET_PERIOD_US
SETTLING_US = 3_000_000
"""A record that came in so lately is on its way to the others too."""
AGREES, OTHER_RULES, OTHER_FACTS = "", "other rules", "other facts"
OTHER_TABLE = "other table from the same facts"
NO_VERSION = (-1, -1)


class Peers:
    """``reckon`` says what this board's own table is; ``owes_versions``: somebody differs and was not told what is held here."""

    def __init__(self, board: str, fleet: FleetState, announcer: Announcer, rules: bytes) -> None:
        self._board, self._fleet, self._announcer, self._rules = board, fleet, announcer, rules
        self._facts = self._table = b""
        self._heard: dict[str, tuple[BoardDigest, int]] = {}
        """By board: the newest digest, and when it came in."""
        self._differs_us: dict[str, int] = {}
        """Boards that are there and reckon from other facts, each with since when."""
        self._named: dict[str, str] = {}
        """Boards that the log says cannot agree, and why."""
        self._to_pass_on: dict[str, None] = {}
        self.owes_versions = False

    def reckon(self, facts: bytes, table: bytes, now_us: int) -> None:
        """The digests of what this board's table was made from, and of the table."""
        self._facts, self._table = facts, table
        for board in self._heard:
            self._compare(board, now_us)

    def rule(self, rules: bytes, now_us: int) -> None:
        """The fleet places by other rules: their digest."""
        self._rules = rules
        for board in self._heard:
            self._compare(board, now_us)

    def keep_only(self, boards: Collection[str]) -> None:
        """Whoever is none of ``boards`` was not heard."""
        for board in self._heard.keys() - set(boards):
            del self._heard[board]
            self._differs_us.pop(board, None)
            self._named.pop(board, None)
            self._to_pass_on.pop(board, None)

    def restart(self) -> None:
        """A new connection: whoever differs has its time again."""
        self._differs_us.clear()
        self.owes_versions = True

    def hear(self, said: BoardDigest, now_us: int) -> str:
        """A board's word on its table; returns a line for the log, empty if there is nothing to say."""
        held = self._heard.get(said.board)
        if said.board == self._board or (held is not None and held[0].version >= said.version):
            return ""
        self._heard[said.board] = said, now_us
        self._compare(said.board, now_us)
        if said.versions:
            self._answer_versions(said, now_us)
        return self._news_of(said.board)

    def differing(self, now_us: int) -> list[str]:
        """Who reckons from other facts and is heard of: one that died unseen is not talked to for ever."""
        return [board for board in self._differs_us if now_us - self._heard[board][1] < SILENT_US]

    def impatient(self, now_us: int) -> bool:
        """Has anybody differed for so long that it is told the versions held here?"""
        return any(now_us - self._differs_us[board] >= PATIENCE_US for board in self.differing(now_us))

    @property
    def pending(self) -> bool:
        return bool(self._to_pass_on) or (self.owes_versions and bool(self._differs_us))

    @property
    def has_to_pass_on(self) -> bool:
        return bool(self._to_pass_on)

    def take_passed_on(self) -> Iterator[bytes]:
        """What fits into one digest of what others lack."""
        size_bytes = 0
        for board in list(self._to_pass_on)[:MAX_PASSED_ON]:
            message = self._fleet.signed(board)
            size_bytes += len(message)
            if size_bytes > MAX_PASSED_ON_BYTES:
                return
            del self._to_pass_on[board]
            if message:
                yield message

    def report(self, now_us: int) -> Iterator[dict[str, object]]:
        """Every other board that is known: does its table agree, and if not, why; plain values."""
        for board in sorted({record.board for record in self._fleet.records()} | set(self._heard)):
            why, (said, heard_us) = self._why(board), self._heard.get(board, (None, 0))
            yield {
                "board": board,
                "standing": self._fleet.standing(board).value,
                "agrees": None if why is None else why == AGREES,
                "why": why or "",
                "said_ago_us": now_us - heard_us if said else None,
                "since_us": now_us - self._differs_us[board] if board in self._differs_us else None,
                "digest": said.table.hex() if said else "",
            }

    def _compare(self, board: str, now_us: int) -> None:
        if self._why(board) != OTHER_FACTS:
            self._differs_us.pop(board, None)
        elif board not in self._differs_us:
            self._differs_us[board] = now_us
            self.owes_versions = True

    def _why(self, board: str) -> str | None:
        """Why the table of a board differs; empty if it does not; ``None`` if it said nothing, or is not there."""
        if board not in self._heard or self._fleet.standing(board) is not Standing.ONLINE:
            return None
        said = self._heard[board][0]
        if said.table == self._table:
            return AGREES
        if said.rules != self._rules:
            return OTHER_RULES
        return OTHER_FACTS if said.facts != self._facts else OTHER_TABLE

    def _news_of(self, board: str) -> str:
        """A person should know of a board that cannot agree; that facts are on their way is no news."""
        why, named = self._why(board), self._named.get(board, AGREES)
        if why in (OTHER_RULES, OTHER_TABLE) and why != named:
            self._named[board] = why
            return f"{board} holds {_explained(why)}"
        if why == AGREES and named:
            del self._named[board]
            return f"{board} holds the same table again"
        return ""

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
        for record in self._fleet.records():
            there = self._fleet.standing(record.board) is Standing.ONLINE
            settled = now_us - self._fleet.heard_us(record.board) >= SETTLING_US
            lacks = listed.get(record.board, NO_VERSION) < record.version
            if there and settled and lacks and record.board != said.board:
                self._to_pass_on[record.board] = None


def _explained(why: str) -> str:
    if why == OTHER_RULES:
        return f"{why}: its [policy] or the models that it knows as released are not those here; the tables cannot agree"
    return f"{why}: the two run different versions of the placement"
