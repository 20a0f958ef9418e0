"""A pipeline: which model's answer goes into which other model, a directed acyclic graph of stages.

Owns ``Pipeline`` and ``Stage`` and everything that can be known to be wrong of them without asking which models there are:
names, references, cycles, what nobody uses.  ``pipeline_file`` reads one, ``ports`` checks the types, ``pipeline_run`` runs it.
Rules: pure, frozen, bounded, and refused when built with one error that names the stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from string import Formatter
from types import MappingProxyType

from edge_agent.core.chat import DEFAULT_NEW_TOKENS, MAX_NEW_TOKENS
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import (
    MAX_PARENTS,
    MODEL_NAME,
    TASK_NAME,
    DataClass,
    Limits,
    bounded,
    checked,
)

MAX_STAGES = 16
MAX_INPUTS = 16
"""Of a pipeline, and of one stage."""
MAX_FAN_OUT = 32
"""Items that one stage is run on."""
MAX_PROMPT_CHARS = 4096
MAX_SUMMARY_CHARS = 400

NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
ITEM = "item"
"""What an input of a stage with ``for_each`` names to get the item at hand."""
RESERVED = (ITEM, "limits", "data")


class Kind(StrEnum):
    """What a pipeline is given."""

    PICTURE = "picture"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Reference:
    """``port`` of a stage, or with an empty port an input of the pipeline or the item at hand."""

    name: str
    port: str = ""

    @classmethod
    def parsed(cls, subject: str, text: object) -> Reference:
        """``"faces.boxes"``, ``"picture"``, ``"item"``. Raises ``RefusedError`` naming ``subject``."""
        name, dot, port = text.partition(".") if isinstance(text, str) else ("", "", "")
        if not NAME.fullmatch(name) or (dot and not NAME.fullmatch(port)):
            raise RefusedError(subject, shown(text), "STAGE.OUTPUT, an input of the pipeline, or item")
        return cls(name, port)

    def __str__(self) -> str:
        return f"{self.name}.{self.port}" if self.port else self.name


@dataclass(frozen=True, slots=True)
class Gate:
    """A stage runs only if ``stage`` found ``label`` with ``at_least_permille`` or more."""

    stage: str
    label: str
    at_least_permille: int

    def __post_init__(self) -> None:
        bounded("when at_least", self.at_least_permille, 0, 1000, "per mille")


@dataclass(frozen=True, slots=True)
class Stage:
    """One model's part, an inference request of its own for each item.

    ``inputs``: by the names of the task's inputs where each comes from.  ``for_each``: run once for each item of this output, the
    best ``at_most``.  ``prompt``: of a language model, with ``{stage.label}``, ``{stage.score}``, ``{stage.count}``,
    ``{stage.text}`` and ``{input}`` filled in.
    """

    name: str
    task: str
    model: str | None = None
    inputs: Mapping[str, Reference] = field(default_factory=dict)
    for_each: Reference | None = None
    at_most: int = MAX_FAN_OUT
    when: Gate | None = None
    prompt: str = ""
    max_tokens: int = DEFAULT_NEW_TOKENS
    quality_permille: int = 0

    def __post_init__(self) -> None:
        checked(NAME, "stage name", self.name)
        checked(TASK_NAME, f"stage {self.name}, task", self.task)
        if self.model is not None:
            checked(MODEL_NAME, f"stage {self.name}, model", self.model)
        bounded(f"stage {self.name}, inputs", len(self.inputs), 0, MAX_INPUTS)
        bounded(f"stage {self.name}, at_most", self.at_most, 1, MAX_FAN_OUT, "items")
        bounded(f"stage {self.name}, max_tokens", self.max_tokens, 1, MAX_NEW_TOKENS, "tokens")
        bounded(f"stage {self.name}, quality", self.quality_permille, 0, 1000, "per mille")
        if not isinstance(self.prompt, str) or len(self.prompt) > MAX_PROMPT_CHARS:
            raise RefusedError(f"stage {self.name}, prompt", shown(self.prompt), f"text of at most {MAX_PROMPT_CHARS} characters")
        object.__setattr__(self, "inputs", MappingProxyType(dict(self.inputs)))

    @property
    def blanks(self) -> tuple[Reference, ...]:
        """What the prompt's blanks are filled from."""
        return tuple(reference for _, reference in pieces(self) if reference)

    @property
    def references(self) -> tuple[Reference, ...]:
        """Everything that the stage's requests are made from, but its item."""
        source = (self.for_each,) if self.for_each else ()
        return (*(each for each in self.inputs.values() if each.name != ITEM), *source, *self.blanks)


