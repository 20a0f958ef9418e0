"""Boards of one fleet run unlike Pythons: what they sign, compare and agree on is the same to the bit."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.same_bytes import digests

OTHER = "SLY_OTHER_PYTHON"
ROOT = Path(__file__).resolve().parents[1]


def test_another_python_makes_the_same_bytes() -> None:
    other = os.environ.get(OTHER)
    if not other:
        pytest.skip(f"{OTHER} names no other Python to compare with: make test-pythons")
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    told = subprocess.run(
        [other, "-m", "tests.same_bytes"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == digests()
