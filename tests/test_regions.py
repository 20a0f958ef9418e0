"""A region of a picture, cropped where the model is: the way in and back, what is refused, and the landmarks of a face."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_agent.answers import findings_of
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import InferenceResult, Status, Tensor, encoded_image
from models.card import BoxReading, Card, PointReading
from models.catalog import card
from models.geometry import FITS, Box, Size, checked_region, cropped
from models.pictures import TURNS
from models.vision import interpret, placed, prepare
from tests.face_scenes import FACES, FOUND_OVERLAP, overlap, scenes
from tests.fetched import model_path, picture_path
from tests.sandboxes import BUDGET_US, MODEL, run, supervised
from tests.test_vision import colours, encoded, interpreter, opened, outputs_of, photograph, seen

LANDMARKS = "face-landmark"
POINTS = 468
NOSE_TIP, CHIN, RIGHT_EYE, LEFT_EYE, LIPS = 1, 152, 33, 263, 13
"""Of the canonical face mesh of MediaPipe: the outer corners of the eyes, the inner edge of the upper lip."""


def region_of(box: Box | list[float]) -> Any:
    return np.array(box, np.float32)


def landmarks(data: bytes, box: Any = None) -> dict[str, Any]:
    inputs, geometry = prepare(card(LANDMARKS), data, None if box is None else region_of(box))
    return interpret(card(LANDMARKS), outputs_of(LANDMARKS, inputs), geometry)


def without_margin(name: str) -> Card:
    return replace(card(name), prepare=replace(card(name).prepare, margin_permille=0))


# ---- the way in and back

SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
INPUTS = st.tuples(st.integers(8, 512), st.integers(8, 512))
PARTS = st.tuples(*[st.floats(0, 1)] * 4)
MARGINS = st.integers(0, 1000)


def box_in(picture: Size, parts: tuple[float, ...]) -> Box:
    """A box on the picture whose edges are any two of each pair of parts of its sides, at least a hundredth of a pixel apart."""
    (left, right), (top, bottom) = sorted(parts[:2]), sorted(parts[2:])
    edges = [left * picture[0], top * picture[1], right * picture[0], bottom * picture[1]]
    for axis in (0, 1):
        edges[axis] = min(edges[axis], picture[axis] - 0.01)
        edges[axis + 2] = min(float(picture[axis]), max(edges[axis + 2], edges[axis] + 0.01))
    return edges[0], edges[1], edges[2], edges[3]


@given(SIZES, INPUTS, PARTS, MARGINS, st.sampled_from(sorted(FITS)), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_a_place_in_a_region_comes_back_and_the_region_lies_within_the_input(
    picture: Size, size: Size, parts: tuple[float, ...], margin: int, resize: str, u: float, v: float
) -> None:
    region = box_in(picture, parts)
    geometry = cropped(picture, size, resize, region, margin)
    left, top, right, bottom = geometry.shown
    assert 0 <= left <= region[0] < region[2] <= right <= picture[0]
    assert 0 <= top <= region[1] < region[3] <= bottom <= picture[1]
    for start, length, side in zip((geometry.left, geometry.top), geometry.fitted, size, strict=True):
        assert start >= 0
        assert length >= 1
        assert start + length <= side
    x, y = region[0] + u * (region[2] - region[0]), region[1] + v * (region[3] - region[1])
    assert geometry.to_picture(*geometry.to_input(x, y)) == pytest.approx((x, y), abs=1e-6 * max(picture))


@given(SIZES, INPUTS, PARTS, MARGINS)
@settings(deadline=None)
def test_the_middle_of_a_region_is_in_the_middle_of_the_input_though_it_lies_at_an_edge(
    picture: Size, size: Size, parts: tuple[float, ...], margin: int
) -> None:
    region = box_in(picture, parts)
    geometry = cropped(picture, size, "stretch", region, margin)
    middle = geometry.to_input((region[0] + region[2]) / 2, (region[1] + region[3]) / 2)
    for got, side in zip(middle, size, strict=True):
        assert got == pytest.approx(side / 2, abs=1.01), "the edges are rounded to whole pixels"


@given(SIZES, INPUTS, st.sampled_from(sorted(FITS)))
@settings(deadline=None)
def test_the_whole_picture_as_a_region_lies_where_the_picture_lies(picture: Size, size: Size, resize: str) -> None:
    whole = cropped(picture, size, resize, (0.0, 0.0, float(picture[0]), float(picture[1])), 0)
    assert whole == FITS[resize](picture, size)


def test_the_margin_widens_a_region_on_each_side_by_its_own_size() -> None:
    assert cropped((1000, 1000), (100, 100), "stretch", (400.0, 300.0, 500.0, 340.0), 250).shown == (375.0, 290.0, 525.0, 350.0)


def test_what_lies_beyond_the_picture_is_black_and_what_lies_on_it_keeps_its_place() -> None:
    white = encoded(Image.new("RGB", (300, 300), "white"))
    inputs, geometry = prepare(card(LANDMARKS), white, region_of([0, 0, 100, 100]))
    tensor: Any = inputs["input_1"]
    assert (geometry.left, geometry.top, geometry.fitted) == (32, 32, (160, 160)), (
        "192 px show 150, of which 25 are beyond the edge"
    )
    expected = np.zeros((192, 192, 3), np.float32)
    expected[32:, 32:] = 1
    assert np.array_equal(tensor[0], expected)


@pytest.mark.parametrize("box", [(100, 40, 400, 340), (0, 0, 64, 200), (300, 500, 512, 600)])
def test_a_region_is_seen_like_the_picture_cut_out(box: tuple[int, int, int, int]) -> None:
    """The oracle is Pillow's own crop."""
    image = opened("grace_hopper")
    for name in ("blazeface-short", "mobilenet-vww"):
        told: Any = prepare(without_margin(name), encoded(image), region_of(list(map(float, box))))[0]
        cut: Any = prepare(without_margin(name), encoded(image.crop(box)))[0]
        for key in cut:
            assert np.abs(told[key] - cut[key]).mean() < 0.004 * np.ptp(cut[key])


