"""``sly ask``: one question to the fleet about one picture."""

from __future__ import annotations

import argparse
import json
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.commands.limits import add_limits
from edge_agent.commands.proof_file import add_receipt

if TYPE_CHECKING:
    from edge_agent.answers import Answer
    from edge_agent.broker_client import Asker
    from edge_agent.core.values import InferenceRequest, InferenceResult


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("ask", help="ask the fleet what is in a picture")
    parser.add_argument("task", help="what is wanted, e.g. detect_faces (see: sly models list)")
    parser.add_argument("picture", type=Path, help="a JPEG or PNG file")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--socket", type=Path, action="append", metavar="PATH",
        help="an agent's socket (STATE/agent.sock); repeat it to name others that are asked when the first is gone",
    )  # fmt: skip
    way.add_argument("--config", type=Path, metavar="FILE", help="ask over the broker and of the fleet that this file names")
    way.add_argument(
        "--fleet", type=Path, metavar="DIR", help="ask over the broker as the operator of this folder (sly fleet init)"
    )
    parser.add_argument(
        "--board", action="append", metavar="NAME",
        help="with --config or --fleet: ask this board; repeat it to name others for when it is gone (default: every member)",
    )  # fmt: skip
    parser.add_argument("--model", help="this model and no other")
    add_limits(parser, 10_000)
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="write the picture with what was found drawn on it")
    add_receipt(parser, "what ran (with --socket)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_ask)


def _ask(arguments: argparse.Namespace) -> int:
    from edge_agent.answers import answer_of
    from edge_agent.client import read_picture, request_for_picture
    from edge_agent.commands.limits import data_of, limits_of

    limits, data = limits_of(arguments), data_of(arguments)
    picture = read_picture(arguments.picture)
    request = request_for_picture(arguments.task, picture, model=arguments.model, limits=limits, data=data)
    _must_be_able_to_prove(arguments)
    result = _over_sockets(arguments, request) if arguments.socket else _over_the_broker(arguments, request)
    answer = answer_of(result)
    if arguments.output is not None:
        _draw(arguments.output, picture, result)
    print(json.dumps(_as_json(answer)) if arguments.json else _as_table(answer), flush=True)
    if arguments.receipt is not None:
        _prove(arguments, request, result)
    return 0


def _over_sockets(arguments: argparse.Namespace, request: InferenceRequest) -> InferenceResult:
    from edge_agent.client import Client
    from edge_agent.core.errors import ConfigError

    if arguments.board:
        raise ConfigError("--board", "with --socket", "with --config or --fleet", "a socket is one board's own")
    with Client(*arguments.socket) as client:
        return client.submit(request)


def _over_the_broker(arguments: argparse.Namespace, request: InferenceRequest) -> InferenceResult:
    import asyncio

    from edge_agent.broker_client import ask_over_broker
    from edge_agent.core.errors import UnavailableError
    from edge_agent.core.values import BOARD_ID, checked

    asker = _operator(arguments.fleet) if arguments.fleet else _member(arguments.config)
    boards = [checked(BOARD_ID, "--board", name) for name in arguments.board or asker.members]
    if not boards:
        raise UnavailableError(f"fleet {asker.fleet}", "it has no board", "enroll one: sly fleet enroll")
    return asyncio.run(ask_over_broker(asker, request, boards))


def _member(path: Path) -> Asker:
    from edge_agent.broker_client import asker_of
    from edge_agent.configured import read_config

    return asker_of(read_config(path))


def _operator(path: Path) -> Asker:
    from edge_agent.broker_client import Asker
    from edge_agent.steward.folder import OperatorFolder
    from edge_agent.transport.endpoint import MqttOptions

    folder = OperatorFolder(path)
    charter = folder.charter
    return Asker(folder.settings.operator, charter.fleet, folder.address, charter.members, MqttOptions())


def _must_be_able_to_prove(arguments: argparse.Namespace) -> None:
    from edge_agent.core.errors import ConfigError

    if arguments.receipt is not None and not arguments.socket:
        raise ConfigError(
            "--receipt", "over the broker", "with --socket", "a board's socket tells what others show of themselves"
        )


def _prove(arguments: argparse.Namespace, request: InferenceRequest, result: InferenceResult) -> None:
    from edge_agent.attest.proof import write_proof
    from edge_agent.client import Client

    with Client(*arguments.socket) as client:
        write_proof(arguments.receipt, client.proof([], [(request, result)]))


def _draw(path: Path, picture: bytes, result: InferenceResult) -> None:
    from edge_agent.drawing import draw

    draw(path, picture, result)


def _as_json(answer: Answer) -> dict[str, object]:
    return {
        "request": answer.request_id,
        "board": answer.board,
        "model": answer.model,
        "busy_us": answer.busy_us,
        "energy_uj": answer.energy_uj,
        "energy_kind": answer.energy_kind.value,
        "receipt": b64encode(answer.receipt).decode(),
        "findings": [{"label": f.label, "score": round(f.score, 4), "box": list(f.box)} for f in answer.findings],
    }


def _as_table(answer: Answer) -> str:
    lines = [f"{'label':<20} {'score':>6}  box (left, top, right, bottom)"]
    for finding in answer.findings:
        box = ", ".join(f"{edge:.0f}" for edge in finding.box)
        lines.append(f"{finding.label:<20} {finding.score:>6.3f}  {box}")
    if not answer.findings:
        lines.append("nothing found")
    energy = f"{answer.energy_uj / 1000:.2f} mJ {answer.energy_kind.value}"
    lines.append(
        f"by {answer.model} on {answer.board}: {answer.busy_us / 1000:.2f} ms busy, {energy}; request {answer.request_id}"
    )
    return "\n".join(lines)
