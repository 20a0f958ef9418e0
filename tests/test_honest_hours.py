"""Honest boards are never contraindicated, whatever befalls them (many more hours: ``make honest-hours``)."""

from __future__ import annotations

import pytest

from edge_agent.attest import standing
from edge_agent.attest.receipts import Chain
from tests.honest_hours import EPOCHS_S, ride_out

SEEDS = [seed for seed in range(15) if EPOCHS_S[seed % len(EPOCHS_S)] >= 300]
AT_ONCE = SEEDS[-4:]
"""Two of each length of an epoch; the others are tried by ``make test-long``."""


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=() if seed in AT_ONCE else pytest.mark.long) for seed in SEEDS])
def test_through_reboots_losses_cuts_and_clocks_that_jump_nobody_honest_is_contraindicated(seed: int) -> None:
    hours = ride_out(seed)
    assert not hours.found
    assert hours.counts["quotes heard"] > hours.board_hours
    assert hours.counts["power cut"]
    assert hours.counts["receipts heard"]


def test_it_shows_when_a_quote_that_came_late_is_taken_for_one_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "NONCE_EPOCHS", 0)
    assert any("rolled back" in each for each in ride_out(10).found)


def test_it_shows_when_a_board_forgets_a_receipt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chain, "count", property(lambda chain: max(0, chain._kept.newest - chain._kept.newest % 2)))
    assert ride_out(0, 2).found
