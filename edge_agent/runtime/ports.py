"""What each task takes and gives, and whether a pipeline's stages fit together by it.

Owns the types of the ports: perception tasks have those of the catalog's cards, ``chat`` takes a prompt and gives a text.  Rules:
no NumPy; one error, naming the stage and the port; an answer is checked against its task's form before anything is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

from edge_agent.core.chat import CHAT, TURN, TurnEnd
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import DTYPE_BYTES, InferenceResult, Tensor
from edge_agent.runtime.pipeline import ITEM, Kind, Pipeline, Reference, Stage
from models.card import BoxReading, Card, PointReading
from models.catalog import catalog
from models.language_card import language_catalog


class Port(StrEnum):
    PICTURE = "picture"
    """A JPEG or PNG file: uint8 [bytes]."""
    BOX = "box"
    """float32 [4]: left, top, right, bottom in pixels of the upright picture."""
    BOXES = "boxes"
    """float32 [n, 4]."""
    POINTS = "points"
    """float32 [n, p, 2]: x, y."""
    LABELS = "labels"
    """int32 [n]: numbers of the task's labels."""
    SCORES = "scores"
    """float32 [n]: 0 to 1."""
    TEXT = "text"


ITEMS = {Port.BOXES: Port.BOX}
"""What one item of a list is; of nothing else is there an item."""
SEEN_WORDS, SAID_WORDS = ("label", "score", "count"), ("text",)
"""What a prompt may say of a stage that looks, and of one that talks."""
_SHAPES = {Port.BOXES: ("float32", (None, 4)), Port.LABELS: ("int32", (None,)), Port.SCORES: ("float32", (None,))}


@dataclass(frozen=True, slots=True)
class Form:
    """A task: what it must have, what it may have besides, what it answers, and the labels of its findings."""

    task: str
    needs: Mapping[str, Port]
    may: Mapping[str, Port]
    gives: Mapping[str, Port]
    labels: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        return SAID_WORDS if self.task == CHAT else SEEN_WORDS


def _form(card: Card) -> Form:
    gives = {"labels": Port.LABELS, "scores": Port.SCORES}
    if isinstance(card.interpret, BoxReading):
        gives |= {"boxes": Port.BOXES} | ({"keypoints": Port.POINTS} if card.interpret.keypoints else {})
    elif isinstance(card.interpret, PointReading):
        gives |= {"points": Port.POINTS}
    return Form(card.task, {"image": Port.PICTURE}, {"region": Port.BOX}, gives, card.labels)


def forms() -> Mapping[str, Form]:
    """Every task that a stage can have. Models of one task answer in the same form."""
    return {card.task: _form(card) for card in catalog().values()} | {CHAT: Form(CHAT, {}, {}, {"text": Port.TEXT})}


def task_of(model: str, offered: Collection[str] = ()) -> str | None:
    """What a model does; a model that no card tells of, but a board offers, is a language model."""
    if model in catalog():
        return catalog()[model].task
    return CHAT if model in language_catalog() or model in offered else None


def check(pipeline: Pipeline, offered: Collection[str] | None = None) -> Mapping[str, Form]:
    """The form of each stage. Raises ``RefusedError`` for a task, a model, a port, a label or a prompt that cannot be.

    ``offered``: the models that boards offer now; with it, every stage must have one.
    """
    try:
        return _checked(pipeline, offered)
    except RefusedError as error:
        raise RefusedError(f"pipeline {pipeline.name}, {error}") from error


def _checked(pipeline: Pipeline, offered: Collection[str] | None) -> Mapping[str, Form]:
    known, found = forms(), dict[str, Form]()
    for stage in pipeline.order:
        if stage.task not in known:
            raise RefusedError(f"stage {stage.name}", f"unknown task {stage.task}", ", ".join(sorted(known)))
        found[stage.name] = known[stage.task]
        _check_model(stage, offered)
        _check_inputs(pipeline, stage, found)
        _check_prompt(pipeline, stage, found)
        _check_gate(stage, found)
    return found


def _check_model(stage: Stage, offered: Collection[str] | None) -> None:
    there = sorted(name for name in offered or () if task_of(name, offered or ()) == stage.task)
    able = there if offered is not None else [name for name in (*catalog(), *language_catalog()) if task_of(name) == stage.task]
    if stage.model is None:
        if offered is not None and not there:
            raise RefusedError(f"stage {stage.name}", f"no board offers {stage.task}", "a task of a model that is served")
        return
    task = task_of(stage.model, offered or ())
    if task is None:
        raise RefusedError(f"stage {stage.name}", f"unknown model {stage.model}", ", ".join(able) or "a model that is served")
    if task != stage.task:
        raise RefusedError(f"stage {stage.name}", f"model {stage.model}, which does {task}", ", ".join(able) or stage.task)
    if offered is not None and stage.model not in offered:
        raise RefusedError(f"stage {stage.name}", f"no board offers {stage.model}", ", ".join(able) or "a model that is served")


