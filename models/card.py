"""The card of a perception model: everything that has to be known about it besides its weights.

Rules: no NumPy and no I/O; frozen and validated when built.  ``to_mapping`` gives plain ints, strings, booleans, lists and
dictionaries (no floats), so that a card crosses to the engine child as CBOR and lies in ``catalog/*.toml`` in the same form;
``from_mapping`` is its inverse and refuses a key that is missing, unknown or of another type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import PurePosixPath
from types import MappingProxyType

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import DTYPE_BYTES, MAX_RANK, MAX_TENSOR_BYTES, MODEL_NAME, TASK_NAME, TensorSpec, bounded, checked
from models.toml_text import toml_text

MAX_MEMBER_BYTES = 128 * 2**20
MAX_OWN_BYTES = 4 * 2**30
MAX_LABELS = 4096
MAX_LABEL_CHARS = 128
MAX_TEXT_CHARS = 400
MAX_SIDE_PX = 4096
MAX_STRIDE_LAYERS = 16
MAX_ANCHORS_PER_CELL = 32
MAX_KEYPOINTS = 64
MAX_GOLDEN = 64
MAX_POINTS = 1024
MAX_MARGIN_PERMILLE = 1000

SHA256_HEX = re.compile(r"[0-9a-f]{64}")
PACKAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PACKAGE_VERSION = re.compile(r"[0-9][0-9A-Za-z.+!_-]{0,49}")
WHEEL_TAG = re.compile(r"py3-none-any|cp3\d+-cp3\d+-[a-z0-9_]{1,60}")
FREE_LICENCES = ("Apache-2.0", "MIT", "BSD-3-Clause", "Zlib", "CC0-1.0", "CC-BY-4.0", "public domain")
RESIZES = ("letterbox", "stretch")
SUPPRESSIONS = ("weighted", "plain")
OWN_SUFFIX = ".tflite"
NESTED = "!"
"""Separates a member of a wheel that is a ZIP itself from the member within: ``models/a.zip!a.tflite``."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file within a wheel of the package index, and where it came from before that."""

    package: str
    version: str
    wheel_tag: str
    wheel_sha256: str
    member: str
    sha256: str
    size_bytes: int
    licence: str
    url: str

    def __post_init__(self) -> None:
        checked(PACKAGE_NAME, "source package", self.package)
        checked(PACKAGE_VERSION, "source version", self.version)
        checked(WHEEL_TAG, "source wheel_tag", self.wheel_tag)
        checked(SHA256_HEX, "source wheel_sha256", self.wheel_sha256)
        checked(SHA256_HEX, "source sha256", self.sha256)
        bounded("source size_bytes", self.size_bytes, 1, MAX_MEMBER_BYTES, "bytes")
        if self.licence not in FREE_LICENCES:
            raise RefusedError("source licence", self.licence, ", ".join(FREE_LICENCES))
        for part in self.member.split(NESTED):
            _check_member(part)

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True, slots=True)
class OwnSource:
    """A file of an operator's own: it comes as a release and is fetched from nowhere. ``url``: its origin, empty for none."""

    sha256: str
    size_bytes: int
    licence: str
    url: str = ""

    def __post_init__(self) -> None:
        checked(SHA256_HEX, "source sha256", self.sha256)
        bounded("source size_bytes", self.size_bytes, 1, MAX_OWN_BYTES, "bytes")
        checked_texts("source licence", (self.licence,), 1)
        if self.url:
            checked_texts("source url", (self.url,), 1, MAX_TEXT_CHARS)


def _check_member(path: str) -> None:
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts) or any(c in path for c in "\\\0:"):
        raise RefusedError("source member", path, "a relative path inside the wheel, with / and without . or .. parts")


@dataclass(frozen=True, slots=True)
class Preparation:
    """Pixels to tensor: a pixel value p of 0..255 becomes low + p (high - low) / 255, rounded for integer tensors.

    ``letterbox`` keeps the aspect and centres the picture on black; ``stretch`` fills the tensor.
    ``margin_permille``: by how much of its own width and height a region is widened on each side before the model sees it;
    what lies beyond the picture is black.
    """

    resize: str
    low: int
    high: int
    margin_permille: int

    def __post_init__(self) -> None:
        _one_of("prepare resize", self.resize, RESIZES)
        bounded("prepare low", self.low, -32768, 32767)
        bounded("prepare high", self.high, self.low + 1, 65535)
        bounded("prepare margin_permille", self.margin_permille, 0, MAX_MARGIN_PERMILLE)


