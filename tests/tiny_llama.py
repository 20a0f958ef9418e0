"""A tiny random Llama, built by the product's own code for both runtimes in a blink, with a byte-level tokenizer.

Rules: seeded, so that the same seed is the same bytes; it needs no network, no jinja2 and no runtime library.  Its talk is
noise, but lively noise: weights are large enough that the next token depends on all before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.chat import ROLES
from edge_agent.core.model_shape import ModelShape
from models.chat_template import ChatTemplate
from models.language_build import Words, install
from models.language_card import FileEntry, LanguageCard
from models.llama import Layer
from models.tokenizer import Tokenizer

END_OF_TEXT, IM_START, IM_END = range(3)
FIRST_BYTE = 3
MERGED = ("th", "the", " the", "in", "er", "an", "  ", "    ", "ing", " a", "\n\n", " t")
TINY = ModelShape(
    layers=2, heads=6, kv_heads=2, head_dim=16, width=48, hidden=80, vocabulary=FIRST_BYTE + 256 + len(MERGED) + 1,
    rope_base=10_000, context_tokens=8192,
)  # fmt: skip
SYSTEM = "You are tiny."


PLAIN = "".join(letter for letter in map(chr, range(33, 127)) if letter not in "".join(MERGED))
"""Printable, and in no merge: what is made of these tokens is encoded as these tokens again."""
NEVER = 300.0


class RandomWeights:
    """``models.llama.Weights`` from a seeded generator.

    ``says``: the only ids that it ever chooses, whatever the runtime does to the last bits.  The first number of every token's
    state is then a constant, which no layer touches, and the head turns it into a large negative logit for all other ids.
    """

    def __init__(self, shape: ModelShape = TINY, seed: int = 0, tied: bool = True, says: Sequence[int] = ()) -> None:
        self.epsilon, self.tied = 1e-5, tied and not says
        random = np.random.default_rng(seed)

        def matrix(rows: int, columns: int, gain: float = 1.0) -> NDArray[np.float32]:
            return (random.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

        def vector(length: int) -> NDArray[np.float32]:
            return (1 + random.standard_normal(length) / 8).astype(np.float32)

        width, q, kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._embedding, self._norm = matrix(shape.vocabulary, width, 4.0), vector(width)
        self._head = self._embedding if self.tied else matrix(shape.vocabulary, width, 2.0 if says else 4.0)
        self._layers = [
            Layer(
                vector(width), matrix(q, width, 1.5), matrix(kv, width, 1.5), matrix(kv, width), matrix(width, q, 2.0),
                vector(width), matrix(shape.hidden, width), matrix(shape.hidden, width), matrix(width, shape.hidden, 2.0),
            )
            for _ in range(shape.layers)
        ]  # fmt: skip
        if says:
            self._say_only(says)

    def _say_only(self, says: Sequence[int]) -> None:
        self._embedding[:, 0], self._norm[0] = 2.0, 1.0
        for layer in self._layers:
            layer.o[0] = layer.down[0] = 0
        self._head[:, 0] = 0
        others = np.setdiff1d(np.arange(len(self._head)), says)
        self._head[others] = 0
        self._head[others, 0] = -NEVER

    def norm(self) -> NDArray[np.float32]:
        return self._norm

    def embedding(self, first: int, last: int) -> NDArray[np.float32]:
        return self._embedding[first:last]

    def head(self, first: int, last: int) -> NDArray[np.float32]:
        return self._head[first:last]

    def gain(self) -> NDArray[np.float32]:
        return np.ones(len(self._norm), np.float32)

    def layer(self, index: int) -> Layer:
        return self._layers[index]


def tiny_template() -> ChatTemplate:
    """SmolLM2's, with a shorter default."""
    around = {role: ((IM_START, f"{role}\n"), (IM_END, "\n")) for role in ROLES}
    no_system = (IM_START, f"system\n{SYSTEM}", IM_END, "\n")
    return ChatTemplate((), no_system, around, (IM_START, "assistant\n"))


def tiny_tokenizer(vocabulary: int = TINY.vocabulary) -> Tokenizer:
    """Three special tokens, all bytes, a few merges, and filler up to ``vocabulary``."""
    tokens = [b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>", *(bytes((byte,)) for byte in range(256))]
    merges: list[tuple[int, int]] = []
    for merged in (text.encode() for text in MERGED):
        halves = ((merged[:cut], merged[cut:]) for cut in range(len(merged) - 1, 0, -1))
        left, right = next(pair for pair in halves if pair[0] in tokens and pair[1] in tokens)
        merges.append((tokens.index(left), tokens.index(right)))
        tokens.append(merged)
    fillers = [f"<filler {number}>".encode() for number in range(vocabulary - len(tokens))]
    specials = [END_OF_TEXT, IM_START, IM_END, *range(len(tokens), vocabulary)]
    return Tokenizer(tokens + fillers, merges, specials, [END_OF_TEXT, IM_END], tiny_template())


def tiny_model(
    folder: Path, name: str = "tiny", seed: int = 0, shape: ModelShape = TINY, says: str = ""
) -> tuple[LanguageCard, dict[str, Path]]:
    """The card, and the path of each runtime's stages and of the ``tokenizer``, all in ``folder``.

    ``says``: all that it ever says; it never ends an answer by itself then.
    """
    origin = FileEntry("random.gguf", hashlib.sha256(f"tiny {seed}".encode()).hexdigest(), 1)
    words = Words("a tiny random model", quality_source="none: it is noise")
    ids = [FIRST_BYTE + byte for byte in says.encode()]
    card = install(
        RandomWeights(shape, seed, says=ids), shape, tiny_tokenizer(shape.vocabulary), name, folder, words, None, origin
    )
    paths = {runtime: folder / entry.filename for runtime, entry in card.files.items()}
    return card, paths | {"tokenizer": folder / card.tokenizer.filename}
