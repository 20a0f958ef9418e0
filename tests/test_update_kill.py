"""The real agent is killed with SIGKILL at random points of real updates; ``python -m tests.update_kills N`` does more of it."""

from __future__ import annotations

from pathlib import Path

from tests import update_kills

KILLS = 50


def test_19_a_real_agent_killed_at_any_point_of_an_update_serves_again_forgets_nothing_and_ends_with_the_update(
    tmp_path: Path,
) -> None:
    found = update_kills.run(KILLS, tmp_path)
    assert sum(found.values()) == KILLS + update_kills.WORLDS
    assert found["staging"] >= 3 and found["trial"] >= 3, found
