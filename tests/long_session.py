"""``python -m tests.long_session TOKENS [WINDOW_BLOCKS]``: one session of SmolLM2 far past its context, on the test text.

Prints, every tenth of the way, the perplexity of the tokens since the last line and the memory of the process; exits with 1 if a
logit is no number or memory grew by more than ``MOST_GROWTH_MB`` after the first tenth.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

import numpy as np

from edge_agent.language.decoder import Decoder, Segment
from edge_agent.language.stages import open_stages
from tests.fetched import smollm2
from tests.rings import Session

TEXT = Path(__file__).parent / "data" / "alice.txt"
RUNTIME = "ai_edge_litert"
MOST_GROWTH_MB = 8


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def main(tokens: int, window_blocks: int = 16) -> int:
    built = smollm2()
    shape = built.card.shape
    stages = open_stages(importlib.import_module(f"{RUNTIME}.interpreter"), str(built.stages(RUNTIME)), shape, 2, RUNTIME)
    session = Session(Decoder(stages, shape, 2), shape, window_blocks)
    ring, text = session.ring, built.tokenizer().encode(TEXT.read_text())
    surprises: list[float] = []
    first_mb, start = 0.0, time.monotonic()
    for tenth in range(1, 11):
        while ring.tokens < tokens * tenth // 10:
            ids = [text[n % len(text)] for n in range(ring.tokens, ring.tokens + ring.room + 1)]
            (rows,) = session.decoder.step([Segment(ring, ids[:-1], "all", prompt=True)])
            ring.seal()
            rows -= rows.max(-1, keepdims=True)
            surprises += (np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(rows)), ids[1:]]).tolist()
        mean, surprises = float(np.mean(surprises)), []
        first_mb = first_mb or resident_mb()
        words = f"perplexity {np.exp(mean):.2f}, {resident_mb():.0f} MB, {ring.tokens / (time.monotonic() - start):.0f} tokens/s"
        print(f"{ring.tokens} tokens: {words}", flush=True)
        if not np.isfinite(mean) or resident_mb() > first_mb + MOST_GROWTH_MB:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
