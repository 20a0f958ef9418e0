"""``sly models build``: a language model from its GGUF file, with a progress bar on stderr."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.core.errors import ConfigError
from edge_agent.progress import Bar

if TYPE_CHECKING:
    from models.language_card import LanguageCard


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
