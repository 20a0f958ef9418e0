"""Byte-level BPE: text to token ids and back, in pure Python over flat arrays.

Rules: ids equal those of ``tokenizers`` for a SmolLM vocabulary.  Text is split in two stages: every number character stands
alone (``\\p{N}``), then GPT-2's pattern within what is between them; one alternation is wrong on spaces before digits.  Plain
text never gives a special token.  The file is deterministic CBOR with a bound for everything, and is checked whole when it is
read: a table that contradicts itself is refused.  Merges lie in sorted arrays, not in dictionaries of objects: 2 MB, not 20.
Sources: Sennrich et al. 2016 (BPE), GPT-2 (the pattern; bytes as symbols).
"""

from __future__ import annotations

import re
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush

from edge_agent.core.cbor import decode, encode, fields
from edge_agent.core.chat import ChatMessage
from edge_agent.core.errors import RefusedError
from models.chat_template import ChatTemplate
from models.unicode_classes import NEWER_LETTERS, NO_SPACES, NUMBERS

FORMAT = 1
MAX_FILE_BYTES = 32 * 2**20
MAX_VOCABULARY = 2**20
MAX_SPECIALS = 4096
MAX_TOKEN_BYTES = 1024
NO_TOKEN = 2**32 - 1
"""In the table of bytes: this byte has no token, and is dropped from text as the reference does."""
PRE_TOKENIZER = "smollm"
CACHED_WORDS = 4096
CACHED_WORD_BYTES = 48

_NUMBER = re.compile(f"([{NUMBERS}])")
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
_UNLIKE_PYTHON = re.compile(f"[{NEWER_LETTERS}]|[{NO_SPACES}]")


