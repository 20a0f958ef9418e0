"""The models that this board hosts: from the catalog into the sandbox, and each inference through it.

Owns the way of a model file (set-up folder -> content-addressed cache -> the descriptor that was hashed -> the engine child)
and of one job (engine, then what the board says it cost; or a language model's turn, part by part).  Rules: a model that is
missing or is not what its card says is refused before anything is loaded; on an emulated board the modelled time is waited out
when it is paced; a turn ends with its job, whatever ended that; what may not leave the fleet never reaches a cloud.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from board_support.board import Board
from board_support.roofline import ModelWork, estimate
from edge_agent.attest.golden import golden_inputs
from edge_agent.attest.measure import MappedFile, MappedModel
from edge_agent.core.chat import CHAT, Tier, TurnEnd
from edge_agent.core.clock import Clock
from edge_agent.core.config import AgentConfig
from edge_agent.core.digests import tensors_digest
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import MAX_REFUSAL_CHARS
from edge_agent.core.values import MAX_PART_CHARS, AnswerPart, EnergyKind, InferenceResult, ModelOffer, Status, Tensor, failure
from edge_agent.core.wanted import Wanted
from edge_agent.hosting.files import language_models, model_files, models_folder
from edge_agent.node.events import Execute, KvFind, KvFound, KvGave, KvGive, KvPut, KvStored
from edge_agent.node.streams import end_tensor, turn_of
from edge_agent.placement.options import Rules, why_not_model
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.supervisor import EngineState, EngineSupervisor, Loaded
from edge_agent.store.blobs import BlobStore
from models.language_card import language_digest

if TYPE_CHECKING:
    from edge_agent.speaking import Speaker

GOLDEN_BUDGET_US = 5_000_000


class Host:
    def __init__(
        self, config: AgentConfig, board: Board, blobs: BlobStore, supervisor: EngineSupervisor, clock: Clock,
        engine: EngineSettings, report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._board, self._blobs, self._supervisor, self._clock = board, blobs, supervisor, clock
        self._board_id = config.board.id
        self._config, self._engine, self._report = config, engine, report
        self._files, self._languages = model_files(config), language_models(config)
        self._work: dict[str, ModelWork] = {}
        self._digests: dict[str, bytes] = {}
        self._loaded: dict[str, Loaded] = {}
        self._language_files: dict[str, Callable[[], tuple[MappedFile, ...]]] = {}
        self.speakers: dict[str, Speaker] = {}
        self._talking = Counter[str]()
        """Turns of each language model at work: they share its energy."""
        self._clouds: dict[str, ModelOffer] = {}

    def speak(self, offer: ModelOffer, speaker: Speaker) -> None:
        """Host a language model that runs already."""
        self.speakers[offer.model], self._digests[offer.model] = speaker, offer.digest
        if offer.cloud:
            self._clouds[offer.model] = offer

    async def close(self) -> None:
        while self.speakers:
            await self.speakers.popitem()[1].close()

    async def load(self, name: str) -> ModelOffer:
        """Bring one configured model up. Raises ``RefusedError`` or ``UnavailableError`` saying why it cannot be hosted."""
        if name in self._languages:
            return await self._load_language(name)
        card, path = self._files[name]
        digest = bytes.fromhex(card.source.sha256)
        descriptor = self._verified(path, digest)
        try:
            loaded = await self._supervisor.load(name, descriptor, digest, card)
        finally:
            os.close(descriptor)
        self._work[name], self._digests[name], self._loaded[name] = loaded.work, digest, loaded
        prior = estimate(loaded.work, self._board.profile)
        return ModelOffer(name, card.task, digest, card.quality_permille, max(1, prior.busy_us), prior.energy_uj)

    def _verified(self, path: Path, digest: bytes) -> int:
        """A descriptor of the model's copy in the cache, pinned. A copy that rotted is set aside and made once more."""
        self._blobs.add_file(path, digest)
        self._blobs.pin(digest)
        try:
            return self._blobs.open_verified(digest)
        except RefusedError as error:
            self._report(f"{error.subject}: got {error.got}; set aside, and copied from {path} again")
            self._blobs.add_file(path, digest)
            return self._blobs.open_verified(digest)

    async def _load_language(self, name: str) -> ModelOffer:
        from edge_agent.speaking import speaker_of

        folder = models_folder(self._config)
        state = Path(self._config.state.folder)
        offer, speaker = await speaker_of(
            self._languages[name], folder, state, self._config, self._engine, self._board, self._report
        )
        self.speak(offer, speaker)
        self._language_files[name] = lambda: speaker.service.files
        return offer

    def mapped(self) -> list[MappedModel]:
        """The models whose files are held here now. Descriptors are lent: they are good until the caller waits."""
        found = []
        for name, fd in self._supervisor.loaded().items():
            if name in self._loaded:
                digest = self._digests[name]
                file = MappedFile(self._blobs.path_of(digest), digest, fd)
                found.append(MappedModel(name, digest, (file,), bytes, self._loaded[name].delegated_permille))
        for name, files in self._language_files.items():
            if name in self.speakers:
                found.append(MappedModel(name, self._digests[name], files(), language_digest))
        return found

    def picture_models(self) -> list[str]:
        """Those that were loaded and not unloaded."""
        return [name for name in self._supervisor.loaded() if name in self._loaded]

    def resting(self, model: str) -> bool:
        """Whether this picture model would run at once."""
        return model in self._supervisor.loaded() and self._supervisor.idle(model)

    @property
    def at_rest(self) -> bool:
        """Whether no model here has anything to do."""
        return not self._talking.total() and all(map(self._supervisor.idle, self._supervisor.loaded()))

    async def golden(self, model: str) -> tuple[bytes, int]:
        """What a picture model gives for its golden input, as SHA-256 (empty if it has no such input), and how many µs it took.

        Raises ``RefusedError`` or ``UnavailableError`` as an inference does.
        """
        inputs = await asyncio.to_thread(golden_inputs, self._loaded[model].signature.inputs)
        if not inputs:
            return b"", 0
        invocation = await self._supervisor.invoke(model, inputs, GOLDEN_BUDGET_US)
        outputs = {name: self._handed_over(tensor) for name, tensor in invocation.outputs.items()}
        return tensors_digest(outputs), invocation.elapsed_us

    def quarantined(self, model: str) -> bool:
        """Whether this picture model has killed its engine too often."""
        return self._supervisor.state(model) is EngineState.QUARANTINED

    async def execute(self, job: Execute, emit: Callable[[AnswerPart], None]) -> InferenceResult:
        """Run one job; every way it can fail is a result with its reason. ``emit`` takes the parts of an answer as they come."""
        return await (self._converse(job, emit) if job.request.task == CHAT else self._infer(job))

    async def _converse(self, job: Execute, emit: Callable[[AnswerPart], None]) -> InferenceResult:
        started_us = self._clock.monotonic_us()
        speaker = self.speakers.get(job.model)
        if speaker is None:
            return self._failure(job, Status.FAILED, f"{self._board_id} does not host {job.model!r}")
        if refusal := self._why_not_cloud(job):
            return self._failure(job, Status.FAILED, refusal)
        try:
            self._talking[job.model] += 1
            together = self._talking[job.model]
            async with asyncio.timeout(job.budget_us / 1e6):
                end = await _heard_out(speaker, job, emit)
                if job.moved_from and end.cached_tokens:
                    end = replace(end, tier=Tier.PEER)
        except RefusedError as error:
            return self._failure(job, Status.REFUSED, str(error))
        except UnavailableError as error:
            return self._failure(job, Status.FAILED, str(error))
        except TimeoutError:
            return self._failure(job, Status.FAILED, f"the turn did not end within {job.budget_us} µs")
        finally:
            self._talking[job.model] -= 1
        together = max(together, self._talking[job.model] + 1)
        busy_us = self._clock.monotonic_us() - started_us
        cloud = job.model in self._clouds
        energy_uj = 0 if cloud else busy_us * self._board.profile.active_mw // (1000 * together)
        kind = EnergyKind.EMULATED if self._board.emulated and not cloud else EnergyKind.ESTIMATED
        return InferenceResult(
            job.request.request_id, Status.OK, self._board_id, job.model, self._digests[job.model], end_tensor(end), busy_us,
            energy_uj, kind,
        )  # fmt: skip

    def _why_not_cloud(self, job: Execute) -> str:
        """Why a job may not leave the fleet, whoever placed it and however; empty if it may, or does not."""
        offer = self._clouds.get(job.model)
        if offer is None:
            return ""
        if not job.key.startswith(f"{self._board_id}/"):
            return f"the cloud of {self._board_id} is for requests that come in there"
        return why_not_model(Wanted.of(job.request), offer, Rules())

    async def _infer(self, job: Execute) -> InferenceResult:
        started_us = self._clock.monotonic_us()
        try:
            invocation = await self._supervisor.invoke(job.model, job.request.inputs, job.budget_us)
        except RefusedError as error:
            return self._failure(job, Status.REFUSED, str(error))
        except UnavailableError as error:
            return self._failure(job, Status.FAILED, str(error))
        spent = self._board.execution(self._work[job.model], started_us, invocation.elapsed_us)
        outputs = invocation.outputs
        if self._board.emulated:
            outputs = {name: self._handed_over(tensor) for name, tensor in outputs.items()}
            if not await self._pace(started_us, spent.busy_us, job.budget_us):
                reason = f"the emulated board took {spent.busy_us} µs, it had {job.budget_us} µs"
                return self._failure(job, Status.FAILED, reason)
        return InferenceResult(
            job.request.request_id,
            Status.OK,
            self._board_id,
            job.model,
            self._digests[job.model],
            outputs,
            spent.busy_us,
            spent.energy_uj,
            spent.energy_kind,
        )

    async def find(self, effect: KvFind) -> KvFound:
        """Make a session ready to move here."""
        try:
            missing, rows = await self.speakers[effect.model].adopt(effect.session, effect.manifest)
        except (RefusedError, UnavailableError) as error:
            return KvFound(effect.key, refusal=str(error))
        return KvFound(effect.key, missing, rows)

    async def put(self, effect: KvPut) -> KvStored:
        """Keep an item of a session that moves here."""
        try:
            await self.speakers[effect.model].put(effect.session, effect.item, effect.name, effect.payload)
        except (RefusedError, UnavailableError) as error:
            return KvStored(effect.key, effect.item, effect.name, str(error))
        return KvStored(effect.key, effect.item, effect.name)

    async def give(self, effect: KvGive) -> KvGave:
        """Read what another board asks of a session here."""
        ask = effect.ask
        try:
            for speaker in self.speakers.values():
                state = speaker.kv_state()
                if state is not None and state.fingerprint == ask.fingerprint:
                    return KvGave(effect.board, ask, await speaker.give(ask))
            raise UnavailableError("session", "no model here has KV of this format", "")
        except (RefusedError, UnavailableError) as error:
            return KvGave(effect.board, ask, refusal=str(error)[:MAX_REFUSAL_CHARS])

    def _handed_over(self, output: Tensor) -> Tensor:
        return Tensor(output.dtype, output.shape, self._board.corrupt(bytes(output.data)))

    async def _pace(self, started_us: int, busy_us: int, budget_us: int) -> bool:
        """Wait out the modelled time of a paced emulated board; ``False`` if the budget was over before."""
        if not self._board.settings.paced:
            return True
        left_us = started_us + min(busy_us, budget_us) - self._clock.monotonic_us()
        await asyncio.sleep(max(0, left_us) / 1e6)
        return busy_us <= budget_us

    def _failure(self, job: Execute, status: Status, reason: str) -> InferenceResult:
        return failure(job.request.request_id, status, self._board_id, reason, job.model)


async def _heard_out(speaker: Speaker, job: Execute, emit: Callable[[AnswerPart], None]) -> TurnEnd:
    """Pass on the parts of a turn; its end."""
    turn, tokens = turn_of(job.request), 0
    offset = len(turn.begun)
    async with aclosing(speaker.talk(turn)) as parts:
        async for part in parts:
            if isinstance(part, TurnEnd):
                return part
            tokens += part.tokens
            for start in range(0, len(part.text), MAX_PART_CHARS):
                text = part.text[start : start + MAX_PART_CHARS]
                emit(AnswerPart(job.request.request_id, offset, text, tokens))
                offset += len(text)
    raise RuntimeError(f"a turn of {job.model} ended without its end")
