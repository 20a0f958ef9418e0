"""``sly run``: one inference from the shell, in the same sandbox that the agent uses.

Rules: NumPy is imported only once the inputs are about to be read; data goes to stdout, and ``--output`` writes files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.core.errors import ConfigError, RefusedError, UnavailableError
from edge_agent.core.values import DTYPE_BYTES, MAX_TENSOR_BYTES, Tensor, encoded_image

if TYPE_CHECKING:
    from edge_agent.runtime.supervisor import Invocation, Loaded
    from models.card import Card

RUNTIMES = ("auto", "ai_edge_litert", "tflite_runtime")
PICTURE = "image"
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
BUDGET_US = 3_600_000_000


@dataclass(frozen=True, slots=True)
class Source:
    """The model that was asked for: its name, its file, and its card if it is one of the catalog."""

    name: str
    path: Path
    card: Card | None


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("run", help="run a model once, in the sandbox, on arrays or on a picture")
    parser.add_argument("model", help="a model of the catalog (see: sly models list) or the path of a .tflite file")
    parser.add_argument(
        "--input", action="append", default=[], metavar="[NAME=]FILE", dest="inputs",
        help="a .npy file for the input NAME, or a JPEG or PNG for a model of the catalog; repeat it for more inputs",
    )  # fmt: skip
    parser.add_argument(
        "--region", metavar="L,T,R,B", help="look at this part of the picture alone: left, top, right, bottom in its pixels"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of the interpreter (default: 1)")
    parser.add_argument("--runtime", choices=RUNTIMES, default="auto", help="which TFLite library (default: auto)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write every output as .npy there, and the picture drawn on")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import asyncio

    from edge_agent.runtime.settings import EngineSettings

    source = _source(arguments.model)
    settings = EngineSettings(runtime=arguments.runtime, threads=arguments.threads)
    files = [_named_file(text) for text in arguments.inputs]
    region = {} if arguments.region is None else {"region": region_of(arguments.region)}
    loaded, result, picture = asyncio.run(_infer(source, settings, files, region))
    answer = _as_json(source, loaded, result, picture is not None)
    if arguments.output is not None:
        _write(arguments.output, source, result, picture)
    print(json.dumps(answer) if arguments.json else _as_text(answer))
    return 0


def _source(model: str) -> Source:
    path = Path(model)
    if path.suffix == ".tflite" or "/" in model:
        return Source(path.stem, path, None)
    from models.catalog import card
    from models.fetch import default_folder

    known = card(model)
    path = default_folder() / known.filename
    if not path.is_file():
        raise ConfigError(f"model {model}", f"no file {path}", "", f"fetch it with: sly models fetch {model}")
    return Source(model, path, known)


def _named_file(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    return (name, Path(path)) if separator else ("", Path(text))


def region_of(text: str) -> Tensor:
    """``left,top,right,bottom`` as the tensor that picture tasks take as ``region``. Raises ``ConfigError`` for anything else."""
    import struct

    try:
        edges = [float(part) for part in text.split(",")]
        return Tensor("float32", (4,), struct.pack("<4f", *edges))
    except (ValueError, OverflowError, struct.error) as error:
        raise ConfigError("--region", text, "four numbers: LEFT,TOP,RIGHT,BOTTOM") from error


async def _infer(
    source: Source, settings: Any, files: Sequence[tuple[str, Path]], region: Mapping[str, Tensor]
) -> tuple[Loaded, Invocation, bytes | None]:
    """The model loaded from the very descriptor that is hashed here, and run once; with the picture if it ran on one."""
    from edge_agent.runtime.supervisor import EngineSupervisor

    supervisor = EngineSupervisor(settings)
    try:
        descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            _check_card(source, digest)
            loaded = await supervisor.load(source.name, file.fileno(), digest, source.card)
        inputs, picture = _inputs(source, loaded, files)
        return loaded, await supervisor.invoke(source.name, {**inputs, **region}, BUDGET_US), picture
    except OSError as error:
        raise UnavailableError(f"model file {source.path}", error.strerror or str(error)) from error
    finally:
        await supervisor.close()


def _check_card(source: Source, digest: bytes) -> None:
    if source.card is not None and digest.hex() != source.card.source.sha256:
        remedy = f"remove {source.path} and run: sly models fetch {source.name}"
        raise RefusedError(f"model file {source.path}", f"SHA-256 {digest.hex()}", source.card.source.sha256, remedy)


def _inputs(source: Source, loaded: Loaded, files: Sequence[tuple[str, Path]]) -> tuple[dict[str, Tensor], bytes | None]:
    if len(files) == 1 and files[0][1].suffix.lower() in PICTURE_SUFFIXES:
        if source.card is None:
            raise ConfigError(f"input {files[0][1]}", "a picture", ".npy files for a model without a card")
        picture = _read(files[0][1])
        return {files[0][0] or PICTURE: encoded_image(picture)}, picture
    only = loaded.signature.inputs[0].name if len(loaded.signature.inputs) == 1 else ""
    named = [(name or only, path) for name, path in files]
    allowed = ", ".join(f"{spec.name} {spec}" for spec in loaded.signature.inputs)
    if len({name for name, _ in named}) != len(named) or any(not name for name, _ in named):
        raise ConfigError("sly run --input", [name for name, _ in named], f"NAME=FILE once for each of: {allowed}")
    return {name: _array(path) for name, path in named}, None


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_TENSOR_BYTES:
            raise RefusedError(f"input {path}", f"{path.stat().st_size} bytes", f"at most {MAX_TENSOR_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"input {path}", error.strerror or str(error), "a file that can be read") from error


def _array(path: Path) -> Tensor:
    """The array of a ``.npy`` file. Raises ``RefusedError`` for anything else; nothing is unpickled."""
    import io

    import numpy as np

    try:
        array = np.load(io.BytesIO(_read(path)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise RefusedError(f"input {path}", "something else", "an array of numbers as numpy.save writes it") from error
    if not isinstance(array, np.ndarray) or array.dtype.name not in DTYPE_BYTES:
        raise RefusedError(f"input {path}", getattr(array, "dtype", type(array).__name__), ", ".join(DTYPE_BYTES))
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return Tensor(array.dtype.name, array.shape, little.tobytes())


def _arrays(result: Invocation) -> dict[str, Any]:
    import numpy as np

    return {name: np.frombuffer(t.data, t.dtype).reshape(t.shape) for name, t in result.outputs.items()}


def _write(folder: Path, source: Source, result: Invocation, picture: bytes | None) -> None:
    import numpy as np

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, array) in enumerate(_arrays(result).items()):
            safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name).lstrip(".") or f"output{number}"
            np.save(folder / f"{safe[:100]}.npy", array)
        if picture is not None and source.card is not None:
            from models.annotate import annotate

            caption = f"{source.name}: {result.elapsed_us / 1000:.2f} ms"
            (folder / "annotated.png").write_bytes(annotate(picture, source.card, _arrays(result), [caption]))
    except OSError as error:
        raise UnavailableError(f"folder {folder}", error.strerror or str(error), "choose another --output") from error


def _as_json(source: Source, loaded: Loaded, result: Invocation, seen: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "model": source.name,
        "library": loaded.library,
        "delegate": loaded.delegate,
        "confinement": list(loaded.confinement),
        "elapsed_us": result.elapsed_us,
    }
    if seen and source.card is not None:
        return answer | {"findings": _findings(source.card, _arrays(result))}
    return answer | {"outputs": [_summary(name, array) for name, array in _arrays(result).items()]}


def _findings(card: Card, arrays: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the child says it found; it has read a model and a picture, so it is not taken at its word."""
    labels, scores, boxes, points = (arrays.get(name) for name in ("labels", "scores", "boxes", "points"))
    if labels is None or scores is None or labels.shape != scores.shape or labels.ndim != 1 or labels.dtype.kind != "i":
        raise RefusedError(f"answer of model {card.name}", list(arrays), "labels and scores, one for each finding")
    if any(not 0 <= label < len(card.labels) for label in labels) or (boxes is not None and boxes.shape != (len(labels), 4)):
        raise RefusedError(f"answer of model {card.name}", labels.tolist(), "labels of its card, with a box each or none")
    if points is not None and (points.ndim != 3 or points.shape[::2] != (len(labels), 2)):
        raise RefusedError(f"answer of model {card.name}", list(points.shape), "points [findings, points, 2]")
    return [
        {"label": card.labels[int(label)], "score": round(float(score), 4)}
        | ({} if boxes is None else {"box": [round(float(edge), 1) for edge in boxes[index]]})
        | ({} if points is None else {"points": [[round(float(x), 1), round(float(y), 1)] for x, y in points[index]]})
        for index, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]


