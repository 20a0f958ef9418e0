"""Faults that an emulated board can be told to have. Each is a frozen value; the emulator reads them and nothing else does."""

from __future__ import annotations

import random
from dataclasses import dataclass

from edge_agent.core.values import bounded


@dataclass(frozen=True, slots=True)
class BitFlips:
    """``flips`` random bits of every output are wrong; the same ``seed`` gives the same bits, invocation by invocation."""

    seed: int
    flips: int = 1

    def __post_init__(self) -> None:
        bounded("fault seed", self.seed, 0, 2**64 - 1)
        bounded("fault flips", self.flips, 1, 10**6, "bits")


@dataclass(frozen=True, slots=True)
class Throttle:
    """The clock runs at ``clock_permille`` of its rating, or slower where heat says so."""

    clock_permille: int

    def __post_init__(self) -> None:
        bounded("fault clock_permille", self.clock_permille, 1, 1000)


@dataclass(frozen=True, slots=True)
class Hang:
    """Every invocation takes ``hang_us`` more: longer than any deadline, and the caller's watchdog must end it."""

    hang_us: int = 3_600_000_000

    def __post_init__(self) -> None:
        bounded("fault hang_us", self.hang_us, 1, 10**11, "µs")


@dataclass(frozen=True, slots=True)
class ChannelLoss:
    """``channels`` of the profile's memory channels are dead, and their share of the bandwidth with them."""

    channels: int

    def __post_init__(self) -> None:
        bounded("fault channels", self.channels, 1, 1023)


Fault = BitFlips | Throttle | Hang | ChannelLoss


def flipped(data: bytes, fault: BitFlips, invocation: int) -> bytes:
    """``data`` with that invocation's bits turned over; distinct ones, as far as there are enough."""
    if not data:
        return data
    generator = random.Random(f"{fault.seed}/{invocation}")
    wrong = bytearray(data)
    for bit in generator.sample(range(len(data) * 8), min(fault.flips, len(data) * 8)):
        wrong[bit // 8] ^= 1 << bit % 8
    return bytes(wrong)
