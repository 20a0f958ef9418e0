"""The known answer, asked of the runtime as it would be asked of any model: in a sandboxed child, with the board's delegate.

Rules: the child is closed whatever comes of it; every wait has an end; what went wrong is told apart by where it went wrong, and
with a delegate it is asked once more without, to know which of the two is at fault.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from hashlib import sha256

from board_support.board import Delegate
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.core.values import Tensor
from edge_agent.runtime.child import ChildDiedError
from edge_agent.runtime.sandbox import Sandbox
from edge_agent.runtime.settings import EngineSettings
from models.known_answer import known_inputs, known_model, known_outputs

NAME = "known-answer"
LOAD_LIMIT_US, INVOKE_LIMIT_US = 120_000_000, 30_000_000
ARENA_BYTES = 2**20
ILLEGAL, NO_CHILD = "SIGILL", "no child can be started"


@dataclass(frozen=True, slots=True)
class Asked:
    """``why``: what kept the right answer from coming, with what to do in ``remedy``; both empty if it came.

    ``layers``: of the sandbox, as far as the child got to tell; ``delegate``: with which it was asked, "" for the CPU's kernels.
    """

    library: str = ""
    delegate: str = ""
    layers: tuple[str, ...] = ()
    why: str = ""
    remedy: str = ""


async def ask_known_answer(settings: EngineSettings, delegate: Delegate | None = None) -> Asked:
    """Run the known model once; never raises for what the machine does."""
    asked = await _ask(settings, delegate)
    if delegate is None or not asked.why:
        return asked
    alone = await _ask(settings, None)
    if alone.why:
        return replace(alone, delegate="")
    remedy = "the runtime is sound: install the delegate that fits this board and this runtime, see sly board probe"
    return replace(asked, why=f"with {delegate.library}: {asked.why}", remedy=remedy, layers=asked.layers or alone.layers)


async def _ask(settings: EngineSettings, delegate: Delegate | None) -> Asked:
    bounded = replace(settings, load_limit_us=LOAD_LIMIT_US, invoke_limit_us=INVOKE_LIMIT_US, arena_bytes=ARENA_BYTES)
    named = Asked(delegate=delegate.library if delegate else "")
    sandbox = None
    try:
        sandbox = await _started(bounded, delegate)
        ready = sandbox.ready
        named = replace(named, library=ready.library, layers=ready.confinement)
        done, _ = await sandbox.invoke(known_inputs(), whole_task=False)
        return _judged(named, sandbox.take(done))
    except (SlyError, OSError) as error:
        why, remedy = _told(error)
        return replace(named, why=why, remedy=remedy)
    finally:
        if sandbox is not None:
            await sandbox.close()


async def _started(settings: EngineSettings, delegate: Delegate | None) -> Sandbox:
    model = known_model()
    descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC)
    try:
        os.write(descriptor, model)
        return await Sandbox.start(NAME, descriptor, sha256(model).digest(), settings, delegate)
    finally:
        os.close(descriptor)


def _judged(asked: Asked, outputs: dict[str, Tensor]) -> Asked:
    expected = known_outputs()
    if outputs == expected:
        return asked
    wrong = [name for name in expected if outputs.get(name) != expected[name]]
    remedy = "install the runtime anew; if it goes on, the memory or the processor of this board is at fault"
    return replace(asked, why=f"{asked.library} computes wrong numbers ({', '.join(wrong)} of whole numbers)", remedy=remedy)


def _told(error: SlyError | OSError) -> tuple[str, str]:
    """What happened, and what to do."""
    match error:
        case ChildDiedError() if error.death.cause == ILLEGAL:
            remedy = "install a runtime made for this processor: a 64-bit system, and the wheel for it"
            return f"{ILLEGAL}: the runtime uses instructions that this processor does not have", remedy
        case ChildDiedError() if error.death.cause.startswith("hung"):
            return f"the engine {error.death}", "see what else uses the machine; start it again, and install the runtime anew"
        case ChildDiedError():
            return f"the engine died: {error.death}", "install the runtime anew, or its other release: docs/boards.md"
        case UnavailableError() if error.reason.startswith(NO_CHILD):
            remedy = f"see that this user may run {sys.executable}, and how many processes and how much memory it may have"
            return error.reason, remedy
        case UnavailableError():
            reason, _, remedy = error.reason.rpartition("; ")  # what a child says is in one line
            return (reason, remedy) if reason else (remedy, error.remedy or "see docs/boards.md, and sly board probe")
        case RefusedError():
            return f"the runtime refuses a sound model: {error}", "install the runtime anew: docs/boards.md"
    return f"no engine can be started: {error}", "see what else uses the machine's memory and processes"
