"""What boards sign, compare and agree on, as digests: ``python -m tests.same_bytes`` prints the same on every Python and machine.

Rules: everything is drawn from seeds and stays in memory; a kind that boards exchange or agree on has one line here.
"""

from __future__ import annotations

import json
from hashlib import sha256
from random import Random

from edge_agent.attest.proof import encode_proof
from edge_agent.placement.table import TableMaker
from edge_agent.sim.fleet import simulate
from tests.fleet_facts import rules
from tests.proofs import random_fleet
from tests.sim_worlds import CAMERAS, TALK, world
from tests.test_convergence import MESSAGES, POOLS, facts_of, joined, messages
from tests.test_sim import ROUGH
from tests.test_table import golden

SEEDS = range(5)


def digests() -> dict[str, str]:
    """SHA-256 of each kind of bytes, by name."""
    states = [joined(pool, range(MESSAGES)) for pool in range(POOLS)]
    tables = [TableMaker(rules()).make(facts_of(state)) for state in states]
    fleets = [random_fleet(Random(seed)) for seed in SEEDS]
    boards = [fleet.boards[name] for fleet in fleets for name in sorted(fleet.boards)]
    return {
        "records and presences": _of(*(str(messages(pool)).encode() for pool in range(POOLS))),
        "tables of what was heard": _of(*(table.encode() for table in tables)),
        "golden tables": _of(json.dumps(golden(), sort_keys=True).encode()),
        "receipts": _of(*(signed for board in boards for _, signed in board.receipts)),
        "quotes": _of(*(signed for board in boards for _, signed in board.quotes)),
        "appraisals": _of(*(signed for fleet in fleets for _, signed in fleet.appraisals)),
        "proofs": _of(*(encode_proof(fleet.proof()) for fleet in fleets)),
        "a simulated fleet": simulate(world(CAMERAS, TALK, ROUGH), 3).trace_digest,
    }


def _of(*parts: bytes) -> str:
    digest = sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8) + part)
    return digest.hexdigest()


if __name__ == "__main__":
    print(json.dumps(digests(), indent=2))
