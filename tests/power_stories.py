"""What happens to the board of ``tests/power.py``: releases of small files, and what operators do with them.

Rules: the same seed is the same story with the same bytes, for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from random import Random

from edge_agent.core.cbor import encode
from edge_agent.core.errors import RefusedError
from ota.slots import Held

STEP_BYTES = 600
"""Of a piece: not a multiple of a sector, so that pieces share sectors."""
MOST_RELEASES = 6
"""Of one story."""


@dataclass(frozen=True)
class File:
    """The bytes of a released file and their pieces, as ``ota.chunks.Artefact`` has them, but of small ones."""

    data: bytes
    step_bytes: int = STEP_BYTES

    @cached_property
    def digest(self) -> bytes:
        return sha256(self.data).digest()

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    @property
    def count(self) -> int:
        return -(-len(self.data) // self.step_bytes)

    def piece(self, index: int) -> bytes:
        return self.data[index * self.step_bytes : (index + 1) * self.step_bytes]

    def piece_bytes(self, index: int) -> int:
        return len(self.piece(index))

    def piece_digest(self, index: int) -> bytes:
        return sha256(self.piece(index)).digest()

    def check(self, index: int, data: bytes | memoryview) -> None:
        if bytes(data) != self.piece(index):
            raise RefusedError(f"piece {index}", "other bytes")


@dataclass(frozen=True)
class Published:
    """A release of two files, of which a piece is the same in all releases, and its manifest: the digests of its files."""

    number: int
    files: tuple[File, File]

    @cached_property
    def manifest(self) -> File:
        data = encode([self.number, bytes(180), *(each.digest for each in self.files)])
        return File(data, step_bytes=len(data))

    @property
    def held(self) -> Held:
        return Held(self.number, self.manifest.digest)


@lru_cache(64)
def published(number: int, seed: int) -> Published:
    random = Random(f"{seed}/{number}")
    same = Random(seed).randbytes(STEP_BYTES)
    large = random.randbytes(random.randint(1, STEP_BYTES)) if number % 2 else random.randbytes(STEP_BYTES)
    return Published(number, (File(same + large), File(random.randbytes(random.randint(1, STEP_BYTES)))))


@lru_cache(8)
def budget_bytes(seed: int) -> int:
    """Of the cache: for the three largest releases of a story and nothing more, so an older one has to give way to a new one."""
    releases = [published(number, seed) for number in range(1, MOST_RELEASES + 1)]
    sizes = [sum(file.size_bytes for file in (each.manifest, *each.files)) for each in releases]
    return sum(sorted(sizes)[-3:])


@dataclass(frozen=True)
class Take:
    """An operator pushes a release: it is sound, or rolls back, or is given up while it is fetched."""

    number: int
    end: str = "sound"


@dataclass(frozen=True)
class Return:
    """The fleet goes back to the release before."""


@dataclass(frozen=True)
class Deliver:
    """What is owed is sent, one message after another."""


Deed = Take | Return | Deliver
Story = tuple[Deed, ...]
WHOLE_STORY: Story = (Take(2), Take(3, "bad"), Deliver(), Take(4, "dropped"), Take(4), Return(), Take(5), Deliver())


def told(seed: int) -> Story:
    """A story that can happen; that of seed 0 has everything in it."""
    if not seed:
        return WHOLE_STORY
    random, deeds, confirmed, number = Random(seed), list[Deed](), [1], 1
    for _ in range(5):
        deed = random.choice(("sound", "sound", "bad", "dropped", "return", "deliver"))
        if deed == "return" and len(confirmed) < 2 or deed == "deliver" and not deeds:
            deed = "sound"
        if deed == "return":
            deeds.append(Return())
            confirmed = confirmed[-2:-1]
        elif deed == "deliver":
            deeds.append(Deliver())
        else:
            number += 1
            deeds.append(Take(number, deed))
            confirmed += [number] * (deed == "sound")
    return tuple(deeds)
