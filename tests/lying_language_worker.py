"""The engine child of a language model that was taken over: after the text ``lie: NAME`` its next step is that lie."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from edge_agent.core.cbor import decode
from edge_agent.language import worker
from edge_agent.runtime import doorbell

Answer = tuple[object, list[bytes]]
EVENT = [0, 5, [1], "", "", 0, 0, 0, 0, [], 0, ""]


def _hang() -> Answer:
    time.sleep(600)
    return None, []


def _exit() -> Answer:
    os._exit(7)


LIES: dict[str, Callable[[], Answer]] = {
    "nothing": lambda: (None, []),
    "no list": lambda: ({1: 2}, []),
    "more turns than slots": lambda: ([[], 1, 99, 1], []),
    "a slot that is none": lambda: ([[[99, *EVENT[1:]]], 1, 1, 1], []),
    "an unknown token": lambda: ([[[*EVENT[:2], [2**31], *EVENT[3:]]], 1, 1, 1], []),
    "bulk that nobody named": lambda: ([[EVENT], 1, 1, 1], [b"x" * 100]),
    "rows that did not come": lambda: ([[[*EVENT[:8], 10**9, *EVENT[9:]]], 1, 1, 1], []),
    "a million events": lambda: ([[EVENT] * 1000, 1, 1, 1], []),
}
DEATHS = {"hang": _hang, "exit": _exit}
MORE = ("tensors", "handshake", "no cbor")


class Lying(worker.LanguageWorker):
    lie = ""

    def encode(self, body: Any, bulk: memoryview) -> Answer:
        value: Any = decode(bulk)
        if value[0] and value[0].startswith("lie: "):
            Lying.lie = value[0].removeprefix("lie: ")
        if Lying.lie == "ids":
            return 3, [b"\xff" * 12]
        if Lying.lie == "count":
            return 3, [b"\0" * 8]
        return super().encode(body, bulk)  # type: ignore[return-value]

    def step(self, body: Any, bulk: memoryview) -> Answer:
        found = (LIES | DEATHS).get(Lying.lie)
        return found() if found else super().step(body, bulk)  # type: ignore[return-value]


def lying_said(sequence: int, elapsed_us: int, body: object, bulk_bytes: int) -> bytes:
    if Lying.lie == "tensors" and bulk_bytes == 0:
        return doorbell.encode_done(sequence, elapsed_us, ())
    if Lying.lie == "handshake" and bulk_bytes == 0:
        return doorbell.encode_loaded(8)
    if Lying.lie == "no cbor" and bulk_bytes == 0:
        return doorbell.HEAD.pack(sequence, 0) + b"\xff\xff"
    return said(sequence, elapsed_us, body, bulk_bytes)


if __name__ == "__main__":
    said = doorbell.encode_said
    doorbell.encode_said = lying_said
    worker.LanguageWorker = Lying  # type: ignore[misc]
    worker.main(sys.argv[1:])