class Tokenizer:
    """A vocabulary with its merges, special tokens and chat template. Make one with ``from_bytes``.

    ``vocabulary``: how many ids there are. ``specials``: ids that no plain text gives. ``stop_ids``: those that end an answer.
    ``begin_ids``: what a raw text begins with (nothing, for SmolLM); a conversation's beginning is the template's.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: Sequence[tuple[int, int]],
        specials: Iterable[int],
        stop_ids: Iterable[int],
        template: ChatTemplate,
        begin_ids: Iterable[int] = (),
    ) -> None:
        """``merges`` pair ids, the first merge is the first to be made. Raises ``RefusedError`` for what fits not together."""
        specials = frozenset(specials)
        ids = {token: number for number, token in enumerate(tokens) if number not in specials}
        made = _merge_table(tokens, merges, ids)
        bytes_ids = array("I", (ids.get(bytes((byte,)), NO_TOKEN) for byte in range(256)))
        self._set(b"".join(tokens), array("H", map(len, tokens)), made, bytes_ids, specials, stop_ids, begin_ids, template)

    def _set(
        self,
        blob: bytes,
        lengths: array[int],
        merges: tuple[array[int], array[int], array[int]],
        byte_ids: array[int],
        specials: Iterable[int],
        stop_ids: Iterable[int],
        begin_ids: Iterable[int],
        template: ChatTemplate,
    ) -> None:
        self._blob, self._lengths, self._byte_ids, self.template = blob, lengths, byte_ids, template
        self._pairs, self._ranks, self._products = merges
        self.specials, self.stop_ids, self.begin_ids = frozenset(specials), frozenset(stop_ids), tuple(begin_ids)
        self.vocabulary = len(lengths)
        self._check()
        offset, self._offsets = 0, array("I", bytes(4 * (self.vocabulary + 1)))
        for number, length in enumerate(lengths):
            offset += length
            self._offsets[number + 1] = offset
        self._check_merges()
        self._longest_bytes = max(lengths)
        self._special_ids = {self.token_bytes(number).decode("utf-8", "replace"): number for number in self.specials}
        texts = sorted(self._special_ids, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else None
        self._short = lru_cache(CACHED_WORDS)(self._merged)

    # -- text to ids

    def encode(self, text: str, special: bool = False, limit: int | None = None) -> list[int]:
        """The ids of ``text``; with ``special`` the texts of special tokens in it become those.

        Raises ``RefusedError`` for more than ``limit`` ids, and for half of a surrogate pair.
        """
        if not special or self._special is None:
            return self._encode_runs([text], limit)
        pieces = self._special.split(text)
        return self._encode_runs([self._special_ids[each] if odd % 2 else each for odd, each in enumerate(pieces)], limit)

    def render(
        self,
        messages: Iterable[ChatMessage],
        continuing: bool = False,
        answer: bool = True,
        begun: str = "",
        limit: int | None = None,
    ) -> list[int]:
        """The ids of a conversation by the chat template; raises as ``encode``.

        ``continuing``: the messages follow a session that ends with an answer not closed yet, which is closed first.
        ``answer``: the model is to speak next, and has said ``begun`` already.
        """
        return self._encode_runs(self.template.parts(messages, continuing, answer, begun), limit)

    def _encode_runs(self, runs: Iterable[str | int], limit: int | None) -> list[int]:
        ids: list[int] = []
        for run in runs:
            if isinstance(run, int):
                ids.append(run)
                self._refuse_over(limit, len(ids))
                continue
            _must_be_text(run)
            self._refuse_over(limit, len(ids) + -(-len(run) // self._longest_bytes))
            for word in words(run):
                data = word.encode()
                ids += self._short(data) if len(data) <= CACHED_WORD_BYTES else self._merged(data)
                self._refuse_over(limit, len(ids))
        return ids

    @staticmethod
    def _refuse_over(limit: int | None, count: int) -> None:
        if limit is not None and count > limit:
            raise RefusedError("length of the text", f"at least {count} tokens", f"at most {limit} tokens", "send less")

    def _merged(self, word: bytes) -> tuple[int, ...]:
        """BPE on one word: of all neighbours the pair that was merged first in training, the leftmost of equal ones, until
        none is left. A heap over a doubly linked list, so that a word of n bytes costs O(n log n)."""
        known = self._byte_ids
        ids = [number for byte in word if (number := known[byte]) != NO_TOKEN]
        before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
        heap = [(*found, at) for at in range(len(ids) - 1) if (found := self._merge(ids[at], ids[at + 1]))]
        heapify(heap)
        while heap:
            rank, product, at = heappop(heap)
            right = after[at]
            if ids[at] < 0 or right >= len(ids) or self._merge(ids[at], ids[right]) != (rank, product):
                continue
            ids[at], ids[right], after[at] = product, -1, after[right]
            if after[at] < len(ids):
                before[after[at]] = at
                if found := self._merge(product, ids[after[at]]):
                    heappush(heap, (*found, at))
            if before[at] >= 0 and (found := self._merge(ids[before[at]], product)):
                heappush(heap, (*found, before[at]))
        return tuple(number for number in ids if number >= 0)

    def _merge(self, left: int, right: int) -> tuple[int, int] | None:
        """Rank and product of a pair, if it has one."""
        pair = left << 32 | right
        at = bisect_left(self._pairs, pair)
        if at == len(self._pairs) or self._pairs[at] != pair:
            return None
        return self._ranks[at], self._products[at]

    # -- ids to text

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; of a special one its text. Raises ``ValueError`` for an id that is not in the vocabulary."""
        if not 0 <= token < self.vocabulary:
            raise ValueError(f"token {token}; the vocabulary has {self.vocabulary}")
        return self._blob[self._offsets[token] : self._offsets[token + 1]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    # -- the file

    def to_bytes(self) -> bytes:
        """Inverse of ``from_bytes``; the same tokenizer gives the same bytes."""
        entry = {
            1: FORMAT, 2: PRE_TOKENIZER, 3: self._blob, 4: _little(self._lengths), 5: _little(self._pairs),
            6: _little(self._ranks), 7: _little(self._products), 8: _little(self._byte_ids), 9: sorted(self.specials),
            10: sorted(self.stop_ids), 11: list(self.begin_ids), 12: self.template.to_value(),
        }  # fmt: skip
        return encode(entry)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Tokenizer:
        """The tokenizer in a file that ``to_bytes`` made. Raises ``RefusedError`` for anything else."""
        entry = fields(decode(data, MAX_FILE_BYTES, subject=_SUBJECT), _SUBJECT, _FIELDS)
        if (entry["format"], entry["pre_tokenizer"]) != (FORMAT, PRE_TOKENIZER):
            raise RefusedError(_SUBJECT, f"format {entry['format']}, {entry['pre_tokenizer']}", f"{FORMAT}, {PRE_TOKENIZER}")
        merges = _array("Q", entry["pairs"]), _array("I", entry["ranks"]), _array("I", entry["products"])
        made = cls.__new__(cls)
        specials, stops, begins = (_ids(entry[name], name) for name in ("specials", "stop_ids", "begin_ids"))
        template = ChatTemplate.from_value(entry["template"])
        made._set(
            entry["tokens"], _array("H", entry["lengths"]), merges, _array("I", entry["bytes"]), specials, stops, begins, template
        )
        return made

    def _check(self) -> None:
        """The bounds, before anything is computed from the tables."""
        lengths, count = self._lengths, len(self._lengths)
        _must(0 < count <= MAX_VOCABULARY, f"{count} tokens", f"1 to {MAX_VOCABULARY} tokens")
        _must(0 < max(lengths) <= MAX_TOKEN_BYTES, f"a token of {max(lengths)} bytes", f"at most {MAX_TOKEN_BYTES} bytes")
        _must(sum(lengths) == len(self._blob), f"{len(self._blob)} bytes of tokens", f"{sum(lengths)} by their lengths")
        sizes = {len(self._pairs), len(self._ranks), len(self._products)}
        _must(len(sizes) == 1, f"merge tables of {sorted(sizes)} entries", "tables of one length")
        _must(len(self._byte_ids) == 256, f"{len(self._byte_ids)} bytes", "256")
        named = [*self.specials, *self.stop_ids, *self.begin_ids, *self._template_ids()]
        known = [number for number in self._byte_ids if number != NO_TOKEN]
        _must(all(number < count for number in named + known), "a token outside the vocabulary", f"ids under {count}")
        _must(not self.specials & set(known), "a special token for a byte", "ordinary tokens for bytes")

    def _check_merges(self) -> None:
        """Strictly rising pairs, each of known ids, whose product is their bytes together and no special token."""
        last = -1
        for pair, rank, product in zip(self._pairs, self._ranks, self._products, strict=True):
            left, right = pair >> 32, pair & 0xFFFFFFFF
            sound = last < pair and max(left, right, product) < self.vocabulary and rank < len(self._pairs)
            sound = sound and product not in self.specials
            joined = sound and self.token_bytes(left) + self.token_bytes(right) == self.token_bytes(product)
            _must(joined, f"the merge {left}, {right} -> {product}", "rising pairs, each with its bytes as the product")
            last = pair
        for byte, number in enumerate(self._byte_ids):
            sound = number == NO_TOKEN or self.token_bytes(number) == bytes((byte,))
            _must(sound, f"token {number} for byte {byte}", "the token that is this byte")

    def _template_ids(self) -> Iterator[int]:
        around = (parts for pair in self.template.around.values() for parts in pair)
        for parts in (self.template.begin, self.template.no_system, self.template.answer, *around):
            yield from (part for part in parts if isinstance(part, int))


_SUBJECT = "tokenizer file"
_FIELDS = {
    1: ("format", int), 2: ("pre_tokenizer", str), 3: ("tokens", bytes), 4: ("lengths", bytes), 5: ("pairs", bytes),
    6: ("ranks", bytes), 7: ("products", bytes), 8: ("bytes", bytes), 9: ("specials", list), 10: ("stop_ids", list),
    11: ("begin_ids", list), 12: ("template", dict),
}  # fmt: skip


def words(text: str) -> Iterator[str]:
    """The pre-tokens of ``text``, in order and without a gap."""
    shadow = _UNLIKE_PYTHON.sub(lambda found: "!" if found[0] < "!" else "a", text)
    if shadow is text or shadow == text:
        yield from _split(text)
        return
    at = 0
    for word in _split(shadow):
        yield text[at : at + len(word)]
        at += len(word)


def _split(text: str) -> Iterator[str]:
    for odd, piece in enumerate(_NUMBER.split(text)):
        if odd % 2:
            yield piece
        elif piece:
            yield from _WORD.findall(piece)


def _must_be_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RefusedError("text", "half of a surrogate pair", "text that UTF-8 can hold") from None


def _must(holds: bool, got: str, allowed: str) -> None:
    if not holds:
        raise RefusedError(_SUBJECT, got, allowed)


def _merge_table(
    tokens: Sequence[bytes], merges: Sequence[tuple[int, int]], ids: dict[bytes, int]
) -> tuple[array[int], array[int], array[int]]:
    """Pairs in rising order, with their ranks and products."""
    table: dict[int, tuple[int, int]] = {}
    for rank, (left, right) in enumerate(merges):
        product = ids.get(tokens[left] + tokens[right])
        _must(product is not None, f"the merge {left}, {right}", "merges whose product is a token")
        table[left << 32 | right] = rank, product or 0
    pairs = sorted(table)
    ranks, products = ([table[pair][part] for pair in pairs] for part in (0, 1))
    return array("Q", pairs), array("I", ranks), array("I", products)


def _little(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def _array(code: str, data: bytes) -> array[int]:
    numbers = array(code)
    _must(len(data) % numbers.itemsize == 0, f"a table of {len(data)} bytes", f"a multiple of {numbers.itemsize} bytes")
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _ids(values: list[object], name: str) -> list[int]:
    _must(len(values) <= MAX_SPECIALS, f"{len(values)} {name}", f"at most {MAX_SPECIALS}")
    _must(all(type(each) is int and each >= 0 for each in values), f"odd {name}", "token ids")
    return values  # type: ignore[return-value]
