"""``sly models build``: a language model from its GGUF file, with a progress bar on stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.core.errors import ConfigError

if TYPE_CHECKING:
    from models.language_card import LanguageCard

BAR_CHARS = 30
REDRAW_S = 0.1


def add(actions: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        "build", help="build a language model for both runtimes from a GGUF file"
    )
    parser.add_argument("model", metavar="NAME|FILE.gguf", help="a language model of the catalog, or a GGUF file")
    parser.add_argument("--name", default="", help="what to call it (needed for a file)")
    parser.add_argument("--json", action="store_true", help="for programs: the built card")
    parser.set_defaults(run=run_build)
    return parser


def run_build(args: argparse.Namespace) -> int:
    from models.fetch import default_folder

    folder: Path = args.folder or default_folder()
    began_s = time.monotonic()
    card, fresh = _built(args, folder)
    told = _told(card, folder, fresh, time.monotonic() - began_s)
    if args.json:
        print(json.dumps(told, indent=2))
        return 0
    print(f"{card.name}: " + (f"built in {told['seconds']} s" if fresh else "is built already"))
    for path in told["files"]:
        print(path)
    return 0


def _told(card: LanguageCard, folder: Path, fresh: bool, took_s: float) -> dict[str, Any]:
    files = [str(folder / entry.filename) for entry in card.entries()]
    return {"card": card.to_mapping(), "files": files, "fresh": fresh, "seconds": round(took_s, 1)}


def _built(args: argparse.Namespace, folder: Path) -> tuple[LanguageCard, bool]:
    """The card, and whether it was built just now."""
    from models.language_build import build_from_catalog, build_language_model, is_built
    from models.language_card import CARD_SUFFIX, language_catalog, read_language_card

    is_file = args.model.endswith(".gguf")
    name = args.name or ("" if is_file else args.model)
    if not name:
        raise ConfigError("--name", "none", "a name for what is built from a file", f"sly models build {args.model} --name mine")
    present = folder / f"{name}{CARD_SUFFIX}"
    if not is_file and name in language_catalog() and present.is_file():
        card, told = read_language_card(present), language_catalog()[name]
        if card.entries() == told.entries() and is_built(card, folder):
            return card, False
    with Bar() as bar:
        if is_file:
            return build_language_model(Path(args.model), name, folder, progress=bar.show), True
        return build_from_catalog(args.model, folder, name, progress=bar.show), True


class Bar:
    """One line on stderr that is drawn again; a line for each kind of work where stderr is no terminal."""

    def __init__(self) -> None:
        self._live, self._what, self._drawn_s = sys.stderr.isatty(), "", 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live and self._what:
            print(file=sys.stderr, flush=True)

    def show(self, what: str, done: int, whole: int) -> None:
        if not self._live:
            if what != self._what:
                print(f"{what} ...", file=sys.stderr, flush=True)
            self._what = what
            return
        if what != self._what and self._what:
            print(file=sys.stderr)
        now_s = time.monotonic()
        if what == self._what and done < whole and now_s - self._drawn_s < REDRAW_S:
            return
        self._what, self._drawn_s = what, now_s
        full = BAR_CHARS * done // max(1, whole)
        bar = "#" * full + "-" * (BAR_CHARS - full)
        print(f"\r{what:28} [{bar}] {100 * done // max(1, whole):3d} %", end="", file=sys.stderr, flush=True)