@dataclass(frozen=True, slots=True)
class BoxReading:
    """Tensors to boxes: single-class SSD with fixed-size anchors, as BlazeFace has it.

    ``layers`` are (stride in pixels, anchors a cell) in the order of the model's rows; a row of the ``boxes`` tensor holds
    centre x, centre y, width, height and then x, y of each keypoint, in pixels of the input relative to its anchor.
    Source: MediaPipe's SsdAnchorsCalculator and TensorsToDetectionsCalculator.
    """

    boxes: str
    scores: str
    layers: tuple[tuple[int, int], ...]
    score_permille: int
    overlap_permille: int
    suppression: str
    keypoints: tuple[str, ...]

    def __post_init__(self) -> None:
        bounded("interpret layers", len(self.layers), 1, MAX_STRIDE_LAYERS)
        for stride, anchors in self.layers:
            bounded("interpret stride", stride, 1, MAX_SIDE_PX, "px")
            bounded("interpret anchors a cell", anchors, 1, MAX_ANCHORS_PER_CELL)
        bounded("interpret score_permille", self.score_permille, 1, 999)
        bounded("interpret overlap_permille", self.overlap_permille, 1, 999)
        _one_of("interpret suppression", self.suppression, SUPPRESSIONS)
        checked_texts("interpret keypoints", self.keypoints, MAX_KEYPOINTS)


@dataclass(frozen=True, slots=True)
class ClassReading:
    """Tensor to classes: a value v of the ``scores`` tensor is the probability (v - zero) / (one - zero) of its label."""

    scores: str
    zero: int
    one: int

    def __post_init__(self) -> None:
        bounded("interpret zero", self.zero, -32768, 32767)
        bounded("interpret one", self.one, self.zero + 1, 65536)


@dataclass(frozen=True, slots=True)
class PointReading:
    """Tensor to the points of the one thing that the picture, or the region of it, shows: x, y and the depth, which is left
    out, of each in pixels of the input; ``score`` is the logit that the thing is there at all.

    Source: MediaPipe's TensorsToLandmarksCalculator, and its face landmark module for score and margin.
    """

    points: str
    score: str
    score_permille: int

    def __post_init__(self) -> None:
        bounded("interpret score_permille", self.score_permille, 1, 999)


Reading = BoxReading | ClassReading | PointReading


@dataclass(frozen=True, slots=True)
class Card:
    """One model. ``version`` counts the revisions of this card; models with the same ``task`` answer in the same form
    and with the same labels, so that placement may choose among them by ``quality_permille``.  ``golden``: the SHA-256, in hex,
    of the right answer to its golden input (``edge_agent.attest.golden``) by library, version and machine, where every CPU of
    that machine gives the same.

    Raises ``RefusedError`` naming the field for a value outside its bounds or fields that contradict each other.
    """

    name: str
    version: int
    task: str
    summary: str
    quality_permille: int
    quality_source: str
    source: Source | OwnSource
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    prepare: Preparation
    interpret: Reading
    labels: tuple[str, ...]
    golden: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checked(MODEL_NAME, "card name", self.name)
        checked(TASK_NAME, "card task", self.task)
        bounded("card version", self.version, 1, 10**6)
        bounded("card quality_permille", self.quality_permille, 0, 1000)
        checked_texts("card text", (self.summary, self.quality_source), 2, MAX_TEXT_CHARS)
        checked_texts(f"labels of card {self.name}", self.labels, MAX_LABELS)
        _check_golden(self.golden)
        for tensor in (*self.inputs, *self.outputs):
            _check_tensor(tensor)
        _check_picture_input(self)
        match self.interpret:
            case ClassReading():
                _check_classes(self, self.interpret)
            case PointReading():
                _check_points(self, self.interpret)
            case BoxReading():
                _check_boxes(self, self.interpret)

    @property
    def input_size(self) -> tuple[int, int]:
        """Width and height of the picture that the model takes, in pixels."""
        _, height, width, _ = self.inputs[0].shape
        return width, height

    @property
    def filename(self) -> str:
        return self.name + (OWN_SUFFIX if isinstance(self.source, OwnSource) else suffix_of(self.source))

    def wheel_source(self) -> Source:
        """Where it is fetched from; raises ``RefusedError`` for a model of an operator's own."""
        if isinstance(self.source, OwnSource):
            remedy = f"push it: sly ota push {self.filename} --to GROUP"
            raise RefusedError(f"model {self.name}", "a model of your own", "one that a package of the index ships", remedy)
        return self.source

    def to_toml(self) -> str:
        """The card as a TOML file."""
        return toml_text(self.to_mapping())

    def to_mapping(self) -> dict[str, object]:
        """The card as plain values that CBOR and TOML can hold."""
        return {
            "name": self.name, "version": self.version, "task": self.task, "summary": self.summary,
            "quality_permille": self.quality_permille, "quality_source": self.quality_source,
            "source": {key: getattr(self.source, key) for key in type(self.source).__slots__},
            "inputs": [_tensor_mapping(tensor) for tensor in self.inputs],
            "outputs": [_tensor_mapping(tensor) for tensor in self.outputs],
            "prepare": {key: getattr(self.prepare, key) for key in _PREPARE},
            "interpret": _reading_mapping(self.interpret),
            "labels": list(self.labels),
            **({"golden": dict(self.golden)} if self.golden else {}),
        }  # fmt: skip

    @classmethod
    def from_mapping(cls, mapping: object) -> Card:
        """Inverse of ``to_mapping``; raises ``RefusedError`` for anything else."""
        with_golden = isinstance(mapping, Mapping) and "golden" in mapping
        fields = typed("card", mapping, _CARD | ({"golden": dict} if with_golden else {}))
        return cls(
            **{key: fields[key] for key in ("name", "version", "task", "summary", "quality_permille", "quality_source")},
            source=_either_source(fields["source"]),
            inputs=tuple(_tensor(item) for item in fields["inputs"]),
            outputs=tuple(_tensor(item) for item in fields["outputs"]),
            prepare=Preparation(**typed("card prepare", fields["prepare"], _PREPARE)),
            interpret=_reading(fields["interpret"]),
            labels=tuple(fields["labels"]),
            golden=MappingProxyType(fields.get("golden", {})),
        )


