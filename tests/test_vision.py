"""From a photograph to what is on it: real models on real photographs, and the laws of every step between."""

from __future__ import annotations

import importlib
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps

from edge_agent.core.errors import RefusedError, UnavailableError
from models import pictures as pictures_module
from models.anchors import ssd_anchors
from models.catalog import Card, card, catalog
from models.detection import MAX_DETECTIONS, decoded, overlaps, sigmoid, suppressed
from models.geometry import letterboxed, stretched
from models.pictures import MAX_PICTURE_BYTES, TURNS, decode
from models.vision import annotate, interpret, pixel_values, prepare
from tests.face_scenes import FACES, f1_permille, overlap
from tests.fetched import model_path, picture_path
from tests.needs import needs

FACE_MODELS = ("blazeface-short", "blazeface-full", "blazeface-back")
Answer = Mapping[str, Any]


@cache
def interpreter(name: str) -> Any:
    """A model in whichever runtime there is."""
    for module in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"):
        try:
            runtime = importlib.import_module(module)
        except ImportError:
            continue
        loaded = runtime.Interpreter(str(model_path(name)), num_threads=1)
        loaded.allocate_tensors()
        return loaded
    needs(False, "no TFLite runtime is installed (pip install ai-edge-litert)")
    return None


def outputs_of(name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    loaded = interpreter(name)
    for detail in loaded.get_input_details():
        loaded.set_tensor(detail["index"], inputs[detail["name"]])
    loaded.invoke()
    return {detail["name"]: loaded.get_tensor(detail["index"]) for detail in loaded.get_output_details()}


def seen(name: str, encoded: bytes) -> dict[str, Any]:
    inputs, geometry = prepare(card(name), encoded)
    return interpret(card(name), outputs_of(name, inputs), geometry)


def photograph(name: str) -> bytes:
    return picture_path(name).read_bytes()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tensor_of(data: bytes) -> Any:
    """The input tensor of a 128 x 128 face model, -1 to 1."""
    return prepare(card("blazeface-short"), data)[0]["input"]


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()))


def opened(name: str) -> Image.Image:
    return Image.open(picture_path(name)).convert("RGB")


# ---- real models on real photographs

SEEN_FACES = {
    ("astronaut", "blazeface-short"): ((177.2, 80.6, 272.0, 175.4), 0.92),
    ("astronaut", "blazeface-full"): ((173.4, 68.0, 279.8, 174.4), 0.94),
    ("astronaut", "blazeface-back"): ((172.4, 73.4, 277.4, 178.4), 0.88),
    ("grace_hopper", "blazeface-short"): ((168.5, 145.3, 365.0, 341.5), 0.95),
    ("grace_hopper", "blazeface-full"): ((157.7, 118.1, 367.5, 328.1), 0.79),
    ("grace_hopper", "blazeface-back"): ((171.3, 139.3, 367.1, 334.7), 0.88),
}
"""What every runtime must give, within a pixel and a half and two percent: taken with ai-edge-litert 2.3."""


@pytest.mark.parametrize(("picture", "model"), SEEN_FACES)
def test_the_face_on_the_photograph_is_found_in_its_place(picture: str, model: str) -> None:
    answer = seen(model, photograph(picture))
    assert len(answer["boxes"]) == 1
    assert overlap(FACES[picture][0], tuple(answer["boxes"][0])) > 0.7
    box, score = SEEN_FACES[picture, model]
    assert answer["boxes"][0] == pytest.approx(box, abs=1.5)
    assert answer["scores"][0] == pytest.approx(score, abs=0.02)
    assert [card(model).labels[label] for label in answer["labels"]] == ["face"]


@pytest.mark.parametrize("model", FACE_MODELS)
def test_the_keypoints_lie_where_their_names_say(model: str) -> None:
    reading: Any = card(model).interpret
    points = dict(zip(reading.keypoints, seen(model, photograph("astronaut"))["keypoints"][0].tolist(), strict=True))
    by_eye = {"right eye": (203, 101), "left eye": (247, 104), "nose tip": (223, 127), "mouth": (223, 146)}
    for name, place in by_eye.items():
        assert points[name] == pytest.approx(place, abs=12), name


