"""A release of a model that lies in the cache: what a host needs to load it.

Rules: no I/O; ``number`` 0 is the factory's, what set-up brought.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.card import Card
from models.language_card import LanguageCard


@dataclass(frozen=True, slots=True)
class Installed:
    """``files``: SHA-256 of each file by its name, all of them in the content-addressed cache."""

    name: str
    number: int
    card: Card | LanguageCard
    files: Mapping[str, bytes]
