"""Broken variants of a model file: the same seed gives the same variant for ever."""

from __future__ import annotations

import random
from collections.abc import Callable


def _flip_bit(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _flip_bits(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(2, 32)):
        _flip_bit(data, chance)


def _set_byte(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] = chance.choice((0x00, 0x01, 0x7F, 0x80, 0xFF, chance.randrange(256)))


def _set_word(data: bytearray, chance: random.Random) -> None:
    """An aligned 32-bit word, which is what offsets, lengths and dimensions are."""
    at = 4 * chance.randrange(max(len(data) // 4, 1))
    word = chance.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data), chance.randrange(2**32), chance.randrange(256)))
    data[at : at + 4] = word.to_bytes(4, "little")


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def _cut_out(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    del data[at : at + chance.randint(1, 64)]


def _repeat(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    piece, at = data[start : start + chance.randint(1, 64)], chance.randrange(len(data))
    data[at : at + len(piece)] = piece


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip_bit, _flip_bits, _set_byte, _set_word, _set_word, _cut, _cut_out, _repeat,
)  # fmt: skip


def mutant(model: bytes, seed: int) -> bytes:
    """The variant of ``model`` that belongs to ``seed``; every kind of mutation comes equally often."""
    chance = random.Random(seed)
    data = bytearray(model)
    MUTATIONS[seed % len(MUTATIONS)](data, chance)
    return bytes(data)
