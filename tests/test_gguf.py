"""GGUF: what is read is what was written, and nothing that a file holds can do more than be refused."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.errors import RefusedError, UnavailableError
from models import gguf as gguf_module
from models.gguf import Gguf
from models.gguf_types import TYPES
from models.llama import Layer
from models.llama_gguf import LlamaGguf
from tests.gguf_writer import (
    BF16,
    F16,
    F32,
    Q4_0,
    Q4_1,
    Q6_K,
    Q8_0,
    TINY_GGUF,
    f32,
    gguf,
    tiny_gguf,
    tiny_metadata,
    tiny_tensors,
    value,
)
from tests.tiny_llama import RandomWeights

FLIPS = 1500


def opened(folder: Path, data: bytes) -> Gguf:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return Gguf(path)


def refused(folder: Path, data: bytes) -> str:
    with pytest.raises(RefusedError) as caught:
        opened(folder, data).close()
    return str(caught.value)


# ---- what was written is read


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors_are_read_as_written(tmp_path: Path, version: int) -> None:
    keys = {"a": 7, "b": "x", "c": True, "d": 0.5, "e": [1, 2, 3], "f": ["p", "q"], "g": [True, False], "h": []}
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    with opened(tmp_path, gguf(keys, {"w": f32(array), "v": f32(array[0])}, version)) as file:
        assert dict(file.metadata) == keys
        assert np.array_equal(file.rows("w"), array)
        assert np.array_equal(file.rows("w", 1, 2), array[1:2])
        assert np.array_equal(file.rows("v"), array[0])


def halves(*numbers: float) -> bytes:
    return np.array(numbers, "<f2").tobytes()


def test_every_number_type_of_the_metadata_is_read(tmp_path: Path) -> None:
    forms = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(forms))
    for kind, form in forms.items():
        data += struct.pack("<Q", 2) + f"k{kind % 10}".encode() + struct.pack("<I", kind) + struct.pack(form, 100 + kind % 3)
    data = data.replace(b"k0" + struct.pack("<I", 10), b"ka" + struct.pack("<I", 10))
    data = data.replace(b"k1" + struct.pack("<I", 11), b"kb" + struct.pack("<I", 11))
    data = data.replace(b"k2" + struct.pack("<I", 12), b"kc" + struct.pack("<I", 12))
    with opened(tmp_path, data) as file:
        assert list(file.metadata.values()) == [100 + kind % 3 for kind in forms]


def test_q4_0_is_scale_times_nibble_less_eight() -> None:
    nibbles = bytes(low | high << 4 for low, high in zip(range(16), reversed(range(16)), strict=True))
    got = TYPES[Q4_0].decode(np.frombuffer(halves(0.5) + nibbles, np.uint8))
    assert got.tolist() == [0.5 * (n - 8) for n in (*range(16), *reversed(range(16)))]


def test_q4_1_is_scale_times_nibble_and_a_minimum() -> None:
    nibbles = bytes(low | high << 4 for low, high in zip(range(16), reversed(range(16)), strict=True))
    got = TYPES[Q4_1].decode(np.frombuffer(halves(0.25, -3) + nibbles, np.uint8))
    assert got.tolist() == [0.25 * n - 3 for n in (*range(16), *reversed(range(16)))]


def test_q8_0_is_scale_times_int8() -> None:
    got = TYPES[Q8_0].decode(np.frombuffer(halves(2) + bytes(range(112, 144)), np.uint8))
    assert got.tolist() == [2.0 * (n if n < 128 else n - 256) for n in range(112, 144)]


def test_q6_k_puts_six_bits_together_as_the_reference_does() -> None:
    """ggml's dequantize_row_q6_K, one number after another."""
    rng = random.Random(6)
    low, high, scales = rng.randbytes(128), rng.randbytes(64), rng.randbytes(16)
    expected = [0.0] * 256
    for half in range(2):
        for at in range(32):
            twos, first, second = high[32 * half + at], low[64 * half + at], low[64 * half + at + 32]
            sixes = (first & 15, second & 15, first >> 4, second >> 4)
            for group, four in enumerate(sixes):
                scale = int.from_bytes(scales[8 * half + 2 * group + at // 16 :][:1], "little", signed=True)
                expected[128 * half + 32 * group + at] = 0.5 * scale * ((four | (twos >> 2 * group & 3) << 4) - 32)
    got = TYPES[Q6_K].decode(np.frombuffer(low + high + scales + halves(0.5), np.uint8))
    assert got.tolist() == expected


def test_the_float_types_widen_without_loss() -> None:
    numbers = np.array([1.5, -2.25, 0.0, 1024.0], np.float32)
    assert np.array_equal(TYPES[F32].decode(np.frombuffer(numbers.tobytes(), np.uint8)), numbers)
    assert np.array_equal(TYPES[F16].decode(np.frombuffer(numbers.astype("<f2").tobytes(), np.uint8)), numbers)
    top = (numbers.view(np.uint32) >> 16).astype("<u2")
    assert np.array_equal(TYPES[BF16].decode(np.frombuffer(top.tobytes(), np.uint8)), numbers)


def test_a_llamas_weights_come_back_in_half_split_order(tmp_path: Path) -> None:
    weights = RandomWeights(TINY_GGUF)
    with opened(tmp_path, tiny_gguf()) as file:
        llama = LlamaGguf(file)
        assert llama.shape == TINY_GGUF
        assert llama.tied
        for index in range(TINY_GGUF.layers):
            for name in Layer.__slots__:
                assert np.array_equal(getattr(llama.layer(index), name), getattr(weights.layer(index), name)), name


def test_a_head_of_its_own_is_read(tmp_path: Path) -> None:
    weights = RandomWeights(TINY_GGUF, tied=False)
    with opened(tmp_path, gguf(tiny_metadata(), tiny_tensors(weights=weights))) as file:
        llama = LlamaGguf(file)
        assert not llama.tied
        assert np.array_equal(llama.head(3, 9), weights.head(3, 9))


# ---- what is not supported is refused by name


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"general__architecture": "qwen2"}, "general.architecture.*qwen2.*llama"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type.*yarn"),
        ({"llama__rope__scaling__factor": 4.0}, "rope.scaling.factor.*4"),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count.*8.*head_dim 16"),
        ({"llama__attention__key_length": 15}, "head_dim.*15"),
        ({"llama__attention__value_length": 8}, "value_length"),
        ({"llama__attention__head_count_kv": 3}, "kv_heads.*3.*divisor"),
        ({"llama__attention__head_count": 0}, "head_count"),
        ({"llama__expert_count": 8}, "expert_count.*8"),
        ({"llama__rope__freq_base": 10000.5}, "rope.freq_base.*10000.5.*whole"),
        ({"llama__rope__freq_base": None}, "rope.freq_base"),
        ({"llama__block_count": 3}, "blk.2"),
        ({"llama__block_count": 1}, "unknown use.*blk.1"),
        ({"llama__attention__layer_norm_rms_epsilon": 0.5}, "epsilon.*0.5"),
        ({"llama__feed_forward_length": "many"}, "feed_forward_length.*many"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused_by_name(tmp_path: Path, changed: dict, names: str) -> None:
    with opened(tmp_path, gguf(tiny_metadata(**changed), tiny_tensors())) as file, pytest.raises(RefusedError, match=names):
        LlamaGguf(file)


@pytest.mark.parametrize(
    ("name", "says"), [("blk.0.attn_q.bias", "biases"), ("rope_freqs.weight", "RoPE factors"), ("blk.0.odd.weight", "unknown")]
)
def test_tensors_that_the_stages_have_no_place_for_are_refused(tmp_path: Path, name: str, says: str) -> None:
    data = gguf(tiny_metadata(), tiny_tensors() | {name: f32(np.zeros(64))})
    with opened(tmp_path, data) as file, pytest.raises(RefusedError, match=says):
        LlamaGguf(file)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    data = gguf(tiny_metadata(), tiny_tensors() | {"blk.1.ffn_up.weight": f32(np.zeros((96, 32)))})
    with opened(tmp_path, data) as file, pytest.raises(RefusedError, match=r"blk.1.ffn_up.weight.*\(96, 32\).*\(96, 64\)"):
        LlamaGguf(file)


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path, gguf({}, {"w": f32([[1.0, float("nan")]])})) as file:
        assert file.tensors["w"].shape == (1, 2)
        with pytest.raises(RefusedError, match="not finite"):
            file.rows("w")


# ---- hostile files


def test_a_file_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="nothing.gguf"):
        Gguf(tmp_path / "nothing.gguf")


