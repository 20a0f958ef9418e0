"""Inputs that a model does not take are refused before its child sees them, by name and with what would be taken."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import Tensor, TensorSpec
from edge_agent.runtime.signature import Signature, check_inputs, first_non_finite

SIGNATURE = Signature(
    (TensorSpec("image", "float32", (1, 2, 2)), TensorSpec("ids", "int32", (-1, 2))),
    (TensorSpec("scores", "float32", (1, 3)),),
)
IMAGE = Tensor("float32", (1, 2, 2), bytes(16))
IDS = Tensor("int32", (3, 2), bytes(24))
FORMS = {"float16": ("<e", 2), "float32": ("<f", 4), "float64": ("<d", 8)}


def floats(dtype: str, *values: float) -> Tensor:
    return Tensor(dtype, (len(values),), b"".join(struct.pack(FORMS[dtype][0], value) for value in values))


def test_what_the_model_takes_is_taken() -> None:
    check_inputs("m", SIGNATURE, {"image": IMAGE, "ids": IDS})
    check_inputs("m", SIGNATURE, {"ids": IDS, "image": Tensor("float32", (1, 2, 2), memoryview(bytes(16)))})


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("image", Tensor("float64", (1, 2, 2), bytes(32)), r"'image': got float64\[1,2,2\]; allowed: float32\[1,2,2\]"),
        ("image", Tensor("float32", (2, 2), bytes(16)), r"'image': got float32\[2,2\]; allowed: float32\[1,2,2\]"),
        ("image", Tensor("float32", (1, 2, 3), bytes(24)), r"'image': got float32\[1,2,3\]"),
        ("image", Tensor("float32", (1, 0, 2), b""), r"'image': got float32\[1,0,2\]"),
        ("ids", Tensor("int32", (0, 2), b""), r"'ids': got int32\[0,2\]; allowed: int32\[\?,2\]"),
        ("ids", Tensor("int32", (3, 1), bytes(12)), r"'ids': got int32\[3,1\]"),
        ("image", Tensor("float32", (1, 2, 2), struct.pack("<4f", 0, math.nan, 0, 0)), "'image': got NaN .* at element 1"),
        ("image", Tensor("float32", (1, 2, 2), struct.pack("<4f", 0, 0, 0, -math.inf)), "'image': got NaN .* at element 3"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_refused_by_its_name(name: str, tensor: Tensor, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        check_inputs("m", SIGNATURE, {"image": IMAGE, "ids": IDS} | {name: tensor})


def test_a_missing_and_an_unknown_input_are_refused_by_name() -> None:
    with pytest.raises(RefusedError, match=r"'ids': got nothing; allowed: int32\[\?,2\]"):
        check_inputs("m", SIGNATURE, {"image": IMAGE})
    with pytest.raises(RefusedError, match=r"'other': got an unknown input; allowed: image .*, ids"):
        check_inputs("m", SIGNATURE, {"image": IMAGE, "ids": IDS, "other": IDS})


def test_a_tensor_of_zero_size_is_refused_even_where_the_shape_says_so() -> None:
    signature = Signature((TensorSpec("x", "int8", (0,)),), (TensorSpec("y", "int8", (1,)),))
    with pytest.raises(RefusedError, match="empty"):
        check_inputs("m", signature, {"x": Tensor("int8", (0,), b"")})


@pytest.mark.parametrize("dtype", FORMS)
@given(data=st.data())
def test_the_finite_check_agrees_with_arithmetic(dtype: str, data: st.DataObject) -> None:
    width = {"float16": 16, "float32": 32, "float64": 64}[dtype]
    values = data.draw(st.lists(st.floats(width=width), min_size=1, max_size=40))  # type: ignore[arg-type]
    expected = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
    tensor = floats(dtype, *values)
    assert first_non_finite(tensor) == expected
    assert first_non_finite(Tensor(dtype, tensor.shape, memoryview(tensor.data))) == expected


@pytest.mark.parametrize(
    ("dtype", "largest"), [("float16", 65504.0), ("float32", 3.4028234663852886e38), ("float64", 1.7976931348623157e308)]
)
def test_the_largest_numbers_are_finite_and_come_next_to_infinity(dtype: str, largest: float) -> None:
    assert first_non_finite(floats(dtype, *[largest, -largest] * 500)) is None
    assert first_non_finite(floats(dtype, *[largest, -largest] * 500, math.inf)) == 1000


def test_integers_have_no_bad_values() -> None:
    assert first_non_finite(Tensor("int32", (2,), b"\xff" * 8)) is None


@pytest.mark.parametrize(
    "inputs",
    [
        (),
        (TensorSpec("x", "int8", (1,)), TensorSpec("x", "int8", (1,))),
        (TensorSpec("", "int8", (1,)),),
        (TensorSpec("x" * 300, "int8", (1,)),),
        (TensorSpec("x", "complex64", (1,)),),
        (TensorSpec("x", "int8", (1,) * 9),),
        (TensorSpec("x", "int8", (-2,)),),
        tuple(TensorSpec(f"x{i}", "int8", (1,)) for i in range(65)),
    ],
)
def test_a_model_whose_tensors_cannot_be_served_is_refused(inputs: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(RefusedError, match="model input"):
        Signature(inputs, (TensorSpec("y", "int8", (1,)),))
