"""The bare interpreter that the agent is compared with: a child process that runs one model on one input, round by round.

Rules: what runs is ``set_tensor``, ``invoke`` and ``get_tensor``, with one thread, as anybody would write it; the same library
and environment as the engine child's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edge_agent.core.errors import UnavailableError
from edge_agent.runtime.child import ROOT, child_environment

REMEDY = "pip install ai-edge-litert"


class BareInterpreter:
    """``round(n)`` runs ``n`` inferences and gives each one's time in µs. Use it as a context manager."""

    def __init__(self, model: Path, tensor: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bare", str(model), str(tensor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(),
            cwd=ROOT,
            text=True,
        )
        self.library = str(self._answer())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()

    def round(self, inferences: int) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{inferences}\n")
        self._process.stdin.flush()
        samples: list[float] = self._answer()
        return samples

    def asked(self) -> tuple[float, float]:
        """One inference asked for over a pipe: its own time, and that of the way there and back, in µs."""
        started_ns = time.perf_counter_ns()
        (inside_us,) = self.round(1)
        return inside_us, (time.perf_counter_ns() - started_ns) / 1000 - inside_us

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UnavailableError("bare interpreter", f"it ended with code {self._process.wait()}", REMEDY)
        return json.loads(line)


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)


def main(model: str, tensor: str) -> None:
    import numpy as np

    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter
    interpreter = Interpreter(model_path=model, num_threads=1)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    array = np.fromfile(tensor, given["dtype"]).reshape(given["shape"])
    wanted = [each["index"] for each in interpreter.get_output_details()]
    _say(Interpreter.__module__)
    for line in sys.stdin:
        samples = []
        for _ in range(int(line)):
            started_ns = time.perf_counter_ns()
            interpreter.set_tensor(given["index"], array)
            interpreter.invoke()
            outputs = [interpreter.get_tensor(index) for index in wanted]
            samples.append((time.perf_counter_ns() - started_ns) / 1000)
            del outputs
        _say(samples)


if __name__ == "__main__":
    main(*sys.argv[1:])