_CARD = {
    "name": str, "version": int, "task": str, "summary": str, "quality_permille": int, "quality_source": str,
    "source": dict, "inputs": list, "outputs": list, "prepare": dict, "interpret": dict, "labels": list,
}  # fmt: skip
_SOURCE = {
    "package": str, "version": str, "wheel_tag": str, "wheel_sha256": str,
    "member": str, "sha256": str, "size_bytes": int, "licence": str, "url": str,
}  # fmt: skip
_OWN_SOURCE = {"sha256": str, "size_bytes": int, "licence": str, "url": str}
_TENSOR = {"name": str, "dtype": str, "shape": list}
_PREPARE = {"resize": str, "low": int, "high": int, "margin_permille": int}
_BOXES = {
    "kind": str, "boxes": str, "scores": str, "layers": list, "score_permille": int,
    "overlap_permille": int, "suppression": str, "keypoints": list,
}  # fmt: skip
_CLASSES = {"kind": str, "scores": str, "zero": int, "one": int}
_POINTS = {"kind": str, "points": str, "score": str, "score_permille": int}


def source_from_mapping(mapping: object) -> Source:
    return Source(**typed("source", mapping, _SOURCE))


def _either_source(mapping: object) -> Source | OwnSource:
    if isinstance(mapping, Mapping) and "package" not in mapping:
        return OwnSource(**typed("source", mapping, _OWN_SOURCE))
    return source_from_mapping(mapping)


def suffix_of(source: Source) -> str:
    """Of the file within the wheel, with its dot."""
    return PurePosixPath(source.member.split(NESTED)[-1]).suffix


def typed(subject: str, mapping: object, types: Mapping[str, type]) -> dict:  # type: ignore[type-arg]
    """``mapping`` as a dictionary if it has exactly the keys of ``types`` with values of just those types."""
    if not isinstance(mapping, Mapping):
        raise RefusedError(subject, mapping, "a table")
    if mapping.keys() != types.keys():
        odd = sorted(map(str, mapping.keys() ^ types.keys()))
        raise RefusedError(subject, f"missing or unknown keys {', '.join(odd)}", ", ".join(types))
    for key, value in mapping.items():
        if type(value) is not types[key]:
            raise RefusedError(f"{subject} {key}", value, f"a value of type {types[key].__name__}")
    return dict(mapping)


def _tensor_mapping(tensor: TensorSpec) -> dict[str, object]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}


def _tensor(mapping: object) -> TensorSpec:
    fields = typed("card tensor", mapping, _TENSOR)
    return TensorSpec(fields["name"], fields["dtype"], tuple(fields["shape"]))


def _reading_mapping(reading: Reading) -> dict[str, object]:
    if isinstance(reading, PointReading):
        return {"kind": "points"} | {key: getattr(reading, key) for key in _POINTS if key != "kind"}
    if isinstance(reading, ClassReading):
        return {"kind": "classes", "scores": reading.scores, "zero": reading.zero, "one": reading.one}
    return {
        "kind": "boxes", "boxes": reading.boxes, "scores": reading.scores,
        "layers": [list(layer) for layer in reading.layers],
        "score_permille": reading.score_permille, "overlap_permille": reading.overlap_permille,
        "suppression": reading.suppression, "keypoints": list(reading.keypoints),
    }  # fmt: skip


