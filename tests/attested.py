"""Boards with keys, what they attest in tests, and Hypothesis strategies of all that attestation sends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import strategies as st

from edge_agent.attest.appraisal import MAX_REASON_CHARS, MAX_REASONS, Appraisal, Vector
from edge_agent.attest.epoch import Challenge, EpochMark
from edge_agent.attest.evidence import MAX_COUNT, KeyKind, Measurements, ModelMeasurement, Quote
from edge_agent.attest.words import Action, OperatorWord
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier
from tests.drawn import board_ids, model_names, texts

BOARDS = ("a", "b", "c")


@cache
def signer(name: str) -> Signer:
    return Signer(name.encode(), digest(name))


def find_key(kid: bytes) -> bytes | None:
    """Of the boards that are enrolled."""
    return next((signer(board).public_key for board in BOARDS if board.encode() == kid), None)


def key_of_any(kid: bytes) -> bytes | None:
    return signer(kid.decode()).public_key


def digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


MEASURED = Measurements(
    digest("code"), digest("library"), "ai-edge-litert 2.3.0", digest("policy"),
    models=(
        ModelMeasurement("blazeface", digest("blazeface"), digest("blazeface"), digest("golden"), version=3, slot="a"),
        ModelMeasurement("smollm2", digest("smollm2"), digest("smollm2"), delegated_permille=500),
    ),
)  # fmt: skip


def a_quote(**changes: Any) -> Quote:
    """The second quote of the third boot of board ``b``, with two models."""
    quote = Quote(
        board="b", nonces=(digest("nonce")[:16],), bootcount=3, bootseed=digest("seed"), counter=2, previous=digest("first"),
        issued_s=1_790_000_000, uptime_s=61, hardware="Raspberry Pi 4 Model B Rev 1.4", emulated=False, version="0.1.0",
        measurements=MEASURED, receipts=7, receipts_head=digest("seventh"), receipts_dropped=1,
    )  # fmt: skip
    return replace(quote, **changes)


def refused_when_broken(message: bytes, open_it: Callable[[bytes], object]) -> None:
    """Every single-bit flip, every truncation and any byte behind it: refused."""
    open_it(message)
    for at in range(len(message)):
        for bit in range(8):
            flipped = bytearray(message)
            flipped[at] ^= 1 << bit
            with pytest.raises(RefusedError):
                open_it(bytes(flipped))
    for size_bytes in range(len(message)):
        with pytest.raises(RefusedError):
            open_it(message[:size_bytes])
    with pytest.raises(RefusedError):
        open_it(message + b"\0")


counts = st.integers(0, MAX_COUNT)
digests = st.binary(min_size=32, max_size=32)
nonces = st.binary(min_size=16, max_size=16)
models = st.builds(
    ModelMeasurement, model_names, digests, digests, st.just(b"") | digests, st.none() | st.integers(0, 1000), counts,
    st.sampled_from(["", "a", "trial"]),
)  # fmt: skip
measurements = st.builds(
    Measurements, digests, digests, texts, digests, st.just(b"") | digests, texts,
    st.lists(models, max_size=3, unique_by=lambda model: model.name).map(tuple),
)  # fmt: skip
hardware = texts | st.sampled_from(["", "Raspberry Pi 4 Model B Rev 1.4", " Rev ", "ÄÖÜ" * 30])
quotes = st.builds(
    Quote, board_ids, st.lists(nonces, max_size=4).map(tuple), counts, digests, st.integers(1, MAX_COUNT), digests, counts,
    counts, hardware, st.booleans(), texts, measurements, st.just(MAX_COUNT), digests, counts, st.sampled_from(KeyKind),
    st.binary(max_size=40),
)  # fmt: skip
marks = st.builds(EpochMark, board_ids, counts, counts, nonces)
challenges = st.builds(Challenge, board_ids, board_ids, nonces)
vectors = st.builds(Vector, *[st.just(0) | st.integers(-128, 127)] * 8)
reasons = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=MAX_REASON_CHARS), max_size=MAX_REASONS)
appraisals = st.builds(
    Appraisal, board_ids, counts, counts, board_ids, st.sampled_from(TrustTier), vectors, reasons.map(tuple),
    st.just(b"") | digests, counts, counts, counts, counts, st.lists(st.binary(min_size=1, max_size=40), max_size=2).map(tuple),
)  # fmt: skip
words = st.builds(OperatorWord, board_ids, board_ids, st.integers(1, MAX_COUNT), st.sampled_from(Action), texts)
