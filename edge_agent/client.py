"""The client library: ask the boards for an answer, from Python, with nothing to set up.

Owns the asking over agents' sockets.  Rules: a request keeps its id when it is asked again elsewhere, so that an answer
counts once; only an agent that went away is a reason to ask another one; no NumPy is needed.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edge_agent.answers import Answer, answer_of
from edge_agent.core import wire
from edge_agent.core.chat import DEFAULT_NEW_TOKENS, ChatMessage, Sampling, Turn, TurnEnd, TurnPart
from edge_agent.core.clock import SystemClock
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import (
    DataClass,
    InferenceRequest,
    InferenceResult,
    Limits,
    encoded_image,
)
from edge_agent.gateway.local import LocalConnection
from edge_agent.gateway.local_talk import talk_over
from edge_agent.gateway.terms import Terms

if TYPE_CHECKING:
    from edge_agent.attest.proof import Proof
    from edge_agent.pipelines import Evidence, PipelineResult
    from edge_agent.runtime.pipeline import Pipeline

MAX_PICTURE_BYTES = 16 * 2**20
PICTURE_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
"""Of JPEG (ITU-T T.81, B.1.1.3: SOI and the next marker) and PNG (W3C PNG, 5.2)."""


class Reply:
    """A language model's answer as it is made: iterate over its texts; ``end`` is there when they are out.

    Closing it, or leaving it to the garbage collector, cancels what is not made yet.
    """

    def __init__(self, parts: Generator[TurnPart, None, TurnEnd]) -> None:
        self._parts = parts
        self.end: TurnEnd | None = None

    def __iter__(self) -> Iterator[str]:
        while self.end is None:
            try:
                part = next(self._parts)
            except StopIteration as ended:
                self.end = ended.value
                return
            yield part.text

    def text(self) -> str:
        """The whole answer, waited for."""
        for _ in self:
            pass
        assert self.end is not None
        return self.end.text

    def close(self) -> None:
        self._parts.close()


class Client:
    """Asks the first agent that answers, in the order of ``sockets``. Use it as a context manager."""

    def __init__(self, *sockets: Path | str) -> None:
        if not sockets:
            raise ValueError("name at least one agent's socket")
        self._connections = [LocalConnection(path) for path in sockets]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for connection in self._connections:
            connection.close()

    def look(
        self, task: str, picture: Path | str | bytes, *, model: str | None = None, limits: Limits | None = None,
        data: DataClass = DataClass.PRIVATE,
    ) -> Answer:  # fmt: skip
        """What is in a JPEG or PNG picture, by a task of the catalog (``detect_faces``, ``classify``).

        ``data`` says how far the picture may travel.

        Raises ``RefusedError`` for a picture or a limit that cannot be, ``UnavailableError`` when no board can serve it.
        """
        content = picture if isinstance(picture, bytes) else read_picture(Path(picture))
        result = self.submit(request_for_picture(task, content, model=model, limits=limits, data=data))
        return answer_of(result)

    def chat(
        self,
        messages: str | Sequence[ChatMessage],
        *,
        session: str = "",
        model: str = "",
        max_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        data: DataClass = DataClass.PRIVATE,
    ) -> Reply:
        """Talk with a language model: one question, or the messages of a conversation.

        With ``session`` the messages are new ones after those that the board's session of that name holds; without, a
        conversation is told whole each time, and the board computes only what is new in it.  ``limits`` says what the turn may
        cost (without, it has ten minutes), ``data`` how far it may travel.  Raises ``RefusedError`` for what
        cannot be asked; iterating raises ``RefusedError`` for what is refused and ``UnavailableError`` when no agent answers.
        """
        told = (ChatMessage("user", messages),) if isinstance(messages, str) else tuple(messages)
        turn = Turn(told, session=session, max_tokens=max_tokens, sampling=sampling or Sampling())
        return Reply(self._talk(turn, model, Terms(limits or Terms().limits, data)))

    def _talk(self, turn: Turn, model: str, terms: Terms) -> Generator[TurnPart, None, TurnEnd]:
        """From the first agent that begins to answer; one that goes away amid its answer is not replaced."""
        refusals = []
        for connection in self._connections:
            parts = talk_over(connection, turn, model, terms)
            try:
                first = next(parts)
            except StopIteration as ended:
                end: TurnEnd = ended.value
                return end
            except UnavailableError as error:
                refusals.append(str(error))
                continue
            yield first
            return (yield from parts)
        raise UnavailableError("no agent answers", " | ".join(refusals))

    def explain(self, request_id: str) -> dict[str, Any]:
        """Why a request went where it went, as ``sly explain --json`` prints it, from the first agent that remembers it.

        Raises ``UnavailableError`` when none does.
        """
        refusals = []
        for connection in self._connections:
            try:
                report = connection.call("explain", request_id)
            except (RefusedError, UnavailableError) as error:
                refusals.append(str(error))
                continue
            if not isinstance(report, dict):
                raise RefusedError("explanation", report, "a map")
            return report
        raise UnavailableError(f"explanation of {request_id}", " | ".join(refusals))

    def run(
        self, pipeline: Pipeline | str | Path, /, *, limits: Limits | None = None, data: DataClass | None = None,
        **inputs: Path | str | bytes,
    ) -> PipelineResult:  # fmt: skip
        """Run a pipeline: one of the product by its name, a TOML file, or a ``Pipeline``; its stages side by side where they can.

        A picture is a path or the bytes of a file, a text is ``str``.  ``limits`` and ``data`` stand in for the pipeline's own.
        Raises ``RefusedError`` for a pipeline or inputs that cannot be, ``UnavailableError`` when no agent answers; a stage that
        fails is told in the result.
        """
        return self.run_on(pipeline, inputs, limits=limits, data=data)

    def run_on(
        self, pipeline: Pipeline | str | Path, inputs: Mapping[str, Path | str | bytes], *, limits: Limits | None = None,
        data: DataClass | None = None,
    ) -> PipelineResult:  # fmt: skip
        """As ``run``, with the inputs in a mapping."""
        from edge_agent.pipelines import Evidence, PipelineResult, drive
        from edge_agent.runtime.pipeline import Kind, Pipeline
        from edge_agent.runtime.pipeline_file import pipeline_named
        from edge_agent.runtime.pipeline_run import Run

        clock = SystemClock()
        told = pipeline if isinstance(pipeline, Pipeline) else pipeline_named(pipeline)
        given = {name: _given(value, told.inputs.get(name) is Kind.PICTURE) for name, value in inputs.items()}
        started_us = clock.monotonic_us()
        run = Run(told, given, started_us, limits=limits, data=data, offered=self.offered())
        shown = list[Evidence]()
        stages = drive(run, lambda request: self._submit_apart(request, shown), clock)
        return PipelineResult(told.name, stages, told.results, clock.monotonic_us() - started_us, Evidence.of(shown))

    def _submit_apart(self, request: InferenceRequest, shown: list[Evidence]) -> InferenceResult:
        """As ``submit``, over connections of its own, so that several can wait at once; with what the board showed then."""
        with Client(*(connection.path for connection in self._connections)) as other:
            result = other.submit(request)
            if result.receipt:
                shown.append(other.evidence([result.board]))
            return result

    def offered(self) -> frozenset[str]:
        """The models that boards offer which are there. Raises ``UnavailableError`` when no agent answers."""
        from edge_agent.pipelines import offered_by

        return offered_by(self._call("status"))

    def evidence(self, boards: Sequence[str]) -> Evidence:
        """What these boards show of themselves now and others say of them, as they signed it.

        Raises ``UnavailableError`` when no agent answers.
        """
        from edge_agent.pipelines import Evidence

        return Evidence.read(self._call("evidence", list(boards)))

    def proof(self, receipts: Sequence[bytes], asked: Sequence[tuple[InferenceRequest, InferenceResult]] = ()) -> Proof:
        """What ``sly verify`` checks, for ``attest.proof.write_proof``: these receipts, what was ``asked`` with its answers, and
        what the boards that signed them show of themselves now.

        Raises ``RefusedError`` where there is no receipt to prove with, ``UnavailableError`` when no agent answers.
        """
        from edge_agent.attest.proof import Asked, gathered
        from edge_agent.attest.receipts import unverified_receipt

        signed = [*receipts, *(result.receipt for _, result in asked)]
        evidence = self.evidence(sorted({unverified_receipt(each).board for each in signed if each}))
        proven = [Asked.of(request, result) for request, result in asked]
        return gathered(signed, evidence.quotes, evidence.appraisals, proven)

    def trust(self) -> dict[str, Any]:
        """How far each board is trusted and why, as ``sly trust --json`` prints it.

        Raises ``UnavailableError`` when no agent answers.
        """
        report = self._call("trust")
        if not isinstance(report, dict):
            raise RefusedError("trust", report, "a map")
        return report

    def _call(self, verb: str, body: object = None) -> object:
        """What the first agent that answers says."""
        refusals = []
        for connection in self._connections:
            try:
                return connection.call(verb, body)
            except UnavailableError as error:
                refusals.append(str(error))
        raise UnavailableError("no agent answers", " | ".join(refusals))

    def submit(self, request: InferenceRequest) -> InferenceResult:
        """The one result of a request. An agent that goes away is replaced by the next one, with the same request id.

        Raises ``UnavailableError`` naming every agent that was tried, when none answers.
        """
        refusals = []
        body = wire.encode_request(request, wire.LOCAL)
        for connection in self._connections:
            try:
                data = connection.call("infer", body)
            except UnavailableError as error:
                refusals.append(str(error))
                continue
            if not isinstance(data, bytes):
                raise RefusedError("answer", data, "bytes")
            return wire.decode_result(data, wire.LOCAL)
        raise UnavailableError("no agent answers", " | ".join(refusals))


def request_for_picture(
    task: str, picture: bytes, *, model: str | None = None, limits: Limits | None = None, data: DataClass = DataClass.PRIVATE
) -> InferenceRequest:
    return InferenceRequest(os.urandom(16).hex(), task, {"image": encoded_image(picture)}, model, limits or Limits(), data=data)


def _given(value: Path | str | bytes, is_picture: bool) -> bytes | str:
    """An input of a pipeline: a picture that is named by a path is read."""
    if isinstance(value, Path) or (is_picture and isinstance(value, str)):
        return read_picture(Path(value))
    return value


def read_picture(path: Path) -> bytes:
    """A picture file. Raises ``RefusedError`` if it cannot be read, begins as no picture, or is over ``MAX_PICTURE_BYTES``."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PICTURE_BYTES + 1)
    except OSError as error:
        raise RefusedError(f"picture {path}", error.strerror or str(error), "a JPEG or PNG file that can be read") from error
    if len(data) > MAX_PICTURE_BYTES:
        raise RefusedError(f"picture {path}", f"more than {MAX_PICTURE_BYTES} bytes", f"at most {MAX_PICTURE_BYTES} bytes")
    if not data.startswith(PICTURE_BEGINNINGS):
        raise RefusedError(f"picture {path}", f"a file that begins with {data[:8]!r}" if data else "an empty file", "JPEG or PNG")
    return data
