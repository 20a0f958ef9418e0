"""GGUF files for tests: any metadata, any tensors, and a whole tiny Llama with its tokenizer keys.

Rules: it knows the format from the specification alone and shares nothing with the reader but names; ``encode`` of the types
packs given integers, so that a test can say by hand what must come out.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge_agent.core.model_shape import ModelShape
from models.gguf_tokenizer import byte_characters
from tests.tiny_llama import MERGED, RandomWeights

ALIGNMENT_BYTES = 32
F32, F16, Q4_0, Q4_1, Q8_0, Q6_K, BF16 = 0, 1, 2, 3, 8, 14, 30
UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10

Tensor = tuple[int, tuple[int, ...], bytes]
"""Type, shape in C order, bytes."""

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are tiny.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY_GGUF = ModelShape(
    layers=2, heads=4, kv_heads=2, head_dim=16, width=64, hidden=96, vocabulary=3 + 256 + len(MERGED),
    rope_base=10_000, context_tokens=2048,
)  # fmt: skip


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """A metadata value with its type in front."""
    kind, body = _kind(item)
    return struct.pack("<I", kind) + body


def _kind(item: Any) -> tuple[int, bytes]:
    if isinstance(item, bool):
        return BOOL, struct.pack("<?", item)
    if isinstance(item, int):
        return UINT32, struct.pack("<I", item)
    if isinstance(item, float):
        return FLOAT32, struct.pack("<f", item)
    if isinstance(item, str):
        return STRING, text(item)
    kinds = {_kind(each)[0] for each in item} or {UINT32}
    (kind,) = kinds
    return ARRAY, struct.pack("<IQ", kind, len(item)) + b"".join(_kind(each)[1] for each in item)


def gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value(item) for key, item in metadata.items())
    body = b""
    for name, (kind, shape, data) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(body))
        body += data + bytes(-len(data) % ALIGNMENT_BYTES)
    return head + bytes(-len(head) % ALIGNMENT_BYTES) + body


def f32(array: Any) -> Tensor:
    return F32, np.shape(array), np.asarray(array, "<f4").tobytes()


def tiny_metadata(shape: ModelShape = TINY_GGUF, **changed: Any) -> dict[str, Any]:
    """A Llama's keys; ``changed`` by key with dots as double underscores, ``None`` to leave one out."""
    names = {number: character for character, number in byte_characters().items()}
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(names[byte] for byte in range(256))]
    merges = []
    for merged in ("".join(names[byte] for byte in each.encode()) for each in MERGED):
        cut = next(cut for cut in range(len(merged) - 1, 0, -1) if {merged[:cut], merged[cut:]} <= set(tokens))
        merges.append(f"{merged[:cut]} {merged[cut:]}")
        tokens.append(merged)
    keys = {
        "general.architecture": "llama", "general.name": "tiny", "llama.block_count": shape.layers,
        "llama.context_length": shape.context_tokens, "llama.embedding_length": shape.width,
        "llama.feed_forward_length": shape.hidden, "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads, "llama.rope.freq_base": float(shape.rope_base),
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": shape.head_dim,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3), "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.chat_template": SMOLLM2_TEMPLATE,
    }  # fmt: skip
    keys |= {key.replace("__", "."): item for key, item in changed.items()}
    return {key: item for key, item in keys.items() if item is not None}


def interleaved(w: Any, heads: int) -> Any:
    """Rows of q or k from half-split RoPE order to GGUF's, where neighbours are turned together."""
    rows, columns = w.shape
    return w.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tiny_tensors(shape: ModelShape = TINY_GGUF, weights: RandomWeights | None = None) -> dict[str, Tensor]:
    weights = weights or RandomWeights(shape)
    tensors = {"token_embd.weight": f32(weights.embedding(0, shape.vocabulary)), "output_norm.weight": f32(weights.norm())}
    if not weights.tied:
        tensors["output.weight"] = f32(weights.head(0, shape.vocabulary))
    for index in range(shape.layers):
        layer = weights.layer(index)
        parts: Sequence[tuple[str, Any]] = (
            ("attn_norm", layer.attention_norm), ("attn_q", interleaved(layer.q, shape.heads)),
            ("attn_k", interleaved(layer.k, shape.kv_heads)), ("attn_v", layer.v), ("attn_output", layer.o),
            ("ffn_norm", layer.mlp_norm), ("ffn_gate", layer.gate), ("ffn_up", layer.up), ("ffn_down", layer.down),
        )  # fmt: skip
        tensors |= {f"blk.{index}.{name}.weight": f32(part) for name, part in parts}
    return tensors


def tiny_gguf(**changed: Any) -> bytes:
    return gguf(tiny_metadata(**changed), tiny_tensors())