def pieces(stage: Stage) -> list[tuple[str, Reference | None]]:
    """The prompt as text and the blank that follows it. Raises ``RefusedError`` for braces that are no blank."""
    subject, found = f"stage {stage.name}, prompt", list[tuple[str, Reference | None]]()
    try:
        for text, blank, form, conversion in Formatter().parse(stage.prompt):
            if form or conversion:
                raise ValueError(f"{{{blank}}} has a format")
            found.append((text, None if blank is None else Reference.parsed(subject, blank)))
    except ValueError as error:
        raise RefusedError(subject, str(error), "{STAGE.WORD} and {INPUT}, and {{ or }} for a brace") from None
    return found


@dataclass(frozen=True)
class Pipeline:
    """Stages that make a directed acyclic graph; ``results`` are the stages whose answers are wanted.

    ``limits`` hold for the whole: the deadline and the energy are divided among the stages, trust and quality hold for each.
    Raises ``RefusedError`` naming the stage at fault.
    """

    name: str
    inputs: Mapping[str, Kind]
    stages: tuple[Stage, ...]
    results: tuple[str, ...]
    summary: str = ""
    limits: Limits = Limits()
    data: DataClass = DataClass.PRIVATE

    def __post_init__(self) -> None:
        checked(MODEL_NAME, "pipeline name", self.name)
        bounded(f"pipeline {self.name}, stages", len(self.stages), 1, MAX_STAGES)
        bounded(f"pipeline {self.name}, inputs", len(self.inputs), 1, MAX_INPUTS)
        if len(self.summary) > MAX_SUMMARY_CHARS or not self.summary.isprintable():
            raise RefusedError(
                f"pipeline {self.name}, summary", self.summary, f"one line of at most {MAX_SUMMARY_CHARS} characters"
            )
        object.__setattr__(self, "inputs", MappingProxyType(dict(self.inputs)))
        _check_names(self)
        for stage in self.stages:
            _check_references(self, stage)
        self.order  # noqa: B018  (a cycle raises)
        _check_used(self)
        for stage in self.stages:
            _check_parents(self, stage)

    @cached_property
    def by_name(self) -> Mapping[str, Stage]:
        return {stage.name: stage for stage in self.stages}

    def upstream(self, stage: Stage) -> tuple[str, ...]:
        """The stages that this one waits for, each once."""
        named = [each.name for each in stage.references] + ([stage.when.stage] if stage.when else [])
        return tuple(dict.fromkeys(name for name in named if name in self.by_name))

    @cached_property
    def order(self) -> tuple[Stage, ...]:
        """The stages, each after those that it waits for. Raises ``RefusedError`` naming a cycle."""
        sorter = TopologicalSorter({stage.name: self.upstream(stage) for stage in self.stages})
        try:
            return tuple(self.by_name[name] for name in sorter.static_order())
        except CycleError as error:
            raise RefusedError(
                f"pipeline {self.name}", f"a cycle: {' -> '.join(error.args[1])}", "stages without a cycle"
            ) from None

    @cached_property
    def depths(self) -> Mapping[str, int]:
        """For each stage, how many stages the longest way from it to an end has, itself included."""
        depths = dict[str, int]()
        for stage in reversed(self.order):
            after = [depths[other.name] for other in self.stages if stage.name in self.upstream(other)]
            depths[stage.name] = 1 + max(after, default=0)
        return depths

    def parents_at_most(self, stage: Stage) -> int:
        """How many receipts the inputs of one request of this stage can come from."""
        source = stage.for_each.name if stage.for_each else ""
        alone = {each.name for each in stage.references} | ({stage.when.stage} if stage.when else set())
        return sum(1 if name == source else self._requests_at_most(name) for name in alone if name in self.by_name)

    def _requests_at_most(self, name: str) -> int:
        return self.by_name[name].at_most if self.by_name[name].for_each else 1


