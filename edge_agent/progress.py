"""A progress bar for long work, on stderr: one line, drawn again; a line for each kind of work where that is no terminal."""

from __future__ import annotations

import sys
import time

BAR_CHARS = 30
REDRAW_S = 0.1


class Bar:
    def __init__(self) -> None:
        self._live, self._what, self._drawn_s = sys.stderr.isatty(), "", 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live and self._what:
            print(file=sys.stderr, flush=True)

    def show(self, what: str, done: int, whole: int) -> None:
        if not self._live:
            if what != self._what:
                print(f"{what} ...", file=sys.stderr, flush=True)
            self._what = what
            return
        if what != self._what and self._what:
            print(file=sys.stderr)
        now_s = time.monotonic()
        if what == self._what and done < whole and now_s - self._drawn_s < REDRAW_S:
            return
        self._what, self._drawn_s = what, now_s
        full = BAR_CHARS * done // max(1, whole)
        bar = "#" * full + "-" * (BAR_CHARS - full)
        print(f"\r{what:28} [{bar}] {100 * done // max(1, whole):3d} %", end="", file=sys.stderr, flush=True)
