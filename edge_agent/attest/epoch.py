"""Freshness without a common clock: each verifier's epochs, whose nonces boards put into their quotes (RFC 9334, section 10.3).

Owns the signed epoch mark, the challenge on demand, and who holds which nonce.  Rules:

* A nonce comes from a secret that is drawn anew in each boot: nobody knows it before it is said, and none outlives a restart.
* A verifier accepts the nonces of its current epoch and of the one before, and the nonce of a challenge once, from the board that
  was challenged, until two epochs are over.
* Whose epoch it is says its signature; the larger ``(boot_epoch, counter)`` counts.
* Both sides hold at most ``MAX_BOARDS`` boards.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edge_agent.attest.evidence import MAX_COUNT, MAX_NONCES, NONCE_BYTES, Quote
from edge_agent.core.cbor import decode, encode, fields
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import BOARD_ID, MAX_BOARDS, bounded, checked

AAD_EPOCH = b"sly/1/epoch"
AAD_CHALLENGE = b"sly/1/challenge"
MAX_MARK_BYTES = 512


@dataclass(frozen=True, slots=True)
class EpochMark:
    """A verifier's present epoch: ``(boot_epoch, counter)`` is its version, the larger one counts."""

    verifier: str
    boot_epoch: int
    counter: int
    nonce: bytes

    def __post_init__(self) -> None:
        checked(BOARD_ID, "epoch's verifier", self.verifier)
        bounded("epoch boot_epoch", self.boot_epoch, 0, MAX_COUNT)
        bounded("epoch counter", self.counter, 0, MAX_COUNT)
        bounded("epoch nonce, length", len(self.nonce), NONCE_BYTES, NONCE_BYTES, "bytes")

    @property
    def number(self) -> tuple[int, int]:
        return (self.boot_epoch, self.counter)


@dataclass(frozen=True, slots=True)
class Challenge:
    """``verifier`` wants a quote of ``board`` with this nonce now."""

    verifier: str
    board: str
    nonce: bytes

    def __post_init__(self) -> None:
        checked(BOARD_ID, "challenge's verifier", self.verifier)
        checked(BOARD_ID, "challenged board", self.board)
        bounded("challenge nonce, length", len(self.nonce), NONCE_BYTES, NONCE_BYTES, "bytes")


_MARK = {1: ("verifier", str), 2: ("boot_epoch", int), 3: ("counter", int), 4: ("nonce", bytes)}
_CHALLENGE = {1: ("verifier", str), 2: ("board", str), 3: ("nonce", bytes)}


def sign_epoch(mark: EpochMark, signer: Signer) -> bytes:
    return sign1(encode({key: getattr(mark, name) for key, (name, _) in _MARK.items()}), signer, AAD_EPOCH)


def open_epoch(message: bytes, find_key: Callable[[bytes], bytes | None]) -> EpochMark:
    """The mark in a signed message. Raises ``RefusedError`` unless it is well-formed and signed by its own verifier."""
    signed = verify1(message, find_key, AAD_EPOCH, MAX_MARK_BYTES)
    mark = EpochMark(**fields(decode(signed.payload, MAX_MARK_BYTES, subject="epoch"), "epoch", _MARK))
    _must_be_its_own("epoch", mark.verifier, signed.kid)
    return mark


def sign_challenge(challenge: Challenge, signer: Signer) -> bytes:
    return sign1(encode({key: getattr(challenge, name) for key, (name, _) in _CHALLENGE.items()}), signer, AAD_CHALLENGE)


def open_challenge(message: bytes, find_key: Callable[[bytes], bytes | None]) -> Challenge:
    """The challenge in a signed message. Raises ``RefusedError`` unless it is well-formed and signed by its own verifier."""
    signed = verify1(message, find_key, AAD_CHALLENGE, MAX_MARK_BYTES)
    challenge = Challenge(**fields(decode(signed.payload, MAX_MARK_BYTES, subject="challenge"), "challenge", _CHALLENGE))
    _must_be_its_own("challenge", challenge.verifier, signed.kid)
    return challenge


def _must_be_its_own(subject: str, verifier: str, kid: bytes) -> None:
    if kid != verifier.encode():
        raise RefusedError(subject, f"verifier {verifier!r} signed by {shown(kid)}", "a verifier's own signature")


@dataclass(frozen=True, slots=True)
class _Open:
    """A challenge that waits for its quote, and the epoch in which it was made."""

    challenge: Challenge
    epoch: int


