"""The catalog: the cards that come with the product, one file each in ``catalog/``.

Rules: read once, in the order of their names, so that every board has the same catalog; a card file that breaks a rule is
refused by name.  ``pictures.toml`` lists the photographs that the demo and the tests use; ``NAME.language.toml`` are the language
models, which are built and not fetched: ``models.language_card`` reads them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import MODEL_NAME, checked
from models.card import Card, Source, source_from_mapping

__all__ = ["Card", "Picture", "card", "catalog", "models_for", "picture", "pictures"]

FOLDER = Path(__file__).with_name("catalog")
PICTURES = "pictures.toml"
LANGUAGE = ".language.toml"


@dataclass(frozen=True, slots=True)
class Picture:
    """A photograph to run models on."""

    name: str
    summary: str
    source: Source

    def __post_init__(self) -> None:
        checked(MODEL_NAME, "picture name", self.name)

    @property
    def filename(self) -> str:
        return self.name + Path(self.source.member).suffix


@cache
def catalog() -> Mapping[str, Card]:
    """Every perception model's card by its name, in the order of the names.

    Raises ``RefusedError`` naming the file that breaks a rule.
    """
    files = sorted(path for path in FOLDER.glob("*.toml") if path.name != PICTURES and not path.name.endswith(LANGUAGE))
    cards = [read_card(path) for path in files]
    return MappingProxyType({each.name: each for each in sorted(cards, key=lambda each: each.name)})


def read_card(path: Path) -> Card:
    """The card in a TOML file. Raises ``RefusedError`` naming the file."""
    try:
        return Card.from_mapping(tomllib.loads(path.read_text("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RefusedError(f"card {path}", str(error), "a TOML file in UTF-8") from error
    except RefusedError as error:
        raise RefusedError(f"card {path}: {error}") from error


def card(name: str) -> Card:
    """The card of a perception model; raises ``RefusedError`` listing the names that there are."""
    if name not in catalog():
        raise RefusedError("model", name, ", ".join(catalog()), "see: sly models list")
    return catalog()[name]


def models_for(task: str) -> tuple[Card, ...]:
    """The cards that do a task, best quality first; raises ``RefusedError`` listing the tasks that there are."""
    found = [each for each in catalog().values() if each.task == task]
    if not found:
        raise RefusedError("task", task, ", ".join(sorted({each.task for each in catalog().values()})))
    return tuple(sorted(found, key=lambda each: (-each.quality_permille, each.name)))


@cache
def pictures() -> Mapping[str, Picture]:
    """The photographs by their names."""
    tables = tomllib.loads((FOLDER / PICTURES).read_text("utf-8"))
    return MappingProxyType(
        {name: Picture(name, table["summary"], source_from_mapping(table["source"])) for name, table in sorted(tables.items())}
    )


def picture(name: str) -> Picture:
    """A photograph; raises ``RefusedError`` listing the names that there are."""
    if name not in pictures():
        raise RefusedError("picture", name, ", ".join(pictures()))
    return pictures()[name]
