"""The tokenizer in a GGUF file's metadata, as ``models.tokenizer`` has it.

Rules: only byte-level BPE with SmolLM's pre-tokenization is read; any other is refused by name.  GGUF writes a token's bytes as
the printable characters that GPT-2 chose for them; special tokens are written as they are.
Source: the tokenizer keys of the GGUF specification; ``bytes_to_unicode`` of GPT-2's encoder.py for the characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_agent.core.errors import RefusedError
from models.chat_template import ASSISTANT
from models.gguf import Gguf, Value
from models.jinja_template import probed
from models.tokenizer import MAX_TOKEN_BYTES, PRE_TOKENIZER, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types of GGUF."""
SPECIAL_TYPES = (UNKNOWN, CONTROL, USER_DEFINED, UNUSED)
END_KEYS = ("eos_token_id", "eot_token_id")
END_TEXTS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "</s>")
"""Special tokens that end an answer by their name, as llama.cpp takes them."""


def read_tokenizer(gguf: Gguf) -> Tokenizer:
    """Raises ``RefusedError`` naming the key for a tokenizer or a chat template that is not supported."""
    reader = _Keys(gguf)
    reader.must_be("model", "gpt2")
    reader.must_be("pre", PRE_TOKENIZER)
    if reader.value("add_space_prefix") not in (None, False):
        raise reader.refused("add_space_prefix", True, "no space before the text")
    texts, types = reader.texts("tokens"), reader.types()
    if len(types) != len(texts):
        raise reader.refused("token_type", f"{len(types)} types", f"one for each of {len(texts)} tokens")
    specials = {text: number for number, (text, kind) in enumerate(zip(texts, types, strict=True)) if kind in SPECIAL_TYPES}
    of_specials = frozenset(specials.values())
    tokens = [text.encode() if number in of_specials else reader.raw(text) for number, text in enumerate(texts)]
    ids = {text: number for number, text in enumerate(texts)}
    begin = [token for token in [reader.token("bos_token_id", len(texts))] if token is not None]
    template = probed(reader.text("chat_template"), specials, _variables(reader, texts))
    stops = {token for key in END_KEYS if (token := reader.token(key, len(texts))) is not None}
    stops |= {specials[text] for text in END_TEXTS if text in specials}
    stops |= {part for part in template.around[ASSISTANT][1][:1] if isinstance(part, int)}
    merges = [reader.merge(pair, ids) for pair in reader.texts("merges")]
    begin_ids = begin if reader.value("add_bos_token") is True else []
    return Tokenizer(tokens, merges, of_specials, stops, template, begin_ids)


def _variables(reader: _Keys, texts: Sequence[str]) -> dict[str, str]:
    """What a chat template may name besides the messages."""
    found = {}
    for name in ("bos_token", "eos_token", "unknown_token", "padding_token"):
        if (token := reader.token(f"{name}_id", len(texts))) is not None:
            found[{"unknown_token": "unk_token", "padding_token": "pad_token"}.get(name, name)] = texts[token]
    return found


def byte_characters() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it is printable Latin-1, else the next from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class _Keys:
    """The ``tokenizer.*`` keys of a file, each with the type that it must have."""

    def __init__(self, gguf: Gguf) -> None:
        self._metadata: Mapping[str, Value] = gguf.metadata
        self._file = gguf.path.name
        self._bytes = byte_characters()

    def refused(self, key: str, got: object, allowed: str) -> RefusedError:
        return RefusedError(f"tokenizer {key} of {self._file}", got, allowed, "this tokenizer cannot be built yet")

    def value(self, key: str) -> Value | None:
        prefix = "tokenizer." if key == "chat_template" else "tokenizer.ggml."
        return self._metadata.get(prefix + key)

    def must_be(self, key: str, allowed: str) -> None:
        if self.value(key) != allowed:
            raise self.refused(key, self.value(key), allowed)

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str):
            raise self.refused(key, type(value).__name__, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.value(key)
        if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
            raise self.refused(key, type(value).__name__, "a list of texts")
        return value  # type: ignore[return-value]

    def types(self) -> list[int]:
        value = self.value("token_type")
        if not isinstance(value, list) or not all(type(each) is int and NORMAL <= each <= BYTE for each in value):
            raise self.refused("token_type", type(value).__name__, f"a list of numbers from {NORMAL} to {BYTE}")
        return value  # type: ignore[return-value]

    def token(self, key: str, count: int) -> int | None:
        value = self.value(key)
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise self.refused(key, value, f"an id under {count}")
        return value

    def raw(self, text: str) -> bytes:
        if not 0 < len(text) <= MAX_TOKEN_BYTES or not all(character in self._bytes for character in text):
            raise self.refused("tokens", text, f"1 to {MAX_TOKEN_BYTES} of GPT-2's characters for bytes")
        return bytes(self._bytes[character] for character in text)

    def merge(self, pair: str, ids: Mapping[str, int]) -> tuple[int, int]:
        left, _, right = pair.partition(" ")
        if left not in ids or right not in ids:
            raise self.refused("merges", pair, "two tokens with a space between them")
        return ids[left], ids[right]