@pytest.mark.parametrize("orientation", [1, *TURNS])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_region_is_of_the_upright_picture_however_the_file_lies(orientation: int, kind: str) -> None:
    """The oracle is the upright picture itself; the sides are odd so that a JPEG's small decoding overhangs."""
    turns_back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    upright = opened("grace_hopper").resize((521, 613))
    turn = turns_back.get(orientation, TURNS.get(orientation))
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 98} if kind == "JPEG" else {}
    box = region_of([20, 330, 480, 600])
    (turned,) = prepare(card("resnet8-cifar10"), encoded(stored, kind, exif=exif, **options), box)[0].values()
    (plain,) = prepare(card("resnet8-cifar10"), encoded(upright), box)[0].values()
    assert np.abs(turned.astype(float) - plain.astype(float)).mean() < 2.5


def test_a_detector_that_is_shown_a_region_tells_places_of_the_whole_picture() -> None:
    inputs, geometry = prepare(card("blazeface-short"), photograph("astronaut"), region_of([120, 30, 340, 250]))
    answer = interpret(card("blazeface-short"), outputs_of("blazeface-short", inputs), geometry)
    assert len(answer["boxes"]) == 1
    assert overlap(FACES["astronaut"][0], tuple(answer["boxes"][0])) > 0.6


# ---- what is no region

