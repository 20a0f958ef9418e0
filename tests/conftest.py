"""What holds for every test: a Ctrl-C means what it means to a person, however the tests were started; no example of a law has a
time limit of its own, for the machine is shared; no process that a test starts compiles again what another has compiled; what
takes longest begins first."""

from __future__ import annotations

import compileall
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("edge_agent", "board_support", "models", "ota")
LONGEST_FIRST = (
    "test_update_kill.py", "test_language_kill.py", "test_placement_bench.py", "test_measuring.py", "test_fleet.py",
    "test_hand_over.py", "test_self_update.py", "test_broker_attacks.py", "test_language_hand_over.py", "test_disk_faults.py",
    "test_convergence.py", "test_language_service.py", "test_ota_command.py", "test_receipts.py", "test_sim_trust.py",
    "test_fleet_sim.py", "test_partitions.py", "test_model_build.py", "test_agent_slots.py", "test_repository_power.py",
    "test_mutations.py", "test_first_boot.py", "test_sim.py",
)  # fmt: skip
"""Files that have a test of more than four seconds (``pytest --durations=60``), by their longest one."""


def pytest_configure(config: pytest.Config) -> None:
    """A shell lets what it starts in the background ignore SIGINT, and every process that a test starts would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import settings

        settings.register_profile("shared machine", deadline=None)
        settings.load_profile("shared machine")
    if not hasattr(config, "workerinput"):
        compile_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker that begins a long test last has the others wait for it. A file's tests stay together, with what they share."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def compile_once() -> None:
    """Else a container that sets PYTHONDONTWRITEBYTECODE pays most of a second in each of the many hundred processes of a run.

    An engine's child has a clean environment and writes nothing, but reads what lies there.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    for folder in PRODUCT:
        compileall.compile_dir(ROOT / folder, quiet=2)