def _reading(mapping: object) -> Reading:
    kind = mapping.get("kind") if isinstance(mapping, Mapping) else None
    if kind == "classes":
        fields = typed("card interpret", mapping, _CLASSES)
        return ClassReading(fields["scores"], fields["zero"], fields["one"])
    if kind == "points":
        fields = typed("card interpret", mapping, _POINTS)
        return PointReading(fields["points"], fields["score"], fields["score_permille"])
    if kind != "boxes":
        raise RefusedError("card interpret kind", kind, "boxes, classes, points")
    fields = typed("card interpret", mapping, _BOXES)
    if any(not isinstance(layer, list) or len(layer) != 2 for layer in fields["layers"]):
        raise RefusedError("card interpret layers", fields["layers"], "pairs of stride and anchors a cell")
    del fields["kind"]
    return BoxReading(**fields | {"layers": tuple(map(tuple, fields["layers"])), "keypoints": tuple(fields["keypoints"])})


def _check_golden(golden: Mapping[str, str]) -> None:
    bounded("card golden, count", len(golden), 0, MAX_GOLDEN)
    checked_texts("card golden", tuple(golden), MAX_GOLDEN)
    for library, digest in golden.items():
        if not isinstance(digest, str):
            raise RefusedError(f"card golden {library}", digest, "a SHA-256 in hexadecimal digits")
        checked(SHA256_HEX, f"card golden {library}", digest)


def _one_of(subject: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RefusedError(subject, value, ", ".join(allowed))


def checked_texts(subject: str, texts: tuple[object, ...], most: int, most_chars: int = MAX_LABEL_CHARS) -> None:
    bounded(f"{subject}, count", len(texts), 0, most)
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= most_chars or not text.isprintable():
            raise RefusedError(subject, text, f"printable text of 1 to {most_chars} characters")


def _check_tensor(tensor: TensorSpec) -> None:
    checked_texts("card tensor name", (tensor.name,), 1)
    _one_of(f"dtype of tensor {tensor.name}", tensor.dtype, tuple(DTYPE_BYTES))
    bounded(f"rank of tensor {tensor.name}", len(tensor.shape), 1, MAX_RANK)
    for length in tensor.shape:
        bounded(f"shape of tensor {tensor.name}", length, 1, MAX_TENSOR_BYTES)
    bounded(f"size of tensor {tensor.name}", prod(tensor.shape) * DTYPE_BYTES[tensor.dtype], 1, MAX_TENSOR_BYTES, "bytes")


def _check_picture_input(card: Card) -> None:
    shapes = [tensor.shape for tensor in card.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][0] != 1 or shapes[0][3] != 3 or max(shapes[0]) > MAX_SIDE_PX:
        raise RefusedError(
            f"inputs of card {card.name}", shapes, f"one of shape [1, height, width, 3], sides to {MAX_SIDE_PX} px"
        )


def _output(card: Card, name: str) -> TensorSpec:
    for tensor in card.outputs:
        if tensor.name == name:
            return tensor
    raise RefusedError(f"interpret of card {card.name}", name, ", ".join(tensor.name for tensor in card.outputs))


def _check_boxes(card: Card, reading: BoxReading) -> None:
    width, height = card.input_size
    rows = sum(-(-width // stride) * -(-height // stride) * anchors for stride, anchors in reading.layers)
    boxes, scores = (1, rows, 4 + 2 * len(reading.keypoints)), (1, rows, 1)
    for name, shape in ((reading.boxes, boxes), (reading.scores, scores)):
        if _output(card, name).shape != shape:
            raise RefusedError(f"output {name} of card {card.name}", _output(card, name).shape, f"shape {shape} by its layers")
    if len(card.labels) != 1:
        raise RefusedError(f"labels of card {card.name}", f"{len(card.labels)} labels", "one: boxes are read for a single class")


def _check_classes(card: Card, reading: ClassReading) -> None:
    if _output(card, reading.scores).shape != (1, len(card.labels)):
        raise RefusedError(
            f"labels of card {card.name}", f"{len(card.labels)} labels", f"one for each of {_output(card, reading.scores)}"
        )


def _check_points(card: Card, reading: PointReading) -> None:
    coordinates, score = _output(card, reading.points), _output(card, reading.score)
    if prod(coordinates.shape) % 3 or prod(coordinates.shape) > 3 * MAX_POINTS:
        raise RefusedError(
            f"output {reading.points} of card {card.name}", coordinates.shape, f"x, y and depth of at most {MAX_POINTS} points"
        )
    if prod(score.shape) != 1:
        raise RefusedError(f"output {reading.score} of card {card.name}", score.shape, "one number")
    if len(card.labels) != 1:
        raise RefusedError(f"labels of card {card.name}", f"{len(card.labels)} labels", "one: points are of a single thing")
