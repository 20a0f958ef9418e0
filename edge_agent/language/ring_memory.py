"""The memory of a model's ring slots: one sealed memfd that the agent owns and every engine child of the model maps.

Rules: slots begin at page boundaries, so that the pages of one can be given back alone; memory costs only where it was touched.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field

from edge_agent.core.errors import UnavailableError
from edge_agent.core.model_shape import ModelShape, ring_bytes
from edge_agent.core.values import bounded
from edge_agent.runtime.arena import sealed_memfd

MAX_SLOTS = 64
MAX_WINDOW_BLOCKS = 2**16


@dataclass(slots=True)
class RingMemory:
    """``slots`` rings of ``window_blocks`` sealed blocks each. Raises ``UnavailableError`` if the system has no such memory."""

    shape: ModelShape
    window_blocks: int
    slots: int
    fd: int = field(init=False)

    def __post_init__(self) -> None:
        bounded("window_blocks", self.window_blocks, 1, MAX_WINDOW_BLOCKS, "blocks")
        bounded("slots", self.slots, 1, MAX_SLOTS)
        try:
            self.fd = sealed_memfd("sly-ring", self.slots * self.slot_bytes)
        except OSError as error:
            raise UnavailableError("ring memory", f"{self.slots * self.slot_bytes} bytes: {error.strerror}") from error

    @property
    def slot_bytes(self) -> int:
        return slot_bytes(self.shape, self.window_blocks)

    def close(self) -> None:
        """Free it, once no child maps it any more. May be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def slot_bytes(shape: ModelShape, window_blocks: int) -> int:
    """Bytes from one slot's beginning to the next one's."""
    return -(-ring_bytes(shape, window_blocks) // mmap.PAGESIZE) * mmap.PAGESIZE
