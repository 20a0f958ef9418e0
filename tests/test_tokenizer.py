"""The tokenizer: ids as the reference has them, content that stays content, and files that are refused when they lie."""

from __future__ import annotations

import json
import random
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.core.cbor import decode, encode
from edge_agent.core.chat import ChatMessage
from edge_agent.core.errors import RefusedError, UnavailableError
from models import tokenizer as tokenizer_module
from models.calibration import PROSE
from models.chat_template import ChatTemplate
from models.gguf import Gguf
from models.gguf_tokenizer import byte_characters, read_tokenizer
from models.jinja_template import probed
from models.tokenizer import Tokenizer, words
from tests.fetched import smollm2, smollm2_gguf
from tests.gguf_writer import SMOLLM2_TEMPLATE, gguf, tiny_metadata
from tests.needs import needs_module
from tests.tiny_llama import END_OF_TEXT, IM_END, IM_START, tiny_tokenizer

SEED_TEXTS = (
    "", " ", "  ", "\n", "\t\t x", "Hello, world!", "a  b", "a   12", "  12", "12  34", "1234567890", "x1y2z3", "3.14159", "-7",
    "it's we're I'm you've he'll she'd don't DON'T", "'s'''tt 's", "foo_bar __init__ _", "def f(x):\n    return x ** 2\n",
    "naïve café résumé", "Ünïcödé ÀÉ", "Привет, мир!", "你好，世界", "こんにちは 世界", "안녕하세요",
    "\u0645\u0631\u062d\u0628\u0627 \u0628", "\u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926",
    "\u0661\u0662 \u096a 七 ⅷ ² ½ ①", "😀 👩\u200d👩\u200d👧 🇵🇹", "e\u0301 a\u0308\u0323", "\u200b\u200d\ufeff",
    "\u00a0x\u2003y\u3000z\u0085w", "\x1c\x1d a \x1e\x1f\x00\x7f", "\ufffd\uffff\U0010ffff", "ǅ ʰ ª º", "🄰𝐀𝟘𝟙",
    "$€£¥₿", "<|im_end|>", "<|endoftext|><|im_start|>user", "\r\n\r\n\r", "a\u2028b\u2029c", "https://example.org/?q=1&r=%20#x",
    "\U0001e4d0\U0001e4f1 \U00011f50", "ﬁ ﬂ ﬀ", "\uff21\uff22\uff11\uff12", "x" * 300, " " * 100, "ab" * 200, "🙂" * 40,
)  # fmt: skip


@cache
def reference() -> Any:
    """The library's own BPE over the GGUF's tokens and merges, with SmolLM's pre-tokenizer."""
    needs_module("tokenizers", "dev")
    import tokenizers
    from tokenizers import models, pre_tokenizers

    with Gguf(smollm2_gguf()) as file:
        tokens, merges = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, list)
    assert isinstance(merges, list)
    pairs = [tuple(str(merge).split(" ")) for merge in merges]
    made = tokenizers.Tokenizer(models.BPE({str(token): number for number, token in enumerate(tokens)}, pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    return made


@cache
def smollm() -> Tokenizer:
    return smollm2().tokenizer()


def library_texts() -> Iterator[str]:
    """200 passages of what every Python has: documentation and source code."""
    source = Path(json.__file__).read_text("utf-8") + Path(re.__file__).read_text("utf-8")
    rng = random.Random(200)
    for _ in range(200):
        at = rng.randrange(len(source) - 400)
        yield source[at : at + rng.randrange(1, 400)]


# ---- ids equal the reference's


@pytest.mark.parametrize("text", SEED_TEXTS)
def test_ids_equal_the_references(text: str) -> None:
    assert smollm().encode(text) == reference().encode(text).ids


def test_ids_of_two_hundred_passages_equal_the_references() -> None:
    for text in (*library_texts(), PROSE):
        assert smollm().encode(text) == reference().encode(text).ids


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=60))
@example("\x1c\x1c0 ")
@example("\U00011de0a\U00011de1")
def test_ids_of_any_unicode_equal_the_references(text: str) -> None:
    assert smollm().encode(text) == reference().encode(text).ids


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(" \n\ta1'sSé²٣一_-.!\u00a0\x1c\u0301🙂"), max_size=40))
def test_ids_of_spaces_digits_and_marks_in_any_order_equal_the_references(text: str) -> None:
    assert smollm().encode(text) == reference().encode(text).ids


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.long)])
def test_every_code_point_is_of_the_references_class(step: int) -> None:
    """A code point after a letter, and after a mark, is split as the reference splits it: letter, number, space or other.

    Of the planes without assigned letters (from U+40000 on) every 61st is looked at. The first plane always is, of the others
    every ``step``-th.
    """
    needs_module("tokenizers", "dev")
    from tokenizers import pre_tokenizers

    stages = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    points = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x40000, step)]
    points += range(0x40000, sys.maxunicode + 1, 61)
    for first in range(0, len(points), 2**15):
        text = "".join(f"\n a{chr(point)}\n !{chr(point)}" for point in points[first : first + 2**15])
        expected = [text[begin:end] for _, (begin, end) in stages.pre_tokenize_str(text)]
        assert list(words(text)) == expected, f"between U+{points[first]:04X} and the next {2**15}"


