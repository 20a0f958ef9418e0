"""The card of a release: TOML text that was signed with it, read as the catalog's own cards are."""

from __future__ import annotations

import tomllib

from edge_agent.core.errors import RefusedError
from models.card import Card
from models.language_card import LanguageCard


def card_of(is_language: bool, text: str) -> Card | LanguageCard:
    """Raises ``RefusedError`` for text that is no such card."""
    try:
        mapping = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RefusedError("card of a release", str(error), "TOML, as sly ota push puts it in") from error
    return LanguageCard.from_mapping(mapping) if is_language else Card.from_mapping(mapping)