# what a pipeline must be


def _check_names(pipeline: Pipeline) -> None:
    seen = set[str]()
    for name in (*pipeline.inputs, *(stage.name for stage in pipeline.stages)):
        if name in seen:
            raise RefusedError(
                f"pipeline {pipeline.name}", f"two things named {name}", "each input and stage has a name of its own"
            )
        if name in RESERVED:
            raise RefusedError(f"pipeline {pipeline.name}", f"the name {name}", f"any but {', '.join(RESERVED)}")
        seen.add(name)
    if not pipeline.results or len(set(pipeline.results)) != len(pipeline.results):
        raise RefusedError(f"pipeline {pipeline.name}, results", list(pipeline.results), "at least one stage, each once")
    for name in pipeline.results:
        _check_stage(f"pipeline {pipeline.name}, results", pipeline, name)


def _check_stage(subject: str, pipeline: Pipeline, name: str) -> None:
    if name not in pipeline.by_name:
        raise RefusedError(subject, f"unknown stage {name}", ", ".join(pipeline.by_name))


def _check_references(pipeline: Pipeline, stage: Stage) -> None:
    subject = f"stage {stage.name}"
    for port, reference in stage.inputs.items():
        if reference == Reference(ITEM):
            if stage.for_each is None:
                raise RefusedError(f"{subject}, input {port}", ITEM, "a stage's output: without for_each there is no item")
            continue
        _check_reference(f"{subject}, input {port}", pipeline, reference)
    if stage.for_each:
        if not stage.for_each.port:
            raise RefusedError(f"{subject}, for_each", str(stage.for_each), "STAGE.OUTPUT")
        _check_reference(f"{subject}, for_each", pipeline, stage.for_each)
        if Reference(ITEM) not in stage.inputs.values():
            raise RefusedError(f"{subject}, for_each", "no input that takes the item", 'one input that is "item"')
    for reference in stage.blanks:
        _check_reference(f"{subject}, prompt", pipeline, reference)
    if stage.when:
        _check_stage(f"{subject}, when", pipeline, stage.when.stage)


def _check_reference(subject: str, pipeline: Pipeline, reference: Reference) -> None:
    if reference.port:
        _check_stage(subject, pipeline, reference.name)
    elif reference.name not in pipeline.inputs:
        allowed = ", ".join([*pipeline.inputs, *(f"{name}.OUTPUT" for name in pipeline.by_name)])
        raise RefusedError(subject, f"unknown input {reference}", allowed)


def _check_used(pipeline: Pipeline) -> None:
    used, waiting = set[str](), list(pipeline.results)
    while waiting:
        if (name := waiting.pop()) not in used:
            used.add(name)
            waiting += pipeline.upstream(pipeline.by_name[name])
    if unused := [stage.name for stage in pipeline.stages if stage.name not in used]:
        raise RefusedError(f"stage {unused[0]}", "nobody uses it", "a stage that results name or need")
    named = {each.name for stage in pipeline.stages for each in stage.references}
    if idle := [name for name in pipeline.inputs if name not in named]:
        raise RefusedError(f"input {idle[0]}", "nobody uses it", "an input that a stage takes")


def _check_parents(pipeline: Pipeline, stage: Stage) -> None:
    most = pipeline.parents_at_most(stage)
    if most > MAX_PARENTS:
        remedy = "lower at_most of the stages that it gathers from"
        raise RefusedError(f"stage {stage.name}", f"what up to {most} requests say", f"at most {MAX_PARENTS}", remedy)
