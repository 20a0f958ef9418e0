"""What the boards of one process need to work out only once.

In a fleet every board opens the same records and reckons the same table from the same facts: that is the point of it, and each
does so on its own machine.  In the simulator all boards are one process, which would do the same work once a board.  While
``shared_work`` lasts they share the results.  Rules: only of pure functions of frozen values and bytes, so that no board can see
the difference (a test holds the traces with and without it against each other); bounded, the oldest results give way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Generic, TypeVar

from edge_agent.attest.appraisal import open_appraisal
from edge_agent.attest.epoch import open_epoch
from edge_agent.attest.evidence import open_quote
from edge_agent.gossip.agreement import open_digest
from edge_agent.gossip.presence import open_presence
from edge_agent.gossip.record import open_record
from edge_agent.node import agreement, attestation, inbound
from edge_agent.placement.agreed import Table
from edge_agent.placement.facts import BoardFacts
from edge_agent.placement.options import Rules
from edge_agent.placement.table import TableMaker
from edge_agent.transport import loopback_broker
from edge_agent.transport.link import matches

MAX_KEPT = 4096
"""Results of one function."""
MAX_TABLES = 256
MAX_MATCHES = 2**16
"""Of topics with filters."""

_Result = TypeVar("_Result")


class _Kept(Generic[_Result]):
    """The last results of a pure function, by what they depend on."""

    def __init__(self, most: int = MAX_KEPT) -> None:
        self._most = most
        self._results: OrderedDict[Hashable, _Result] = OrderedDict()

    def of(self, key: Hashable, make: Callable[[], _Result]) -> _Result:
        if key in self._results:
            self._results.move_to_end(key)
            return self._results[key]
        result = self._results[key] = make()
        if len(self._results) > self._most:
            self._results.popitem(last=False)
        return result


def _opening(open_message: Callable[[bytes, Any], _Result]) -> Callable[[bytes, Any], _Result]:
    """``open_message``, once for equal bytes. All boards of a simulated fleet know the same keys."""
    kept = _Kept[_Result]()
    return lambda message, find_key: kept.of(bytes(message), lambda: open_message(message, find_key))


class _SharedFacts:
    """Stands for the class ``BoardFacts`` where records are rounded: equal facts are one value."""

    def __init__(self) -> None:
        self._rounded = _Kept[BoardFacts]()
        self._equal = _Kept[BoardFacts]()

    def rounded(self, board: str, **known: Any) -> BoardFacts:
        return self._rounded.of((board, *known.values()), lambda: self._one(BoardFacts.rounded(board, **known)))

    def _one(self, facts: BoardFacts) -> BoardFacts:
        return self._equal.of(facts, lambda: facts)


class _SharedMaker(TableMaker):
    """One for all boards, which keeps the last tables."""

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules)
        self._tables = _Kept[Table](MAX_TABLES)

    def make(self, facts: Iterable[BoardFacts]) -> Table:
        together = tuple(facts)
        return self._tables.of(together, lambda: super(_SharedMaker, self).make(together))


@contextmanager
def shared_work() -> Iterator[None]:
    """While it lasts, the nodes of this process share what they open and reckon."""
    makers = _Kept[_SharedMaker](1)
    exchanged: list[tuple[Any, str, Any]] = [
        (inbound, "open_record", _opening(open_record)),
        (inbound, "open_digest", _opening(open_digest)),
        (inbound, "open_presence", _opening(open_presence)),
        (attestation, "open_quote", _opening(open_quote)),
        (attestation, "open_epoch", _opening(open_epoch)),
        (attestation, "open_appraisal", _opening(open_appraisal)),
        (agreement, "TableMaker", lambda rules: makers.of(rules, lambda: _SharedMaker(rules))),
        (agreement, "BoardFacts", _SharedFacts()),
        (loopback_broker, "matches", lru_cache(MAX_MATCHES)(matches)),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in exchanged]
    try:
        for module, name, shared in exchanged:
            setattr(module, name, shared)
        yield
    finally:
        for module, name, original in before:
            setattr(module, name, original)
