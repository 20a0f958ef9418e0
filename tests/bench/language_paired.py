"""The measurements of ``tests.bench.language``, in a process of their own: figures as JSON lines on stdout, progress on stderr.

How: ours and llama.cpp, where ``llama_cpp`` can be imported, alternate in this one process in blocks of ``BLOCK`` steps; the
first of each is thrown away; each round gives the first quartile of each, so that other work on the machine weighs less, and a
ratio is the median over the rounds of their ratios.  With one thread the same is told of CPU time, which feels other work least.
A step decodes one token at a context of exactly C and is then taken back.  Goals are the most that is allowed.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from edge_agent.core.model_shape import ModelShape
from edge_agent.language.decoder import Decoder, Segment
from edge_agent.language.stages import open_stages
from tests.bench.figures import Figure, progress
from tests.bench.llama_cpp_rival import Rival, q8_0
from tests.rings import Session

CONTEXTS = (128, 512, 1024)
SHORT_TOKENS = 64
PREFILL_TOKENS, RESTORE_TOKENS = 512, 1024
WINDOW_BLOCKS = 24
BLOCK, ROUNDS, PREFILL_ROUNDS, RESTORES = 9, 7, 3, 12
DECODE_GOALS = {1: 0.75, 2: 0.85}
PREFILL_GOAL, RESTORE_GOAL, BYTES_GOAL = 0.4, 1 / 30, 6_700
SESSIONS, SESSIONS_GOAL = 4, 4 / 3.3
Taken = tuple[float, float]
WALL, CPU = 0, 1
Timed = dict[str, Callable[[], Taken]]


def main() -> None:
    stages, gguf, shape, ids = json.loads(sys.argv[1])
    for figure in measured(Path(stages), Path(gguf), ModelShape(**shape), ids):
        print(json.dumps(figure.as_json()), flush=True)


def measured(stages: Path, gguf: Path, shape: ModelShape, ids: list[int]) -> Iterator[Figure]:
    files = {}
    if find_spec("llama_cpp"):
        files = {"llama.cpp Q8_0": q8_0(gguf, gguf.with_name("smollm2.q8_0.gguf")), "llama.cpp Q4_1": gguf}
    runtime = importlib.import_module("ai_edge_litert.interpreter")
    for threads in DECODE_GOALS:
        decoder = Decoder(open_stages(runtime, str(stages), shape, threads, "ai_edge_litert"), shape, threads)
        rivals = {name: Rival(path, threads, 2048) for name, path in files.items()}
        words = f"{threads} thread" + "s" * (threads > 1)
        for context in CONTEXTS:
            yield from _decoding(decoder, rivals, ids, context, threads, words)
        yield from _prefill(decoder, rivals, ids, words)
        for rival in rivals.values():
            rival.close()
        yield from _sessions(decoder, files, ids, threads, words)
        yield from _restoring(decoder, ids, words)
    yield from _parked(decoder, ids)


def _decoding(
    decoder: Decoder, rivals: dict[str, Rival], ids: list[int], context: int, threads: int, words: str
) -> Iterator[Figure]:
    progress(f"decoding, {words}, C = {context}")
    session = _session(decoder, ids[:context])
    ways: Timed = {"": lambda: _one_step([session])}
    for name, rival in rivals.items():
        rival.clear()
        rival.read(ids[:context])
        ways[name] = _rival_step(rival, context, 1)
    yield from _compared(f"decode, {words}, C = {context}", _rounds(ways, ROUNDS), DECODE_GOALS[threads], threads == 1)


def _rival_step(rival: Rival, context: int, sessions: int) -> Callable[[], Taken]:
    def step() -> Taken:
        taken = _timed(lambda: rival.step(context, sessions))
        rival.take_back(context)
        return taken

    return step


def _one_step(sessions: list[Session]) -> Taken:
    segments = [Segment(each.ring, [500 + n]) for n, each in enumerate(sessions)]
    taken = _timed(lambda: sessions[0].decoder.step(segments))
    for each in sessions:
        each.ring.truncate(each.ring.tokens - 1)
    return taken


def _prefill(decoder: Decoder, rivals: dict[str, Rival], ids: list[int], words: str) -> Iterator[Figure]:
    progress(f"prefill, {words}")
    part = ids[:PREFILL_TOKENS]
    session = _session(decoder, [])

    def ours() -> Taken:
        session.ring.reset()
        return _timed(lambda: _fill(session, part))

    ways: Timed = {"": ours}
    for name, rival in rivals.items():
        ways[name] = _rival_prefill(rival, part)
    yield from _compared(
        f"prefill of {PREFILL_TOKENS}, {words}", _rounds(ways, PREFILL_ROUNDS, 1), PREFILL_GOAL, words == "1 thread"
    )


def _rival_prefill(rival: Rival, part: list[int]) -> Callable[[], Taken]:
    def read() -> Taken:
        rival.clear()
        return _timed(lambda: rival.read(part))

    return read


def _sessions(decoder: Decoder, files: dict[str, Path], ids: list[int], threads: int, words: str) -> Iterator[Figure]:
    """A step of four sessions over a step of one: 1 would be four times the tokens a second.

    llama.cpp's own step of four is 5 to 6 times its step of one: its Q8_0 products of 2 to 8 rows are another path than those of
    one row, and slow (one sequence alone, 1, 2, 4, 8, 16 rows: 6.5, 23, 33, 38, 45 ms); not logits, batch sizes or attention.
    """
    for context in (SHORT_TOKENS, CONTEXTS[0], CONTEXTS[1]):
        progress(f"{SESSIONS} sessions, {words}, C = {context}")
        sessions = [_session(decoder, ids[n : n + context]) for n in range(SESSIONS)]
        ways: Timed = {"one": _steps_of(sessions[:1]), "four": _steps_of(sessions)}
        those = files if context == CONTEXTS[0] else {}
        rivals = [Rival(path, threads, 1024, SESSIONS) for name, path in those.items() if "Q8_0" in name]
        for rival in rivals:
            for n in range(SESSIONS):
                rival.read(ids[n : n + context], n)
            ways |= {"rival's one": _rival_step(rival, context, 1), "rival's four": _rival_step(rival, context, SESSIONS)}
        rounds = _rounds(ways, ROUNDS)
        what = f"{SESSIONS} sessions, {words}, C = {context}: a step / one session's"
        yield Figure(what, _ratio(rounds, "four", "one"), "", SESSIONS_GOAL)
        if threads == 1:
            yield Figure(f"{what}, CPU time", _ratio(rounds, "four", "one", CPU), "", SESSIONS_GOAL)
        for rival in rivals:
            yield Figure(f"{what}, llama.cpp Q8_0 itself", _ratio(rounds, "rival's four", "rival's one"), "")
            yield Figure(f"{what[: what.index(':')]}: ours / llama.cpp Q8_0", _ratio(rounds, "four", "rival's four"), "")
            rival.close()


def _steps_of(sessions: list[Session]) -> Callable[[], Taken]:
    return lambda: _one_step(sessions)


def _restoring(decoder: Decoder, ids: list[int], words: str) -> Iterator[Figure]:
    progress(f"restoring, {words}")
    session = _session(decoder, [])
    prefill_s, _ = _timed(lambda: _fill(session, ids[:RESTORE_TOKENS]))
    parked = session.parked()
    taken = [_timed(lambda: session.ring.restore(RESTORE_TOKENS, *parked))[WALL] for _ in range(RESTORES)]
    yield Figure(f"restore of {RESTORE_TOKENS} tokens", statistics.median(taken) * 1e3, "ms")
    what = f"restore / prefill of {RESTORE_TOKENS} tokens, {words}"
    yield Figure(what, statistics.median(taken) / prefill_s, "", RESTORE_GOAL)


def _parked(decoder: Decoder, ids: list[int]) -> Iterator[Figure]:
    shape = decoder.shape
    yield Figure("parked bytes a token, sealed", shape.block_bytes / 64, "bytes", BYTES_GOAL)
    session = _session(decoder, ids[:RESTORE_TOKENS])
    prelude, blocks, rows = session.parked()
    total = len(prelude) + sum(map(len, blocks)) + len(rows)
    yield Figure(f"parked bytes a token of {RESTORE_TOKENS}, rows and sinks included", total / RESTORE_TOKENS, "bytes")


def _session(decoder: Decoder, ids: list[int]) -> Session:
    session = Session(decoder, decoder.shape, WINDOW_BLOCKS)
    _fill(session, ids)
    return session


def _fill(session: Session, ids: list[int]) -> None:
    """Read a prompt; only the logits after its last token are wanted."""
    ring = session.ring
    while ring.tokens < len(ids):
        last = min(len(ids), ring.tokens + ring.room)
        session.decoder.step([Segment(ring, ids[ring.tokens : last], "last" if last == len(ids) else "none", True)])
        session.seal()


def _timed(action: Callable[[], object]) -> Taken:
    """Wall clock and CPU time, seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - start, time.process_time() - cpu


