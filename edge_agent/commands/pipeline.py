"""``sly pipeline``: several models, one after another and side by side, each where it costs least.

Rules: NumPy is imported only once a picture is about to be drawn; data goes to stdout; exit code 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.commands.proof_file import add_receipt
from edge_agent.commands.terminal import WIDTH, clipped, wrapped
from edge_agent.core.errors import ConfigError
from edge_agent.core.printable import harmless, on_one_line

if TYPE_CHECKING:
    from edge_agent.pipelines import PipelineResult
    from edge_agent.runtime.pipeline import Pipeline
    from edge_agent.runtime.ports import Found
    from edge_agent.runtime.stage_progress import StageAnswer, StageOutcome

ABOUT = """\
Run a pipeline, or with --check see whether it could be run. A pipeline is a TOML file that says which model's answer goes into
which other; NAME is one that comes with the product. Every stage is a request of its own that the fleet places.
"""
STAGE_CHARS = 14


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("pipeline", help="run a pipeline of models on the fleet, or check one", description=ABOUT)
    parser.add_argument(
        "pipeline", metavar="FILE|NAME", nargs="?", help="without it, those that come with the product are listed"
    )
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=VALUE", dest="inputs",
        help="a picture's file, or a text, for the input NAME; repeat it for more inputs",
    )  # fmt: skip
    parser.add_argument(
        "--socket", type=Path, action="append", metavar="PATH",
        help="an agent's socket (STATE/agent.sock); repeat it to name others that are asked when the first is gone",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="only check it; with --socket also whether its models are offered")
    parser.add_argument("--deadline-ms", type=int, metavar="N", help="for the whole, instead of the pipeline's own")
    add_receipt(parser, "what ran")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write each picture there with what was found drawn on it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from edge_agent.attest.proof import write_proof
    from edge_agent.runtime.pipeline_file import pipeline_named

    if arguments.pipeline is None:
        return _list(arguments.json)
    pipeline = pipeline_named(arguments.pipeline)
    if arguments.check:
        return _check(pipeline, arguments)
    if not arguments.socket:
        raise ConfigError("sly pipeline", "no --socket", "the path of an agent's socket (STATE/agent.sock), or --check")
    result = _asked(pipeline, arguments)
    print(json.dumps(as_json(result)) if arguments.json else as_text(result), flush=True)
    if arguments.receipt is not None:
        write_proof(arguments.receipt, result.proof())
    if arguments.output is not None:
        _draw(arguments.output, pipeline, _inputs(arguments.inputs), result)
    return 0 if result.ok else 1


def _list(as_json: bool) -> int:
    from edge_agent.runtime.pipeline_file import pipeline_named, shipped

    told = {name: pipeline_named(name).summary for name in shipped()}
    print(json.dumps(told) if as_json else "\n".join(f"{name:<24} {summary}" for name, summary in told.items()))
    return 0


def _check(pipeline: Pipeline, arguments: argparse.Namespace) -> int:
    from edge_agent.runtime.ports import check

    offered = None
    if arguments.socket:
        from edge_agent.client import Client

        with Client(*arguments.socket) as client:
            offered = client.offered()
    check(pipeline, offered)
    stages = [
        {"stage": stage.name, "task": stage.task, "model": stage.model, "after": list(pipeline.upstream(stage))}
        for stage in pipeline.order
    ]
    if arguments.json:
        print(json.dumps({"pipeline": pipeline.name, "inputs": dict(pipeline.inputs), "stages": stages}))
        return 0
    for stage in pipeline.order:
        after = ", ".join(pipeline.upstream(stage)) or "the inputs"
        print(f"{stage.name:<16} {stage.task:<16} {stage.model or 'any model':<16} after {after}")
    print(f"{pipeline.name} can be run{'' if offered is None else ' here'}")
    return 0


def _inputs(named: Iterable[str]) -> dict[str, str]:
    inputs = dict[str, str]()
    for text in named:
        name, separator, value = text.partition("=")
        if not separator or name in inputs:
            raise ConfigError("sly pipeline --input", text, "NAME=VALUE, each name once")
        inputs[name] = value
    return inputs


def _asked(pipeline: Pipeline, arguments: argparse.Namespace) -> PipelineResult:
    from dataclasses import replace

    from edge_agent.client import Client

    limits = pipeline.limits
    if arguments.deadline_ms is not None:
        limits = replace(limits, deadline_us=arguments.deadline_ms * 1000)
    with Client(*arguments.socket) as client:
        return client.run_on(pipeline, _inputs(arguments.inputs), limits=limits)


def _draw(folder: Path, pipeline: Pipeline, inputs: Mapping[str, str], result: PipelineResult) -> None:
    """Each input picture with what the stages found that saw it."""
    from edge_agent.client import read_picture
    from edge_agent.drawing import draw_all
    from edge_agent.runtime.pipeline import Kind

    for name, kind in pipeline.inputs.items():
        if kind is Kind.PICTURE:
            seen = [
                each.result
                for outcome in result.stages.values()
                if name in _pictures(outcome)
                for each in outcome.answers
                if each.found is not None
            ]
            draw_all(folder / f"{name}.png", read_picture(Path(inputs[name])), seen)


def _pictures(outcome: StageOutcome) -> list[str]:
    """The pipeline's inputs that a stage looked at."""
    return [reference.name for reference in outcome.stage.inputs.values() if not reference.port]


