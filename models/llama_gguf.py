"""A Llama-architecture model in a GGUF file: its shape and its weights, and what of the architecture is not supported.

Rules: everything that the stages of ``models.llama`` cannot express is refused by name when the file is opened, never
approximated: another architecture, RoPE scaling, partial RoPE, biases, experts, tensors of another shape or of unknown use.
GGUF stores q and k rows so that RoPE turns neighbours; they are put back into half-split order here.
Source: llama.cpp's LLM_ARCH_LLAMA and ``LlamaModel.permute`` of its convert_hf_to_gguf.py.
"""

from __future__ import annotations

from math import isfinite

import numpy as np

from edge_agent.core.errors import RefusedError
from edge_agent.core.model_shape import ModelShape
from edge_agent.core.values import bounded
from models.gguf import Gguf, Value
from models.llama import Floats, Layer

ARCHITECTURE = "llama"
EMBEDDING, NORM, HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
LAYER_TENSORS = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip
MAX_EPSILON = 1e-2


class LlamaGguf:
    """The weights of an open GGUF file, as ``models.llama.Weights`` wants them. Raises ``RefusedError`` when it is built."""

    def __init__(self, gguf: Gguf) -> None:
        self._gguf = gguf
        self._refuse_other_architectures()
        self.shape = self._read_shape()
        self.epsilon = self._float("attention.layer_norm_rms_epsilon")
        if not 0 < self.epsilon <= MAX_EPSILON:
            raise self._refused("attention.layer_norm_rms_epsilon", self.epsilon, f"above 0, at most {MAX_EPSILON}")
        self.tied = HEAD not in gguf.tensors
        self._check_tensors()

    def norm(self) -> Floats:
        return self._gguf.rows(NORM)

    def embedding(self, first: int, last: int) -> Floats:
        return self._gguf.rows(EMBEDDING, first, last)

    def head(self, first: int, last: int) -> Floats:
        return self._gguf.rows(EMBEDDING if self.tied else HEAD, first, last)

    def gain(self) -> Floats:
        return np.ones(self.shape.width, np.float32)

    def layer(self, index: int) -> Layer:
        norm, q, k, v, o, mlp_norm, gate, up, down = (self._gguf.rows(f"blk.{index}.{name}.weight") for name in LAYER_TENSORS)
        q, k = half_split(q, self.shape.heads), half_split(k, self.shape.kv_heads)
        return Layer(norm, q, k, v, o, mlp_norm, gate, up, down)

    def _refused(self, key: str, got: object, allowed: str) -> RefusedError:
        return RefusedError(f"{key} of {self._gguf.path.name}", got, allowed, "this model cannot be built yet")

    def _value(self, key: str) -> Value | None:
        return self._gguf.metadata.get(key if "." in key and key.split(".")[0] == "general" else f"{ARCHITECTURE}.{key}")

    def _int(self, key: str) -> int:
        value = self._value(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._refused(key, value, "a whole number")
        return value

    def _float(self, key: str) -> float:
        value = self._value(key)
        if not isinstance(value, float) or not isfinite(value):
            raise self._refused(key, value, "a finite number")
        return value

    def _refuse_other_architectures(self) -> None:
        if (name := self._gguf.metadata.get("general.architecture")) != ARCHITECTURE:
            raise self._refused("general.architecture", name, ARCHITECTURE)
        for key in self._gguf.metadata:
            if key.startswith(f"{ARCHITECTURE}.rope.scaling.") and self._gguf.metadata[key] not in ("none", 0, 1, 1.0):
                raise self._refused(key, self._gguf.metadata[key], "no RoPE scaling")
        if self._value("expert_count") not in (None, 0):
            raise self._refused("expert_count", self._value("expert_count"), "no experts")

    def _read_shape(self) -> ModelShape:
        width, heads = self._int("embedding_length"), self._int("attention.head_count")
        if EMBEDDING not in self._gguf.tensors:
            raise self._refused(EMBEDDING, "no such tensor", "one")
        bounded("attention.head_count", heads, 1, 1024)
        head_dim = self._int("attention.key_length") if self._value("attention.key_length") is not None else width // heads
        shape = ModelShape(
            layers=self._int("block_count"),
            heads=heads,
            kv_heads=self._int("attention.head_count_kv"),
            head_dim=head_dim,
            width=width,
            hidden=self._int("feed_forward_length"),
            vocabulary=self._gguf.tensors[EMBEDDING].shape[0],
            rope_base=self._int("rope.freq_base"),
            context_tokens=self._int("context_length"),
        )
        for key in ("rope.dimension_count", "attention.value_length"):
            if self._value(key) not in (None, shape.head_dim):
                raise self._refused(key, self._value(key), f"the head_dim {shape.head_dim}")
        return shape

    def _check_tensors(self) -> None:
        expected = self._expected()
        for name, shape in expected.items():
            if name not in self._gguf.tensors:
                raise self._refused(name, "no such tensor", f"one of shape {shape}")
            if self._gguf.tensors[name].shape != shape:
                raise self._refused(name, self._gguf.tensors[name].shape, f"shape {shape}")
        if odd := sorted(self._gguf.tensors.keys() - expected.keys()):
            kind = "biases" if odd[0].endswith(".bias") else "RoPE factors" if "rope" in odd[0] else "tensors of unknown use"
            raise self._refused("tensors", f"{len(odd)} {kind}, the first {odd[0]}", "those of a plain Llama")

    def _expected(self) -> dict[str, tuple[int, ...]]:
        s = self.shape
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        shapes: tuple[tuple[int, ...], ...] = (
            (s.width,), (q, s.width), (kv, s.width), (kv, s.width), (s.width, q),
            (s.width,), (s.hidden, s.width), (s.hidden, s.width), (s.width, s.hidden),
        )  # fmt: skip
        table = (s.vocabulary, s.width)
        expected = {EMBEDDING: table, NORM: (s.width,)} | ({} if self.tied else {HEAD: table})
        for index in range(s.layers):
            expected |= {f"blk.{index}.{name}.weight": shape for name, shape in zip(LAYER_TENSORS, shapes, strict=True)}
        return expected


def half_split(w: Floats, heads: int) -> Floats:  # [heads * D, n] -> [heads * D, n]
    """Rows 0, 2, 4, ... of every head come first, then rows 1, 3, 5, ..."""
    rows, columns = w.shape
    return w.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