def header(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def info(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "cut short"),
    "another magic": (b"GGML" + bytes(20), "magic"),
    "version 1": (header(version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), "version"),
    "a billion keys": (header(keys=2**30), "number of keys"),
    "a billion tensors": (header(tensors=2**63), "number of tensors"),
    "a key of 2^60 bytes": (header(keys=1) + struct.pack("<Q", 2**60), "text of bytes"),
    "a key that is no text": (header(keys=1) + struct.pack("<Q", 2) + b"\xff\xfe", "UTF-8"),
    "a value of type 99": (header(keys=1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99), "type 99"),
    "a boolean of 2": (header(keys=1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 7, 2), "boolean"),
    "an array of arrays": (header(keys=1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 9, 1), "array of type 9"),
    "an array past the end": (header(keys=1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**20), "room for"),
    "a vast array": (header(keys=1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**60), "array of items"),
    "a key twice": (header(keys=2) + (struct.pack("<Q", 1) + b"k" + value(1)) * 2, "twice"),
    "a tensor twice": (header(tensors=2) + info(b"w", (1,), 0, 0) * 2 + bytes(99), "twice"),
    "a rank of 9": (header(tensors=1) + struct.pack("<Q", 1) + b"w" + struct.pack("<I", 9), "rank"),
    "a side of 2^63": (header(tensors=1) + info(b"w", (2**63,), 0, 0), "side"),
    "sides that multiply to much": (header(tensors=1) + info(b"w", (400, 400, 400, 400), 0, 0) + bytes(99), "at most the file"),
    "an empty side": (header(tensors=1) + info(b"w", (0,), 0, 0) + bytes(99), "shape"),
    "no side": (header(tensors=1) + info(b"w", (), 0, 0) + bytes(99), "shape"),
    "an unknown type": (header(tensors=1) + info(b"w", (256,), 12, 0) + bytes(999), "type 12.*Q4_1"),
    "part of a block": (header(tensors=1) + info(b"w", (33,), 2, 0) + bytes(99), "multiple of 32"),
    "an odd offset": (header(tensors=1) + info(b"w", (1,), 0, 7) + bytes(99), "multiple of 32"),
    "an offset past the end": (header(tensors=1) + info(b"w", (1,), 0, 2**40) + bytes(99), "at most the file"),
    "an alignment of 3": (gguf({"general.alignment": 3}, {"w": f32([1.0])}), "alignment"),
    "an alignment of 0": (gguf({"general.alignment": 0}, {}), "alignment"),
    "an alignment of text": (gguf({"general.alignment": "32"}, {}), "alignment"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_where_it_is_told(tmp_path: Path, lie: str) -> None:
    data, told = LIES[lie]
    assert re.search(told, refused(tmp_path, data)), refused(tmp_path, data)


def test_a_file_over_the_bound_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_module, "MAX_FILE_BYTES", 100)
    assert "at most 100 bytes" in refused(tmp_path, bytes(101))


def looked_at(folder: Path, data: bytes, read: Callable[[LlamaGguf], object]) -> bool:
    """Whether the file is sound; anything but a refusal passes through."""
    try:
        with opened(folder, data) as file:
            for name in file.tensors:
                file.rows(name)
            read(LlamaGguf(file))
    except RefusedError as error:
        assert len(str(error)) < 2000
        return False
    return True


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = tiny_gguf()
    head = whole.index(struct.pack("<f", RandomWeights(TINY_GGUF).embedding(0, 1)[0, 0]))
    cuts = [*range(0, head, 7), *range(head, len(whole), 4001), len(whole) - 1]
    assert not any(looked_at(tmp_path, whole[:cut], lambda llama: None) for cut in cuts)
    assert looked_at(tmp_path, whole, lambda llama: llama.layer(0))


def test_flipped_bytes_give_a_refusal_or_a_sound_model(tmp_path: Path) -> None:
    whole, rng = tiny_gguf(), random.Random(1)
    head = whole.index(struct.pack("<f", RandomWeights(TINY_GGUF).embedding(0, 1)[0, 0]))
    sound = 0
    for _ in range(FLIPS):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 4))):
            data[rng.randrange(head)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        sound += looked_at(tmp_path, bytes(data), lambda llama: llama.layer(llama.shape.layers - 1))
    assert 0 < sound < FLIPS


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_after_the_magic_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    looked_at(tmp_path_factory.getbasetemp(), b"GGUF\x03\0\0\0" + data, lambda llama: None)