def _rounds(ways: Timed, rounds: int, block: int = BLOCK) -> list[dict[str, Taken]]:
    """The first quartiles of each way's block, round by round; the first of a block and the first round are thrown away."""
    found = []
    for _ in range(rounds + 1):
        found.append({name: _quartile([way() for _ in range(block + 1)][1:]) for name, way in ways.items()})
    return found[1:]


def _quartile(taken: Sequence[Taken]) -> Taken:
    wall, cpu = (sorted(each)[len(taken) // 4] for each in zip(*taken, strict=True))
    return wall, cpu


def _ratio(rounds: list[dict[str, Taken]], one: str, other: str, clock: int = WALL) -> float:
    return statistics.median(each[one][clock] / each[other][clock] for each in rounds)


def _compared(what: str, rounds: list[dict[str, Taken]], goal: float, cpu: bool) -> Iterator[Figure]:
    yield Figure(what, statistics.median(each[""][WALL] for each in rounds) * 1e3, "ms")
    for name in rounds[0]:
        if name:
            allowed = goal if "Q8_0" in name else None
            yield Figure(f"{what}: ours / {name}", _ratio(rounds, "", name), "", allowed)
            if cpu:
                yield Figure(f"{what}: ours / {name}, CPU time", _ratio(rounds, "", name, CPU), "", allowed)


if __name__ == "__main__":
    main()