# for programs and for people


def as_json(result: PipelineResult) -> dict[str, Any]:
    stages = [
        {
            "stage": name,
            "state": outcome.state.value,
            "reason": outcome.reason,
            "left_out": outcome.left_out,
            "answers": [_answer_json(answer) for answer in outcome.answers],
        }
        for name, outcome in result.stages.items()
    ]
    return {"pipeline": result.pipeline, "ok": result.ok, "elapsed_us": result.elapsed_us, "stages": stages}


def _answer_json(answer: StageAnswer) -> dict[str, Any]:
    result, found = answer.result, answer.found
    told: dict[str, Any] = {
        "request": result.request_id,
        "status": result.status.value,
        "board": result.board,
        "model": result.model,
        "busy_us": result.busy_us,
        "energy_uj": result.energy_uj,
        "receipt": sha256(result.receipt).hexdigest() if result.receipt else None,
        "parents": [parent.hex() for parent in answer.request.parents],
    }
    if found is None:
        return told | {"reason": result.reason}
    if found.text:
        return told | {"text": found.text}
    labels = [{"label": label, "score": round(score, 4)} for label, score in zip(found.labels, found.scores, strict=True)]
    return told | {"findings": [each | ({"box": list(found.boxes[i])} if found.boxes else {}) for i, each in enumerate(labels)]}


def as_text(result: PipelineResult) -> str:
    lines = [f"{'stage':<{STAGE_CHARS}} {'board':<12} {'model':<16} {'ms':>8} {'receipt':<8}  found"]
    for name, outcome in result.stages.items():
        lines += [_line(name, each, each.found) for each in outcome.answers if each.found]
        if outcome.reason:
            lines += _below(name, f"{outcome.state}: {_not_said_yet(outcome, result)}")
        if outcome.left_out:
            lines += _below(name, f"{outcome.left_out} more items were left out: at_most = {outcome.stage.at_most}")
    for name in result.results:
        lines += [harmless(each.found.text) for each in result.stages[name].answers if each.found and each.found.text]
    signed, ended = sum(bool(each.result.receipt) for each in result.answers), "done" if result.ok else "failed"
    proven = f"{signed} receipt{'' if signed == 1 else 's'}"
    return "\n".join([*lines, f"{result.pipeline} {ended} in {result.elapsed_us / 1000:.1f} ms, {proven}"])


def _line(name: str, answer: StageAnswer, found: Found) -> str:
    result = answer.result
    receipt = sha256(result.receipt).hexdigest()[:8] if result.receipt else "-"
    where = f"{clipped(name, STAGE_CHARS):<{STAGE_CHARS}} {clipped(result.board, 12):<12} {clipped(result.model, 16) or '-':<16}"
    return clipped(f"{where} {result.busy_us / 1000:>8.2f} {receipt:<8}  {on_one_line(_told(found))}", WIDTH)


def _not_said_yet(outcome: StageOutcome, result: PipelineResult) -> str:
    """Why a stage did not run, without what is told of the stage that it needed."""
    reason = outcome.reason
    for other in result.stages.values():
        if other is not outcome and other.reason:
            reason = reason.removesuffix(f": {other.reason}")
    return reason


def _below(name: str, text: str) -> list[str]:
    """What became of a stage, behind its name, on as many lines as it takes."""
    first, *others = wrapped(text, " " * (STAGE_CHARS + 1), "  ")
    return [f"{clipped(name, STAGE_CHARS):<{STAGE_CHARS}}{first[STAGE_CHARS:]}", *others]


def _told(found: Found) -> str:
    """What was found, on the rest of a line."""
    if found.text:
        return found.text
    pairs = [f"{label} {score * 100:.0f} %" for label, score in zip(found.labels, found.scores, strict=True)]
    shown = ", ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
    return shown or "nothing"
