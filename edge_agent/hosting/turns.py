"""Turns of talk: through the language model that speaks here, part by part, and what the board says they cost.

Owns who speaks.  Rules: a turn ends with its job, whatever ended that; what may not leave the fleet never reaches a cloud.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from board_support.board import Board
from edge_agent.core.chat import Tier, Turn, TurnEnd
from edge_agent.core.clock import Clock
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import MAX_PART_CHARS, AnswerPart, EnergyKind, InferenceResult, ModelOffer, Status, failure
from edge_agent.core.wanted import Wanted
from edge_agent.gateway.talker import Parts
from edge_agent.hosting.hand_over import HandOver
from edge_agent.hosting.pair import PairState
from edge_agent.hosting.release import Release
from edge_agent.node.events import Execute
from edge_agent.node.streams import end_tensor, turn_of
from edge_agent.placement.options import Rules, why_not_model

if TYPE_CHECKING:
    from edge_agent.speaking import Speaker

Emit = Callable[[AnswerPart], None]


class Conversations:
    """``tell`` is told of each turn of a release on trial, and why it was not clean, else empty."""

    def __init__(
        self, board: Board, board_id: str, releases: HandOver, clock: Clock, tell: Callable[[Release, str], None]
    ) -> None:
        self._board, self._board_id, self._releases, self._clock, self._tell = board, board_id, releases, clock, tell
        self.speakers: dict[str, Speaker] = {}
        self._offers: dict[str, ModelOffer] = {}
        self._talking = Counter[str]()
        """Turns of each language model at work: they share its energy."""

    @property
    def count(self) -> int:
        """Of the turns that are under way."""
        return self._talking.total()

    def speak(self, offer: ModelOffer, speaker: Speaker) -> None:
        """Host a language model that runs already."""
        self.speakers[offer.model], self._offers[offer.model] = speaker, offer

    async def converse(self, job: Execute, emit: Emit) -> InferenceResult:
        """One job; every way it can fail is a result with its reason."""
        model, started_us = job.model, self._clock.monotonic_us()
        if model not in self.speakers:
            return self._failure(job, Status.FAILED, f"{self._board_id} does not host {model!r}")
        if refusal := self._why_not_cloud(job):
            return self._failure(job, Status.FAILED, refusal)
        self._talking[model] += 1
        together = self._talking[model]
        try:
            async with asyncio.timeout(job.budget_us / 1e6):
                end, digest = await self._heard_out(job, turn_of(job.request), emit)
        except RefusedError as error:
            return self._failure(job, Status.REFUSED, str(error))
        except UnavailableError as error:
            return self._failure(job, Status.FAILED, str(error))
        except TimeoutError:
            return self._failure(job, Status.FAILED, f"the turn did not end within {job.budget_us} µs")
        finally:
            self._talking[model] -= 1
        together = max(together, self._talking[model] + 1)
        busy_us = self._clock.monotonic_us() - started_us
        cloud = self._offers[model].cloud
        energy_uj = 0 if cloud else busy_us * self._board.profile.active_mw // (1000 * together)
        kind = EnergyKind.EMULATED if self._board.emulated and not cloud else EnergyKind.ESTIMATED
        return InferenceResult(
            job.request.request_id, Status.OK, self._board_id, model, digest, end_tensor(end), busy_us, energy_uj, kind
        )

    async def _heard_out(self, job: Execute, turn: Turn, emit: Emit) -> tuple[TurnEnd, bytes]:
        """The end of a turn, and the digest of the model that made the last of it."""
        pair = self._releases.pair(job.model)
        if pair.serving is None:
            end, digest = await _passed_on(self.speakers[job.model].talk(turn), job, turn, emit), self._offers[job.model].digest
        else:
            going = pair.serving.going(turn, job.budget_us, self._tell if pair.state is PairState.TRIAL else None)
            end, digest = await _passed_on(going.parts(), job, turn, emit), going.release.digest
        return replace(end, tier=Tier.PEER) if job.moved_from and end.cached_tokens else end, digest

    def _why_not_cloud(self, job: Execute) -> str:
        """Why a job may not leave the fleet, whoever placed it and however; empty if it may, or does not."""
        offer = self._offers[job.model]
        if not offer.cloud:
            return ""
        if not job.key.startswith(f"{self._board_id}/"):
            return f"the cloud of {self._board_id} is for requests that come in there"
        return why_not_model(Wanted.of(job.request), offer, Rules())

    def _failure(self, job: Execute, status: Status, reason: str) -> InferenceResult:
        return failure(job.request.request_id, status, self._board_id, reason, job.model)


async def _passed_on(parts: Parts, job: Execute, turn: Turn, emit: Emit) -> TurnEnd:
    """Pass on the parts of a turn; its end."""
    tokens, offset = 0, len(turn.begun)
    async with aclosing(parts):
        async for part in parts:
            if isinstance(part, TurnEnd):
                return part
            tokens += part.tokens
            for start in range(0, len(part.text), MAX_PART_CHARS):
                text = part.text[start : start + MAX_PART_CHARS]
                emit(AnswerPart(job.request.request_id, offset, text, tokens))
                offset += len(text)
    raise RuntimeError(f"a turn of {job.model} ended without its end")
