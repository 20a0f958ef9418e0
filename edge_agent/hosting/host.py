"""The models that this board hosts: from the files into the sandbox, each inference through it, and from release to release.

Owns the way of one job (engine, then what the board says it cost; or a language model's turn, part by part) and which release of
its model does it.  Rules: a model that is missing or is not what its card says is refused before anything is loaded; a turn ends
with its job, whatever ended that; what may not leave the fleet never reaches a cloud; no job fails because of an update.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from board_support.board import Board
from edge_agent.attest.measure import MappedModel
from edge_agent.core.chat import CHAT
from edge_agent.core.clock import Clock
from edge_agent.core.config import AgentConfig
from edge_agent.core.digests import tensors_digest
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import AnswerPart, InferenceResult, ModelOffer, Status, failure
from edge_agent.hosting.cached import CachedFiles
from edge_agent.hosting.files import check_there, language_models, model_files, models_folder
from edge_agent.hosting.hand_over import HandOver
from edge_agent.hosting.moving import Moving
from edge_agent.hosting.pair import PairState
from edge_agent.hosting.pictures import PictureRelease, Pictures
from edge_agent.hosting.release import Release
from edge_agent.hosting.trial import run_in_trial
from edge_agent.hosting.turns import Conversations
from edge_agent.node.events import Execute
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.supervisor import EngineSupervisor
from edge_agent.store.blobs import BlobStore
from models.card import Card
from models.installed import Installed
from models.language_card import LanguageCard

if TYPE_CHECKING:
    from edge_agent.speaking import Speaker

CONFIRMED, TRIAL = "confirmed", "trial"
"""Slots, as measurements name them."""


class Host:
    """``on_trial``, if set, is told of each inference of a release on trial: its model, and why it was not clean, else empty."""

    def __init__(
        self, config: AgentConfig, board: Board, blobs: BlobStore, supervisor: EngineSupervisor, clock: Clock,
        engine: EngineSettings, report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._board, self._blobs, self._supervisor, self._clock = board, blobs, supervisor, clock
        self._board_id = config.board.id
        self._config, self._engine, self._report = config, engine, report
        self._files, self._languages = model_files(config), language_models(config)
        self._cache = CachedFiles(blobs, Path(config.state.folder) / "releases", report)
        self._pictures = Pictures(board, self._board_id, supervisor, self._cache, clock)
        self._releases = HandOver(self._changed, report)
        self.on_trial: Callable[[str, str], None] = lambda name, why: None
        self._conversations = Conversations(board, self._board_id, self._releases, clock, self._told)
        self.speakers = self._conversations.speakers
        moving = Moving(self.speakers)
        self.find, self.put, self.give = moving.find, moving.put, moving.give
        """Steps of a session that moves between boards."""

    # releases

    async def load(self, name: str, installed: Installed | None = None) -> ModelOffer:
        """Bring up what is confirmed of a model: a release, or the configured files, as set-up left them.

        Raises ``RefusedError`` or ``UnavailableError`` saying why it cannot be hosted, ``RuntimeError`` if it is loaded already.
        """
        if installed is None:
            return await self._releases.load(name, lambda: self._factory(name))
        return await self._releases.load(name, lambda: self._installed(installed))

    async def bring(self, installed: Installed) -> None:
        """Load a release beside the one that serves, with an engine of its own. Raises as ``load`` does."""
        await self._releases.bring(installed.name, lambda: self._installed(installed, beside=True))

    async def bring_factory(self, name: str) -> None:
        """The same of the files that set-up left. Raises ``UnavailableError`` for a model that has none."""
        if name not in self._files and name not in self._languages:
            raise UnavailableError(f"model {name}", "nothing of it was there before it came over the air", "")
        await self._releases.bring(name, lambda: self._factory(name))

    def factory_files(self, name: str) -> tuple[Path, ...]:
        """The files of a model that set-up left; none of a model that it knows nothing of."""
        if name in self._files:
            return (self._files[name][1],)
        entries = self._languages[name].entries() if name in self._languages else ()
        return tuple(models_folder(self._config) / each.filename for each in entries)

    async def golden_beside(self, name: str) -> tuple[bytes, str]:
        """What the brought release gives for its golden input, as SHA-256 (empty if it has no such input or gave nothing).

        Besides, why that is bad whatever was expected: a crash, a hang, numbers that are none; empty if it is not.
        """
        new = self._releases.pair(name).new
        if new is None:
            raise RuntimeError(f"no release of {name} was brought")
        golden, why = await new.golden()
        new.spoiled = new.spoiled or why
        return golden, why

    async def hand_over(self, name: str) -> ModelOffer:
        """New jobs go to the brought release, on trial; those under way end where they are. The offer of it."""
        return self._releases.hand_over(name)

    async def settle(self, name: str) -> None:
        """The trial was passed: what served before goes when its last job has ended."""
        self._releases.settle(name)

    async def hand_back(self, name: str) -> ModelOffer:
        """The trial was not passed: jobs go to the release before, also those that the new one still has. The offer of it.

        Raises ``UnavailableError`` if no release of it served before.
        """
        return self._releases.hand_back(name)

    async def take_back(self, name: str) -> ModelOffer | None:
        """Whatever was brought of a model goes, on trial or not; the offer of what serves then, ``None`` if nothing does."""
        pair = self._releases.pair(name)
        if pair.state is PairState.TRIAL:
            with suppress(UnavailableError):
                self._releases.hand_back(name)
        if pair.state is PairState.BESIDE:
            self._releases.discard(name)
        return pair.old.offer if pair.old is not None else None

    async def discard(self, name: str) -> None:
        """A brought release goes that was not handed over."""
        self._releases.discard(name)

    async def at_ease(self) -> None:
        """Wait until every release that was to go has gone."""
        await self._releases.all_gone()

    async def _factory(self, name: str) -> Release:
        check_there(self._config, name)
        if name in self._languages:
            return await self._load_language(self._languages[name])
        card, path = self._files[name]
        digest = bytes.fromhex(card.source.sha256)
        return await self._pictures.load(name, 0, card, self._cache.take_in(path, digest))

    async def _installed(self, installed: Installed, beside: bool = False) -> Release:
        card = installed.card
        if isinstance(card, LanguageCard):
            return await self._load_language(card, installed, beside)
        return await self._load_picture(installed, card)

    async def _load_picture(self, installed: Installed, card: Card) -> Release:
        digest = bytes.fromhex(card.source.sha256)
        if digest not in installed.files.values():
            raise RefusedError(f"release {installed.number} of {installed.name}", "no file that its card is of", digest.hex())
        try:
            return await self._pictures.load(installed.name, installed.number, card, self._cache.open(digest))
        except RefusedError:
            self._cache.suspect(digest)
            raise

    async def _load_language(self, card: LanguageCard, installed: Installed | None = None, beside: bool = False) -> Release:
        from edge_agent.hosting.languages import Languages

        factory = self._languages.get(card.name)
        languages = Languages(self._config, self._engine, self._board, self._cache, factory, self._report)
        return await languages.load(card, installed, beside)

    def _changed(self, name: str) -> None:
        """Which release of a model serves may be another one now."""
        serving = self._releases.pair(name).serving
        if serving is not None and serving.speaker is not None:
            self.speak(serving.offer, serving.speaker)

    def _told(self, release: Release, why: str) -> None:
        """An inference of a release in its trial has ended."""
        pair = self._releases.pair(release.name)
        if pair.state is PairState.TRIAL and pair.new is release and not release.spoiled:
            release.spoiled = why
            self.on_trial(release.name, why)

    # what is hosted

    def speak(self, offer: ModelOffer, speaker: Speaker) -> None:
        """Host a language model that runs already."""
        self._conversations.speak(offer, speaker)

    async def close(self) -> None:
        for pair in self._releases:
            for release in pair.held:
                self.speakers.pop(release.name, None)
        await self._releases.close()
        while self.speakers:
            await self.speakers.popitem()[1].close()

    def mapped(self) -> list[MappedModel]:
        """The models whose files are held here now. Descriptors are lent: they are good until the caller waits."""
        found = []
        for pair in self._releases:
            serving = pair.serving
            if serving is not None:
                slot = TRIAL if pair.state is PairState.TRIAL else CONFIRMED if serving.number else ""
                found.append(serving.mapped(slot))
        return [each for each in found if each is not None]

    def picture_models(self) -> list[str]:
        """Those that were loaded and not unloaded."""
        found = [pair.serving for pair in self._releases]
        return [each.name for each in found if isinstance(each, PictureRelease) and each.there]

    def offered(self, model: str) -> bytes:
        """The digest of the release of a model that serves; empty if none does."""
        serving = self._releases.pair(model).serving
        return serving.digest if serving is not None else b""

    def resting(self, model: str) -> bool:
        """Whether this picture model would run at once."""
        serving = self._releases.pair(model).serving
        return isinstance(serving, PictureRelease) and serving.rests

    @property
    def at_rest(self) -> bool:
        """Whether no model here has anything to do."""
        return not self._conversations.count and all(map(self._supervisor.idle, self._supervisor.loaded()))

    async def golden(self, model: str) -> tuple[bytes, int]:
        """What a picture model gives for its golden input, as SHA-256 (empty if it has no such input), and how many µs it took.

        Raises ``RefusedError`` or ``UnavailableError`` as an inference does.
        """
        serving = self._releases.pair(model).serving
        if not isinstance(serving, PictureRelease):
            raise RefusedError("model", model, "a picture model that is loaded")
        outputs, elapsed_us = await serving.invoke_golden()
        return (tensors_digest(outputs), elapsed_us) if outputs else (b"", 0)

    def quarantined(self, model: str) -> bool:
        """Whether every release of this picture model that could serve has killed its engine too often."""
        pair = self._releases.pair(model)
        able = pair.held if pair.state is PairState.TRIAL else (pair.serving,)
        pictures = [each for each in able if isinstance(each, PictureRelease) and each.there]
        return bool(pictures) and all(each.quarantined for each in pictures)

    # jobs

    async def execute(self, job: Execute, emit: Callable[[AnswerPart], None]) -> InferenceResult:
        """Run one job; every way it can fail is a result with its reason. ``emit`` takes the parts of an answer as they come."""
        return await (self._conversations.converse(job, emit) if job.request.task == CHAT else self._infer(job))

    async def _infer(self, job: Execute) -> InferenceResult:
        pair = self._releases.pair(job.model)
        serving, old = pair.serving, pair.old
        if not isinstance(serving, PictureRelease):
            return self._failure(job, Status.FAILED, f"{self._board_id} does not host {job.model!r}")
        if pair.state is PairState.TRIAL and isinstance(old, PictureRelease):
            return await run_in_trial(job, serving, old, self._clock, self._told)
        return await serving.run(job, job.budget_us)

    def _failure(self, job: Execute, status: Status, reason: str) -> InferenceResult:
        return failure(job.request.request_id, status, self._board_id, reason, job.model)
