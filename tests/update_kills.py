"""A real agent under one push after another, killed with SIGKILL at random moments: ``python -m tests.update_kills N [SEED]``.

A world is an operator whose pushes go on, its Mosquitto, one agent, and a client that asks all the time, with the same request
until it is answered.  A kill falls a short random time after something drawn: the start, readiness, the first pieces that were
sent, a release loaded beside the old one, the turn to it, its confirmation.  When exactly is left to the machine; nothing that
is checked depends on it.  Checked after each kill: confirmed releases, floors and boots never go back.  After each start: a
real inference is answered, by the confirmed model or the one that is pushed.  At the end: the last push is done, and of every
receipt that the client holds the ledger holds the same, in one chain.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from random import Random

from edge_agent.attest.evidence import NO_DIGEST
from edge_agent.attest.receipts import Receipt, open_receipt, receipt_digest
from edge_agent.client import Client, request_for_picture
from edge_agent.configured import read_config, signer_of
from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import InferenceResult, Status
from edge_agent.steward.pushing import Wanted, attend, begin, planned, release_into
from edge_agent.steward.session import OperatorSession
from edge_agent.store.ledger import Ledger
from edge_agent.transport.topics import Kind
from ota.records import Records
from ota.release import release_of_model
from ota.slots import ModelSlots, State
from tests.enrolled_fleet import LIMITS, MODEL, TASK, enrolled, good_file
from tests.fetched import model_path, picture_path
from tests.operators import broker_of, new_fleet

BOARD = "kitchen"
WORLDS = 3
"""Beside each other: much of a life is waiting."""
SETTINGS = {"ota": "trial_s = 1\ntrial_inferences = 8\ntrial_boots = 100\n", "attest": "epoch_s = 600\n"}
"""More starts within a trial than there may be kills in it: what a boot loop comes to is tested elsewhere."""
PADDING_BYTES = 12 * 2**16
RATE_BYTES_PER_S = 2**20
PATIENCE_S = 120.0
POLL_S = 0.004
BATCH = 256
SEEDED_BYTES = 4 * 2**16
"""What a board has of a release already, rounded up."""
MOMENTS = {"spawned": 1.0, "ready": 0.9, "pieces": 0.8, "loaded beside": 0.3, "new requests go to": 0.8, "is confirmed": 0.2}
"""After what a kill falls, and at most how many seconds after it."""


class Pushes(threading.Thread):
    """An operator that pushes release after release, each when the one before is confirmed, until ``finish`` is called."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.operator = new_fleet(folder / "op")
        self.digests = {0: sha256(model_path(MODEL).read_bytes()).digest()}
        self.fault: BaseException | None = None
        self._folder, self._random = folder / "pushed", Random(f"pushes {seed}")
        self._is_last = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._push_for_ever())

    def run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self.fault = error
            raise
        finally:
            self._loop.close()

    def finish(self) -> int:
        """Push one more; its number, when it is confirmed."""
        self._is_last.set()
        self.join(PATIENCE_S)
        assert not self.is_alive() and self.fault is None, f"the last push does not end: {self.fault}"
        return max(self.digests)

    def stop(self) -> None:
        if self.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
            self.join(PATIENCE_S)

    async def _push_for_ever(self) -> None:
        kinds = (Kind.OTA_META, Kind.WORD, Kind.ONLINE, Kind.ROLLOUT, Kind.REPORT)
        async with self.operator.session(kinds=kinds) as session:
            is_last = False
            while not is_last:
                is_last = self._is_last.is_set()
                await self._push(session)

    async def _push(self, session: OperatorSession) -> None:
        path = good_file(self._folder, self._random.randbytes(PADDING_BYTES))
        built = release_of_model(str(path), 1, golden=False)
        release = release_into(self.operator, built.release, built.files)
        self.digests[release.number] = release.files[0].digest
        await self.operator.publish(session)
        wanted = Wanted(canary_permille=1000, rate_bytes_per_s=RATE_BYTES_PER_S)
        await begin(self.operator, session, planned(self.operator, release, wanted))
        status = await attend(self.operator, session, MODEL, lambda status: None)
        assert status["state"] == "done", f"{status['state']}: {status['why']}"