BAD_REGIONS: dict[str, tuple[Any, str]] = {
    "NaN": (region_of([float("nan"), 0, 9, 9]), "four finite numbers"),
    "infinity": (region_of([0, 0, float("inf"), 9]), "four finite numbers"),
    "left of nothing": (region_of([-1, 0, 9, 9]), "512 x 512"),
    "above": (region_of([0, -0.5, 9, 9]), "512 x 512"),
    "right of the edge": (region_of([0, 0, 512.5, 9]), "512 x 512"),
    "below the edge": (region_of([0, 0, 9, 513]), "512 x 512"),
    "all of it outside": (region_of([600, 600, 700, 700]), "512 x 512"),
    "inverted across": (region_of([9, 0, 3, 9]), "left < right"),
    "inverted down": (region_of([0, 9, 9, 3]), "top < bottom"),
    "no width": (region_of([5, 0, 5, 9]), "left < right"),
    "no height": (region_of([0, 5, 9, 5]), "top < bottom"),
    "no point even": (region_of([0, 0, 0, 0]), "left < right"),
    "three numbers": (region_of([0, 0, 9]), r"got float32\[3\]; allowed: float32\[4\]"),
    "five numbers": (region_of([0, 0, 9, 9, 9]), r"got float32\[5\]"),
    "two boxes": (np.zeros((2, 4), np.float32), r"got float32\[2, 4\]"),
    "nothing": (np.zeros((0,), np.float32), r"got float32\[0\]"),
    "whole numbers": (np.array([0, 0, 9, 9], np.int32), r"got int32\[4\]"),
    "doubles": (np.array([0, 0, 9, 9], np.float64), r"got float64\[4\]"),
    "halves": (np.array([0, 0, 9, 9], np.float16), r"got float16\[4\]"),
}


@pytest.mark.parametrize("what", list(BAD_REGIONS))
def test_what_is_no_region_is_refused_with_what_came_and_what_is_allowed(what: str) -> None:
    region, told = BAD_REGIONS[what]
    with pytest.raises(RefusedError, match=told) as caught:
        placed(card(LANDMARKS), (512, 512), region)
    assert caught.value.subject == "input 'region'"


def test_a_bad_region_is_refused_by_the_child_and_the_child_lives() -> None:
    picture = encoded_image(photograph("astronaut"))

    async def story() -> None:
        async with supervised(model_path(LANDMARKS).read_bytes(), card=card(LANDMARKS)) as (supervisor, _, reports):
            for region, told in BAD_REGIONS.values():
                bad = Tensor(region.dtype.name, region.shape, region.tobytes())
                with pytest.raises(RefusedError, match=told):
                    await supervisor.invoke(MODEL, {"image": picture, "region": bad}, BUDGET_US)
            with pytest.raises(RefusedError, match="unknown input"):
                await supervisor.invoke(MODEL, {"image": picture, "regions": bad}, BUDGET_US)
            with pytest.raises(RefusedError, match="unknown input"):
                await supervisor.invoke(MODEL, {"region": bad}, BUDGET_US)
            good = Tensor("float32", (4,), struct.pack("<4f", 172, 72, 278, 180))
            found = (await supervisor.invoke(MODEL, {"region": good, "image": picture}, BUDGET_US)).outputs
            assert found["points"].shape == (1, POINTS, 2)
            assert (await supervisor.invoke(MODEL, {"image": picture}, BUDGET_US)).outputs["points"].shape[1:] == (POINTS, 2)
            assert not reports.count_of("died")

    run(story())


@given(st.tuples(*[st.floats(width=32)] * 4), SIZES)
@settings(max_examples=300, deadline=None)
def test_any_four_numbers_are_a_region_on_the_picture_or_refused(numbers: tuple[float, ...], picture: Size) -> None:
    try:
        left, top, right, bottom = checked_region(numbers, picture)
    except RefusedError:
        return
    assert 0 <= left < right <= picture[0] and 0 <= top < bottom <= picture[1]


