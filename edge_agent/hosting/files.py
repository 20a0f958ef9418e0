"""The files of the models that a configuration names, as set-up left them: the factory's release of each.

Rules: a model that is missing is refused before anything is loaded, with the command that brings it.
"""

from __future__ import annotations

from pathlib import Path

from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import ConfigError
from models.card import Card
from models.catalog import card as card_named
from models.fetch import default_folder
from models.language_card import LanguageCard, find, is_language_model


def models_folder(config: AgentConfig) -> Path:
    return Path(config.models.folder).expanduser() if config.models.folder else default_folder()


def model_files(config: AgentConfig) -> dict[str, tuple[Card, Path]]:
    """The card and file of every picture model that the configuration names. Raises ``ConfigError`` for one that is not there."""
    folder, files = models_folder(config), {}
    for name in config.models.serve:
        if is_language_model(name, folder):
            continue
        card = card_named(name)
        path = folder / card.filename
        if not path.is_file():
            remedy = f"fetch it with: sly models fetch {name}{_into(folder)}"
            raise ConfigError(f"[models] serve {name}", f"no file {path}", "", remedy)
        files[name] = (card, path)
    return files


def language_models(config: AgentConfig) -> dict[str, LanguageCard]:
    """The card of every language model that the configuration names. Raises ``ConfigError`` for one that was not built."""
    folder = models_folder(config)
    return {name: built_model(name, folder) for name in config.models.serve if is_language_model(name, folder)}


def built_model(name: str, folder: Path) -> LanguageCard:
    card = find(name, folder)
    for entry in card.entries():
        if not (folder / entry.filename).is_file():
            where = f"no file {folder / entry.filename}"
            raise ConfigError(f"[models] serve {name}", where, "", f"build it with: sly models build {name}{_into(folder)}")
    return card


def _into(folder: Path) -> str:
    """What a command needs besides the name, to write where the configuration looks."""
    return "" if folder == default_folder() else f" --folder {folder}"