class Asking(threading.Thread):
    """Asks the agent for a real inference all the time while it is ``ready``; the same request again until it is answered."""

    def __init__(self, socket: Path) -> None:
        super().__init__(daemon=True)
        self._socket, self._ending = socket, False
        self.ready = threading.Event()
        self._answered = threading.Condition()
        self.results: list[InferenceResult] = []

    def run(self) -> None:
        picture = picture_path("grace_hopper").read_bytes()
        while not self._ending:
            request = request_for_picture(TASK, picture, limits=LIMITS)
            while not self._ending:
                self.ready.wait()
                with suppress(UnavailableError), Client(self._socket) as client:
                    result = client.submit(request)
                    with self._answered:
                        self.results.append(result)
                        self._answered.notify_all()
                    break
                time.sleep(0.02)
            time.sleep(0.05)

    def wait_for_more(self, count: int, alive: Callable[[], object]) -> None:
        """Return when so many more were answered."""
        until_s = time.monotonic() + PATIENCE_S
        with self._answered:
            wanted = len(self.results) + count
            while len(self.results) < wanted:
                assert alive() and time.monotonic() < until_s, "it does not serve"
                self._answered.wait(0.5)

    def end(self) -> None:
        self._ending = True
        self.ready.set()
        self.join(PATIENCE_S)


class Life:
    """One life of the agent."""

    def __init__(self, state: Path) -> None:
        self._state, self.log = state, state / "agent.log"
        self.log.touch()
        self._said = self.log.stat().st_size
        command = [sys.executable, "-m", "edge_agent.cli", "agent", "--config", str(state / "agent.toml")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def has_come(self, moment: str) -> bool:
        if moment == "spawned":
            return True
        if moment == "pieces":
            return any(_size_bytes(path) > SEEDED_BYTES for path in (self._state / "ota" / "staging").glob("*"))
        with self.log.open("rb") as log:
            log.seek(self._said)
            return ("is ready on" if moment == "ready" else moment).encode() in log.read()

    def wait_for(self, moment: str) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not self.has_come(moment):
            assert self.is_alive() and time.monotonic() < until_s, f"{moment!r} does not come: {self.last_words()}"
            time.sleep(POLL_S)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        return self.log.read_text("utf-8", "replace")[-3000:]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)


