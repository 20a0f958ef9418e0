"""A value that exists may be used: tensors, limits, requests, results and offers refuse to be built wrong."""

from __future__ import annotations

import dataclasses
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import (
    DTYPE_BYTES,
    INVOKE,
    MAX_DEADLINE_US,
    MAX_RANK,
    MAX_REASON_CHARS,
    MAX_TENSOR_BYTES,
    MAX_TENSORS,
    InferenceRequest,
    InferenceResult,
    Limits,
    ModelOffer,
    Status,
    Tensor,
    bounded,
    failure,
)

ID = "0123456789abcdef" * 2
ONE = Tensor("uint8", (1,), b"\1")


@given(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 5), max_size=4), st.integers(-3, 3))
def test_a_tensors_bytes_fill_its_shape_exactly(dtype: str, shape: list[int], off_by: int) -> None:
    size_bytes = prod(shape) * DTYPE_BYTES[dtype]
    if off_by == 0:
        assert Tensor(dtype, tuple(shape), bytes(size_bytes)).size_bytes == size_bytes
    elif size_bytes + off_by >= 0:
        with pytest.raises(RefusedError, match="tensor data"):
            Tensor(dtype, tuple(shape), bytes(size_bytes + off_by))


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "named"),
    [
        ("complex64", (1,), b"12345678", "tensor dtype"),
        ("", (), b"", "tensor dtype"),
        ("uint8", (-1,), b"", "tensor shape"),
        ("uint8", (True,), b"1", "tensor shape"),
        ("uint8", (1.0,), b"1", "tensor shape"),
        ("uint8", (1,) * (MAX_RANK + 1), b"1", "tensor shape"),
        ("uint8", (MAX_TENSOR_BYTES + 1,), b"", "tensor size"),
        ("float32", (2**62, 2**62, 2**62), b"", "tensor size"),
    ],
)
def test_42_a_tensor_of_wrong_type_or_shape_is_refused_naming_what_is_wrong(
    dtype: str, shape: tuple[int, ...], data: bytes, named: str
) -> None:
    with pytest.raises(RefusedError, match=named):
        Tensor(dtype, shape, data)


def test_a_view_counts_its_bytes_and_not_its_items() -> None:
    view = memoryview(bytes(8)).cast("I")
    assert Tensor("uint32", (2,), view).size_bytes == 8


@pytest.mark.parametrize("number", [True, 1.0, "1", None, -1, 11])
def test_what_is_no_whole_number_within_its_bounds_is_refused(number: object) -> None:
    with pytest.raises(RefusedError, match="thing: got .* allowed: a whole number from 0 to 10 µs"):
        bounded("thing", number, 0, 10, "µs")


@pytest.mark.parametrize(
    "settings",
    [
        {"deadline_us": 0},
        {"deadline_us": MAX_DEADLINE_US + 1},
        {"energy_uj": 0},
        {"energy_uj": 10**12 + 1},
        {"quality_permille": -1},
        {"quality_permille": 1001},
    ],
)
def test_a_limit_out_of_bounds_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(RefusedError, match=next(iter(settings))):
        Limits(**settings)


@pytest.mark.parametrize("request_id", ["", "0" * 31, "0" * 33, "G" * 32, "A" * 32, 7])
def test_a_request_id_is_32_hex_digits(request_id: object) -> None:
    with pytest.raises(RefusedError, match="request id"):
        InferenceRequest(request_id, "detect_faces", {"image": ONE})  # type: ignore[arg-type]


def test_raw_tensors_need_a_model_that_takes_them() -> None:
    with pytest.raises(RefusedError, match="say which model"):
        InferenceRequest(ID, INVOKE, {"x": ONE})


@pytest.mark.parametrize("name", ["", "n" * 257, 7])
def test_an_inputs_name_is_bounded(name: object) -> None:
    with pytest.raises(RefusedError, match="request inputs"):
        InferenceRequest(ID, "detect_faces", {name: ONE})  # type: ignore[dict-item]


def test_the_number_of_inputs_is_bounded() -> None:
    with pytest.raises(RefusedError, match=f"at most {MAX_TENSORS}"):
        InferenceRequest(ID, "detect_faces", {f"t{i}": ONE for i in range(MAX_TENSORS + 1)})


def test_a_request_does_not_change_with_the_mapping_that_it_was_made_of() -> None:
    inputs = {"image": ONE}
    request = InferenceRequest(ID, "detect_faces", inputs)
    inputs["more"] = ONE
    assert list(request.inputs) == ["image"] and request.size_bytes == 1
    with pytest.raises(TypeError):
        request.inputs["more"] = ONE  # type: ignore[index]


def test_a_placed_request_differs_in_its_model_and_what_is_left_of_its_deadline() -> None:
    request = InferenceRequest(ID, "detect_faces", {"image": ONE}, limits=Limits(100, 7, 900))
    assert request.placed("small", 60) == dataclasses.replace(request, model="small", limits=Limits(60, 7, 900))


@pytest.mark.parametrize(
    "settings",
    [
        {"request_id": "x"},
        {"board": "A"},
        {"model": "Not A Model"},
        {"model_digest": b"short"},
        {"busy_us": -1},
        {"energy_uj": -1},
        {"reason": "x" * (MAX_REASON_CHARS + 1)},
        {"outputs": {"": ONE}},
    ],
)
def test_a_result_out_of_bounds_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(RefusedError, match="result"):
        InferenceResult(**{"request_id": ID, "status": Status.OK, "board": "a", **settings})  # type: ignore[arg-type]


@given(st.text() | st.just("\ud800 no text") | st.just("long " * 1000))
def test_a_failure_can_be_built_of_whatever_words_an_error_had(reason: str) -> None:
    result = failure(ID, Status.FAILED, "a", reason)
    assert len(result.reason) <= MAX_REASON_CHARS
    result.reason.encode()
    if len(reason) <= MAX_REASON_CHARS and "\ud800" not in reason:
        assert result.reason == reason


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "Über"},
        {"task": "De"},
        {"digest": b""},
        {"digest": "0" * 32},
        {"quality_permille": 1001},
        {"busy_us": 0},
        {"energy_uj": -1},
    ],
)
def test_an_offer_out_of_bounds_is_refused(settings: dict[str, object]) -> None:
    sound = {"model": "m", "task": "t", "digest": bytes(32), "quality_permille": 1, "busy_us": 1, "energy_uj": 1}
    with pytest.raises(RefusedError):
        ModelOffer(**{**sound, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "model", "serves"),
    [("t", None, True), ("t", "m", True), ("t", "n", False), ("u", None, False), ("u", "m", False), (INVOKE, "m", True)],
)
def test_an_offer_serves_its_task_and_raw_tensors_unless_another_model_is_pinned(
    task: str, model: str | None, serves: bool
) -> None:
    offer = ModelOffer("m", "t", bytes(32), 1, 1, 1)
    assert offer.serves(InferenceRequest(ID, task, {"x": ONE}, model)) is serves
