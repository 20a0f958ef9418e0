"""The names of the topics, and how a name that came from outside is read back.

Owns the scheme ``sly/1/<fleet>/...``.  Rules:

* Every topic is built here and every incoming topic is parsed here; no other file knows a topic's parts.
* ``parse`` admits exactly what the builders can make for the same fleet.  Anything else is refused, so that ``..``, NUL, a
  wildcard or an endless name never reaches a file name, a table key or a log line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import BOARD_ID, CLIENT_ID, MODEL_NAME, checked
from edge_agent.transport.link import MAX_TOPIC_BYTES

PREFIX = "sly/1"
FLEET_ID = BOARD_ID
DIGEST_HEX = re.compile(r"[0-9a-f]{64}")
METADATA_ROLE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
TOOL = "-ASK-"
"""Between a board's id and the MQTT client id of a program that asks on its behalf, in the name under which that waits for
answers: a broker's access list can grant such a name to that board alone, and no board can be called so."""


class Kind(StrEnum):
    """What a topic carries; the value is its pattern, with the parts that vary in braces."""

    ONLINE = "board/{board}/online"
    RECORD = "board/{board}/record"
    QUOTE = "board/{board}/quote"
    CHALLENGE = "board/{board}/challenge"
    REQUEST = "board/{board}/request"
    CANCEL = "board/{board}/cancel"
    KV = "board/{board}/kv/{peer}"
    REPLY = "board/{board}/reply/{client}"
    APPRAISAL = "appraisal/{verifier}/{board}"
    EPOCH = "epoch/{verifier}"
    WORD = "fleet/word/{board}"
    DIGEST = "digest/{board}"
    OTA_META = "ota/meta/{role}"
    OTA_WANT = "ota/want/{board}"
    OTA_CHUNK = "ota/chunk/{digest}"
    ROLLOUT = "ota/rollout/{model}"
    REPORT = "fleet/report/{board}"
    SELF_TEST = "fleet/self-test/{board}"


_PART_PATTERNS = {
    "board": BOARD_ID,
    "peer": BOARD_ID,
    "verifier": BOARD_ID,
    "client": CLIENT_ID,
    "role": METADATA_ROLE,
    "digest": DIGEST_HEX,
    "model": MODEL_NAME,
}


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic that was parsed. A part that this kind of topic does not have is empty."""

    kind: Kind
    board: str = ""
    peer: str = ""
    client: str = ""
    verifier: str = ""
    role: str = ""
    digest: str = ""
    model: str = ""


class Topics:
    """Builds and parses the topics of one fleet. Raises ``RefusedError`` for a bad fleet name or a bad part."""

    def __init__(self, fleet: str) -> None:
        self.fleet = checked(FLEET_ID, "fleet name", fleet)
        self._root = f"{PREFIX}/{fleet}/"

    def online(self, board: str) -> str:
        return self._build(Kind.ONLINE, board=board)

    def record(self, board: str) -> str:
        return self._build(Kind.RECORD, board=board)

    def quote(self, board: str) -> str:
        return self._build(Kind.QUOTE, board=board)

    def challenge(self, board: str) -> str:
        return self._build(Kind.CHALLENGE, board=board)

    def request(self, board: str) -> str:
        return self._build(Kind.REQUEST, board=board)

    def cancel(self, board: str) -> str:
        return self._build(Kind.CANCEL, board=board)

    def kv(self, board: str, peer: str) -> str:
        """What ``peer`` says to ``board`` about the KV of a session that moves between them."""
        return self._build(Kind.KV, board=board, peer=peer)

    def kv_of(self, board: str) -> str:
        """The subscription filter for what any peer says to ``board`` about KV."""
        return self._root + f"board/{checked(BOARD_ID, 'topic board', board)}/kv/+"

    def reply(self, board: str, client: str) -> str:
        """Where ``client`` waits for what ``board`` answers."""
        return self._build(Kind.REPLY, board=board, client=client)

    def appraisal(self, verifier: str, board: str) -> str:
        return self._build(Kind.APPRAISAL, verifier=verifier, board=board)

    def epoch(self, verifier: str) -> str:
        return self._build(Kind.EPOCH, verifier=verifier)

    def word(self, board: str) -> str:
        """What an operator says of ``board``."""
        return self._build(Kind.WORD, board=board)

    def digest(self, board: str) -> str:
        return self._build(Kind.DIGEST, board=board)

    def ota_meta(self, role: str) -> str:
        return self._build(Kind.OTA_META, role=role)

    def ota_want(self, board: str) -> str:
        return self._build(Kind.OTA_WANT, board=board)

    def ota_chunk(self, digest: str) -> str:
        return self._build(Kind.OTA_CHUNK, digest=digest)

    def rollout(self, model: str) -> str:
        """What an operator wants of a model's release: state, kept by the broker."""
        return self._build(Kind.ROLLOUT, model=model)

    def report(self, board: str) -> str:
        return self._build(Kind.REPORT, board=board)

    def self_test(self, board: str) -> str:
        """What ``board`` found when it looked at itself: state, kept by the broker."""
        return self._build(Kind.SELF_TEST, board=board)

    def every(self, kind: Kind) -> str:
        """The subscription filter for all topics of a kind, with every varying part a ``+``."""
        return self._root + re.sub(r"\{\w+\}", "+", kind.value)

    def replies_to(self, client: str) -> str:
        """The subscription filter for what any board answers to ``client``."""
        return self._root + f"board/+/reply/{checked(CLIENT_ID, 'topic client', client)}"

    def parse(self, topic: str | bytes) -> Topic:
        """Read a topic of this fleet. Raises ``RefusedError`` for a name that the builders could not have made."""
        text = _bounded_text(topic)
        if not text.startswith(self._root):
            raise RefusedError("topic", shown(text), f"topics of this fleet, under {self._root}")
        return _parse_below_root(text, text.removeprefix(self._root).split("/"))

    def _build(self, kind: Kind, **parts: str) -> str:
        for name, part in parts.items():
            checked(_PART_PATTERNS[name], f"topic {name}", part)
        return self._root + kind.value.format(**parts)


def _bounded_text(topic: str | bytes) -> str:
    """The topic as text. Raises ``RefusedError`` if it is overlong or not UTF-8."""
    try:
        encoded = topic.encode("utf-8", "strict") if isinstance(topic, str) else topic
        if not 0 < len(encoded) <= MAX_TOPIC_BYTES:
            raise RefusedError("topic", f"{len(encoded)} bytes", f"1 to {MAX_TOPIC_BYTES} bytes")
        return encoded.decode("utf-8", "strict")
    except UnicodeError as error:
        raise RefusedError("topic", shown(topic[:MAX_TOPIC_BYTES]), "UTF-8 text") from error


_LEVELS = {kind: kind.value.split("/") for kind in Kind}


def _parse_below_root(text: str, levels: list[str]) -> Topic:
    for kind, pattern in _LEVELS.items():
        if len(pattern) == len(levels) and all(p[0] == "{" or p == level for p, level in zip(pattern, levels, strict=True)):
            parts = {p.strip("{}"): level for p, level in zip(pattern, levels, strict=True) if p[0] == "{"}
            for name, part in parts.items():
                checked(_PART_PATTERNS[name], f"{name} in topic {shown(text)}", part)
            return Topic(kind, **parts)
    raise RefusedError("topic", shown(text), "one of " + ", ".join(kind.value for kind in Kind))