def _points_told(points: Sequence[Sequence[float]]) -> str:
    """How many, and the box that they span; a region's answer is hundreds of them."""
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    return f"{len(points)} points within {min(xs):.0f}, {min(ys):.0f}, {max(xs):.0f}, {max(ys):.0f}"


def _summary(name: str, array: Any) -> dict[str, Any]:
    def number(value: Any) -> float | None:
        return float(value) if math.isfinite(value) else None

    known = dict.fromkeys(("min", "mean", "max"))
    if array.size:
        known = {"min": number(array.min()), "mean": number(array.mean(dtype="float64")), "max": number(array.max())}
    return {"name": name, "dtype": array.dtype.name, "shape": list(array.shape), **known}


def _as_text(answer: Mapping[str, Any]) -> str:
    if "findings" in answer:
        lines = [f"{'label':<20} {'score':>6}  box (left, top, right, bottom)"]
        for each in answer["findings"]:
            box = ", ".join(f"{edge:.0f}" for edge in each.get("box", ())) or _points_told(each.get("points", ()))
            lines.append(f"{each['label']:<20} {each['score']:>6.3f}  {box}".rstrip())
        lines += [] if answer["findings"] else ["nothing found"]
    else:
        lines = [f"{'output':<32} {'tensor':<24} {'min':>12} {'mean':>12} {'max':>12}"]
        for each in answer["outputs"]:
            tensor = f"{each['dtype']}[{','.join(map(str, each['shape']))}]"
            numbers = " ".join(f"{'-' if each[key] is None else format(each[key], '.6g'):>12}" for key in ("min", "mean", "max"))
            lines.append(f"{each['name']:<32} {tensor:<24} {numbers}")
    return "\n".join(
        [*lines, f"by {answer['model']} on {answer['library']}: {answer['elapsed_us'] / 1000:.2f} ms in the sandbox"]
    )
