"""``python -m tests.fuzz_models N [runtime]``: N mutated models through real sandboxed interpreters.

Every mutant is parsed, allocated and run in a confined child; what kills the child must not touch this process.  A child goes
on with the next mutant, whatever the last one left behind, until one kills it.  Ends with a table; exit code 1 if a mutant
was neither answered nor ended as a dead child.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable

from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import Tensor
from edge_agent.runtime.child import ChildDiedError
from edge_agent.runtime.sandbox import Sandbox
from edge_agent.runtime.settings import EngineSettings
from tests.sandboxes import INSTALLED, model_file
from tests.tiny_models import tiny_model

KINDS = ("float", "int8", "two_inputs", "conv")
OUTCOMES = {0: "refused", 1: "ran", 2: "refused by the runtime only", 3: "ran, and the work reader took it"}
SETTINGS = {"memory_bytes": 2**30, "invoke_limit_us": 5_000_000, "engine": "tests.odd_engines:Mutants"}


async def fuzz_one_child(model: bytes, seeds: list[int], settings: EngineSettings, count: Callable[[str], None]) -> None:
    """Run every mutant of ``model`` in ``seeds``, with a fresh child whenever one died."""
    fd, digest = model_file(model), hashlib.sha256(model).digest()
    sandbox: Sandbox | None = None
    try:
        for seed in seeds:
            sandbox = sandbox if sandbox and sandbox.alive else await Sandbox.start("mutant", fd, digest, settings)
            try:
                done, _ = await sandbox.invoke({"seed": Tensor("int64", (1,), seed.to_bytes(8, "little"))}, False)
                count(OUTCOMES[int.from_bytes(bytes(sandbox.take(done)["outcome"].data), "little")])
            except ChildDiedError as error:
                count(f"child died: {error.death.cause}")
            except UnavailableError as error:
                count(f"failed: {error.reason[:60]}")
    finally:
        if sandbox:
            await sandbox.close()
        os.close(fd)


async def fuzz(total: int, runtime: str, children: int = 2, first_seed: int = 0, count: Callable[[str], None] = print) -> None:
    """``total`` mutants spread over ``KINDS``, in ``children`` children at a time."""
    settings = EngineSettings(runtime=runtime, **SETTINGS)  # type: ignore[arg-type]
    places = asyncio.Semaphore(children)

    async def share(kind: str, seeds: list[int]) -> None:
        async with places:
            await fuzz_one_child(tiny_model(kind), seeds, settings, count)

    async with asyncio.TaskGroup() as group:
        for index, kind in enumerate(KINDS):
            seeds = list(range(first_seed + index, first_seed + total, len(KINDS)))
            for part in range(0, len(seeds), 250):
                group.create_task(share(kind, [seed // len(KINDS) for seed in seeds[part : part + 250]]))


def main() -> int:
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    runtime = sys.argv[2] if len(sys.argv) > 2 else INSTALLED[0]
    outcomes: Counter[str] = Counter()
    started = time.monotonic()

    def count(outcome: str) -> None:
        outcomes[outcome] += 1
        done = outcomes.total()
        if done % 500 == 0:
            print(f"{done}/{total} mutants, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    asyncio.run(fuzz(total, runtime, count=count))
    print(f"{runtime}: {total} mutated models in {time.monotonic() - started:.0f} s")
    for outcome, number in outcomes.most_common():
        print(f"{number:8d}  {100 * number / total:6.2f} %  {outcome}")
    print(f"{0:8d}  agent deaths")
    return 0 if outcomes.total() == total else 1


if __name__ == "__main__":
    sys.exit(main())
