"""A check of the fleet's metadata, asked by the agent and made by a child process that ends with it.

Rules: the agent never imports python-tuf, ``cryptography`` or ``urllib3``; what the child says is read within bounds and believed
only in the form of ``ota.checked``; a child that hangs, grows or dies is an ``UnavailableError``, and nothing was accepted.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.runtime.child import child_environment, ended, last_words
from ota.checked import MAX_ANSWER_BYTES, Checked, Question, Target, decode_answer, encode_question

__all__ = ["CHECK_LIMIT_S", "Checked", "Target", "check"]

CHECKER = "ota.checker"
CHECK_LIMIT_S = 60.0
KILLED_S = 10
MAX_COMPLAINT_BYTES = 64 * 2**10
PASSED_ON = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""What a child that fetches over HTTP needs besides what every child gets."""
SUBJECT = "check of update metadata"


async def check(
    folder: Path,
    root: bytes,
    offered: Mapping[str, bytes],
    want: Sequence[str],
    floors: Mapping[str, int],
    not_before_s: int,
    url: str = "",
    limit_s: float = CHECK_LIMIT_S,
) -> Checked:
    """Verify what is ``offered`` (or what lies at ``url``, if that is given) against ``root`` and what ``folder`` holds.

    The arguments are those of ``Question``; the caller keeps ``marks`` of the answer durably before it acts on the rest, and
    gives them as ``floors`` next time.  Raises ``RefusedError`` for metadata that breaks a rule; ``UnavailableError`` for what is
    missing, cannot be written, or was not answered within ``limit_s`` (seconds).
    """
    question = Question(folder.absolute(), root, dict(offered), tuple(want), dict(floors), not_before_s, url)
    answer = decode_answer(await _ask(encode_question(question), limit_s))
    if isinstance(answer, Checked):
        return answer
    if len(answer) == 4:
        raise RefusedError(*answer)
    raise UnavailableError(*answer)


async def _ask(question: bytes, limit_s: float) -> bytes:
    child = await _started(math.ceil(limit_s))
    try:
        async with asyncio.timeout(limit_s):
            _, answer, complaint = await asyncio.gather(
                _fed(child, question), _read(child.stdout, MAX_ANSWER_BYTES + 1), _read(child.stderr, MAX_COMPLAINT_BYTES)
            )
            if len(answer) <= MAX_ANSWER_BYTES:
                await child.wait()
    except TimeoutError as error:
        raise UnavailableError(SUBJECT, f"took longer than {limit_s:g} s", "it is tried again later") from error
    finally:
        await _over(child)
    if child.returncode != 0:
        words = last_words(complaint)
        reason = f"its process died: {ended(child.returncode or 0)}" + (f" ({words})" if words else "")
        raise UnavailableError(SUBJECT, reason, "nothing was accepted; it is tried again later")
    return answer


async def _started(cpu_s: int) -> Process:
    environment = child_environment() | {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    command = (sys.executable, "-P", "-s", "-m", CHECKER, str(os.getpid()), str(cpu_s))
    try:
        return await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment, cwd="/", start_new_session=True
        )
    except OSError as error:
        raise UnavailableError(SUBJECT, f"cannot start its process: {error.strerror}", "it is tried again later") from error


async def _fed(child: Process, question: bytes) -> None:
    """A child that ends early is told by its status, not here."""
    if child.stdin is None:
        return
    with suppress(BrokenPipeError, ConnectionResetError):
        child.stdin.write(question)
        await child.stdin.drain()
    child.stdin.close()


async def _read(stream: asyncio.StreamReader | None, max_bytes: int) -> bytes:
    """What comes until its end, or the first ``max_bytes`` of it."""
    if stream is None:
        return b""
    try:
        return await stream.readexactly(max_bytes)
    except asyncio.IncompleteReadError as error:
        return error.partial


async def _over(child: Process) -> None:
    """End it and what it started, if it still runs; its pipes are emptied, or asyncio would not see its end."""
    if child.returncode is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(KILLED_S):
            for stream in (child.stdout, child.stderr):
                while stream is not None and await stream.read(MAX_COMPLAINT_BYTES):
                    pass
            await child.wait()
