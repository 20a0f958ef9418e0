"""The values that travel through every floor: tensors, requests, results.

Rules: frozen, and validated when built, so that a value which exists is a value that may be used.  No NumPy: tensors are
bytes with a dtype and a shape (little endian, C order), because the agent process holds no array library.
Sizes are bounded here, by name and with their unit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from math import prod
from types import MappingProxyType

from edge_agent.core.errors import RefusedError, shown

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "float16": 2, "float32": 4, "float64": 8,
        "int8": 1, "int16": 2, "int32": 4, "int64": 8,
        "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
        "bool": 1,
    }
)  # fmt: skip
MAX_RANK = 8
MAX_TENSOR_BYTES = 64 * 2**20
MAX_TENSORS = 64
MAX_NAME_CHARS = 256
DIGEST_BYTES = 32
MAX_COST = 10**15
MAX_REASON_CHARS = 2048
MAX_BOARDS = 1024
"""In one fleet."""
MAX_DEADLINE_US = 3_600_000_000
DEFAULT_DEADLINE_US = 10_000_000
MAX_SHAPE = 127
MAX_TABLE_BYTES = 8 * 2**20
"""Of the agreed placement table: what can be made can be kept by a ledger."""
MAX_SHAPES = 8
"""That a board tells of, for one model."""
MAX_MEASURED = 2**31
MAX_PARALLEL = 256
"""Jobs of one model that a board may run at once."""
MAX_PART_CHARS = 16_384
MAX_ANSWER_CHARS = 2**20
MAX_ANSWER_TOKENS = 2**20
MAX_PARENTS = 16
"""Receipts that the inputs of one request came from."""
MAX_RECEIPT_BYTES = 4096
"""As it is signed."""

BOARD_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
TASK_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
REQUEST_ID = re.compile(r"[0-9a-f]{32}")
CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SESSION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")


class TrustTier(IntEnum):
    """What the appraisal of a board says of it (AR4SI, draft-ietf-rats-ar4si), from the worst to the best."""

    CONTRAINDICATED = 0
    NONE = 1
    """Nobody has appraised it."""
    WARNING = 2
    AFFIRMING = 3


class DataClass(StrEnum):
    """How far the inputs of a request may travel."""

    PUBLIC = "public"
    """Anywhere, a cloud included."""
    PRIVATE = "private"
    """The boards of this fleet."""
    LOCAL = "local"
    """The board where it came in."""


INVOKE = "invoke"
"""The task of a request that brings a pinned model's own input tensors and wants its output tensors."""


def checked(pattern: re.Pattern[str], subject: str, text: object) -> str:
    """``text`` if the whole of it matches ``pattern``; raises ``RefusedError`` naming ``subject`` otherwise."""
    if isinstance(text, str) and pattern.fullmatch(text):
        return text
    raise RefusedError(subject, shown(text), f"text matching {pattern.pattern}")