def test_a_picture_without_a_face_gives_an_empty_answer_of_the_right_form() -> None:
    answer = seen("blazeface-full", photograph("chelsea"))
    assert {name: (str(array.dtype), tuple(array.shape)) for name, array in answer.items()} == {
        "boxes": ("float32", (0, 4)),
        "scores": ("float32", (0,)),
        "labels": ("int32", (0,)),
        "keypoints": ("float32", (0, 6, 2)),
    }


@pytest.mark.parametrize("model", FACE_MODELS)
def test_the_quality_on_a_card_is_what_is_measured(model: str) -> None:
    measured = f1_permille(lambda scene: seen(model, scene))
    assert measured == pytest.approx(card(model).quality_permille, abs=15)


@pytest.mark.parametrize(
    ("picture", "model", "label", "least"),
    [
        ("chelsea", "resnet8-cifar10", "cat", 0.6),
        ("astronaut", "mobilenet-vww", "person", 0.8),
        ("grace_hopper", "mobilenet-vww", "person", 0.8),
        ("chelsea", "mobilenet-vww", "no person", 0.8),
    ],
)
def test_a_classifier_names_what_is_on_the_photograph(picture: str, model: str, label: str, least: float) -> None:
    answer = seen(model, photograph(picture))
    assert card(model).labels[answer["labels"][0]] == label
    assert answer["scores"][0] >= least
    assert len(answer["scores"]) == len(answer["labels"]) == min(5, len(card(model).labels))
    assert (np.diff(answer["scores"]) <= 0).all()


@pytest.mark.parametrize("name", list(catalog()))
def test_a_card_says_what_the_model_file_takes_and_gives(name: str) -> None:
    loaded, of_card = interpreter(name), card(name)
    sides = (of_card.inputs, loaded.get_input_details()), (of_card.outputs, loaded.get_output_details())
    for told, found in sides:
        in_file = {(each["name"], np.dtype(each["dtype"]).name, tuple(each["shape"].tolist())) for each in found}
        assert {(each.name, each.dtype, each.shape) for each in told} == in_file


def test_an_integer_model_is_fed_and_read_by_its_own_quantization() -> None:
    loaded, reading = interpreter("resnet8-cifar10"), card("resnet8-cifar10")
    step, zero = loaded.get_input_details()[0]["quantization"]
    trained_on = (np.arange(256) - 128) / 128
    fed = pixel_values(reading.prepare.low, reading.prepare.high, "int8").astype(float)
    assert (fed - zero) * step == pytest.approx(trained_on)
    assert pixel_values(-100, 101, "int8")[[0, 1, 2, 3, 255]].tolist() == [-100, -99, -98, -98, 101]
    step, zero = loaded.get_output_details()[0]["quantization"]
    values = np.arange(-128, 118, 25, dtype=np.int8)[None]
    read = interpret(reading, {"Identity_int8": values}, stretched((1, 1), (32, 32)))
    assert read["scores"] == pytest.approx((values[0].astype(float)[::-1] - zero)[:5] * step)


# ---- into the model's input

SIDES = st.integers(1, 5000)
SIZES = st.tuples(SIDES, SIDES)
INPUTS = st.tuples(st.integers(8, 512), st.integers(8, 512))