class World:
    """One agent that is killed again and again; ``found``: how often its ledger had it in which state then."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._pushes, self._random = Pushes(folder, seed), Random(f"kills {seed}")
        self.state = enrolled(self._pushes.operator, folder, BOARD, "jalapeno", SETTINGS)
        self._asking = Asking(self.state / "agent.sock")
        self.found: Counter[str] = Counter()
        self._boots, self._before = 0, ModelSlots(MODEL)
        self._kept: dict[int, bytes] = {}

    def run(self, kills: int) -> Counter[str]:
        with broker_of(self._pushes.operator), self._under_way():
            for _ in range(kills):
                with self._alive() as life:
                    self._live(life)
                self._look_into_ledger()
            with self._alive() as life:
                self._serve(life)
                number = self._pushes.finish()
                self._asking.wait_for_more(2, life.is_alive)
        self._look_into_ledger()
        assert (self._before.confirmed.number, self._before.state) == (number, State.EMPTY)
        self._check_receipts(number)
        return self.found

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        self._pushes.start()
        self._asking.start()
        try:
            yield
        finally:
            self._asking.end()
            self._pushes.stop()

    @contextmanager
    def _alive(self) -> Iterator[Life]:
        """Ends with a kill, whatever comes."""
        life = Life(self.state)
        try:
            yield life
        finally:
            self._asking.ready.clear()
            life.kill()

    def _serve(self, life: Life) -> None:
        """A real inference, answered by this life."""
        life.wait_for("ready")
        self._asking.ready.set()
        self._asking.wait_for_more(1, life.is_alive)

    def _live(self, life: Life) -> None:
        """Until something drawn has come, and a little longer; most lives answer something before."""
        moment, within_s = self._random.choice(list(MOMENTS.items()))
        wait_s = self._random.uniform(0, within_s)
        if moment != "spawned":
            self._serve(life)
            life.wait_for(moment)
        time.sleep(wait_s)
        assert life.is_alive() and self._pushes.fault is None, f"{self._pushes.fault}; {life.last_words()}"

    def _look_into_ledger(self) -> None:
        """What a dead agent left behind."""
        with _opened_ledger(self.state / "ledger.db") as ledger:
            slots, boots = Records(ledger).load(MODEL), ledger.count("boot_epoch")
            self._take_receipts(ledger)
        before = self._before
        assert slots.confirmed.number >= before.confirmed.number and slots.floor >= before.floor and boots >= self._boots
        assert slots.floor == slots.confirmed.number and slots.state is not State.ROLLED_BACK, slots
        self.found[slots.state.value] += 1
        self._before, self._boots = slots, boots

    def _check_receipts(self, last: int) -> None:
        """Every answer is a release's, none of one older than confirmed, the last of the last; each receipt is kept."""
        results = self._asking.results
        unserved = [f"{each.status}: {each.reason}" for each in results if each.status is not Status.OK]
        assert not unserved, unserved
        held = [self._opened(result.receipt) for result in results]
        numbers = {digest: number for number, digest in self._pushes.digests.items()}
        served = [numbers[each.model_digest] for each in held]
        assert all(later >= earlier - 1 for earlier, later in pairwise(served)) and served[-1] == last, served
        lost = [
            each.counter for each, result in zip(held, results, strict=True) if self._kept.get(each.counter) != result.receipt
        ]
        assert not lost, f"acknowledged, and not in the chain: {lost}"

    def _take_receipts(self, ledger: Ledger) -> None:
        """Those since the last look, in one chain with those of before, of which the last is the same as then."""
        newest = max(self._kept, default=0)
        while batch := ledger.receipts.after(max(0, newest - 1), BATCH):
            if batch[-1][0] == newest:
                break
            for counter, message in batch:
                before = self._kept.get(counter - 1)
                assert self._opened(message).previous == (receipt_digest(before) if before else NO_DIGEST), f"receipt {counter}"
                assert self._kept.setdefault(counter, message) == message, f"receipt {counter} is another than it was"
            newest = batch[-1][0]

    def _opened(self, message: bytes) -> Receipt:
        key = signer_of(read_config(self.state / "agent.toml")).public_key
        return open_receipt(message, lambda kid: key if kid == BOARD.encode() else None)


def _opened_ledger(path: Path) -> Ledger:
    """A child that the agent had just forked holds the lock until it has become another program, or has seen its parent's end."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return Ledger(path)
        except UnavailableError:
            if time.monotonic() > until_s:
                raise
            time.sleep(POLL_S)


def _size_bytes(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def run(kills: int, folder: Path, seed: int = 1, worlds: int = WORLDS) -> Counter[str]:
    """``kills`` in all, shared by ``worlds`` beside each other; how often an agent was found in which state."""
    shares = [kills // worlds + (at < kills % worlds) for at in range(worlds)]
    made = [World(folder / f"world{at}", seed * worlds + at) for at in range(worlds)]
    with ThreadPoolExecutor(worlds) as pool:
        found = [pool.submit(world.run, share) for world, share in zip(made, shares, strict=True)]
    return sum((each.result() for each in found), Counter())


if __name__ == "__main__":
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sly-kills-", ignore_cleanup_errors=True) as place:
        states = run(int(sys.argv[1]), Path(place), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    print(f"{sum(states.values())} kills ({told}) in {time.monotonic() - began_s:.0f} s")
