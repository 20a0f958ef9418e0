"""What this board gives of what it holds, to boards around it that lack it.

Owns ``Sharing``.  Rules: sans-I/O; only what is whole in the cache is given, only to boards of the fleet, and when ``Giving``
says that it is this board's turn; so many pieces are under way at a time that the broker stays able to answer, and one of which
nothing is heard again counts as gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from ota.chunks import Artefact, Wants, artefact_of
from ota.events import Give
from ota.giving import MAX_OFFERS, Giving
from ota.heard import Heard
from ota.manifest import Release
from ota.rollout import Step

MAX_UNDER_WAY = 16
UNDER_WAY_US = 30_000_000
"""A piece that was to be sent and of which the link says nothing holds its place no longer."""
AHEAD_US = 250_000
"""The shell comes by so often; what may be sent until then is sent now."""
HAVE_IT = (Step.TRIAL, Step.CONFIRMED)


class Sharing:
    """``rate_bytes_per_s``: how fast this board gives."""

    def __init__(self, board: str, rate_bytes_per_s: int) -> None:
        self._giving, self._rate_bytes_per_s = Giving(board, rate_bytes_per_s), rate_bytes_per_s
        self._under_way: dict[int, int] = {}
        """Since when, by ticket."""
        self._ticket = 0
        self._seen: tuple[Heard | None, int] = (None, -1)
        self._artefacts: dict[bytes, Artefact] = {}
        self._askers: set[str] = set()

    @property
    def given_bytes(self) -> int:
        return self._giving.given_bytes

    def pending(self, now_us: int) -> bool:
        """Something may be due within a second or so."""
        due_us = self._giving.next_us(now_us)
        return bool(self._under_way) or (due_us is not None and due_us - now_us < 1_000_000)

    def hold(self, artefacts: Iterable[Artefact]) -> None:
        """What is held now, and nothing else; the first ``MAX_OFFERS`` of it are given."""
        held = {each.digest: each for each in artefacts}
        held = {digest: held[digest] for digest in list(held)[:MAX_OFFERS]}
        for digest in self._artefacts.keys() - held.keys():
            self._giving.drop(digest)
        for digest in held.keys() - self._artefacts.keys():
            self._giving.hold(held[digest])
        self._artefacts = held

    def heard(self, wants: Wants, now_us: int) -> None:
        self._askers.add(wants.board)
        self._giving.heard_wants(wants, now_us)

    def keep_only(self, boards: Collection[str]) -> None:
        """Nothing more is sent for anybody but ``boards``, until it asks anew."""
        for board in self._askers - set(boards):
            self._giving.gone(board)
        self._askers &= set(boards)

    def look_at(self, words: Heard, releases: Iterable[Release]) -> None:
        """Who else holds what, and how fast the operators let it be given, by what was said last."""
        if (words, words.changes) == self._seen:
            return
        self._seen = words, words.changes
        holders: dict[bytes, frozenset[str]] = {}
        rates = [self._rate_bytes_per_s]
        by_number = {(each.model, each.number): each for each in releases}
        for model, rollout in words.rollouts.items():
            release = by_number.get((model, rollout.plan.number))
            if release is not None:
                said = ((board, report.of(model, rollout.plan.serial)) for board, report in words.reports.items())
                have_it = frozenset(board for board, progress in said if progress is not None and progress.step in HAVE_IT)
                holders |= {file.digest: have_it for file in release.files} | {rollout.plan.manifest: have_it}
                rates += [rollout.plan.rate_bytes_per_s] if rollout.plan.rate_bytes_per_s else []
        self._giving.holders, self._giving.rate_bytes_per_s = holders, min(rates)

    def restart(self) -> None:
        """A new connection: nothing is under way."""
        self._under_way.clear()

    def sent(self, ticket: int) -> None:
        self._under_way.pop(ticket, None)

    def go_on(self, now_us: int) -> Iterator[Give]:
        """The pieces that are to be sent now."""
        while self._under_way and now_us - next(iter(self._under_way.values())) >= UNDER_WAY_US:
            del self._under_way[next(iter(self._under_way))]
        while len(self._under_way) < MAX_UNDER_WAY and (piece := self._giving.next(now_us + AHEAD_US)) is not None:
            digest, index = piece
            self._giving.sent(digest, index, now_us)
            self._ticket += 1
            self._under_way[self._ticket] = now_us
            yield Give(self._artefacts[digest], index, self._ticket)


def artefacts_of(release: Release, manifest: bytes, manifest_bytes: int) -> Iterator[Artefact]:
    """Everything that a board fetches of a release."""
    yield Artefact(manifest, manifest_bytes)
    yield from (artefact_of(file) for file in release.files)
