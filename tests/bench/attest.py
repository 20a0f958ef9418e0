"""What attestation costs: quotes and receipts, signed and verified, and what a receipt adds to a request.

How: signing and verifying are loops in this process, p50 of one call, told as calls a second on one core.  What a receipt adds is
paired: a request of a picture of 60 kB is accepted and answered in the ledger with a receipt and without, turn by turn, one
transaction each, and the figure is the median of the differences.  An answer to a client on the board's own socket is in no
ledger, so its receipt needs a transaction of its own: that is measured in memory (``/dev/shm``), where an fsync is nothing, and
in the folder for temporary files; the difference is that disk's fsync.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from edge_agent.attest.evidence import NO_DIGEST, Measurements, ModelMeasurement, Quote, open_quote, sign_quote
from edge_agent.attest.receipts import Chain, open_receipt, why_not
from edge_agent.core.cose import Signer
from edge_agent.core.digests import tensors_digest
from edge_agent.core.values import InferenceRequest, InferenceResult, Status, Tensor, encoded_image
from edge_agent.store.ledger import Ledger
from tests.bench.figures import Figure, Progress, p50

PICTURE_BYTES, BOXES, MODELS, VERIFIERS = 60_000, 16, 4, 4
CALLS, PAIRS, WARM_UPS = 400, 600, 40
ADDED_GOAL_US = 200.0
"""Of receipts, a request."""
BOARD = "bench"
MEMORY = Path("/dev/shm")


def measure(progress: Progress) -> Iterator[Figure]:
    progress("quotes")
    yield from _quotes()
    progress("receipts")
    signer = Signer(BOARD.encode(), os.urandom(32))
    yield from _verified(signer)
    with _ledger(MEMORY) as ledger:
        yield Figure(
            "receipt: added to a request that the ledger has, in memory, p50", _added_us(ledger, signer), "µs", ADDED_GOAL_US
        )
        in_memory_us = _alone_us(ledger, signer)
    yield Figure("receipt: in a transaction of its own, in memory, p50", in_memory_us, "µs", ADDED_GOAL_US)
    request, _ = _answered()
    yield Figure(
        f"  of it the digest of an input of {PICTURE_BYTES} bytes", _p50_us(lambda: tensors_digest(request.inputs)), "µs"
    )
    with _ledger(None) as ledger:
        yield Figure("receipt: added to a request that the ledger has, on this disk, p50", _added_us(ledger, signer), "µs")
        yield Figure(
            "receipt: in a transaction of its own, on this disk: fsync, p50", _alone_us(ledger, signer) - in_memory_us, "µs"
        )


def _quotes() -> Iterator[Figure]:
    signer = Signer(BOARD.encode(), os.urandom(32))
    models = tuple(ModelMeasurement(f"model-{n}", os.urandom(32), os.urandom(32), os.urandom(32)) for n in range(MODELS))
    measured = Measurements(os.urandom(32), os.urandom(32), "ai_edge_litert 2.3.0", os.urandom(32), models=models)
    nonces = tuple(os.urandom(16) for _ in range(VERIFIERS))
    quote = Quote(BOARD, nonces, 1, os.urandom(32), 1, NO_DIGEST, 1, 1, "a board", False, "0.1.0", measured)
    message = sign_quote(quote, signer)
    about = f"quote of {len(message)} bytes, {MODELS} models, {VERIFIERS} verifiers"
    yield Figure(f"{about}: encode and sign", 1e6 / _p50_us(lambda: sign_quote(quote, signer)), "/s")
    yield Figure(f"{about}: verify and decode", 1e6 / _p50_us(lambda: open_quote(message, lambda _: signer.public_key)), "/s")


def _verified(signer: Signer) -> Iterator[Figure]:
    with _ledger(MEMORY) as ledger:
        request, result = _answered()
        message = Chain(ledger, BOARD, 1, signer).append(request, result, 1, 1)

    def check() -> None:
        if why_not(open_receipt(message, lambda _: signer.public_key), request, result):
            raise RuntimeError("a receipt of this answer does not fit it")

    yield Figure(f"receipt of {len(message)} bytes: verify, decode, hold against its answer, p50", _p50_us(check), "µs")


def _answered() -> tuple[InferenceRequest, InferenceResult]:
    request = InferenceRequest(os.urandom(16).hex(), "detect_faces", {"image": encoded_image(os.urandom(PICTURE_BYTES))})
    outputs = {
        "boxes": Tensor("float32", (BOXES, 4), os.urandom(16 * BOXES)),
        "scores": Tensor("float32", (BOXES,), bytes(4 * BOXES)),
    }
    return request, InferenceResult(request.request_id, Status.OK, BOARD, "model", bytes(32), outputs, 5_000, 9_000)


@contextmanager
def _ledger(folder: Path | None) -> Iterator[Ledger]:
    with tempfile.TemporaryDirectory(prefix="sly-bench-", dir=folder) as name, Ledger(Path(name) / "ledger.db") as ledger:
        yield ledger


def _added_us(ledger: Ledger, signer: Signer) -> float:
    chain, differences = Chain(ledger, BOARD, 1, signer), []
    for number in range(PAIRS + WARM_UPS):
        turns = [_served_us(ledger, with_it) for with_it in ((chain, None) if number % 2 else (None, chain))]
        differences.append(turns[0] - turns[1] if number % 2 else turns[1] - turns[0])
    return p50(differences[WARM_UPS:])


def _served_us(ledger: Ledger, chain: Chain | None) -> float:
    request, result = _answered()
    with ledger.transaction():
        ledger.accept(request.request_id, b"")
    began_ns = time.perf_counter_ns()
    with ledger.transaction():
        if chain is not None:
            chain.append(request, result, 1, 1)
        ledger.answer(request.request_id, bytes(500), None)
    return (time.perf_counter_ns() - began_ns) / 1000


def _alone_us(ledger: Ledger, signer: Signer) -> float:
    chain, numbers = Chain(ledger, BOARD, 1, signer), count(1)
    request, result = _answered()

    def signed() -> None:
        with ledger.transaction():
            chain.append(request, result, 1, next(numbers))

    return _p50_us(signed)


def _p50_us(call: Callable[[], object]) -> float:
    samples = []
    for _ in range(CALLS + WARM_UPS):
        began_ns = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - began_ns) / 1000)
    return p50(samples[WARM_UPS:])