def bounded(subject: str, number: object, low: int, high: int, unit: str = "") -> int:
    """``number`` if it is an int in ``[low, high]``; raises ``RefusedError`` naming ``subject`` otherwise."""
    if isinstance(number, int) and not isinstance(number, bool) and low <= number <= high:
        return number
    raise RefusedError(subject, shown(number), f"a whole number from {low} to {high} {unit}".rstrip())


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model takes or gives. A dimension of -1 may have any size from 1 up."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join('?' if n < 0 else str(n) for n in self.shape)}]"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array as bytes: ``data`` holds ``prod(shape)`` little-endian elements of ``dtype`` in C order.

    Raises ``RefusedError`` for an unknown dtype, a bad shape, or bytes that do not fill the shape.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview = field(repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise RefusedError("tensor dtype", self.dtype, ", ".join(DTYPE_BYTES))
        if len(self.shape) > MAX_RANK or any(type(n) is not int or n < 0 for n in self.shape):
            raise RefusedError("tensor shape", self.shape, f"at most {MAX_RANK} dimensions, each 0 or more")
        expected_bytes = prod(self.shape) * DTYPE_BYTES[self.dtype]
        if expected_bytes > MAX_TENSOR_BYTES:
            raise RefusedError("tensor size", f"{expected_bytes} bytes", f"at most {MAX_TENSOR_BYTES} bytes")
        if self.size_bytes != expected_bytes:
            raise RefusedError(
                "tensor data", f"{self.size_bytes} bytes", f"{expected_bytes} bytes for {self.dtype}{list(self.shape)}"
            )

    @property
    def size_bytes(self) -> int:
        return self.data.nbytes if isinstance(self.data, memoryview) else len(self.data)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def encoded_image(data: bytes) -> Tensor:
    """A JPEG or PNG file as the tensor that the picture tasks take as ``image``: uint8, shape [bytes]."""
    return Tensor("uint8", (len(data),), data)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may cost: a deadline counted from its submission, an energy ceiling, a floor under model quality, and a
    floor under the appraisal of the board that runs it; a contraindicated board runs nothing."""

    deadline_us: int = DEFAULT_DEADLINE_US
    energy_uj: int | None = None
    quality_permille: int = 0
    trust: TrustTier = TrustTier.NONE

    def __post_init__(self) -> None:
        bounded("limit deadline_us", self.deadline_us, 1, MAX_DEADLINE_US, "µs")
        bounded("limit quality_permille", self.quality_permille, 0, 1000)
        if self.energy_uj is not None:
            bounded("limit energy_uj", self.energy_uj, 1, 10**12, "µJ")
        if not isinstance(self.trust, TrustTier) or self.trust is TrustTier.CONTRAINDICATED:
            raise RefusedError("limit trust", shown(self.trust), "none, warning or affirming")


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """The unit that is scheduled.

    ``task`` names what is wanted (``detect_faces``, or ``invoke`` for raw tensors of a pinned ``model``); without a pinned
    ``model`` the choice among the models that do the task is part of the placement.  ``session`` names the talk that a turn
    belongs to, and ``answer_tokens`` how long its answer may be (0: unknown), so that the placement need not read the turn.
    ``data`` says how far the inputs may travel.  ``parents`` are the digests of the receipts that the inputs come from, upstream
    in a pipeline.  ``recheck``: a board that has the inputs may run them once more to see whether the answer is right.
    """

    request_id: str
    task: str
    inputs: Mapping[str, Tensor]
    model: str | None = None
    limits: Limits = Limits()
    session: str = ""
    data: DataClass = DataClass.PRIVATE
    answer_tokens: int = 0
    parents: tuple[bytes, ...] = ()
    recheck: bool = True
    size_bytes: int = field(init=False, compare=False)
    """Of all inputs together."""

    def __post_init__(self) -> None:
        checked(REQUEST_ID, "request id", self.request_id)
        checked(TASK_NAME, "task", self.task)
        if self.model is not None:
            checked(MODEL_NAME, "model", self.model)
        elif self.task == INVOKE:
            raise RefusedError("request", "task 'invoke' without a model", "a model name", "say which model takes the tensors")
        if self.session:
            checked(SESSION_NAME, "session", self.session)
        if self.data not in list(DataClass):
            raise RefusedError("data class", shown(self.data), ", ".join(DataClass))
        bounded("request answer_tokens", self.answer_tokens, 0, MAX_ANSWER_TOKENS, "tokens")
        if len(self.parents) > MAX_PARENTS or any(len(each) != DIGEST_BYTES for each in self.parents):
            allowed = f"at most {MAX_PARENTS} digests of {DIGEST_BYTES} bytes"
            raise RefusedError("request parents", f"{len(self.parents)} of {list(map(len, self.parents))} bytes", allowed)
        object.__setattr__(self, "inputs", _named_tensors("request inputs", self.inputs))
        object.__setattr__(self, "size_bytes", sum(tensor.size_bytes for tensor in self.inputs.values()))

    def placed(self, model: str, budget_us: int) -> InferenceRequest:
        """This request as it is sent to the board that shall run it: the model chosen, the deadline what is left of it."""
        return replace(self, model=model, limits=replace(self.limits, deadline_us=budget_us))


class Status(StrEnum):
    OK = "ok"
    FAILED = "failed"
    """It was tried, and the board or the model could not do it."""
    REFUSED = "refused"
    """The request itself is at fault; trying again elsewhere gives the same answer."""
    SHED = "shed"
    """No board can serve it within its limits now."""


class EnergyKind(StrEnum):
    MEASURED = "measured"
    ESTIMATED = "estimated"
    EMULATED = "emulated"


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """The one answer to a request: outputs when ``status`` is OK, else a ``reason`` for a person to read.

    ``receipt``: what the board that ran it signed of that (``attest.receipts``); empty where nothing ran.
    """

    request_id: str
    status: Status
    board: str
    model: str = ""
    model_digest: bytes = b""
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    busy_us: int = 0
    energy_uj: int = 0
    energy_kind: EnergyKind = EnergyKind.ESTIMATED
    reason: str = ""
    receipt: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        checked(REQUEST_ID, "result's request id", self.request_id)
        checked(BOARD_ID, "result's board", self.board)
        if self.model:
            checked(MODEL_NAME, "result's model", self.model)
        if len(self.model_digest) not in (0, DIGEST_BYTES):
            raise RefusedError("result's model digest", f"{len(self.model_digest)} bytes", f"none or {DIGEST_BYTES} bytes")
        if len(self.reason) > MAX_REASON_CHARS:
            raise RefusedError("result's reason", f"{len(self.reason)} characters", f"at most {MAX_REASON_CHARS}")
        if len(self.receipt) > MAX_RECEIPT_BYTES:
            raise RefusedError("result's receipt", f"{len(self.receipt)} bytes", f"at most {MAX_RECEIPT_BYTES} bytes")
        bounded("result busy_us", self.busy_us, 0, 10**12, "µs")
        bounded("result energy_uj", self.energy_uj, 0, 10**15, "µJ")
        object.__setattr__(self, "outputs", _named_tensors("result outputs", self.outputs))


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """Text of an answer that is still being made: what stands at ``offset`` characters from the answer's beginning.

    ``tokens`` is how many were made for the answer up to the end of this part.  Parts may be lost, repeated and overtaken; the
    result holds the whole.
    """

    request_id: str
    offset: int
    text: str
    tokens: int

    def __post_init__(self) -> None:
        checked(REQUEST_ID, "part's request id", self.request_id)
        bounded("part's offset", self.offset, 0, MAX_ANSWER_CHARS, "characters")
        bounded("part's length", len(self.text), 1, MAX_PART_CHARS, "characters")
        bounded("part's tokens", self.tokens, 0, MAX_ANSWER_TOKENS)

    @property
    def end(self) -> int:
        return self.offset + len(self.text)


def failure(request_id: str, status: Status, board: str, reason: str, model: str = "") -> InferenceResult:
    """A result without outputs, its reason made fit for the wire: shortened, and without what is no text."""
    reason = reason.encode("utf-8", "replace").decode()
    if len(reason) > MAX_REASON_CHARS:
        reason = reason[: MAX_REASON_CHARS - 1] + "…"
    return InferenceResult(request_id, status, board, model, reason=reason)


@dataclass(frozen=True, slots=True)
class ShapeCost:
    """What one inference of a model costs on a board for requests of one ``shape`` (``core.wanted.shape_of``).

    ``measured``: how many measurements it stands on; the confidence.
    """

    shape: int
    busy_us: int
    energy_uj: int
    measured: int = 0

    def __post_init__(self) -> None:
        bounded("cost shape", self.shape, 0, MAX_SHAPE)
        bounded("cost busy_us", self.busy_us, 1, MAX_COST, "µs")
        bounded("cost energy_uj", self.energy_uj, 0, MAX_COST, "µJ")
        bounded("cost measured", self.measured, 0, MAX_MEASURED)


@dataclass(frozen=True, slots=True)
class ModelOffer:
    """A model that a board hosts, and what one inference of it costs there: roofline prior, corrected by measurement.

    ``busy_us`` and ``energy_uj`` are of a request of no known shape; ``shapes`` of those shapes that were measured most.
    ``measured``: how many measurements all of them stand on.
    ``parallel``: so many inferences of it run there at once, each as fast as alone; 1 for what takes the whole board.
    ``cloud``: it runs outside the fleet, on behalf of this board, for ``price_us`` (µs-equivalents) a request.
    """

    model: str
    task: str
    digest: bytes
    quality_permille: int
    busy_us: int
    energy_uj: int
    parallel: int = 1
    shapes: tuple[ShapeCost, ...] = ()
    measured: int = 0
    cloud: bool = False
    price_us: int = 0

    def __post_init__(self) -> None:
        checked(MODEL_NAME, "offered model", self.model)
        checked(TASK_NAME, "offered task", self.task)
        if not isinstance(self.digest, bytes) or len(self.digest) != DIGEST_BYTES:
            raise RefusedError(f"digest of {self.model}", self.digest, f"{DIGEST_BYTES} bytes (SHA-256)")
        bounded("offer quality_permille", self.quality_permille, 0, 1000)
        bounded("offer busy_us", self.busy_us, 1, MAX_COST, "µs")
        bounded("offer energy_uj", self.energy_uj, 0, MAX_COST, "µJ")
        bounded("offer parallel", self.parallel, 1, MAX_PARALLEL)
        bounded("offer measured", self.measured, 0, MAX_MEASURED)
        bounded("offer price_us", self.price_us, 0, MAX_COST, "µs")
        numbers = [each.shape for each in self.shapes]
        if len(numbers) > MAX_SHAPES or numbers != sorted(set(numbers)):
            raise RefusedError(f"shapes of {self.model}", numbers, f"at most {MAX_SHAPES}, each once, ascending")

    def cost_of(self, shape: int) -> ShapeCost:
        """What a request of this shape costs here, as far as is known."""
        known = next((each for each in self.shapes if each.shape == shape), None)
        return known or ShapeCost(shape, self.busy_us, self.energy_uj)

    def serves(self, request: InferenceRequest) -> bool:
        """Does this model do the request's task (raw ``invoke`` works on every model), and is it the pinned one if any?"""
        return request.task in (self.task, INVOKE) and request.model in (None, self.model)


def _named_tensors(subject: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if len(tensors) > MAX_TENSORS:
        raise RefusedError(subject, f"{len(tensors)} tensors", f"at most {MAX_TENSORS}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not isinstance(tensor, Tensor):
            raise RefusedError(subject, name, f"tensors by names of 1 to {MAX_NAME_CHARS} characters")
    return MappingProxyType(dict(tensors))