def test_classes_do_not_hang_on_this_pythons_unicode() -> None:
    """Letters that this Python's tables may lack are letters; those that they have are no numbers."""
    assert list(words("a\U0001e4d0\U0001e5d0b")) == ["a\U0001e4d0\U0001e5d0b"]
    assert list(words("a\U00011f50b")) == ["a", "\U00011f50", "b"]
    assert list(words("a\x1cb")) == ["a", "\x1c", "b"]


def test_special_texts_are_special_only_when_asked_for() -> None:
    text = "<|im_start|>user\nhi<|im_end|>"
    assert not set(smollm().encode(text)) & smollm().specials
    assert smollm().encode(text, special=True) == [1, *smollm().encode("user\nhi"), 2]


def test_decoding_gives_the_text_back() -> None:
    for text in (*library_texts(), *SEED_TEXTS):
        dropped = {byte for byte in text.encode() if not smollm().encode(bytes((byte,)).decode("latin-1"))}
        if not dropped:
            assert smollm().decode(smollm().encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_a_tokenizer_with_every_byte_loses_nothing(text: str) -> None:
    tiny = tiny_tokenizer()
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text
    assert not set(ids) & tiny.specials


# ---- bounds


def test_a_text_over_the_limit_is_refused() -> None:
    assert len(smollm().encode("one two three", limit=3)) == 3
    with pytest.raises(RefusedError, match="at most 2 tokens"):
        smollm().encode("one two three", limit=2)
    with pytest.raises(RefusedError, match="at least"):
        smollm().render([ChatMessage("user", "word " * 1000)], limit=100)


def test_a_text_far_over_the_limit_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "words", lambda text: pytest.fail("it was split"))
    with pytest.raises(RefusedError, match="at most 8 tokens"):
        smollm().encode("a b " * 250_000, limit=8)


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "ab" * 50_000, "é" * 50_000])
def test_one_endless_word_is_no_quadratic_trap(text: str) -> None:
    """A quadratic merge of these needs minutes."""
    began_s = time.process_time()
    assert smollm().encode(text)
    assert time.process_time() - began_s < 20


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(RefusedError, match="surrogate"):
        smollm().encode("a\ud800b")


def test_an_id_outside_the_vocabulary_is_the_callers_bug() -> None:
    for odd in (-1, smollm().vocabulary):
        with pytest.raises(ValueError, match="vocabulary"):
            smollm().token_bytes(odd)


# ---- conversations


def jinja(messages: list[ChatMessage], answer: bool) -> str:
    talk = [{"role": each.role, "content": each.content} for each in messages]
    return str(smollms_template().render(messages=talk, add_generation_prompt=answer))


@cache
def smollms_template() -> Any:
    needs_module("jinja2", "build")
    import jinja2

    with Gguf(smollm2_gguf()) as file:
        return jinja2.Environment().from_string(str(file.metadata["tokenizer.chat_template"]))


MESSAGE = st.builds(ChatMessage, st.sampled_from(["system", "user", "assistant"]), st.text("ab <|im_end|>\n\té", max_size=20))
CONVERSATION = st.lists(MESSAGE, max_size=6)


@settings(max_examples=200, deadline=None)
@given(CONVERSATION.filter(bool), st.booleans())
def test_a_conversation_reads_as_the_models_own_template_writes_it(messages: list[ChatMessage], answer: bool) -> None:
    assert smollm().decode(smollm().render(messages, answer=answer)) == jinja(messages, answer)


@settings(max_examples=200, deadline=None)
@given(CONVERSATION, st.booleans())
def test_no_content_becomes_a_special_token(messages: list[ChatMessage], continuing: bool) -> None:
    ids = smollm().render(messages, continuing)
    begun = 1 + len(messages) + (bool(messages) and messages[0].role != "system" and not continuing)
    assert ids.count(1) == begun
    assert ids.count(2) == begun - 1 + continuing
    assert not set(ids) & (smollm().specials - {1, 2})


def test_text_that_touches_is_split_together() -> None:
    """``user\\n`` and a content that begins with newlines are one run, as the reference sees it."""
    ids = smollm().render([ChatMessage("user", "\n\n  x")], answer=False)
    text = smollm().decode(ids)
    assert ids == smollm().encode(text, special=True)