@given(SIZES, INPUTS, st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_a_place_on_the_picture_comes_back_from_the_letterbox(
    picture: tuple[int, int], size: tuple[int, int], u: float, v: float
) -> None:
    geometry = letterboxed(picture, size)
    x, y = u * picture[0], v * picture[1]
    assert geometry.to_picture(*geometry.to_input(x, y)) == pytest.approx((x, y), abs=1e-6 * max(picture))


@given(SIZES, INPUTS)
@settings(deadline=None)
def test_the_letterbox_holds_the_whole_picture_in_its_aspect_in_the_middle(
    picture: tuple[int, int], size: tuple[int, int]
) -> None:
    geometry = letterboxed(picture, size)
    for side, place, inside in zip(size, (geometry.left, geometry.top), geometry.fitted, strict=True):
        assert 1 <= inside <= side
        assert 0 <= side - inside - 2 * place <= 1
    exact = min(size[0] / picture[0], size[1] / picture[1])
    assert all(abs(inside - whole * exact) <= 1 for inside, whole in zip(geometry.fitted, picture, strict=True))


def test_the_picture_lies_in_the_tensor_where_the_geometry_says() -> None:
    image = Image.new("RGB", (300, 200), "white")
    inputs, geometry = prepare(card("blazeface-short"), encoded(image))
    (tensor,) = inputs.values()
    assert (tensor.shape, str(tensor.dtype)) == ((1, 128, 128, 3), "float32")
    expected = np.full((128, 128, 3), -1, np.float32)
    expected[geometry.top : geometry.top + geometry.fitted[1], geometry.left : geometry.left + geometry.fitted[0]] = 1
    assert np.array_equal(tensor[0], expected)


@pytest.mark.parametrize("size", [(4096, 4800), (3001, 2999), (1283, 957), (517, 603)])
def test_a_large_jpeg_gives_the_same_place_though_it_is_decoded_small(size: tuple[int, int]) -> None:
    """The oracle is the same photograph as PNG, which is decoded whole."""
    big = opened("grace_hopper").resize(size, Image.Resampling.BILINEAR)
    jpeg = seen("blazeface-short", encoded(big, "JPEG", quality=95))
    whole = seen("blazeface-short", encoded(big, "PNG", compress_level=1))
    assert jpeg["boxes"][0] == pytest.approx(whole["boxes"][0], abs=0.006 * max(size))


def test_an_edge_keeps_its_place_to_a_tenth_of_a_pixel_though_the_jpeg_is_decoded_small() -> None:
    """521 px at 1/8 are 65.125 px, which libjpeg gives as 66: what hangs over must not count."""
    stripes = np.zeros((521, 521), np.uint8)
    stripes[:, 469:] = 255
    (tensor,) = prepare(card("resnet8-cifar10"), encoded(Image.fromarray(stripes), "JPEG", quality=100))[0].values()
    dark = (127.0 - tensor[0, 16, :, 0].astype(float)).sum() / 255
    assert dark == pytest.approx(469 / 521 * 32, abs=0.1)


def test_a_large_jpeg_is_really_decoded_small(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded_sizes = []
    real = pictures_module._rgb

    def noting(image: Image.Image) -> Image.Image:
        decoded_sizes.append(image.size)
        return real(image)

    monkeypatch.setattr(pictures_module, "_rgb", noting)
    prepare(card("blazeface-short"), encoded(opened("grace_hopper").resize((2048, 2400)), "JPEG"))
    assert decoded_sizes == [(256, 300)]


@pytest.mark.parametrize("orientation", [1, *TURNS])
def test_a_picture_taken_sideways_is_seen_upright(orientation: int) -> None:
    """The oracle is Pillow's own ImageOps.exif_transpose."""
    turns_back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    upright = opened("grace_hopper")
    turn = turns_back.get(orientation, TURNS.get(orientation))
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "JPEG"):
        data = encoded(stored, kind, exif=exif, **({"quality": 98} if kind == "JPEG" else {}))
        with Image.open(io.BytesIO(data)) as again:
            assert decode(data).tobytes() == ImageOps.exif_transpose(again).convert("RGB").tobytes()
        assert seen("blazeface-short", data)["boxes"][0] == pytest.approx(SEEN_FACES["grace_hopper", "blazeface-short"][0], abs=3)


def test_every_kind_of_picture_is_brought_to_the_same_colours() -> None:
    image = opened("astronaut").resize((128, 128))
    plain = tensor_of(encoded(image))
    alpha = image.copy()
    alpha.putalpha(255)
    for data, tolerance in (
        (encoded(alpha), 0.0),
        (encoded(image.quantize(256)), 0.03),
        (encoded(image.convert("CMYK"), "JPEG", quality=100, subsampling=0), 0.002),
        (encoded(image, "JPEG", quality=100, subsampling=0), 0.005),
        (encoded(image, "JPEG", quality=100, subsampling=0, progressive=True), 0.005),
    ):
        assert np.abs(tensor_of(data) - plain).mean() <= tolerance


def test_grey_of_one_eight_and_sixteen_bits_is_the_same_grey() -> None:
    ramp = np.arange(0, 256, 2, dtype=np.uint8)[None].repeat(128, 0)
    eight = encoded(Image.fromarray(ramp))
    sixteen = encoded(Image.fromarray(ramp.astype(np.uint16) * 256 + 255 - ramp))
    assert sixteen[24] == 16
    (told,), (same,) = (prepare(card("blazeface-short"), data)[0].values() for data in (eight, sixteen))
    assert np.array_equal(told, same)
    assert told[0, 0, :, 0] == pytest.approx(ramp[0] / 127.5 - 1, abs=1e-6)
    (bits,) = prepare(card("blazeface-short"), encoded(Image.new("1", (9, 9), 1)))[0].values()
    assert set(np.unique(bits)) == {1.0}


def test_what_is_transparent_shows_white() -> None:
    clear = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    palette = Image.new("P", (64, 64), 0)
    for data in (encoded(clear), encoded(palette, transparency=0), encoded(Image.new("LA", (64, 64), (0, 0)))):
        assert colours(decode(data)) == {(255, 255, 255)}


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(list(catalog())))
@settings(max_examples=30, deadline=None)
def test_the_smallest_and_thinnest_pictures_are_taken(width: int, height: int, name: str) -> None:
    inputs, geometry = prepare(card(name), encoded(Image.new("RGB", (width, height), "red")))
    assert inputs[card(name).inputs[0].name].shape == card(name).inputs[0].shape
    assert geometry.picture == (width, height)


