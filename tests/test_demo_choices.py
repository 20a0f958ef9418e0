"""The demo's closing table: which option was chosen how often, and why, out of what the boards explained."""

from __future__ import annotations

import json

from edge_agent.demo.choices import WIDTH, choices, choices_json, choices_table

WHYS = [
    *[{"chosen": "coral/m", "main": "less energy"}] * 3, {"chosen": "coral/m", "main": "nearer"},
    *[{"chosen": "jetson/m", "main": "faster"}] * 2, {"chosen": "", "main": "nothing was left"},
]  # fmt: skip


def test_options_are_counted_with_their_reasons_most_frequent_first() -> None:
    found = choices(WHYS)
    assert [(each.option, each.times, each.why) for each in found] == [
        ("coral/m", 4, "less energy 3x, nearer 1x"), ("jetson/m", 2, "faster 2x"), ("none", 1, "nothing was left 1x"),
    ]  # fmt: skip


def test_every_answer_is_in_the_table_or_counted_as_lost() -> None:
    table = choices_table(choices(WHYS), len(WHYS))
    assert "    4x  less energy 3x, nearer 1x" in table and "cannot" not in table
    last = choices_table(choices(WHYS), len(WHYS) + 2).splitlines()[-1]
    assert last == f"2 of {len(WHYS) + 2} answers cannot be explained: who chose is gone"


def test_the_table_fits_a_terminal_and_json_holds_the_same() -> None:
    whys = [{"chosen": f"{'b' * 16}/{'m' * 32}", "main": f"reason {n} of many"} for n in range(20)]
    assert max(map(len, choices_table(choices(whys), 20).splitlines())) <= WIDTH
    told = json.loads(json.dumps(choices_json(choices(WHYS))))
    assert told[0] == {"option": "coral/m", "times": 4, "why": {"less energy": 3, "nearer": 1}}
