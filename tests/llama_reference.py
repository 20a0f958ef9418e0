"""An independent float model of the Llama architecture, in NumPy alone: what the product's logits are held against.

Rules: a function is one equation, its shapes beside it; float32 weights, float64 sums of angles; nothing is cached or quantized.
T tokens, H heads, G KV heads, D head_dim, W width.  Sources: Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE).
``staged`` runs the product's stages with a float attention between them, so that stages can be judged without the KV ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.llama import Weights

Array = NDArray[Any]


def cos_sin(positions: Sequence[int], head_dim: int, base: float) -> tuple[Array, Array]:  # [T] -> [T, 1, D], [T, 1, D]
    """The first half of sin is negative: turned(x) = x cos + swapped(x) sin."""
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.asarray(positions, np.float64)[:, None, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([cos, cos], 2).astype(np.float32), np.concatenate([-sin, sin], 2).astype(np.float32)


def turned(x: Array, cos: Array, sin: Array) -> Array:  # [T, h, D] -> [T, h, D]
    half = x.shape[-1] // 2
    return x * cos + np.concatenate([x[..., half:], x[..., :half]], -1) * sin


def normed(x: Array, weight: Array, epsilon: float) -> Array:  # [T, W], [W] -> [T, W]
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(q: Array, k: Array, v: Array) -> Array:  # [T, H, D] (scaled), [T, G, D], [T, G, D] -> [T, H * D]
    """Causal, grouped: query head h looks at KV head h // (H / G)."""
    tokens, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out = np.empty_like(q)
    mask = np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1)
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].T + mask
        out[:, head] = softmax(scores) @ v[:, head // group]
    return out.reshape(tokens, heads * head_dim)


def logits(weights: Weights, shape: Any, ids: Sequence[int]) -> Array:  # [T] -> [T, vocabulary]
    """``shape`` is a ``ModelShape`` or has its names."""
    tokens, epsilon = len(ids), weights.epsilon
    cos, sin = cos_sin(range(tokens), shape.head_dim, shape.rope_base)
    x = np.concatenate([weights.embedding(each, each + 1) for each in ids])
    for index in range(shape.layers):
        layer = weights.layer(index)
        h = normed(x, layer.attention_norm, epsilon)
        q = turned((h @ layer.q.T).reshape(tokens, shape.heads, shape.head_dim), cos, sin)
        k = turned((h @ layer.k.T).reshape(tokens, shape.kv_heads, shape.head_dim), cos, sin)
        v = (h @ layer.v.T).reshape(tokens, shape.kv_heads, shape.head_dim)
        x = x + attention(q / np.float32(np.sqrt(shape.head_dim)), k, v) @ layer.o.T
        h = normed(x, layer.mlp_norm, epsilon)
        x = x + (silu(h @ layer.gate.T) * (h @ layer.up.T)) @ layer.down.T
    x = normed(x, weights.norm(), epsilon)
    return x @ weights.head(0, shape.vocabulary).T


def staged(interpreter: Any, shape: Any, ids: Sequence[int], suffix: str = "") -> Array:  # [T] -> [T or 1, vocabulary]
    """Logits through the stages of a ``.tflite`` file; with a static suffix T must be its number of rows.

    Every row that the variant can want is wanted: all of them, or the last for ``_p64``.
    """
    tokens = len(ids)
    cos, sin = cos_sin(range(tokens), shape.head_dim, shape.rope_base)
    wanted = np.array([tokens - 1] if suffix == "_p64" else range(tokens), np.int32)
    stage = interpreter.get_signature_runner(f"stage_00{suffix}")
    out = stage(tokens=np.array(ids, np.int32), cos=cos, sin=sin)
    for index in range(1, shape.layers + 1):
        q, k, v = np.split(out["qkv"], [shape.heads, shape.heads + shape.kv_heads], 1)
        carried = {"x": out["x"], "o": attention(q, k, v)}
        stage = interpreter.get_signature_runner(f"stage_{index:02d}{suffix}")
        out = stage(**carried, cos=cos, sin=sin) if index < shape.layers else stage(**carried, last=wanted)
    return np.asarray(out["logits"])


def cosines(a: Array, b: Array) -> Array:  # [T, n], [T, n] -> [T]
    return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))


def perplexity(rows: Array, ids: Sequence[int]) -> float:  # [T, n], [T]: row t is judged by id t + 1
    z = rows[:-1].astype(np.float64)
    z -= z.max(-1, keepdims=True)
    told = z[np.arange(len(ids) - 1), np.asarray(ids[1:])] - np.log(np.exp(z).sum(-1))
    return float(np.exp(-told.mean()))
