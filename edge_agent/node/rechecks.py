"""Spot checks: a secret sample of what other boards answered is run here once more.

Owns the draw, what waits to be run again, and the verdict.  Rules: nobody else can tell which request is drawn, as it is a
function of a secret of this boot; only what its client allows, what this board has the same model bytes for, and perception
alone; such a job runs only while nothing else does, its key can be no request's, and what waits is bounded in number and
bytes; a run that fails here says nothing.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from dataclasses import dataclass

from edge_agent.attest.settings import AttestSettings
from edge_agent.core.chat import CHAT
from edge_agent.core.values import MAX_DEADLINE_US, InferenceRequest, InferenceResult, ModelOffer, Status
from edge_agent.node.comparison import MAX_COMPARED_BYTES, Difference, difference
from edge_agent.node.execution import Execution
from edge_agent.node.lanes import Job

MAX_OUTSTANDING = 4
MAX_OUTSTANDING_BYTES = 16 * 2**20
BUDGET_US = MAX_DEADLINE_US // 60
LABEL = b"sly/1/recheck"
PREFIX = "~recheck/"
"""No board's and no client's id begins so: the key of a check is no request's."""


@dataclass(frozen=True, slots=True)
class Check:
    """An answer that is to be looked at: what ``board`` gave for ``request``, and by which model bytes."""

    board: str
    request: InferenceRequest
    result: InferenceResult

    @property
    def key(self) -> str:
        return PREFIX + self.request.request_id

    @property
    def size_bytes(self) -> int:
        return self.request.size_bytes + sum(each.size_bytes for each in self.result.outputs.values())


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of a check; ``difference`` is ``None`` where the answer stands."""

    board: str
    request_id: str
    difference: Difference | None


class Rechecks:
    def __init__(self, board: str, settings: AttestSettings, execution: Execution) -> None:
        self._board, self._settings, self._execution = board, settings, execution
        self._outstanding: dict[str, Check] = {}
        self._begun = ""
        self.done = self.differed = 0

    def __len__(self) -> int:
        return len(self._outstanding)

    def draws(self, request_id: str) -> bool:
        """Is this request one of the sample?"""
        return drawn(self._settings.secret, request_id, self._settings.recheck_permille)

    def consider(self, board: str, request: InferenceRequest, result: InferenceResult) -> None:
        """``board`` has answered ``request``: keep it for a check if it is drawn, can be checked, and there is room."""
        check = Check(board, request, result)
        if board == self._board or result.status is not Status.OK or request.task == CHAT or not request.recheck:
            return
        if not self.draws(request.request_id) or self._offer(check) is None or check.key in self._outstanding:
            return
        outputs_bytes = sum(each.size_bytes for each in result.outputs.values())
        outstanding_bytes = sum(each.size_bytes for each in self._outstanding.values())
        if outputs_bytes > MAX_COMPARED_BYTES or outstanding_bytes + check.size_bytes > MAX_OUTSTANDING_BYTES:
            return
        if len(self) < MAX_OUTSTANDING:
            self._outstanding[check.key] = check

    def begin(self, now_us: int) -> None:
        """Let the next check run if nothing else does."""
        while self._outstanding and not self._begun and self._execution.idle:
            key, check = next(iter(self._outstanding.items()))
            offer = self._offer(check)
            if offer is None or self._execution.full(check.request.size_bytes, self._board):
                del self._outstanding[key]
                continue
            self._begun = key
            request = check.request.placed(offer.model, BUDGET_US)
            self._execution.enqueue(Job(key, request, offer.model, now_us + BUDGET_US, self._board))

    def board_of(self, key: str) -> str:
        """Whose answer the check of this key is about; empty if there is none."""
        check = self._outstanding.get(key)
        return check.board if check else ""

    def forget(self, key: str) -> None:
        """The check of this key will not run."""
        self._outstanding.pop(key, None)
        self._begun = "" if self._begun == key else self._begun

    def stop(self) -> None:
        """No check begins any more."""
        for key in [key for key in self._outstanding if key != self._begun]:
            del self._outstanding[key]

    def finish(self, key: str, again: InferenceResult, *, like_engines: bool) -> Iterator[Checked]:
        """A second run has ended: what it says of the first; nothing if it failed, or ran on other model bytes."""
        check = self._outstanding.get(key)
        self.forget(key)
        if check is None or again.status is not Status.OK or again.model_digest != check.result.model_digest:
            return
        if sum(each.size_bytes for each in again.outputs.values()) > MAX_COMPARED_BYTES:
            return
        self.done += 1
        found = difference(check.result.outputs, again.outputs, like_engines=like_engines)
        self.differed += found is not None
        yield Checked(check.board, check.request.request_id, found)

    def _offer(self, check: Check) -> ModelOffer | None:
        """The model that this board hosts of the same bytes."""
        offers = self._execution.offers.values()
        same = (each for each in offers if each.digest == check.result.model_digest and not each.cloud)
        return next(same, None)


def drawn(secret: bytes, request_id: str, permille: int) -> bool:
    """Does the sample hold this request? HMAC-SHA256 of its id under ``secret``, uniform over all ids to within 2^-64."""
    digest = hmac.digest(secret, LABEL + bytes.fromhex(request_id), "sha256")
    return int.from_bytes(digest[:8]) * 1000 < permille << 64