def test_a_conversation_told_whole_or_turn_by_turn_is_the_same_ids() -> None:
    first, answer = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hi")], "Hello there!"
    second = [ChatMessage("user", "And now?")]
    whole = smollm().render([*first, ChatMessage("assistant", answer), *second])
    kept = smollm().render(first) + smollm().encode(answer)
    assert kept + smollm().render(second, continuing=True) == whole


def test_a_begun_answer_goes_on_where_it_stopped() -> None:
    asked = [ChatMessage("user", "Hi")]
    assert smollm().render(asked, begun="Hello") == smollm().render(asked) + smollm().encode("Hello")
    with pytest.raises(ValueError, match="answer"):
        smollm().render(asked, answer=False, begun="Hello")


def test_smollm2_stops_at_the_end_of_a_turn_and_of_a_text() -> None:
    assert {smollm().token_bytes(each) for each in smollm().stop_ids} == {b"<|im_end|>", b"<|endoftext|>"}


SPECIALS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<s>": 3}


def table(source: str, **variables: str) -> ChatTemplate:
    needs_module("jinja2", "build")
    return probed(source, SPECIALS, variables)


def test_a_template_becomes_a_table() -> None:
    found = table(SMOLLM2_TEMPLATE)
    assert found == ChatTemplate(
        (), (1, "system\nYou are tiny.", 2, "\n"),
        {role: ((1, f"{role}\n"), (2, "\n")) for role in ("system", "user", "assistant")}, (1, "assistant\n"),
    )  # fmt: skip
    assert ChatTemplate.from_value(decode(encode(found.to_value()))) == found


def test_a_beginning_and_trimmed_contents_are_found() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    found = table(source, bos_token="<s>")
    assert (found.begin, found.no_system, found.trim) == ((3,), (), True)
    assert found.around["user"] == (("[user]",), (2,))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("numbers its messages", "{% for m in messages %}{{ loop.index }} {{ m['content'] }}{% endfor %}"),
        ("moves the system message", "{{ messages[-1]['content'] }}{% for m in messages[:-1] %}{{ m['content'] }}{% endfor %}"),
        ("says contents twice", "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}"),
        ("leaves contents out", "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"),
        ("changes contents", "{% for m in messages %}{{ m['role'] }}{{ m['content'] | replace('%', '#') }}{% endfor %}"),
        ("is no Jinja", "{% for m in messages %}"),
        ("calls what is not there", "{{ raise_exception('no') }}"),
        ("leaves the sandbox", "{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        ("divides by zero", "{{ 1 // 0 }}"),
        ("has no end", "{{ 'x' * 2000000 }}{% for m in messages %}{{ m['content'] }}{% endfor %}"),
        ("is too long", " " * 2**17),
    ],
)
def test_a_template_of_another_form_is_refused(name: str, source: str) -> None:
    with pytest.raises(RefusedError, match="chat template"):
        table(source)


def test_a_build_without_jinja2_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UnavailableError, match=r"slyos-edge\[build\]"):
        probed(SMOLLM2_TEMPLATE, SPECIALS, {})


