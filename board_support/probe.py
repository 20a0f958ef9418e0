"""Trying what may kill the one who tries: native libraries, and the machine's own commands.

Rules: a library is loaded in a child process, never in this one, because a delegate that does not fit its runtime
segfaults; a crash, a hang, a missing file and a missing symbol are told apart.  A command is run without a shell, bounded
in time and output, and only when the board's root is the real one.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from board_support.sysfs import Absent, Tree

PROBE_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 5.0
MAX_OUTPUT_BYTES = 64 * 2**10
NOT_LOADED, NO_SYMBOL, FLOODED = 3, 4, 1000

CHILD = f"""
import ctypes, os, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
answer = os.dup(1)
silence = os.open(os.devnull, os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(silence, descriptor)
def end(code, text):
    os.write(answer, text.encode("utf-8", "replace")[:400])
    os._exit(code)
try:
    library = ctypes.CDLL(sys.argv[1])
except OSError as error:
    end({NOT_LOADED}, str(error))
for symbol in sys.argv[2:]:
    if not hasattr(library, symbol):
        end({NO_SYMBOL}, symbol)
end(0, "")
"""


def library_refusal(library: str, symbols: Sequence[str], timeout_s: float = PROBE_TIMEOUT_S) -> str:
    """Why ``library`` (a path or soname) cannot be used, "" if it loads and has every one of ``symbols``."""
    code, output = _run([sys.executable, "-I", "-c", CHILD, library, *symbols], timeout_s)
    if code is None:
        return f"{library}: hung for {timeout_s:g} s while it was loaded; it was killed"
    if code < 0:
        return f"{library}: crashed with {_signal_name(-code)} while it was loaded: it does not fit this system or this runtime"
    if code == NO_SYMBOL:
        return f"{library}: has no symbol {output}: not the library that is wanted"
    said = output.removeprefix(f"{library}: ") or f"the probe ended with exit code {code}"
    return "" if code == 0 else f"{library}: {said}"


def command_output(tree: Tree, *command: str) -> str | Absent:
    """What one of the board's own commands prints, or why it cannot be asked."""
    if not tree.is_this_machine:
        return Absent(f"{command[0]}: asked only where the root is /, not {tree.root}")
    path = shutil.which(command[0])
    if path is None:
        return Absent(f"{command[0]}: not installed")
    code, output = _run([path, *command[1:]], COMMAND_TIMEOUT_S)
    if code is None:
        return Absent(f"{' '.join(command)}: no answer in {COMMAND_TIMEOUT_S:g} s")
    if code == FLOODED:
        return Absent(f"{' '.join(command)}: printed more than {MAX_OUTPUT_BYTES} bytes")
    return output if code == 0 else Absent(f"{' '.join(command)}: exit code {code}")


def _run(command: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
    """Exit code and output. A negative code is the signal that ended it; ``None``: it hung, ``FLOODED``: it printed too
    much, and it was killed with everything that it started."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        return 127, error.strerror or str(error)
    deadline_s = time.monotonic() + timeout_s
    with process:
        try:
            output = _bounded_output(process, deadline_s)
            if len(output) > MAX_OUTPUT_BYTES:
                os.killpg(process.pid, signal.SIGKILL)
                return FLOODED, ""
            process.wait(max(deadline_s - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, ""
    return process.returncode, output.decode("utf-8", "replace").strip()


def _bounded_output(process: subprocess.Popen[bytes], deadline_s: float) -> bytes:
    """What comes until the end, the bound or the deadline. Raises ``subprocess.TimeoutExpired``."""
    assert process.stdout is not None
    pipe, output = process.stdout.fileno(), b""
    while len(output) <= MAX_OUTPUT_BYTES:
        if not select.select([pipe], [], [], max(deadline_s - time.monotonic(), 0))[0]:
            raise subprocess.TimeoutExpired(process.args, 0)
        if not (chunk := os.read(pipe, MAX_OUTPUT_BYTES)):
            break
        output += chunk
    return output


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