def test_a_memory_view_is_as_good_as_bytes() -> None:
    data = photograph("grace_hopper")
    (one,), (other,) = (prepare(card("blazeface-short"), each)[0].values() for each in (data, memoryview(data)))
    assert np.array_equal(one, other)


# ---- what is no picture


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_says(width: int, height: int, body: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(body)) + png_chunk(b"IEND", b"")


BAD_PICTURES: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "text": lambda: b"a picture of a cat, honestly",
    "zeros": lambda: bytes(5000),
    "a GIF": lambda: encoded(Image.new("P", (9, 9)), "GIF"),
    "a TIFF": lambda: encoded(Image.new("RGB", (9, 9)), "TIFF"),
    "half a JPEG": lambda: photograph("grace_hopper")[:30_000],
    "half a PNG": lambda: photograph("chelsea")[:100_000],
    "a PNG without pixels": lambda: png_that_says(64, 64),
    "a PNG of no width": lambda: png_that_says(0, 64),
    "a PNG bomb": lambda: png_that_says(60_000, 60_000),
    "a PNG of negative size": lambda: png_that_says(2**31 + 5, 2),
    "a very wide PNG": lambda: encoded(Image.new("RGB", (20_001, 3))),
    "a PNG with a short header": lambda: b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", bytes(4)),
    "a PNG with a nameless chunk": lambda: png_that_says(64, 64, bytes(99)).replace(b"IEND", b"\xab\0\1\xef"),
    "just too many pixels": lambda: png_that_says(5001, 5000),
    "too many bytes": lambda: photograph("chelsea") + bytes(MAX_PICTURE_BYTES),
}


@pytest.mark.parametrize("what", list(BAD_PICTURES))
def test_what_is_no_picture_is_refused_with_what_came_and_what_is_allowed(what: str) -> None:
    for take in (lambda data: prepare(card("blazeface-short"), data), decode):
        with pytest.raises(RefusedError, match="picture: got .*; allowed: "):
            take(BAD_PICTURES[what]())


def test_a_bomb_is_refused_by_its_header_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(Image.Image, "load", never)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with pytest.raises(RefusedError, match="8000 x 8000 pixels"):
        prepare(card("blazeface-short"), png_that_says(8000, 8000, bytes(1000)))


