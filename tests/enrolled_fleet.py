"""A real fleet: agents of boards that were enrolled, as processes, and the operator's ``sly`` as another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edge_agent.attest.receipts import unverified_receipt
from edge_agent.client import Client, request_for_picture
from edge_agent.core.values import InferenceResult, Limits
from edge_agent.local_fleet import LocalFleet, Member
from edge_agent.steward.enrolling import Enrolment, enroll
from edge_agent.steward.folder import OperatorFolder
from tests.fetched import model_path, picture_path

MODEL, TASK = "blazeface-short", "detect_faces"
PATIENCE_S = 180.0
ASKS = 50
LIMITS = Limits(deadline_us=120_000_000)
QUICK = {"ota": "trial_s = 1\ntrial_inferences = 1\n", "attest": "epoch_s = 600\n"}
"""Trials of a second, on golden inputs; hardly any evidence."""
NAN_AT = 60_000
"""In the model's weights."""


class EnrolledAgents(LocalFleet):
    """Agents of boards that were enrolled into ``folder``/board, which is their state folder as well."""

    def __init__(self, folder: Path, boards: Iterable[str]) -> None:
        super().__init__(folder, [Member(board, "") for board in boards], [], 0)

    def prepare(self) -> None:
        """Enrolment did."""

    def ask(self, board: str) -> InferenceResult:
        """A real inference, asked of this board, by whichever it is served."""
        with Client(self.socket_of(board)) as client:
            return client.submit(request_for_picture(TASK, picture_path("grace_hopper").read_bytes(), limits=LIMITS))

    def served_by(self, board: str) -> bytes:
        """The digest of the model with which this board itself answers, as its receipt says."""
        for _ in range(ASKS):
            result = self.ask(board)
            assert result.status.value == "ok", result.reason
            if result.board == board:
                return unverified_receipt(result.receipt).model_digest
        raise AssertionError(f"{board} has {ASKS} requests served by others")


class LightProcess:
    """``tests.light_boards``, for boards that were enrolled into ``folder``/board; ``close`` ends it."""

    def __init__(self, folder: Path, boards: Sequence[str], *options: str) -> None:
        self._boards, self._log = list(boards), folder / "light.log"
        command = [sys.executable, "-m", "tests.light_boards", *options, *(str(folder / board) for board in boards)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

    def wait_up(self) -> None:
        assert self._line().split() == ["up", *self._boards]

    def serving(self) -> dict[str, Any]:
        """By board: the release that serves, the one that is confirmed, the state of the slot beside it."""
        assert self._process.stdin is not None
        self._process.stdin.write("?\n")
        self._process.stdin.flush()
        return json.loads(self._line())  # type: ignore[no-any-return]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=PATIENCE_S)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the light boards ended: {self._log.read_text()[-2000:]}"
        return line


def enrolled(operator: OperatorFolder, folder: Path, board: str, backend: str, settings: dict[str, str]) -> Path:
    """Enroll ``board`` into ``folder``/board; ``settings``: by section, lines for its configuration."""
    state = folder / board
    serve, models = (MODEL,), str(model_path(MODEL).parent)
    enroll(operator, Enrolment(board, backend, state=state, serve=serve, models=models), state)
    text = (state / "agent.toml").read_text()
    for section, lines in settings.items():
        head = f"[{section}]\n"
        text = text.replace(head, head + lines) if head in text else f"{text}\n{head}{lines}"
    (state / "agent.toml").write_text(text)
    return state


def sly(operator: OperatorFolder, *words: str) -> subprocess.CompletedProcess[str]:
    """What an operator's command says, and how it ends."""
    command = [sys.executable, "-m", "edge_agent.cli", *words, "--fleet", str(operator.folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def told(operator: OperatorFolder, *words: str) -> Any:
    done = sly(operator, *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def good_file(folder: Path, padding: bytes) -> Path:
    """The model with something after it that the library does not look at: another release, the same answers."""
    return _written(folder, model_path(MODEL).read_bytes() + padding)


def bad_file(folder: Path) -> Path:
    """The model with NaN among its weights: it loads, and answers NaN."""
    data = bytearray(model_path(MODEL).read_bytes())
    data[NAN_AT : NAN_AT + 400] = b"\x00\x00\xc0\x7f" * 100
    return _written(folder, bytes(data))


def _written(folder: Path, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{MODEL}.tflite"
    path.write_bytes(data)
    return path
