"""A real process is killed with SIGKILL while it writes, again and again; what it had acknowledged is there, once and in order.

The child prints a line only after the commit that the line speaks of.  When it is killed is decided by how many lines it has
printed and a short random wait, so that the kill falls anywhere in its work; nothing here depends on that wait.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from random import Random

from edge_agent.store.blobs import BlobStore
from edge_agent.store.files import PART_PREFIX
from edge_agent.store.ledger import Ledger

CYCLES = 50
MAX_WAIT_S = 0.003

INBOX_AND_OUTBOX = """
import sys
from pathlib import Path
from edge_agent.store.ledger import Ledger, Owed

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

with Ledger(Path(sys.argv[1])) as ledger:
    for request_id, _ in ledger.unanswered(100):
        ledger.answer(request_id, request_id.encode(), Owed(request_id, "t", request_id.encode()))
        say("answered", request_id)
    while True:
        with ledger.transaction():
            group = [f"{ledger.increment('requests'):032x}" for _ in range(3)]
            for request_id in group:
                ledger.accept(request_id, bytes(3000))
        for request_id in group:
            say("accepted", request_id)
        for request_id in group:
            ledger.answer(request_id, request_id.encode(), Owed(request_id, "t", request_id.encode()))
            say("answered", request_id)
        ticket, message = ledger.owed(1)[0]
        ledger.delivered(ticket)
        say("delivered", message.key)
"""

BLOBS = """
import sys
from hashlib import sha256
from pathlib import Path
from edge_agent.store.blobs import BlobStore

store = BlobStore(Path(sys.argv[1]), 10**9)
number = len(store.digests())
while True:
    data = b"%d" % number * 5000
    store.add([data[:7000], data[7000:]], sha256(data).digest())
    sys.stdout.write(f"added {number}\\n")
    sys.stdout.flush()
    number += 1
"""


def killed_while(program: str, path: Path, lines: int, wait_s: float) -> list[tuple[str, str]]:
    """Run ``program`` on ``path``, kill it some time after it printed ``lines`` lines; all that it printed in whole."""
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        printed = [child.stdout.readline() for _ in range(lines)]
        time.sleep(wait_s)
        child.send_signal(signal.SIGKILL)
        printed += child.stdout.readlines()
        child.wait()
    assert child.returncode == -signal.SIGKILL, "the child ended by itself"
    return [(line.split()[0], line.split()[1]) for line in printed if line.endswith("\n")]


def over_cycles(cycles: int, program: str, path: Path, check: Callable[[list[tuple[str, str]]], None]) -> int:
    """Kill ``cycles`` children; ``check`` gets all lines so far after each. How many lines there were."""
    random = Random(1)
    said: list[tuple[str, str]] = []
    for _ in range(cycles):
        said += killed_while(program, path, random.randint(1, 12), random.uniform(0, MAX_WAIT_S))
        check(said)
    return len(said)


def test_a_kill_at_any_time_loses_no_acknowledged_request_and_delivers_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"

    def check(said: list[tuple[str, str]]) -> None:
        told = {verb: [key for told, key in said if told == verb] for verb in ("accepted", "answered", "delivered")}
        with Ledger(path) as ledger:
            unanswered = [key for key, _ in ledger.unanswered(100)]
            owed = [message.key for _, message in ledger.owed(4000)]
            lost = [key for key in told["accepted"] if key not in unanswered and ledger.answer_of(key) != key.encode()]
            unsaid = [key for key in told["answered"] if ledger.answer_of(key) != key.encode()]
            assert ledger.count("requests") >= max((int(key, 16) for key in told["accepted"]), default=0)
        assert (lost, unsaid) == ([], [])
        assert not set(told["delivered"]) & set(owed), "delivered, and owed again"
        assert len(set(told["delivered"])) == len(told["delivered"])
        assert set(told["answered"]) <= {*owed, *told["delivered"], *unsaid_deliveries(owed, told["delivered"])}
        assert owed == sorted(owed), "out of order"

    def unsaid_deliveries(owed: list[str], delivered: list[str]) -> list[str]:
        """Committed as delivered by a child that was killed before it could say so: older than all that is owed."""
        return [f"{number:032x}" for number in range(1, int(owed[0], 16))] if owed else delivered

    assert over_cycles(CYCLES, INBOX_AND_OUTBOX, path, check) > 300


def test_a_kill_at_any_time_leaves_every_added_blob_whole(tmp_path: Path) -> None:
    def check(said: list[tuple[str, str]]) -> None:
        added = [b"%d" % int(number) * 5000 for _, number in said]
        present = {path.name: sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
        assert all(digest == name for name, digest in present.items() if not name.startswith(PART_PREFIX))
        assert {sha256(data).hexdigest() for data in added} <= set(present)
        store = BlobStore(tmp_path, 10**9)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(PART_PREFIX)]
        assert store.used_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())

    assert over_cycles(15, BLOBS, tmp_path, check) > 50
