"""The story of one board: it boots from a flashed image, joins, answers, and loses its power in an update again and again.

Owns ``Story``.  Rules: the board is what ``flash.sh`` wrote and nothing else; who speaks to it is an operator's command, through
the broker's TLS; the machine is looked into by SSH with the key that ``flash.sh`` put there; a step awaits an event, and when it
does not come, the end of the console is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from edge_agent.attest.receipts import unverified_receipt
from edge_agent.attest.self_test import Verdict
from edge_agent.gossip.presence import Standing
from edge_agent.steward.folder import OperatorFolder
from edge_agent.steward.session import OperatorSession
from models.fetch import fetch_picture
from ota.rollout import Progress, Step
from tests.boot.disk import VolatileDisk
from tests.boot.inside import Inside
from tests.boot.machine import Hardware, Machine
from tests.brokers import free_port
from tests.operators import broker_of

BOARD, MODEL, TASK, PICTURE = "kitchen", "blazeface-short", "detect_faces", "grace_hopper"
PADDING_BYTES = 48_000_000
"""After the model's own bytes, where no library looks: another revision, the same answers, and a long way over the air: no two
pieces are alike (what is on a board already is not sent)."""
RATE = "400kB"
PATIENCE_S = {"kvm": 300.0, "tcg": 1800.0}


class Story:
    """``tell`` runs it all. Raises ``AssertionError`` with what was awaited and the end of the console."""

    def __init__(self, run: Path, machine: Machine, accel: str, cuts: int) -> None:
        self.run, self.machine, self.cuts = run, machine, cuts
        self.patience_s = PATIENCE_S[accel]
        self.operator = OperatorFolder(run / "fleet")
        self.inside = Inside(machine.ssh_port, run / "key")
        self.picture = fetch_picture(PICTURE)
        self.began_s = time.monotonic()
        self.boot_epoch = 0
        self.session: OperatorSession

    async def tell(self) -> None:
        await self.sly("fleet", "publish")
        async with self.operator.session() as self.session:
            await self.boots("off the card")
            await self.answers(self.model)
            await self.is_tested()
            self.shows(await asyncio.to_thread(self.inside.look))
            await self.is_updated()
            self.shows(await asyncio.to_thread(self.inside.look))
            self.says(await self.sly("fleet", "show", BOARD))

    async def boots(self, after: str) -> None:
        """Power on, until the board is in the fleet with a boot that is newer than the one before."""
        switched_s = time.monotonic()
        self.machine.start()
        await self.until(lambda: self.online() > self.boot_epoch, "the board to join")
        self.boot_epoch = self.online()
        self.says(f"boot {self.machine.boots}, {after}: in the fleet after {time.monotonic() - switched_s:.0f} s")

    async def answers(self, model: bytes) -> None:
        """The operator asks, through the broker; the board's receipt names the model that answered."""
        asked_s = time.monotonic()
        deadline_ms = str(int(self.patience_s * 1000))
        words = ("ask", TASK, str(self.picture), "--board", BOARD, "--deadline-ms", deadline_ms, "--json")
        answer = json.loads(await self.sly(*words))
        receipt = unverified_receipt(b64decode(answer["receipt"]))
        assert (answer["board"], receipt.model_digest) == (BOARD, sha256(model).digest()), answer
        found = ", ".join(f"{each['label']} {each['score']:.3f}" for each in answer["findings"])
        assert found, "the face is not found"
        took_s = time.monotonic() - asked_s
        self.says(f"  asked through the broker: {found}; {answer['busy_us'] / 1000:.1f} ms busy, {took_s:.1f} s in all")

    async def is_tested(self) -> None:
        """Its own self-test of this boot is at the operator; only what needs a time server may be left open."""
        tests = self.session.self_tests
        await self.until(lambda: BOARD in tests and tests[BOARD].boot_epoch == self.boot_epoch, "the self-test of this boot")
        for check in tests[BOARD].checks:
            self.says(f"  self-test: {check.verdict.value} {check.name}: {check.what}")
        short = [check.name for check in tests[BOARD].checks if check.verdict is not Verdict.PASS]
        assert set(short) <= {"clock"}, f"the self-test does not pass: {short}"
        (sandbox,) = [check.what for check in tests[BOARD].checks if check.name == "sandbox"]
        assert "seccomp" in sandbox and "landlock" in sandbox and "no " not in sandbox, sandbox

    async def is_updated(self) -> None:
        """One push from its beginning to its end, and the plug pulled in it again and again."""
        path = self.run / f"{MODEL}.tflite"
        path.write_bytes(self.model + Random(MODEL).randbytes(PADDING_BYTES))
        with (self.run / "push.log").open("wb") as log:
            pushing = await asyncio.create_subprocess_exec(
                *self.command("ota", "push", str(path), "--max-rate", RATE), stdout=log, stderr=log
            )
        try:
            await self.until(lambda: self.progress() is not None, "the board to hear of the push")
            for at in range(1, self.cuts + 1):
                await self.is_cut(at)
                await self.boots(f"after power cut {at}")
                await self.answers(self.model)
            code = await asyncio.wait_for(pushing.wait(), self.patience_s)
        finally:
            if pushing.returncode is None:
                pushing.terminate()
                await pushing.wait()
        self.says((self.run / "push.log").read_text())
        assert code == 0, "the push did not come to a good end"
        said = self.progress()
        assert said is not None and said.step is Step.CONFIRMED, said
        await self.answers(path.read_bytes())

    async def is_cut(self, at: int) -> None:
        """When this part of the bytes is on the board; the last time while it tries the new model."""
        permille = 1000 * at // (self.cuts + 1)

        def reached() -> bool:
            said = self.progress()
            assert said is None or said.step in (Step.WAITING, Step.FETCHING), f"too late for cut {at}: {said}"
            return said is not None and said.step is Step.FETCHING and said.permille >= permille

        await self.until(reached, f"{permille} ‰ of the push")
        said = self.progress()
        unflushed, lost = self.machine.cut()
        assert said is not None
        kib = f"{unflushed // 1024} KiB were not flushed, {lost // 1024} KiB of them are lost"
        self.says(f"power cut {at}: {said.step.value}, {said.permille} ‰ here; {kib}")

    # What the operator knows.

    def online(self) -> int:
        """The boot with which it is there; 0 while it is not."""
        presence = self.session.fleet.presence(BOARD)
        return presence.boot_epoch if presence and presence.standing is Standing.ONLINE else 0

    def progress(self) -> Progress | None:
        """As this boot of the board says."""
        report, rollout = self.session.heard.reports.get(BOARD), self.session.heard.rollout(MODEL)
        if report is None or rollout is None or report.boot_epoch < self.boot_epoch:
            return None
        return report.of(MODEL, rollout.plan.serial)

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        """Raises ``AssertionError`` when it does not come, or the machine ended by itself."""
        until_s = time.monotonic() + self.patience_s
        while not await self.session.wait_for(holds, 5):
            late = time.monotonic() > until_s
            assert self.machine.runs and not late, f"waited for {what}; the console:\n{self.machine.last_words()}"

    # What the operator does.

    @property
    def model(self) -> bytes:
        return (self.run / "models" / f"{MODEL}.tflite").read_bytes()

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "edge_agent.cli", *words, "--fleet", str(self.operator.folder)]

    async def sly(self, *words: str) -> str:
        done = await asyncio.to_thread(
            subprocess.run, self.command(*words), capture_output=True, text=True, timeout=self.patience_s
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}\nthe console:\n{self.machine.last_words()}"
        return done.stdout

    def shows(self, facts: dict[str, Any]) -> None:
        for name, value in facts.items():
            self.says(f"  {name}: {value}")

    def says(self, text: str) -> None:
        for line in text.splitlines():
            print(f"[{time.monotonic() - self.began_s:6.0f} s] {line}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Boot a flashed image, and cut its power in updates.")
    for name in ("run", "kernel", "initrd"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--accel", required=True)
    parser.add_argument("--cuts", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ExitStack() as ends:
        ends.enter_context(broker_of(OperatorFolder(given.run / "fleet")))
        disk = VolatileDisk(given.run / "board.img", given.run / "disk.sock", given.seed)
        machine = Machine(
            Hardware(given.arch, given.accel, given.kernel, given.initrd), disk, given.run / "console.log", free_port()
        )
        ends.callback(machine.close)
        story = Story(given.run, machine, given.accel, given.cuts)
        asyncio.run(story.tell())
    return 0


if __name__ == "__main__":
    sys.exit(main())
