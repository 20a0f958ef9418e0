"""The files of the models that a configuration names, as set-up left them: the factory's release of each.

Rules: a name that nobody knows is a fault of the configuration; a file that is missing is one of that model alone, told before
anything of it is loaded, with the command that brings it.
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
    """The card of every picture model that the configuration names, and where its file is if it is there.

    Raises ``RefusedError`` for a name that the catalog does not have.
    """
    folder = models_folder(config)
    cards = [card_named(name) for name in config.models.serve if not is_language_model(name, folder)]
    return {card.name: (card, folder / card.filename) for card in cards}


def language_models(config: AgentConfig) -> dict[str, LanguageCard]:
    """The card of every language model that the configuration names. Raises ``SlyError`` for a card that cannot be read."""
    folder = models_folder(config)
    return {name: find(name, folder) for name in config.models.serve if is_language_model(name, folder)}


def check_there(config: AgentConfig, name: str) -> None:
    """Raises ``ConfigError`` for a model of the configuration with a file that is not there."""
    folder = models_folder(config)
    if is_language_model(name, folder):
        files, brings = [entry.filename for entry in find(name, folder).entries()], "build it with: sly models build"
    else:
        files, brings = [card_named(name).filename], "fetch it with: sly models fetch"
    for file in files:
        if not (folder / file).is_file():
            raise ConfigError(f"[models] serve {name}", f"no file {folder / file}", "", f"{brings} {name}{_into(folder)}")


def _into(folder: Path) -> str:
    """What a command needs besides the name, to write where the configuration looks."""
    return "" if folder == default_folder() else f" --folder {folder}"
