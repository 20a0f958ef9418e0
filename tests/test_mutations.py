"""The table of mutants stands on this tree, and what tries them cannot be fooled; ``make mutations`` tries them all."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from tests.mutations import MUTANTS, ROOT, Mutant, check, must_stand_once, table

KEY, PIECE = (
    next(each for each in MUTANTS if each.what == what) for what in ("floor of a model's releases", "digest of a piece")
)
"""Two whose tests are fast."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.what)
def test_a_mutants_line_stands_once_and_its_test_is_there(mutant: Mutant) -> None:
    must_stand_once(ROOT, mutant)
    file, name = mutant.test.split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert mutant.line != mutant.instead


def test_a_line_that_is_gone_or_stands_twice_is_told_at_once() -> None:
    for line, times in (("    no such line", 0), ("    @property", 2)):
        with pytest.raises(ValueError, match=f"stands {times} times in ota/slots.py; it must stand there once"):
            check([replace(KEY, line=line)])


def test_a_mutant_that_no_test_sees_or_that_breaks_more_than_it_changes_is_not_found() -> None:
    wrong = {
        "it does not see this": replace(KEY, instead=f"{KEY.line}  # the same"),
        "is no Python": replace(KEY, instead="    if release.number <:"),
        "could not be run": replace(KEY, line="FACTORY = 0", instead="import nothing_of_that_name"),
        "broken, not wrong": replace(PIECE, instead="        if actual != nothing_of_that_name:"),
    }
    founds = check((KEY, *wrong.values()))
    assert [each.red for each in founds] == [True, False, False, False, False]
    assert founds[0].why.startswith(("Failed: DID NOT RAISE", "AssertionError"))
    for said, found in zip(wrong, founds[1:], strict=True):
        assert said in found.why and said in table(founds)


def test_a_test_that_is_red_before_anything_is_changed_proves_nothing() -> None:
    with pytest.raises(RuntimeError, match="red before anything was changed"):
        check([replace(KEY, test="test_slots.py::test_that_is_not_there")])
