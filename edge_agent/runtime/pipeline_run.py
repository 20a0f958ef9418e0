"""One run of a pipeline, without I/O: which requests to submit now, given the answers so far.

Rules: whoever drives it says what time it is and submits what ``ready`` gives; a stage's requests are made once, when everything
upstream has answered; each names as parents the receipts that its inputs came from.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from os import urandom

from edge_agent.core.chat import CHAT, TURN, ChatMessage, Turn
from edge_agent.core.errors import RefusedError, SlyError
from edge_agent.core.values import (
    DataClass,
    InferenceRequest,
    InferenceResult,
    Limits,
    Status,
    Tensor,
    bounded,
    encoded_image,
)
from edge_agent.runtime.pipeline import ITEM, Kind, Pipeline, Reference, Stage, pieces
from edge_agent.runtime.ports import check, read_answer
from edge_agent.runtime.stage_progress import StageOutcome, StageProgress, StageState

MAX_TEXT_CHARS = 64 * 2**10
"""Of a text that a pipeline is given."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A box, and the receipt of the result that it came from, empty without one."""

    box: tuple[float, ...]
    receipt: bytes


class Run:
    """``limits`` and ``data`` stand in for the pipeline's own; ``offered`` as in ``ports.check``.

    Raises ``RefusedError`` for a pipeline whose stages do not fit together, and for inputs that are not the pipeline's: a picture
    is bytes of a JPEG or PNG file, a text is ``str``.
    """

    def __init__(
        self, pipeline: Pipeline, inputs: Mapping[str, bytes | str], now_us: int, *, limits: Limits | None = None,
        data: DataClass | None = None, offered: frozenset[str] | None = None, new_id: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        self.pipeline, self._new_id = pipeline, new_id or _drawn_id
        forms = check(pipeline, offered)
        self.limits, self.data = limits or pipeline.limits, data or pipeline.data
        self._inputs = _checked_inputs(pipeline, inputs)
        self._due_us = now_us + self.limits.deadline_us
        self._stages = {stage.name: StageProgress(stage, forms[stage.name]) for stage in pipeline.order}
        self._in_flight = dict[str, StageProgress]()

    @property
    def done(self) -> bool:
        """Nothing is in flight, and no stage will begin any more."""
        return not self._in_flight and all(each.state is not StageState.WAITING for each in self._stages.values())

    @property
    def outcomes(self) -> Mapping[str, StageOutcome]:
        """By stage, in the order in which they depend on each other."""
        return {name: each.outcome() for name, each in self._stages.items()}

    def ready(self, now_us: int) -> tuple[InferenceRequest, ...]:
        """The requests that can go out now, each given once."""
        requests = list[InferenceRequest]()
        for progress in self._stages.values():
            if progress.state is StageState.WAITING and self._settled(progress):
                requests += self._begun(progress, now_us)
        return tuple(requests)

    def answered(self, result: InferenceResult) -> None:
        """Take the one result of a request in. Raises ``RefusedError`` for a result that nothing waits for."""
        progress = self._taken(result.request_id)
        progress.results[result.request_id] = result
        if result.status is not Status.OK:
            self._failed(progress, f"{result.board}: {result.reason or result.status.value}")
            return
        try:
            progress.found[result.request_id] = read_answer(progress.form, result)
        except RefusedError as error:
            self._failed(progress, str(error))
        if progress.state is StageState.RUNNING and not progress.unanswered:
            progress.become(StageState.DONE)

    def lost(self, request_id: str, reason: str) -> None:
        """No answer will come. Raises ``RefusedError`` for a request that nothing waits for."""
        self._failed(self._taken(request_id), reason)

    def _taken(self, request_id: str) -> StageProgress:
        if request_id not in self._in_flight:
            raise RefusedError("result", f"of request {request_id}", "the one result of a request of this run")
        return self._in_flight.pop(request_id)

    def _failed(self, progress: StageProgress, reason: str) -> None:
        if progress.state is not StageState.FAILED:
            progress.become(StageState.FAILED, reason)

    # from answers to requests

    def _upstream(self, progress: StageProgress) -> list[StageProgress]:
        return [self._stages[name] for name in self.pipeline.upstream(progress.stage)]

    def _settled(self, progress: StageProgress) -> bool:
        return all(each.state not in (StageState.WAITING, StageState.RUNNING) for each in self._upstream(progress))

    def _begun(self, progress: StageProgress, now_us: int) -> tuple[InferenceRequest, ...]:
        """What a stage is to run now that everything upstream has ended, however that ended."""
        for other in self._upstream(progress):
            if other.state is not StageState.DONE:
                progress.become(StageState.SKIPPED, other.cause, other.cause)
                return ()
        if closed := self._closed(progress.stage):
            progress.become(StageState.SKIPPED, closed)
            return ()
        items = self._items(progress)
        if progress.stage.for_each and not items:
            progress.become(StageState.DONE, f"no {progress.stage.for_each}")
            return ()
        try:
            requests = self._requests(progress, items or [_Item((), b"")], now_us)
        except SlyError as error:
            progress.become(StageState.FAILED, str(error))
            return ()
        progress.become(StageState.RUNNING)
        progress.requests = {request.request_id: request for request in requests}
        self._in_flight |= dict.fromkeys(progress.requests, progress)
        return requests

    def _closed(self, stage: Stage) -> str:
        """Why the gate keeps a stage from running; empty if it does not."""
        if stage.when is None:
            return ""
        gate, says = stage.when, self._stages[stage.when.stage].says()
        scores = [s for _, found in says for label, s in zip(found.labels, found.scores, strict=True) if label == gate.label]
        if max(scores, default=-1.0) * 1000 >= gate.at_least_permille:
            return ""
        seen = f"{gate.label} {max(scores):.2f}" if scores else f"no {gate.label}"
        return f"{gate.stage} found {seen}, {gate.at_least_permille / 1000:.2f} is asked for"

    def _items(self, progress: StageProgress) -> list[_Item]:
        """The best ``at_most`` items of the stage that this one goes through, in their order."""
        if progress.stage.for_each is None:
            return []
        says = self._stages[progress.stage.for_each.name].says()
        every = [_Item(box, result.receipt) for result, found in says for box in found.boxes]
        progress.left_out = max(0, len(every) - progress.stage.at_most)
        return every[: progress.stage.at_most]

    def _requests(self, progress: StageProgress, items: list[_Item], now_us: int) -> tuple[InferenceRequest, ...]:
        """Raises ``RefusedError`` when there is no time or energy left, or an answer upstream cannot be an input."""
        limits, stage = self._limits(progress, len(items), now_us), progress.stage
        tokens = stage.max_tokens if stage.task == CHAT else 0
        return tuple(
            InferenceRequest(
                self._new_id(), stage.task, self._tensors(stage, item), stage.model, limits, data=self.data,
                answer_tokens=tokens, parents=self._parents(stage, item),
            )
            for item in items
        )  # fmt: skip

    def _tensors(self, stage: Stage, item: _Item) -> dict[str, Tensor]:
        if stage.task == CHAT:
            turn = Turn((ChatMessage("user", self._prompt(stage)),), max_tokens=stage.max_tokens).encode()
            return {TURN: Tensor("uint8", (len(turn),), turn)}
        box = Tensor("float32", (4,), struct.pack("<4f", *item.box)) if item.box else None
        tensors = dict[str, Tensor]()
        for port, reference in stage.inputs.items():
            tensor = box if reference == Reference(ITEM) else encoded_image(_picture(self._inputs[reference.name]))
            assert tensor is not None
            tensors[port] = tensor
        return tensors

    def _prompt(self, stage: Stage) -> str:
        return "".join(text + (self._word(blank) if blank else "") for text, blank in pieces(stage))

    def _word(self, blank: Reference) -> str:
        if not blank.port:
            return str(self._inputs[blank.name])
        progress = self._stages[blank.name]
        match blank.port:
            case "label":
                return progress.best()[0]
            case "score":
                return f"{progress.best()[1] * 100:.0f}"
            case "count":
                return str(sum(len(found.labels) for _, found in progress.says()))
        return "\n".join(found.text for _, found in progress.says())

    # limits and proof

    def _limits(self, progress: StageProgress, requests: int, now_us: int) -> Limits:
        """Of what is left: time by the number of stages still ahead on the longest way, energy by the requests still to come."""
        left_us = (self._due_us - now_us) // self.pipeline.depths[progress.stage.name]
        if left_us <= 0:
            raise RefusedError(f"deadline of {self.limits.deadline_us // 1000} ms", "it is over", "a later one")
        energy_uj = None if self.limits.energy_uj is None else self._energy_uj(progress, requests)
        quality = max(self.limits.quality_permille, progress.stage.quality_permille)
        return Limits(left_us, energy_uj, quality, self.limits.trust)

    def _energy_uj(self, progress: StageProgress, requests: int) -> int:
        assert self.limits.energy_uj is not None
        answered = [result for each in self._stages.values() for result in each.results.values()]
        granted = sum(each.requests[name].limits.energy_uj or 0 for name, each in self._in_flight.items())
        left_uj = self.limits.energy_uj - sum(result.energy_uj for result in answered) - granted
        others = sum(each.state is StageState.WAITING for each in self._stages.values()) - 1
        share_uj = left_uj // (requests + others)
        if share_uj <= 0:
            raise RefusedError(f"energy of {self.limits.energy_uj // 1000} mJ", f"{left_uj} µJ left", "a higher ceiling")
        return share_uj

    def _parents(self, stage: Stage, item: _Item) -> tuple[bytes, ...]:
        """SHA-256 of the signed receipts that the inputs of a request came from, each once; none of a board that signs none."""
        source = stage.for_each.name if stage.for_each else ""
        receipts = [item.receipt]
        for name in self.pipeline.upstream(stage):
            if name != source:
                receipts += self._receipts(name)
        return tuple(dict.fromkeys(sha256(each).digest() for each in receipts if each))

    def _receipts(self, name: str) -> list[bytes]:
        """Of a stage's results; of a stage that had nothing to run on, those that said so."""
        progress = self._stages[name]
        if progress.requests:
            return [result.receipt for result, _ in progress.says()]
        return [receipt for upstream in self.pipeline.upstream(progress.stage) for receipt in self._receipts(upstream)]


def _drawn_id() -> str:
    return urandom(16).hex()


def _picture(value: bytes | str) -> bytes:
    assert isinstance(value, bytes)
    return value


def _checked_inputs(pipeline: Pipeline, inputs: Mapping[str, bytes | str]) -> dict[str, bytes | str]:
    for name in inputs:
        if name not in pipeline.inputs:
            raise RefusedError(f"input {name}", f"unknown to pipeline {pipeline.name}", ", ".join(pipeline.inputs))
    for name, kind in pipeline.inputs.items():
        if name not in inputs:
            raise RefusedError(f"pipeline {pipeline.name}", f"no input {name}", f"{name} = a {kind}")
        if isinstance(inputs[name], str) is not (kind is Kind.TEXT):
            got = "text" if isinstance(inputs[name], str) else "bytes"
            raise RefusedError(f"input {name}", got, "text" if kind is Kind.TEXT else "the bytes of a JPEG or PNG file")
        if kind is Kind.TEXT:
            bounded(f"input {name}, length", len(inputs[name]), 0, MAX_TEXT_CHARS, "characters")
    return dict(inputs)
