"""What the language path costs: decoding, prompts, four sessions at once, restoring, parked bytes; beside llama.cpp.

How: the measurements run in a process of their own with one NumPy thread (``tests.bench.language_paired``), in the Python that
the environment variable ``SLY_LLAMA_PYTHON`` names if it is set (``make bench-llama`` makes one): with ``llama_cpp`` installed
there, ours and llama.cpp alternate in that one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from edge_agent.core.errors import UnavailableError
from tests.bench.figures import Figure, Progress
from tests.fetched import smollm2, smollm2_gguf

TEXT = Path(__file__).parents[1] / "data" / "alice.txt"


def measure(progress: Progress) -> Iterator[Figure]:
    progress("SmolLM2")
    built = smollm2()
    ids = built.tokenizer().encode(TEXT.read_text())
    order = json.dumps([str(built.stages("ai_edge_litert")), str(smollm2_gguf()), asdict(built.card.shape), ids])
    python = os.environ.get("SLY_LLAMA_PYTHON", sys.executable)
    command = [python, "-m", "tests.bench.language_paired", order]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout
        for line in child.stdout:
            each = json.loads(line)
            yield Figure(each["what"], each["value"], each["unit"], each["goal"])
    if child.returncode:
        raise UnavailableError("language benchmark", f"{python} ended with {child.returncode}", "its own words are above")