def test_a_picture_beyond_the_memory_of_the_engine_is_refused_and_the_engine_lives(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(encoded(Image.new("RGB", (5000, 4000)), compress_level=1))
    code = (
        "import resource, sys\n"
        "from models.catalog import card\n"
        "from models.vision import prepare\n"
        "from edge_agent.core.errors import RefusedError\n"
        "encoded = open(sys.argv[1], 'rb').read()\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + 30 * 2**20,) * 2)\n"
        "try: prepare(card('blazeface-short'), encoded)\n"
        "except RefusedError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "large.png")], capture_output=True, text=True, check=True)
    assert done.stdout == "picture: got more pixels than there is memory for; allowed: a smaller picture\n"


@cache
def small_files() -> tuple[bytes, ...]:
    image = opened("astronaut").resize((40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    return (
        encoded(image, "JPEG", exif=exif),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image),
        encoded(image.quantize(16), transparency=3),
        encoded(Image.fromarray(np.zeros((9, 9), np.uint16)), exif=exif),
    )


@given(st.integers(0, 5), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8), st.floats(0, 1))
@settings(max_examples=400, deadline=None)
def test_a_damaged_file_is_a_picture_or_a_refusal_and_nothing_else(
    which: int, changes: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(small_files()[which])
    for place, value in changes:
        data[int(place * len(data))] = value
    if kept > 0.5:
        del data[int(kept * len(data)) :]
    for take in (lambda data: prepare(card("resnet8-cifar10"), data), decode):
        try:
            take(bytes(data))
        except RefusedError as error:
            assert str(error).startswith("picture: ")


# ---- from the model's output


def test_anchors_are_the_centres_of_cells_row_by_row() -> None:
    assert ssd_anchors(4, 2, ((2, 2),)).tolist() == [[1, 1], [1, 1], [3, 1], [3, 1]]
    assert ssd_anchors(5, 2, ((2, 1), (4, 1))).tolist() == [[1, 1], [3, 1], [5, 1], [2, 2], [6, 2]]
    assert ssd_anchors(128, 128, ((8, 2), (16, 6))).shape == (896, 2)


def test_a_card_counts_rows_as_anchors_are_laid_where_strides_do_not_divide_the_input() -> None:
    mapping: Any = card("blazeface-short").to_mapping()
    mapping["inputs"][0]["shape"] = [1, 100, 90, 3]
    rows = len(ssd_anchors(90, 100, ((8, 2), (16, 6))))
    for output, columns in zip(mapping["outputs"], (16, 1), strict=True):
        output["shape"] = [1, rows, columns]
    assert Card.from_mapping(mapping).outputs[0].shape == (1, 564, 16)


def test_a_row_is_told_from_its_anchor() -> None:
    raw = np.array([[1, -2, 10, 20, 3, 4]], np.float32)
    assert decoded(raw, np.array([[100, 50]], np.float32)).tolist() == [[[96, 38], [106, 58], [103, 54]]]


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(arrays.arrays(np.float32, st.integers(1, 50), elements=FLOATS))
@settings(deadline=None)
def test_a_sigmoid_is_a_probability_and_keeps_the_order(logits: Any) -> None:
    scores = sigmoid(np.sort(logits))
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (np.diff(scores) >= 0).all()


@st.composite
def rows(draw: st.DrawFn) -> tuple[Any, Any]:
    """Boxes with two keypoints, and scores in which ties are common."""
    count = draw(st.integers(0, 30))
    corner = draw(arrays.arrays(np.float32, (count, 2), elements=st.integers(0, 60).map(float)))
    side = draw(arrays.arrays(np.float32, (count, 2), elements=st.integers(0, 40).map(float)))
    scores = draw(arrays.arrays(np.float32, count, elements=st.integers(1, 31).map(lambda n: n / 32)))
    return np.stack([corner, corner + side, corner + side / 2, corner + side / 3], axis=1), scores


def suppressed_by_definition(points: Any, scores: Any, limit: float) -> list[int]:
    """Plain suppression, one pair at a time: a row stays unless a better one that stays overlaps it."""
    kept: list[int] = []
    for row in sorted(range(len(scores)), key=lambda row: (-scores[row], row)):
        box = tuple(points[row, :2].ravel().tolist())
        others = [tuple(points[other, :2].ravel().tolist()) for other in kept]
        if all(area_of(box) + area_of(other) == 0 or overlap(box, other) <= limit for other in others):
            kept.append(row)
    return kept


def area_of(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


@given(rows(), st.sampled_from([0.1, 0.3, 0.52]))
@settings(deadline=None)
def test_plain_suppression_is_its_definition(drawn: tuple[Any, Any], limit: float) -> None:
    points, scores = drawn
    kept = suppressed_by_definition(points, scores, limit)
    got_points, got_scores = suppressed(points, scores, limit, "plain")
    assert got_points.tolist() == points[kept].tolist()
    assert got_scores.tolist() == scores[kept].tolist()


@given(rows())
@settings(deadline=None)
def test_suppressing_twice_changes_nothing(drawn: tuple[Any, Any]) -> None:
    once = suppressed(*drawn, 0.3, "plain")
    twice = suppressed(*once, 0.3, "plain")
    assert all(np.array_equal(one, two) for one, two in zip(once, twice, strict=True))


@given(rows(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_without_ties_the_order_of_rows_does_not_matter(drawn: tuple[Any, Any], random: Any) -> None:
    points, scores = drawn
    scores = (scores + np.arange(len(scores), dtype=np.float32) / 1024).astype(np.float32)
    order = list(range(len(scores)))
    random.shuffle(order)
    for merge in ("plain", "weighted"):
        one = suppressed(points, scores, 0.3, merge)
        other = suppressed(points[order], scores[order], 0.3, merge)
        assert one[0] == pytest.approx(other[0], rel=1e-5)
        assert one[1].tolist() == other[1].tolist()


@given(rows())
@settings(deadline=None)
def test_weighted_suppression_keeps_the_scores_and_stays_within_the_group(drawn: tuple[Any, Any]) -> None:
    points, scores = drawn
    merged, kept_scores = suppressed(points, scores, 0.3, "weighted")
    assert (np.diff(kept_scores) <= 0).all()
    if len(scores):
        assert kept_scores[0] == scores.max()
        assert (merged >= points.min(axis=0) - 1e-3).all()
        assert (merged <= points.max(axis=0) + 1e-3).all()


def test_two_equal_boxes_are_blended_by_their_scores() -> None:
    points = np.array([[[0, 0], [10, 10]], [[0, 0], [10, 14]], [[50, 50], [60, 60]]], np.float32)
    merged, scores = suppressed(points, np.array([0.75, 0.25, 0.5], np.float32), 0.3, "weighted")
    assert merged.tolist() == [[[0, 0], [10, 11]], [[50, 50], [60, 60]]]
    assert scores.tolist() == [0.75, 0.5]


def test_overlap_of_known_boxes() -> None:
    box = np.array([0, 0, 10, 10], np.float32)
    others = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [10, 0, 20, 10], [3, 3, 3, 3]], np.float32)
    assert overlaps(box, others).tolist() == pytest.approx([1, 1 / 3, 0, 0, 0])
    assert overlaps(others[4], others[4:]).tolist() == [0]


def test_an_answer_is_bounded_however_much_the_model_says() -> None:
    face = card("blazeface-short")
    outputs = {"regressors": np.zeros((1, 896, 16), np.float32), "classificators": np.full((1, 896, 1), 9, np.float32)}
    outputs["regressors"][..., 2:4] = 4
    answer = interpret(face, outputs, letterboxed((640, 480), (128, 128)))
    assert 0 < len(answer["boxes"]) <= MAX_DETECTIONS


@given(arrays.arrays(np.float32, (1, 896, 1), elements=FLOATS, fill=st.just(np.float32(-50))), FLOATS, SIZES)
@settings(max_examples=60, deadline=None)
@example(np.full((1, 896, 1), 9, np.float32), 2.0**100, (640, 480))
@example(np.full((1, 896, 1), 9, np.float32), -(2.0**100), (640, 480))
def test_whatever_a_model_says_the_boxes_lie_on_the_picture(logits: Any, value: float, size: tuple[int, int]) -> None:
    outputs = {"regressors": np.full((1, 896, 16), value, np.float32), "classificators": logits}
    answer = interpret(card("blazeface-short"), outputs, letterboxed(size, (128, 128)))
    left, top, right, bottom = answer["boxes"].T
    assert ((left >= 0) & (left < right) & (right <= size[0])).all()
    assert ((top >= 0) & (top < bottom) & (bottom <= size[1])).all()
    assert np.isfinite(answer["keypoints"]).all()


def test_outputs_that_are_not_the_card_s_are_refused_by_name() -> None:
    geometry = letterboxed((640, 480), (128, 128))
    good = {"regressors": np.zeros((1, 896, 16), np.float32), "classificators": np.zeros((1, 896, 1), np.float32)}
    for name, bad, told in (
        ("regressors", None, "only classificators"),
        ("regressors", np.zeros((1, 895, 16), np.float32), "float32\\[1, 895, 16\\]"),
        ("classificators", np.zeros((1, 896, 1), np.float16), "float16"),
        ("classificators", np.full((1, 896, 1), np.nan, np.float32), "NaN or infinity"),
        ("regressors", np.full((1, 896, 16), np.inf, np.float32), "NaN or infinity"),
    ):
        outputs = {key: array for key, array in (good | {name: bad}).items() if array is not None}
        with pytest.raises(RefusedError, match=f"output {name} of model blazeface-short: got {told}"):
            interpret(card("blazeface-short"), outputs, geometry)


def test_equal_scores_come_in_the_order_of_their_labels() -> None:
    values = np.array([[5, 7, 7, 5, 7, 5, 7, 5, 5, 5]], np.int8)
    answer = interpret(card("resnet8-cifar10"), {"Identity_int8": values}, stretched((9, 9), (32, 32)))
    assert answer["labels"].tolist() == [1, 2, 4, 6, 0]


# ---- drawn on the picture


def drawn(picture: bytes, model: str, answer: Answer, captions: tuple[str, ...] = ()) -> Image.Image:
    return Image.open(io.BytesIO(annotate(picture, card(model), answer, captions)))


def test_a_box_is_drawn_where_it_was_found_and_tagged_above() -> None:
    picture = encoded(Image.new("RGB", (400, 300), "gray"))
    answer = {"boxes": np.float32([[100, 80, 200, 180]]), "scores": np.float32([0.93]), "labels": np.int32([0])}  # type: ignore[arg-type]
    image = drawn(picture, "blazeface-short", answer)
    assert (image.format, image.size) == ("PNG", (400, 300))
    green = (0, 200, 83)
    assert all(image.getpixel(spot) == green for spot in ((100, 130), (200, 130), (150, 180)))
    assert image.getpixel((150, 130)) == image.getpixel((250, 130)) == (128, 128, 128)
    tag = image.crop((102, 60, 140, 79))
    assert green in colours(tag)
    assert min(map(sum, colours(tag))) < 60


def test_nothing_found_leaves_the_picture_and_captions_stand_beneath_it() -> None:
    picture = photograph("chelsea")
    nothing = seen("blazeface-full", picture)
    assert drawn(picture, "blazeface-full", nothing).tobytes() == decode(picture).tobytes()
    with_band = drawn(picture, "blazeface-full", nothing, ("served by board b", "3 ms"))
    width, height = decode(picture).size
    assert with_band.width == width
    assert with_band.height > height + 20
    assert with_band.crop((0, 0, width, height)).tobytes() == decode(picture).tobytes()
    assert len(colours(with_band.crop((0, height, width, with_band.height)))) > 2


def test_a_classifier_s_answer_stands_in_the_band() -> None:
    picture = photograph("chelsea")
    answer = seen("resnet8-cifar10", picture)
    assert drawn(picture, "resnet8-cifar10", answer).height > decode(picture).height + 5 * 11


def test_lines_and_letters_grow_with_the_picture() -> None:
    answer = {"boxes": np.float32([[0.3, 0.3, 0.6, 0.6]]), "scores": np.float32([1]), "labels": np.int32([0])}  # type: ignore[arg-type]
    inked, thick = [], []
    for side in (300, 1500):
        scaled = answer | {"boxes": answer["boxes"] * side}
        image = drawn(encoded(Image.new("L", (side, side))), "blazeface-short", scaled)
        green = (np.asarray(image) == (0, 200, 83)).all(axis=2)
        inked.append(green.mean())
        thick.append(green[side // 2].sum() / 2)
    assert inked[1] == pytest.approx(inked[0], rel=0.5)
    assert thick == [2, 7]


@pytest.mark.parametrize("box", [(0, 0, 399, 299), (-5, -5, 3, 3), (390, 290, 400, 300), (0, 0, 400, 2)])
def test_a_tag_stays_on_the_picture_whole(box: tuple[int, ...]) -> None:
    answer = {"boxes": np.array([box], np.float32), "scores": np.ones(1, np.float32), "labels": np.zeros(1, np.int32)}
    image = drawn(encoded(Image.new("RGB", (400, 300), "gray")), "blazeface-short", answer)
    y, x = np.nonzero(np.asarray(image).max(axis=2) < 60)
    assert len(x) > 30
    assert x.min() > 0 and y.min() > 0 and x.max() < 399 and y.max() < 299


def test_a_picture_that_is_not_there_is_told() -> None:
    with pytest.raises(UnavailableError, match="/no/such/picture.png"):
        annotate("/no/such/picture.png", card("blazeface-short"), {})


def test_a_weighted_and_a_plain_reading_find_the_same_face() -> None:
    """The blend steadies the box; it does not move it elsewhere."""
    weighted = card("blazeface-short")
    reading: Any = weighted.interpret
    plain = replace(weighted, interpret=replace(reading, suppression="plain"))
    inputs, geometry = prepare(weighted, photograph("astronaut"))
    outputs = outputs_of("blazeface-short", inputs)
    one, other = interpret(weighted, outputs, geometry), interpret(plain, outputs, geometry)
    assert one["scores"].tolist() == other["scores"].tolist()
    assert one["boxes"].tolist() != other["boxes"].tolist()
    assert one["boxes"][0] == pytest.approx(other["boxes"][0], abs=8)
