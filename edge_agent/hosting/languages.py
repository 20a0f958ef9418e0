"""Language models: each release with a service, a folder of files and a store of sessions of its own."""

from __future__ import annotations

from edge_agent.attest.measure import MappedModel
from edge_agent.core.values import ModelOffer
from edge_agent.hosting.release import Release
from edge_agent.speaking import HostedLanguage
from models.language_card import language_digest


class LanguageRelease(Release):
    def __init__(self, offer: ModelOffer, number: int, speaker: HostedLanguage) -> None:
        super().__init__(offer, number)
        self.speaker: HostedLanguage = speaker

    async def golden(self) -> tuple[bytes, str]:
        raise NotImplementedError

    def mapped(self, slot: str) -> MappedModel | None:
        return MappedModel(self.name, self.digest, self.speaker.service.files, language_digest, None, self.number, slot)

    async def end(self) -> None:
        await self.speaker.close()
