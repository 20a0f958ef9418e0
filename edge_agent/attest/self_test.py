"""What a board found when it looked at itself: checks, each with what to do where it does not pass, as a signed message.

Owns ``SelfTest``, its bytes and its signature.  Rules: no I/O; a check that does not pass says what to do; a board is believed of
itself alone, and of one board the larger version (boot epoch, number within it) counts; a value has one encoding, so what is
empty is left out and may not be said.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.attest.evidence import MAX_COUNT
from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import BOARD_ID, bounded, checked

AAD = b"sly/1/self-test"
CHECK_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
MAX_CHECKS = 16
MAX_WORDS_CHARS = 240
"""Of what was found, and of what to do."""
MAX_AGENT_CHARS = 64
MAX_SELF_TEST_BYTES = 36 * 2**10
"""``MAX_CHECKS`` with the longest words in UTF-8 take 31 KiB."""


class Verdict(StrEnum):
    PASS = "pass"
    WARN = "warn"
    """It serves, but somebody should look; also what could not be checked."""
    FAIL = "fail"


_GRAVITY = {Verdict.PASS: 0, Verdict.WARN: 1, Verdict.FAIL: 2}


@dataclass(frozen=True, slots=True)
class Check:
    """``what`` was found, and the ``remedy``: nothing for a check that passes, never nothing for one that does not."""

    name: str
    verdict: Verdict
    what: str
    remedy: str = ""

    def __post_init__(self) -> None:
        checked(CHECK_NAME, "check's name", self.name)
        bounded("check's words, length", len(self.what), 1, MAX_WORDS_CHARS, "characters")
        bounded("check's remedy, length", len(self.remedy), 0, MAX_WORDS_CHARS, "characters")
        if bool(self.remedy) == (self.verdict is Verdict.PASS):
            allowed = "what to do where a check does not pass, and nothing where it does"
            raise RefusedError(f"check {self.name}", f"{self.verdict.value} with remedy {shown(self.remedy)}", allowed)

    def __str__(self) -> str:
        return f"{self.verdict.name} {self.name}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True, slots=True)
class SelfTest:
    """``agent``: its version; ``checks``: each name once, in the order in which a person should read them."""

    board: str
    boot_epoch: int
    number: int
    agent: str
    checks: tuple[Check, ...]

    def __post_init__(self) -> None:
        checked(BOARD_ID, "self-test's board", self.board)
        bounded("self-test's boot epoch", self.boot_epoch, 0, MAX_COUNT)
        bounded("self-test's number", self.number, 0, MAX_COUNT)
        bounded("self-test's agent, length", len(self.agent), 1, MAX_AGENT_CHARS, "characters")
        bounded("self-test's checks", len(self.checks), 1, MAX_CHECKS)
        if len({each.name for each in self.checks}) != len(self.checks):
            raise RefusedError("self-test's checks", "a name twice", "each once")

    @property
    def version(self) -> tuple[int, int]:
        return self.boot_epoch, self.number

    @property
    def verdict(self) -> Verdict:
        return worst(self.checks)


def worst(checks: tuple[Check, ...]) -> Verdict:
    """The gravest of the verdicts; a pass where there is none."""
    return max((each.verdict for each in checks), key=_GRAVITY.__getitem__, default=Verdict.PASS)


_SELF_TEST = {1: ("board", str), 2: ("boot_epoch", int), 3: ("number", int), 4: ("agent", str), 5: ("checks", list)}
_CHECK = {1: ("name", str), 2: ("verdict", str), 3: ("what", str)}
_CHECK_OPTIONAL = {4: ("remedy", str)}


def self_test_map(test: SelfTest) -> dict[int, object]:
    """What a self-test is encoded as."""
    return {1: test.board, 2: test.boot_epoch, 3: test.number, 4: test.agent, 5: [_check_map(each) for each in test.checks]}


def sign_self_test(test: SelfTest, signer: Signer) -> bytes:
    return sign1(encode(self_test_map(test)), signer, AAD)


def open_self_test(message: bytes, find_key: Callable[[bytes], bytes | None]) -> SelfTest:
    """The self-test in a signed message; ``find_key`` knows the boards of the fleet.

    Raises ``RefusedError`` unless it is well-formed and signed by its own board.
    """
    signed = verify1(message, find_key, AAD, MAX_SELF_TEST_BYTES)
    entry = fields(decode(signed.payload, MAX_SELF_TEST_BYTES, subject="self-test"), "self-test", _SELF_TEST)
    if signed.kid != entry["board"].encode():
        got = f"board {shown(entry['board'])} signed by {shown(signed.kid)}"
        raise RefusedError("self-test", got, "the board's own signature")
    checks = tuple(map(_check, list_of(entry["checks"], "self-test's checks", dict, MAX_CHECKS)))
    return SelfTest(**{**entry, "checks": checks})


def _check_map(check: Check) -> dict[int, object]:
    known: dict[int, object] = {1: check.name, 2: check.verdict.value, 3: check.what}
    return known | ({4: check.remedy} if check.remedy else {})


def _check(value: object) -> Check:
    entry = fields(value, "check", _CHECK, _CHECK_OPTIONAL)
    if entry["verdict"] not in list(Verdict):
        raise RefusedError("check's verdict", shown(entry["verdict"]), ", ".join(Verdict))
    if entry.get("remedy") == "":
        raise RefusedError("check's remedy", "an empty text", "nothing, where there is none")
    return Check(**{**entry, "verdict": Verdict(entry["verdict"])})