class Epochs:
    """The epochs of one verifier in one boot; ``secret`` is random in each boot, ``epoch_us`` how long one lasts."""

    def __init__(self, verifier: str, boot_epoch: int, secret: bytes, epoch_us: int) -> None:
        self._verifier, self._boot_epoch, self._secret, self._epoch_us = verifier, boot_epoch, secret, epoch_us
        self._began_us: int | None = None
        self._challenges: dict[str, _Open] = {}
        self._drawn = 0
        self.counter = 0
        """The present epoch, from 1; 0 before the first turn."""

    @property
    def mark(self) -> EpochMark | None:
        """The present epoch, to be said again after a reconnect; ``None`` before the first turn."""
        if not self.counter:
            return None
        return EpochMark(self._verifier, self._boot_epoch, self.counter, self._nonce_of(self.counter))

    def turn(self, now_us: int) -> EpochMark | None:
        """Begin an epoch if the last is over by the monotonic clock: its mark, to be published; ``None`` otherwise.

        After a gap of two epochs or more a number is left out, so that no nonce from before the gap is accepted.
        """
        over = 1 if self._began_us is None else min((now_us - self._began_us) // self._epoch_us, 2)
        if over < 1:
            return None
        self.counter += over
        self._began_us = now_us
        self._challenges = {board: each for board, each in self._challenges.items() if self._is_accepted(each.epoch)}
        return self.mark

    def challenge(self, board: str) -> Challenge | None:
        """The open challenge of ``board``, a new one if none is open; ``None`` if too many boards have one."""
        if board not in self._challenges:
            if len(self._challenges) >= MAX_BOARDS:
                return None
            self._drawn += 1
            nonce = self._drawn_nonce(b"challenge", self._drawn)
            self._challenges[board] = _Open(Challenge(self._verifier, board, nonce), self.counter)
        return self._challenges[board].challenge

    def fresh(self, quote: Quote) -> bool:
        """Was this quote made for us, now?  A challenge that it answers is closed by that."""
        waiting = self._challenges.get(quote.board)
        if waiting and waiting.challenge.nonce in quote.nonces:
            del self._challenges[quote.board]
            return True
        held = [self._nonce_of(each) for each in (self.counter, self.counter - 1) if each > 0]
        return any(nonce in quote.nonces for nonce in held)

    def _is_accepted(self, epoch: int) -> bool:
        return self.counter - 1 <= epoch <= self.counter

    def _nonce_of(self, epoch: int) -> bytes:
        return self._drawn_nonce(b"epoch", epoch)

    def _drawn_nonce(self, label: bytes, number: int) -> bytes:
        return hmac.digest(self._secret, b"sly/1/nonce/" + label + number.to_bytes(8, "big"), "sha256")[:NONCE_BYTES]


class HeardEpochs:
    """What an attester heard of others' epochs and challenges: the newest of each verifier."""

    def __init__(self) -> None:
        self._marks: dict[str, EpochMark] = {}
        self._challenges: dict[str, bytes] = {}

    def hear(self, mark: EpochMark) -> bool:
        """Keep ``mark`` if it is newer than what is held of its verifier: then the next quote should have its nonce."""
        held = self._marks.get(mark.verifier)
        if held.number >= mark.number if held else len(self._marks) >= MAX_BOARDS:
            return False
        self._marks[mark.verifier] = mark
        return True

    def hear_challenge(self, challenge: Challenge) -> bool:
        """Keep a challenge of this board until it is ``answered``; is it a new one?"""
        known = self._challenges.get(challenge.verifier)
        if known == challenge.nonce or (known is None and len(self._challenges) >= MAX_BOARDS):
            return False
        self._challenges[challenge.verifier] = challenge.nonce
        return True

    def answered(self) -> None:
        """A quote with these nonces is out: challenges are answered once."""
        self._challenges.clear()

    def nonces(self, verifiers: Iterable[str]) -> tuple[bytes, ...]:
        """For a quote: the open challenges of these verifiers, then the newest nonce of each; at most ``MAX_NONCES``."""
        asked = sorted(set(verifiers))
        challenges = [self._challenges[each] for each in asked if each in self._challenges]
        marks = [self._marks[each].nonce for each in asked if each in self._marks]
        return tuple((challenges + marks)[:MAX_NONCES])
