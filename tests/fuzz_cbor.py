"""Hostile bytes against the decoder and the signature check: ``python -m tests.fuzz_cbor N [SEED]``.

Seven inputs of eight go to ``cbor.decode``: mutations of valid messages, and random bytes.  Each must be refused by
``RefusedError`` or give a value that is encoded to the same bytes.  One of eight is a mutated signed message, which
``cose.verify1`` must refuse.  The same N and SEED make the same inputs; a failure prints its input in hexadecimal.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass

from edge_agent.core.cbor import Tag, decode, encode
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import RefusedError

TAGS = (18, 1, 2, 28)
MAX_GROWTH_BYTES = 512
REPORT_EVERY = 250_000

SIGNER = Signer(b"board-01", bytes(range(32)))
PURPOSE = b"sly/1/fuzz"

VALUES: tuple[object, ...] = (
    0, -1, 23, 24, 255, 256, 65_536, 2**32, 2**64 - 1, -(2**64), 0.0, 1.5, 1e300, 3.5e38, float("nan"), float("-inf"),
    None, True, b"", b"bytes" * 7, "", "text é 水", [], {}, [1, [2, [3, []]]], {1: 2, -1: 3, "a": [], b"k": None},
    {1: "board-01", 2: 7, 3: {"detector": [1, 2_000, 0.5], "classifier": [4, 5, 6.25]}, 4: b"\x00" * 32, -1: [True, None]},
    Tag(18, [b"\xa1\x01\x26", {}, b"payload", b"signature"]), Tag(1, 1_700_000_000), list(range(40)),
    {n: {str(n): n * 1_000} for n in range(-8, 30)},
)  # fmt: skip
CORPUS = tuple(encode(value) for value in VALUES)
SIGNED = tuple(sign1(encode(value), SIGNER, PURPOSE) for value in VALUES)

HEADS = tuple(bytes((initial,)) for initial in range(256)) + tuple(
    bytes((major << 5 | info,)) + argument.to_bytes(size, "big")
    for major in range(8)
    for info, size in ((24, 1), (25, 2), (26, 4), (27, 8))
    for argument in (0, 1, 23, 24, 2 ** (8 * size) - 1)
)


@dataclass
class Tally:
    """What came of the inputs so far."""

    inputs: int = 0
    admitted: int = 0


def mutated(rng: random.Random, seed: bytes) -> bytes:
    """``seed`` after one to four changes: flips, other bytes, cuts, heads put in or over, slices doubled or spliced in."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        at = rng.randrange(len(data) + 1)
        change = rng.randrange(8)
        if change == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif change == 2:
            del data[at:]
        elif change == 3:
            del data[at : at + rng.randrange(1, 9)]
        elif change == 4:
            data[at:at] = rng.choice(HEADS)
        elif change == 5:
            data[at : at + 1] = rng.choice(HEADS)
        elif change == 6:
            end = at + rng.randrange(1, 33)
            data[at:at] = data[at:end]
        else:
            other = rng.choice(CORPUS)
            data[at:at] = other[rng.randrange(len(other)) :]
    return bytes(data[: len(seed) + MAX_GROWTH_BYTES])


def check_decode(data: bytes) -> bool:
    """True if ``data`` was admitted; AssertionError if it was admitted wrongly."""
    try:
        value = decode(data, tags=TAGS)
    except RefusedError:
        return False
    assert encode(value) == data, f"not what it was decoded from: {data.hex()}"
    return True


def check_verify(message: bytes, original: bytes) -> bool:
    try:
        verify1(message, {SIGNER.kid: SIGNER.public_key}.get, PURPOSE)
    except RefusedError:
        return False
    assert message == original, f"a changed message was believed: {message.hex()}"
    return True


def fuzz(count: int, seed: int = 0, tally: Tally | None = None) -> Tally:
    """Try ``count`` inputs. Any exception but ``RefusedError`` comes out of here with its input in a note."""
    tally, rng = tally or Tally(), random.Random(seed)
    for number in range(count):
        data = b""
        try:
            if number % 8 == 7:
                original = rng.choice(SIGNED)
                data = mutated(rng, original)
                tally.admitted += check_verify(data, original)
            else:
                data = rng.randbytes(rng.randrange(1, 48)) if number % 8 == 6 else mutated(rng, rng.choice(CORPUS))
                tally.admitted += check_decode(data)
        except Exception as error:
            error.add_note(f"input {number} of seed {seed}: {data.hex()}")
            raise
        tally.inputs += 1
    return tally


def main(arguments: list[str]) -> None:
    count, seed = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 0
    tally, start = Tally(), time.monotonic()
    while tally.inputs < count:
        fuzz(min(REPORT_EVERY, count - tally.inputs), seed * 1_000_003 + tally.inputs, tally)
        rate = tally.inputs / (time.monotonic() - start)
        print(f"{tally.inputs:>12,} inputs, {tally.admitted:,} admitted, {rate:,.0f} a second", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
