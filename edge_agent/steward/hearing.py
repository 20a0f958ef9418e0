"""What an operator heard of the fleet and believes: the newest of each.

Owns ``Hearing``.  Rules: no I/O; a board is believed of itself, an operator of rollouts and words, a verifier of its appraisals,
each by the key that the charter has, and on its own topic; metadata is kept as it came, for python-tuf judges that.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from edge_agent.attest.appraisal import Appraisal, open_appraisal
from edge_agent.attest.self_test import SelfTest, open_self_test
from edge_agent.attest.words import open_word
from edge_agent.core.errors import RefusedError
from edge_agent.gossip.presence import open_presence
from edge_agent.gossip.record import open_record
from edge_agent.gossip.state import FleetState
from edge_agent.transport.topics import Kind, Topic
from ota.charter import Charter
from ota.heard import Heard
from ota.orders import open_report, open_rollout

MAX_REFUSALS = 64
MAX_METADATA = 4096
"""Names of retained metadata: every root there ever was, and a few of the rest."""
TIMESTAMP = "timestamp"
_ORDER = {"root": 0, "targets": 1, "snapshot": 2, TIMESTAMP: 3}


class Hearing:
    """``fleet`` (records, presence), ``heard`` (rollouts, reports), ``metadata`` by name, ``appraisals`` by (verifier, board),
    ``self_tests`` and signed operators' ``words`` by board, and the last reasons why something was ``refused``."""

    def __init__(self, charter: Charter) -> None:
        self.fleet, self.heard = FleetState(), Heard()
        self.appraisals: dict[tuple[str, str], Appraisal] = {}
        self.self_tests: dict[str, SelfTest] = {}
        self.metadata: dict[str, bytes] = {}
        self.words: dict[str, bytes] = {}
        self.refused: deque[str] = deque(maxlen=MAX_REFUSALS)
        self.admit(charter)

    def admit(self, charter: Charter) -> None:
        """Believe whom ``charter`` names from now on; a revoked board is heard too, for what it says of itself may matter."""
        self.charter = charter
        self._boards = {board.encode(): each.key for board, each in charter.boards.items()}
        self._operators = {name.encode(): key for name, key in charter.operators.items()}
        self.fleet.keep_only(charter.boards)
        self.self_tests = {board: test for board, test in self.self_tests.items() if board in charter.boards}

    def judge(self, topic: Topic, payload: bytes) -> None:
        """Keep what counts. Raises ``RefusedError`` for what is not believed."""
        match topic.kind:
            case Kind.OTA_META:
                self._take_document(topic.role, payload)
            case _ if not payload:
                return
            case Kind.ONLINE:
                presence = open_presence(payload, self._boards.get)
                _must_agree(presence.board, topic.board)
                self.fleet.join_presence(presence)
            case Kind.RECORD:
                record = open_record(payload, self._boards.get)
                _must_agree(record.board, topic.board)
                self.fleet.join(record)
            case Kind.APPRAISAL:
                self._take_appraisal(open_appraisal(payload, self._boards.get), topic)
            case Kind.REPORT:
                report = open_report(payload, self._boards.get)
                _must_agree(report.board, topic.board)
                self.heard.hear_report(report)
            case Kind.SELF_TEST:
                self._take_self_test(open_self_test(payload, self._boards.get), topic)
            case Kind.WORD:
                word = open_word(payload, self._operators.get)
                _must_agree(word.board, topic.board)
                if word.board in self.charter.boards:
                    self.words[word.board] = payload
            case Kind.ROLLOUT:
                rollout = open_rollout(payload, self._operators.get)
                _must_agree(rollout.plan.model, topic.model)
                self.heard.hear_rollout(rollout, payload)

    def _take_document(self, name: str, payload: bytes) -> None:
        if not payload:
            self.metadata.pop(name, None)
        elif name in self.metadata or len(self.metadata) < MAX_METADATA:
            self.metadata[name] = payload
        else:
            raise RefusedError("metadata on the broker", f"{len(self.metadata)} documents", f"at most {MAX_METADATA}")

    def _take_self_test(self, test: SelfTest, topic: Topic) -> None:
        _must_agree(test.board, topic.board)
        held = self.self_tests.get(test.board)
        if held is None or held.version <= test.version:
            self.self_tests[test.board] = test

    def _take_appraisal(self, appraisal: Appraisal, topic: Topic) -> None:
        _must_agree(appraisal.verifier, topic.verifier)
        _must_agree(appraisal.board, topic.board)
        if appraisal.board not in self.charter.boards:
            raise RefusedError("appraisal", f"of {appraisal.board!r}", "of a board of the charter")
        held = self.appraisals.get((appraisal.verifier, appraisal.board))
        if held is None or held.version <= appraisal.version:
            self.appraisals[appraisal.verifier, appraisal.board] = replace(appraisal, raw=())


def in_order(names: Iterable[str]) -> Sequence[str]:
    """Names of metadata documents in the order in which they are published: what others refer to comes first."""

    def place(name: str) -> tuple[int, int, str]:
        version, _, role = name.rpartition(".")
        return _ORDER.get(role, len(_ORDER)), int(version) if version.isdecimal() else 0, name

    return sorted(names, key=place)


def timestamp_version(documents: Mapping[str, bytes]) -> int:
    """The version that a timestamp says it has, unverified; 0 where there is none that can be read."""
    try:
        version = json.loads(documents.get(TIMESTAMP, b"{}"))["signed"]["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return version if type(version) is int else 0


def _must_agree(said: str, topic: str) -> None:
    if said != topic:
        raise RefusedError("message", f"of {said!r} on the topic of {topic!r}", "its own topic")