def _check_inputs(pipeline: Pipeline, stage: Stage, found: Mapping[str, Form]) -> None:
    form = found[stage.name]
    takes = {**form.needs, **form.may}
    for port, reference in stage.inputs.items():
        subject = f"stage {stage.name}, input {port}"
        if port not in takes:
            raise RefusedError(subject, f"unknown input of {stage.task}", ", ".join(takes) or "none: a prompt says it all")
        given = _port_of(subject, pipeline, stage, reference, found)
        if given is not takes[port]:
            raise RefusedError(subject, f"{reference}, which is {given}", takes[port])
    for port in form.needs:
        if port not in stage.inputs:
            raise RefusedError(f"stage {stage.name}", f"no input {port}", f"{port} = where its {form.needs[port]} comes from")
    if stage.for_each:
        _item_of(stage, found)


def _port_of(subject: str, pipeline: Pipeline, stage: Stage, reference: Reference, found: Mapping[str, Form]) -> Port:
    if reference == Reference(ITEM):
        return _item_of(stage, found)
    if not reference.port:
        return Port.PICTURE if pipeline.inputs[reference.name] is Kind.PICTURE else Port.TEXT
    return _given(subject, reference, found)


def _given(subject: str, reference: Reference, found: Mapping[str, Form]) -> Port:
    form = found[reference.name]
    if reference.port not in form.gives:
        raise RefusedError(subject, f"unknown output {reference}", ", ".join(f"{reference.name}.{each}" for each in form.gives))
    return form.gives[reference.port]


def _item_of(stage: Stage, found: Mapping[str, Form]) -> Port:
    assert stage.for_each is not None
    given = _given(f"stage {stage.name}, for_each", stage.for_each, found)
    if given not in ITEMS:
        raise RefusedError(f"stage {stage.name}, for_each", f"{stage.for_each}, which is {given}", " or ".join(ITEMS))
    return ITEMS[given]


def _check_prompt(pipeline: Pipeline, stage: Stage, found: Mapping[str, Form]) -> None:
    if (stage.task == CHAT) != bool(stage.prompt):
        got, allowed = ("no prompt", "a prompt") if stage.task == CHAT else ("a prompt", f"none: {stage.task} takes no text")
        raise RefusedError(f"stage {stage.name}", got, allowed)
    for reference in stage.blanks:
        subject = f"stage {stage.name}, prompt"
        if reference.port and reference.port not in found[reference.name].words:
            allowed = ", ".join(f"{{{reference.name}.{word}}}" for word in found[reference.name].words)
            raise RefusedError(subject, f"unknown blank {{{reference}}}", allowed)
        if not reference.port and pipeline.inputs[reference.name] is not Kind.TEXT:
            raise RefusedError(subject, f"{{{reference}}}, which is {pipeline.inputs[reference.name]}", Kind.TEXT)


def _check_gate(stage: Stage, found: Mapping[str, Form]) -> None:
    if stage.when and stage.when.label not in found[stage.when.stage].labels:
        allowed = ", ".join(found[stage.when.stage].labels) or f"a stage with labels: {stage.when.stage} has none"
        raise RefusedError(f"stage {stage.name}, when", f"unknown label {stage.when.label}", allowed)


# answers


@dataclass(frozen=True, slots=True)
class Found:
    """What a stage's answer says: a label and a score for each finding, their boxes where there are any; or a text."""

    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()
    text: str = ""


def read_answer(form: Form, result: InferenceResult) -> Found:
    """What the outputs of an OK result say. Raises ``RefusedError`` for outputs that are not of the task's form."""
    if form.task == CHAT:
        tensor = result.outputs.get(TURN)
        if tensor is None or tensor.dtype != "uint8":
            raise RefusedError(
                f"answer of {result.board}", ", ".join(result.outputs) or "nothing", f"an output {TURN!r} of uint8"
            )
        return Found(text=TurnEnd.decode(tensor.data).text)
    numbers = {name: _numbers(result, name, port) for name, port in form.gives.items() if port in _SHAPES}
    labels, scores, boxes = numbers["labels"], numbers["scores"], numbers.get("boxes", [])
    if len(labels) != len(scores) or ("boxes" in numbers and len(boxes) != 4 * len(labels)):
        raise RefusedError(f"answer of {result.board}", f"{len(labels)} labels, {len(scores)} scores", "one of each a finding")
    if any(not 0 <= label < len(form.labels) for label in labels):
        raise RefusedError(f"answer of {result.board}", labels[:8], f"labels 0 to {len(form.labels) - 1}")
    rows = tuple(tuple(boxes[start : start + 4]) for start in range(0, len(boxes), 4))
    return Found(tuple(form.labels[int(label)] for label in labels), tuple(scores), rows)


def _numbers(result: InferenceResult, name: str, port: Port) -> list[float]:
    dtype, shape = _SHAPES[port]
    subject, allowed = f"answer of {result.board}, {name}", f"{dtype}[{','.join('?' if n is None else str(n) for n in shape)}]"
    tensor = result.outputs.get(name)
    if tensor is None or tensor.dtype != dtype or not _fits(tensor, shape):
        raise RefusedError(subject, "nothing" if tensor is None else str(tensor), allowed)
    code = {"int32": "i", "float32": "f"}[dtype]
    numbers = list(struct.unpack(f"<{tensor.size_bytes // DTYPE_BYTES[dtype]}{code}", tensor.data))
    if not all(map(isfinite, numbers)):
        raise RefusedError(subject, "NaN or infinity", "finite numbers")
    return numbers


def _fits(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    return len(tensor.shape) == len(shape) and all(want in (None, got) for got, want in zip(tensor.shape, shape, strict=True))