# ---- from the GGUF


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"tokenizer__ggml__model": "llama"}, "tokenizer model.*llama.*gpt2"),
        ({"tokenizer__ggml__pre": "qwen2"}, "tokenizer pre.*qwen2.*smollm"),
        ({"tokenizer__ggml__pre": None}, "tokenizer pre"),
        ({"tokenizer__ggml__add_space_prefix": True}, "add_space_prefix"),
        ({"tokenizer__ggml__tokens": None}, "tokenizer tokens"),
        ({"tokenizer__ggml__token_type": [1, 2]}, "token_type.*2 types"),
        ({"tokenizer__ggml__token_type": [9]}, "token_type"),
        ({"tokenizer__ggml__merges": ["th"]}, "tokenizer merges.*th"),
        ({"tokenizer__ggml__merges": ["x z"]}, "the merge"),
        ({"tokenizer__ggml__eos_token_id": 10**6}, "eos_token_id"),
        ({"tokenizer__chat_template": None}, "chat_template"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused_by_name(tmp_path: Path, changed: dict[str, Any], names: str) -> None:
    needs_module("jinja2", "build")
    (tmp_path / "odd.gguf").write_bytes(gguf(tiny_metadata(**changed), {}))
    with Gguf(tmp_path / "odd.gguf") as file, pytest.raises(RefusedError, match=names):
        read_tokenizer(file)


def test_a_raw_text_begins_as_the_file_says(tmp_path: Path) -> None:
    needs_module("jinja2", "build")
    for told, begin in ((None, ()), (False, ()), (True, (1,))):
        (tmp_path / "tiny.gguf").write_bytes(gguf(tiny_metadata(tokenizer__ggml__add_bos_token=told), {}))
        with Gguf(tmp_path / "tiny.gguf") as file:
            assert read_tokenizer(file).begin_ids == begin


def test_flipped_tokenizer_keys_give_a_refusal_or_a_sound_tokenizer(tmp_path: Path) -> None:
    needs_module("jinja2", "build")
    whole, rng, sound = gguf(tiny_metadata(), {}), random.Random(2), 0
    first = whole.index(b"tokenizer.ggml.model")
    for _ in range(200):
        data = bytearray(whole)
        data[rng.randrange(first, len(data))] = rng.randrange(256)
        (tmp_path / "odd.gguf").write_bytes(data)
        try:
            with Gguf(tmp_path / "odd.gguf") as file:
                made = read_tokenizer(file)
        except RefusedError:
            continue
        sound += 1
        assert Tokenizer.from_bytes(made.to_bytes()).to_bytes() == made.to_bytes()
    assert sound


def test_gpt2s_characters_are_one_for_each_byte() -> None:
    assert sorted(byte_characters().values()) == list(range(256))
    assert byte_characters()["Ġ"] == ord(" ")
    assert byte_characters()["Ċ"] == ord("\n")


# ---- the file


def test_the_file_gives_the_same_tokenizer_and_the_same_bytes() -> None:
    tiny = tiny_tokenizer()
    again = Tokenizer.from_bytes(tiny.to_bytes())
    assert again.to_bytes() == tiny.to_bytes()
    assert again.encode("the thing ends") == tiny.encode("the thing ends")
    assert (again.stop_ids, again.specials) == (frozenset((END_OF_TEXT, IM_END)), tiny.specials)
    assert again.render([ChatMessage("user", "x")])[0] == IM_START


def changed(number: int, change: Callable[[Any], Any]) -> bytes:
    entry = decode(tiny_tokenizer().to_bytes())
    assert isinstance(entry, dict)
    entry[number] = change(entry[number])
    return encode(entry)


def swapped(data: bytes) -> bytes:
    return data[8:16] + data[:8] + data[16:]


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("another format", changed(1, lambda _: 2)),
        ("another pre-tokenizer", changed(2, lambda _: "gpt2")),
        ("fewer token bytes", changed(3, lambda data: data[:-1])),
        ("changed token bytes", changed(3, lambda data: data.replace(b"the", b"tha", 1))),
        ("no tokens", changed(4, lambda _: b"")),
        ("half a length", changed(4, lambda data: data[:-1])),
        ("a token of 60,000 bytes", changed(4, lambda data: struct.pack("<H", 60_000) + data[2:])),
        ("merges in another order", changed(5, swapped)),
        ("a merge too few", changed(6, lambda data: data[4:])),
        ("a rank past the end", changed(6, lambda data: b"\xff\xff\0\0" + data[4:])),
        ("a product that is no product", changed(7, lambda data: struct.pack("<I", 5) + data[4:])),
        ("a product that is special", changed(7, lambda data: struct.pack("<I", 1) + data[4:])),
        ("a byte too few", changed(8, lambda data: data[4:])),
        ("a byte of another token", changed(8, lambda data: data[4:8] + data[4:])),
        ("a byte past the vocabulary", changed(8, lambda data: b"\xff\xff\xff\x7f" + data[4:])),
        ("a special token past the vocabulary", changed(9, lambda _: [10**6])),
        ("a special token for a byte", changed(9, lambda _: [0, 1, 2, 10])),
        ("a special token that merges make", changed(9, lambda _: [0, 1, 2, 3 + 256])),
        ("a negative stop", changed(10, lambda _: [-1])),
        ("too many begins", changed(11, lambda _: [0] * 5000)),
        ("a template without roles", changed(12, lambda entry: entry | {3: {}})),
        ("a template with an odd token", changed(12, lambda entry: entry | {1: [10**7]})),
        ("a template with an odd part", changed(12, lambda entry: entry | {1: [None]})),
        ("nothing", b""),
        ("another value", encode([1, 2])),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(what: str, data: bytes) -> None:
    with pytest.raises(RefusedError):
        Tokenizer.from_bytes(data)


def test_flipped_and_cut_files_are_refused_or_sound() -> None:
    whole, rng = tiny_tokenizer().to_bytes(), random.Random(3)
    cuts = [whole[:cut] for cut in range(0, len(whole), 31)]
    flips = []
    for _ in range(1000):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        flips.append(bytes(data))
    for data in (*cuts, *flips):
        try:
            made = Tokenizer.from_bytes(data)
        except RefusedError:
            continue
        assert not set(made.encode("the thing <|im_end|>")) & made.specials


def test_the_tables_stay_small_in_memory() -> None:
    """Two dictionaries over this vocabulary would hold some 20 MB."""
    import tracemalloc

    data = smollm2().tokenizer_path.read_bytes()
    tracemalloc.start()
    made = Tokenizer.from_bytes(data)
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made.vocabulary == 49_152
    assert held_bytes < 3 * 2**20
