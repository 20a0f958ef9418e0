"""The pages say what is true of the code: links lead somewhere, commands parse, the picture shows the rooms there are."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from edge_agent import cli
from tests.needs import needs_module

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
MAKE_TARGET = re.compile(r"^make ([a-z-]+)", re.MULTILINE)


def code_lines(page: Path) -> list[str]:
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def sly_commands() -> list[tuple[str, str]]:
    """Those that a reader may paste, and those that stand above what they print."""
    lines = [(page.name, line.removeprefix("$ ")) for page in PAGES for line in code_lines(page)]
    return [(page, line) for page, line in lines if line.startswith("sly ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)\)", page.read_text("utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize(("page", "line"), sly_commands())
def test_every_command_of_a_page_is_one_that_sly_takes(page: str, line: str) -> None:
    words = shlex.split(line.split(" > ")[0].split(" | ")[0], comments=True)
    if any(word in ("...", "[--json]") for word in words):
        pytest.fail(f"{page}: {line} cannot be pasted into a shell")
    cli.parser().parse_args(words[1:])


def test_every_make_target_of_a_page_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(chain.from_iterable(MAKE_TARGET.findall("\n".join(code_lines(page))) for page in PAGES))
    assert named and named <= targets


def test_the_architecture_picture_shows_every_room_of_the_contract() -> None:
    needs_module("grimp", "dev")
    from tests.draw_floors import PICTURE, drawing, floors

    def without_counts(svg: str) -> str:
        return re.sub(r'\d+ lines|stroke-(opacity|width)="[^"]*"', "", svg)

    assert without_counts(PICTURE.read_text("utf-8")) == without_counts(drawing()), "run: python -m tests.draw_floors"
    rooms = set(chain.from_iterable(floors()))
    folders = {
        f"edge_agent.{p.stem}"
        for p in (ROOT / "edge_agent").iterdir()
        if (p.is_dir() and any(p.glob("*.py"))) or p.suffix == ".py"
    }
    assert folders - rooms == {"edge_agent.__init__"}, "every room stands on a floor of the contract"


def test_the_imports_keep_to_the_floors() -> None:
    needs_module("importlinter", "dev")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", str(ROOT / "setup.cfg"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "KEPT" in done.stdout