@given(st.floats(0, 511.5, width=32), st.floats(0, 511.5, width=32), st.sampled_from([1e-30, 1e-4, 0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_the_smallest_regions_are_taken(x: float, y: float, side: float) -> None:
    edges = np.array([x, y, x + side, y + side], np.float32)
    if edges[2] > edges[0] and edges[3] > edges[1]:
        inputs, _ = prepare(card(LANDMARKS), small_picture(), np.minimum(edges, 512))
        assert inputs["input_1"].shape == (1, 192, 192, 3)


@cache
def small_picture() -> bytes:
    return encoded(Image.new("RGB", (512, 512), "red"))


# ---- landmarks


@pytest.mark.parametrize("name", ["astronaut", "grace_hopper"])
@pytest.mark.parametrize("detector", ["blazeface-short", "blazeface-full", "blazeface-back"])
def test_the_points_of_a_face_lie_where_the_detector_saw_its_parts(name: str, detector: str) -> None:
    """Two models that share no weights: the detector's keypoints are the oracle, the mesh's tips of nose and lips the points."""
    face = seen(detector, photograph(name))
    answer = landmarks(photograph(name), face["boxes"][0])
    reading: Any = card(detector).interpret
    parts = dict(zip(reading.keypoints, face["keypoints"][0].tolist(), strict=True))
    points, width = answer["points"][0], float(np.ptp(face["boxes"][0][[0, 2]]))
    assert answer["scores"][0] > 0.9 and answer["labels"].tolist() == [0]
    assert points.shape == (POINTS, 2)
    assert points[NOSE_TIP] == pytest.approx(parts["nose tip"], abs=0.1 * width)
    assert points[LIPS] == pytest.approx(parts["mouth"], abs=0.1 * width)
    assert points[RIGHT_EYE][0] < parts["right eye"][0] < parts["left eye"][0] < points[LEFT_EYE][0]
    assert points[CHIN][1] == points[:, 1].max()


def test_the_points_do_not_depend_on_how_large_the_picture_is() -> None:
    image, box = opened("grace_hopper"), np.array(FACES["grace_hopper"][0], np.float32)
    small = landmarks(encoded(image), box)["points"][0]
    large = landmarks(encoded(image.resize((2048, 2400), Image.Resampling.BILINEAR), "JPEG", quality=95), box * 4)["points"][0]
    assert large / 4 == pytest.approx(small, abs=1.5)


def test_no_face_in_a_region_gives_an_empty_answer_of_the_right_form() -> None:
    answer = landmarks(photograph("chelsea"), [0, 200, 90, 290])
    assert {name: (str(array.dtype), tuple(array.shape)) for name, array in answer.items()} == {
        "points": ("float32", (0, POINTS, 2)),
        "scores": ("float32", (0,)),
        "labels": ("int32", (0,)),
    }


def test_the_quality_on_the_card_is_what_is_measured() -> None:
    faces = iter([truth[0] for _, truth in scenes() if truth])
    found = said = there = 0
    for data, truth in scenes():
        region = np.clip(truth[0] if truth else next(faces), 0, 640)
        points = landmarks(data, region)["points"]
        said, there = said + len(points), there + len(truth)
        for each in points:
            spanned = (*each.min(axis=0).tolist(), *each.max(axis=0).tolist())
            found += bool(truth) and overlap(truth[0], spanned) >= FOUND_OVERLAP
    assert round(2000 * found / (said + there)) == pytest.approx(card(LANDMARKS).quality_permille, abs=15)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(-50, 50, width=32), SIZES)
@settings(max_examples=60, deadline=None)
@example(3.0e38, 9.0, (5000, 5000))
@example(-3.0e38, 9.0, (5000, 5000))
def test_whatever_a_model_says_the_points_are_finite(value: float, logit: float, picture: Size) -> None:
    outputs = {
        "conv2d_20": np.full((1, 1, 1, 3 * POINTS), value, np.float32),
        "conv2d_30": np.full((1, 1, 1, 1), logit, np.float32),
    }
    geometry = placed(card(LANDMARKS), picture, None)
    answer = interpret(card(LANDMARKS), outputs, geometry)
    assert len(answer["points"]) == len(answer["scores"]) == len(answer["labels"]) <= 1
    if abs(logit) > 0.01:
        assert len(answer["points"]) == int(logit > 0)
    assert np.isfinite(answer["points"]).all()


def test_a_person_is_given_the_points_of_each_finding() -> None:
    arrays = {
        "labels": np.array([0, 0], np.int32), "scores": np.array([0.9, 0.8], np.float32),
        "points": np.arange(8, dtype=np.float32).reshape(2, 2, 2),
    }  # fmt: skip
    result = InferenceResult("0" * 32, Status.OK, "pi", LANDMARKS, outputs=tensors(arrays))
    assert [each.points for each in findings_of(result)] == [((0, 1), (2, 3)), ((4, 5), (6, 7))]
    for shape in ((1, 4, 2), (8,), (2, 4, 1)):
        bad = tensors(arrays | {"points": arrays["points"].reshape(shape)})
        with pytest.raises(RefusedError, match="points"):
            findings_of(replace(result, outputs=bad))


def tensors(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {name: Tensor(array.dtype.name, array.shape, array.tobytes()) for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("prepare.margin_permille", 1001, "margin_permille"),
        ("prepare.margin_permille", -1, "margin_permille"),
        ("interpret.score_permille", 0, "score_permille"),
        ("interpret.points", "nothing", "conv2d_20"),
        ("interpret.score", "conv2d_20", "one number"),
        ("outputs.0.shape", [1, 1, 1, 1405], "x, y and depth"),
        ("outputs.0.shape", [1, 1, 1, 3 * 1025], "at most 1024 points"),
        ("labels", ["face", "cat"], "one: points are of a single thing"),
        ("interpret.extra", 1, "extra"),
    ],
)
def test_a_card_of_points_that_breaks_a_rule_is_refused_by_its_field(path: str, value: object, told: str) -> None:
    mapping: Any = card(LANDMARKS).to_mapping()
    *parents, last = path.split(".")
    place = mapping
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    place[last] = value
    with pytest.raises(RefusedError, match=told):
        Card.from_mapping(mapping)


def test_points_are_drawn_where_they_are() -> None:
    from models.annotate import annotate, annotate_all

    grey = encoded(Image.new("RGB", (400, 300), "gray"))
    square = np.array([[[100, 80], [200, 80], [200, 180], [100, 180]]], np.float32)
    answer: Any = {"points": square, "scores": np.float32([0.9]), "labels": np.int32([0])}  # type: ignore[arg-type]
    image = Image.open(io.BytesIO(annotate(grey, card(LANDMARKS), answer)))
    assert all(image.getpixel((x, y)) == (0, 229, 255) for x, y in square[0].astype(int).tolist())
    assert image.getpixel((150, 130)) == (128, 128, 128)
    nothing: Any = {"points": square[:0], "scores": np.zeros(0, np.float32), "labels": np.zeros(0, np.int32)}
    assert colours(Image.open(io.BytesIO(annotate(grey, card(LANDMARKS), nothing)))) == {(128, 128, 128)}
    box: Any = {"boxes": np.float32([[50, 50, 300, 250]]), "scores": np.float32([0.5]), "labels": np.int32([0])}  # type: ignore[arg-type]
    both = Image.open(io.BytesIO(annotate_all(grey, [(card("blazeface-short"), box), (card(LANDMARKS), answer)])))
    assert both.getpixel((100, 80)) == (0, 229, 255) and both.getpixel((300, 150)) == (0, 200, 83)


def test_the_catalog_s_readings_are_of_three_kinds_and_only_points_have_a_margin() -> None:
    assert isinstance(card(LANDMARKS).interpret, PointReading) and card(LANDMARKS).prepare.margin_permille == 250
    assert isinstance(card("blazeface-full").interpret, BoxReading) and card("blazeface-full").prepare.margin_permille == 0
    assert interpreter(LANDMARKS) is not None and picture_path("astronaut").is_file()
