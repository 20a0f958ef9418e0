"""What a model takes and gives, and the check that stands before the sandbox.

Rules: no NumPy; nothing reaches a child that its model did not ask for.  The finite check is linear in the bytes whatever
they hold, because they come from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import DTYPE_BYTES, MAX_NAME_CHARS, MAX_RANK, MAX_TENSORS, Tensor, TensorSpec


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors of a model by name. Raises ``RefusedError`` if names repeat, or a dtype or shape cannot be served."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        for kind, specs in (("input", self.inputs), ("output", self.outputs)):
            if not 0 < len(specs) <= MAX_TENSORS:
                raise RefusedError(f"model {kind}s", f"{len(specs)} tensors", f"1 to {MAX_TENSORS}")
            if len({spec.name for spec in specs}) != len(specs):
                raise RefusedError(f"model {kind}s", f"names {[spec.name for spec in specs]}", "each name once")
            for spec in specs:
                _check_spec(kind, spec)


def _check_spec(kind: str, spec: TensorSpec) -> None:
    if not 0 < len(spec.name) <= MAX_NAME_CHARS:
        raise RefusedError(f"model {kind} name", spec.name, f"1 to {MAX_NAME_CHARS} characters")
    if spec.dtype not in DTYPE_BYTES:
        raise RefusedError(f"model {kind} {spec.name}", f"dtype {spec.dtype}", ", ".join(DTYPE_BYTES))
    if len(spec.shape) > MAX_RANK or any(type(n) is not int or n < -1 for n in spec.shape):
        raise RefusedError(f"model {kind} {spec.name}", f"shape {spec.shape}", f"at most {MAX_RANK} dimensions")


def check_inputs(model: str, signature: Signature, inputs: Mapping[str, Tensor]) -> None:
    """Raises ``RefusedError`` naming the tensor, what came and what is allowed, unless ``inputs`` are what ``model`` takes."""
    allowed = ", ".join(f"{spec.name} {spec}" for spec in signature.inputs)
    known = {spec.name for spec in signature.inputs}
    for name in inputs:
        if name not in known:
            raise RefusedError(f"model {model} input {name!r}", "an unknown input", allowed)
    for spec in signature.inputs:
        if spec.name not in inputs:
            raise RefusedError(f"model {model} input {spec.name!r}", "nothing", str(spec), "send every input")
        _check_tensor(f"model {model} input {spec.name!r}", spec, inputs[spec.name])


def _check_tensor(subject: str, spec: TensorSpec, tensor: Tensor) -> None:
    fits = len(tensor.shape) == len(spec.shape) and all(
        got == want or (want == -1 and got > 0) for got, want in zip(tensor.shape, spec.shape, strict=True)
    )
    if tensor.dtype != spec.dtype or not fits:
        raise RefusedError(subject, str(tensor), str(spec))
    if not tensor.size_bytes:
        raise RefusedError(subject, f"{tensor}, which is empty", f"{spec} with at least one element")
    element = first_non_finite(tensor)
    if element is not None:
        raise RefusedError(subject, f"NaN or infinity at element {element}", "finite numbers")


_EXPONENTS: Mapping[str, tuple[int, int, int]] = {
    "float16": (2, 0x7C, 0x00),
    "float32": (4, 0x7F, 0x80),
    "float64": (8, 0x7F, 0xF0),
}
"""IEEE 754 (2019) table 3.5: element bytes, then the exponent's bits in the top byte and in the one below it."""


def _all_set(mask: int) -> bytes:
    return bytes(byte & mask == mask for byte in range(256))


_TABLES = {dtype: (_all_set(top), _all_set(below)) for dtype, (_, top, below) in _EXPONENTS.items()}
_SUSPECTS = {dtype: tuple(bytes([byte]) for byte in range(256) if byte & top == top) for dtype, (_, top, _) in _EXPONENTS.items()}


def first_non_finite(tensor: Tensor) -> int | None:
    """Index of the first NaN or infinity of a float tensor, else ``None``.

    A float is not finite exactly when all its exponent bits are set (IEEE 754, 3.4).  The top bytes are searched first;
    only if one of them could belong to such a number are both exponent bytes of every element compared.
    """
    if tensor.dtype not in _EXPONENTS:
        return None
    width = _EXPONENTS[tensor.dtype][0]
    data = tensor.data if isinstance(tensor.data, bytes) else bytes(tensor.data)
    top = data[width - 1 :: width]
    if not any(suspect in top for suspect in _SUSPECTS[tensor.dtype]):
        return None
    top_table, below_table = _TABLES[tensor.dtype]
    below = data[width - 2 :: width].translate(below_table)
    both = int.from_bytes(top.translate(top_table), "little") & int.from_bytes(below, "little")
    return (both & -both).bit_length() // 8 if both else None
