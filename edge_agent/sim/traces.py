"""Reads the public traces, as streams: Azure's conversation CSV and Mooncake's JSON lines.

Rules: a file is read line by line, bounded in lines and bytes a line; a line that is not what it should be is ``RefusedError``
with its number; times are whole µs since the first request.

Sessions of the Mooncake trace: its ``hash_ids`` name 512-token blocks of a prompt, each together with all that precede it, so two
prompts with an id in common begin alike up to there.  A request that holds the last id, or the last but one (the last block of a
prompt is rarely full), of an earlier request goes on with that request's session; any other begins one.  Of a branching talk the
later branch therefore takes the session over.  Azure's trace says nothing of sessions.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from edge_agent.core.errors import RefusedError, UnavailableError

MAX_LINE_BYTES = 2**20
MAX_LINES = 10**7
MAX_TOKENS = 2**24
MAX_HASHES = 2**16
MAX_TIPS = 2**17
"""Ends of prompts that are remembered; the oldest give way."""
FILES = {"azure": "azure_llm_2023_conv.csv", "mooncake": "mooncake_synthetic.jsonl"}
AZURE_HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens"


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace. ``session`` counts the talks of the trace from 1; 0: it belongs to none."""

    at_us: int
    prompt_tokens: int
    answer_tokens: int
    session: int = 0


def default_folder() -> Path:
    """Where the traces lie beside a checkout."""
    return Path(__file__).resolve().parents[2].parent / "shared" / "traces"


def trace_file(kind: str, folder: Path | None) -> Path | None:
    """The file of a trace, if it is there."""
    path = (folder or default_folder()) / FILES[kind]
    return path if path.is_file() else None


def read_trace(kind: str, path: Path) -> Iterator[Row]:
    """The rows of a trace in the order of their times. Raises ``RefusedError`` or ``UnavailableError``."""
    return (_azure if kind == "azure" else _mooncake)(path)


def trace_extent(kind: str, path: Path) -> tuple[int, int]:
    """How long a trace is, in µs, and how many requests it has. Raises as ``read_trace`` does."""
    try:
        status = path.stat()
    except OSError as error:
        raise UnavailableError(f"trace {path}", error.strerror or str(error), "choose another folder with --traces") from error
    return _extent(kind, path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _extent(kind: str, path: Path, size_bytes: int, mtime_ns: int) -> tuple[int, int]:
    """Of a file as it is with this size and time: it is read through once."""
    span_us, count = 1, 0
    for row in read_trace(kind, path):
        span_us, count = max(span_us, row.at_us), count + 1
    return span_us, count


def _azure(path: Path) -> Iterator[Row]:
    first_us = 0
    for number, line in _lines(path):
        if number == 1:
            if line != AZURE_HEAD:
                raise RefusedError(f"trace {path.name} line 1", line, AZURE_HEAD)
            continue
        at_us, prompt, answer = _understood(path, number, line, _azure_row, "a time, context tokens, generated tokens")
        first_us = first_us or at_us
        yield Row(max(0, at_us - first_us), prompt, answer)


def _azure_row(line: str) -> tuple[int, int, int]:
    stamp, prompt, answer = line.split(",")
    whole, _, fraction = stamp.partition(".")
    seconds = int((datetime.fromisoformat(whole) - datetime(2020, 1, 1)).total_seconds())
    return seconds * 1_000_000 + int((fraction + "000000")[:6]), _tokens(prompt), _tokens(answer)


def _mooncake(path: Path) -> Iterator[Row]:
    tips: OrderedDict[int, int] = OrderedDict()
    sessions = 0
    first_us = None
    for number, line in _lines(path):
        allowed = "an object with timestamp, input_length, output_length, hash_ids"
        at_us, prompt, answer, hashes = _understood(path, number, line, _mooncake_row, allowed)
        first_us = at_us if first_us is None else first_us
        session = next((tips[each] for each in reversed(hashes) if each in tips), 0)
        if not session:
            sessions += 1
            session = sessions
        for tip in hashes[-2:]:
            tips[tip] = session
            tips.move_to_end(tip)
        while len(tips) > MAX_TIPS:
            tips.popitem(last=False)
        yield Row(max(0, at_us - first_us), prompt, answer, session)


def _mooncake_row(line: str) -> tuple[int, int, int, list[int]]:
    entry = json.loads(line)
    hashes = entry["hash_ids"]
    if not isinstance(hashes, list) or len(hashes) > MAX_HASHES or any(type(each) is not int for each in hashes):
        raise ValueError("hash_ids")
    return _tokens(entry["timestamp"], 2**40) * 1000, _tokens(entry["input_length"]), _tokens(entry["output_length"]), hashes


def _tokens(value: Any, most: int = MAX_TOKENS) -> int:
    number = int(value)
    if isinstance(value, float | bool) or not 0 <= number <= most:
        raise ValueError(f"{value} is not from 0 to {most}")
    return number


def _understood(path: Path, number: int, line: str, read: Callable[[str], Any], allowed: str) -> Any:
    try:
        return read(line)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise RefusedError(f"trace {path.name} line {number}", line[:80], allowed, "take the file as it was published") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            for number in range(1, MAX_LINES + 1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_LINE_BYTES:
                    raise RefusedError(f"trace {path.name} line {number}", "a longer line", f"at most {MAX_LINE_BYTES} bytes")
                if text := line.decode("utf-8", "replace").strip():
                    yield number, text
    except OSError as error:
        raise UnavailableError(f"trace {path}", error.strerror or str(error), "choose another folder with --traces") from error
    raise RefusedError(f"trace {path.name}", f"more than {MAX_LINES} lines", f"at most {MAX_LINES} lines")
