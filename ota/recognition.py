"""What a fleet recognizes because of its releases: the digests of their models and the right answers to their golden inputs.

Rules: pure; a release that is offered is recognized, for boards trust nothing else (``docs/attestation.md``); what is withdrawn
is recognized no more, unless another release says the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from models.language_card import LanguageCard
from models.released import card_of
from ota.charter import References
from ota.manifest import Kind, Release


def recognizing(references: References, release: Release) -> References:
    """``references`` with those of a release. Raises ``RefusedError`` for a card that cannot be read."""
    own = references_of(release)
    golden = dict(references.golden)
    for key, answers in own.golden.items():
        golden[key] = golden.get(key, frozenset()) | answers
    return replace(references, models=references.models | own.models, golden=golden)


def forgetting(references: References, release: Release, others: Iterable[Release]) -> References:
    """``references`` without what only ``release`` says; ``others``: every other release that is offered."""
    gone = references_of(release).models.difference(*(references_of(each).models for each in others))
    golden = {key: answers for key, answers in references.golden.items() if key[0] not in gone}
    return replace(references, models=references.models - gone, golden=golden)


def references_of(release: Release) -> References:
    """What boards call the model of a release, and how it answers; nothing for one without a card, as the agent's own."""
    if not release.card:
        return References()
    card = card_of(release.kind is Kind.LANGUAGE, release.card)
    if isinstance(card, LanguageCard):
        return References(models=frozenset(card.digest(runtime) for runtime in card.files))
    digest = bytes.fromhex(card.source.sha256)
    golden = {(digest, library): frozenset({bytes.fromhex(answer)}) for library, answer in card.golden.items()}
    return References(models=frozenset({digest}), golden=golden)
