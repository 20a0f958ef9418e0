"""What the language path costs: decoding, prompts, four sessions at once, restoring, parked bytes; beside llama.cpp.

How: the measurements run in a process of their own with one NumPy thread (``tests.bench.language_paired``), in the Python that
the environment variable ``SLY_LLAMA_PYTHON`` names if it is set (``make bench-llama`` makes one): with ``llama_cpp`` installed
there, ours and llama.cpp alternate in that one process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tests.bench.apart import figures_of
from tests.bench.figures import Figure, Progress
from tests.fetched import smollm2, smollm2_gguf

TEXT = Path(__file__).parents[1] / "data" / "alice.txt"


def measure(progress: Progress) -> Iterator[Figure]:
    progress("SmolLM2")
    built = smollm2()
    ids = built.tokenizer().encode(TEXT.read_text())
    order = json.dumps([str(built.stages("ai_edge_litert")), str(smollm2_gguf()), asdict(built.card.shape), ids])
    python = os.environ.get("SLY_LLAMA_PYTHON", sys.executable)
    yield from figures_of("tests.bench.language_paired", order, python=python)
