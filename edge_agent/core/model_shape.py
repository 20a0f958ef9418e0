"""The shape of a Llama-architecture decoder, and the sizes that follow from it.

Rules: pure integers, no NumPy: a card says the shape, the builder writes stages for it, the agent reckons with its sizes, and the
engine child lays memory out by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS
from edge_agent.core.values import bounded


@dataclass(frozen=True, slots=True)
class ModelShape:
    """SmolLM2-135M: 30 layers, 9 heads, 3 KV heads, head_dim 64, width 576, hidden 1536, vocabulary 49152, RoPE base 1e5."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    hidden: int
    vocabulary: int
    rope_base: int
    context_tokens: int

    def __post_init__(self) -> None:
        bounded("shape layers", self.layers, 1, 256)
        bounded("shape heads", self.heads, 1, 1024)
        bounded("shape kv_heads", self.kv_heads, 1, min(256, self.heads))
        bounded("shape head_dim", self.head_dim, 2, 512)
        bounded("shape width", self.width, 1, 2**16)
        bounded("shape hidden", self.hidden, 1, 2**18)
        bounded("shape vocabulary", self.vocabulary, 1, 2**20)
        bounded("shape rope_base", self.rope_base, 1, 2**40)
        bounded("shape context_tokens", self.context_tokens, 1, 2**24)
        if self.heads % self.kv_heads:
            raise RefusedError("shape kv_heads", self.kv_heads, f"a divisor of the {self.heads} heads")
        if self.head_dim % 2:
            raise RefusedError("shape head_dim", self.head_dim, "an even number: RoPE turns its halves")

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def strips(self) -> int:
        """K and V of every layer and KV head."""
        return self.layers * 2 * self.kv_heads

    @property
    def row_bytes(self) -> int:
        """One token at hot precision: int8 values and a float32 scale a strip."""
        return self.strips * (self.head_dim + 4)

    @property
    def block_bytes(self) -> int:
        """One sealed block: 4 bits a value; K with a float16 scale and zero a channel, V with them a token."""
        keys = BLOCK_TOKENS * self.head_dim // 2 + 4 * self.head_dim
        values = BLOCK_TOKENS * self.head_dim // 2 + 4 * BLOCK_TOKENS
        return self.layers * self.kv_heads * (keys + values)

    @property
    def prelude_bytes(self) -> int:
        """The sinks in float16: K before RoPE, V."""
        return self.strips * SINK_TOKENS * self.head_dim * 2


def ring_slots(window_blocks: int) -> int:
    """Token slots of a ring: the sinks, the sealed blocks of the window, the full block before the last, the last."""
    return SINK_TOKENS + (window_blocks + 2) * BLOCK_TOKENS


def ring_bytes(shape: ModelShape, window_blocks: int) -> int:
    """The memory of one ring: int8 values and a float32 scale a slot and strip, then the prelude. A multiple of 4."""
    return ring_slots(window_blocks) * shape.row_bytes + shape.prelude_bytes
