"""Every case of the design's SECURITY.md has tests that are there, named after the attack: ``docs/security.md``."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.needs import needs_shared

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "security.md"
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
ROWS = [(int(case), attack, tests.split("<br>")) for case, attack, _, tests in ROW.findall(PAGE.read_text("utf-8"))]
CASES = range(1, 44)
STEM_CHARS = 4
LITTLE = frozenset(
    ["a", "an", "and", "at", "by", "in", "is", "not", "of", "on", "or", "the", "to", "with", "each", "every", "only"]
)


@cache
def named_in(file: str) -> frozenset[str]:
    """The names of all tests in a file under ``tests/``."""
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


def test_no_case_is_missing_and_none_stands_twice_with_one_attack() -> None:
    assert {case for case, _, _ in ROWS} == set(CASES)
    assert len({(case, attack) for case, attack, _ in ROWS}) == len(ROWS)
    assert [case for case, _, _ in ROWS] == sorted(case for case, _, _ in ROWS)


def test_the_attacks_are_those_of_the_design() -> None:
    text = needs_shared("SECURITY.md").read_text("utf-8")
    section = " ".join(re.split(r"^## ", text, flags=re.MULTILINE)[3].split())
    designed = re.split(r"(?:: |; )(?=\d+ )|\.(?: [A-Z][a-z ]+)(?=: \d+ )|\. (?=[A-Z])", section)
    attacks = {match[1]: match[2] for each in designed if (match := re.match(r"(\d+) (.+?)\.?$", each))}
    told: dict[str, list[str]] = {}
    for case, attack, _ in ROWS:
        told.setdefault(str(case), []).append(attack)
    assert {case: "; ".join(each) for case, each in told.items()} == attacks


def stems(words: list[str]) -> set[str]:
    return {word[:STEM_CHARS] for word in words if word not in LITTLE}


@pytest.mark.parametrize(("case", "attack", "tests"), ROWS, ids=[f"{case}-{attack[:40]}" for case, attack, _ in ROWS])
def test_every_test_of_a_case_is_there_and_every_part_of_the_attack_is_in_the_name_of_one(
    case: int, attack: str, tests: list[str]
) -> None:
    said: set[str] = set()
    for each in tests:
        file, name = each.strip("`").split("::")
        assert name in named_in(file), f"case {case} names {each}, which is not there"
        said |= stems(name.split("_"))
    for part in attack.lower().split(", "):
        words = stems(re.findall(r"[a-z0-9]+", part))
        assert not words or words & said, f"no test of case {case} says: {part}"


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE.read_text("utf-8"))
    assert len(named) > sum(len(tests) for _, _, tests in ROWS), "those of the board itself besides"
    assert [each for each in named if each[1] not in named_in(each[0])] == []
