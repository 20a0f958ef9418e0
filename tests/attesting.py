"""Boards that attest, on virtual time: the virtual fleet of ``tests/virtual_fleet`` with evidence, and hands to forge it with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from typing import TypeVar

from edge_agent.attest.evidence import Measurements, ModelMeasurement, Quote, open_quote, sign_quote
from edge_agent.attest.settings import AttestSettings, References
from edge_agent.attest.words import Action, OperatorWord, sign_word
from edge_agent.core.config import QueueSection
from edge_agent.core.cose import Signer
from edge_agent.core.values import InferenceRequest, InferenceResult, ModelOffer, Tensor, TrustTier
from edge_agent.node.attestation import Attestation
from edge_agent.node.events import Effect, Event, Log, Measured
from edge_agent.node.node import Node
from edge_agent.node.rechecks import PREFIX
from edge_agent.node.settings import NodeSettings
from edge_agent.store.ledger import Bounds
from edge_agent.transport.link import Message
from tests.virtual_board import FLEET, RULES, VirtualBoard, seed_of
from tests.virtual_fleet import VirtualFleet

EPOCH_US = 5_000_000
RTT_US = 3_000_000
"""What may pass on virtual links between a word and its last consequence, ticks and the once-a-second rule included."""
OPERATOR = Signer(b"operator", seed_of("operator"))
Result = TypeVar("Result")


def digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


def measured(*offers: ModelOffer, mapped: str = "") -> Measurements:
    """What an honest board measures; ``mapped``: the name of a model whose bytes are others than it offers."""
    models = (
        ModelMeasurement(each.model, each.digest, digest("other bytes") if each.model == mapped else each.digest)
        for each in offers
    )
    return Measurements(digest("code"), digest("library"), "litert 2.3", digest("policy"), models=tuple(models))


REFERENCES = References(
    code=frozenset({digest("code")}),
    libraries=frozenset({digest("library")}),
    models=RULES.releases,
    policy=frozenset({digest("policy")}),
)


class AttestingBoard(VirtualBoard):
    """``settings`` may be changed before a boot; ``seed``: so that two boards can be told to share their secrets, or not."""

    def __init__(
        self, fleet: AttestingFleet, name: str, offers: tuple[ModelOffer, ...], queue: QueueSection, bounds: Bounds | None
    ) -> None:
        super().__init__(fleet, name, offers, queue, bounds)
        self.home = fleet
        self.measurements = measured(*offers)
        self.lies: Callable[[InferenceRequest, InferenceResult], InferenceResult] | None = None
        self.hears: Callable[[Event], Event | None] = lambda event: event
        self.said: list[str] = []
        """Its log."""

    def make_node(self, boot_epoch: int) -> Node:
        secret = digest(f"{self.fleet.seed} {self.name} {boot_epoch}")
        attest = replace(self.home.attest, secret=secret, bootseed=digest(f"seed {secret.hex()}"))
        settings = NodeSettings(
            board=self.name,
            boot_epoch=boot_epoch,
            signer=Signer(self.name.encode(), seed_of(self.name)),
            fleet=FLEET,
            members=self.fleet.keys,
            rules=self.rules,
            trust=self.home.ceiling,
            queue=self.queue,
            attest=attest,
        )
        return Node(settings, self.ledger)

    def furnish(self) -> Iterator[Event]:
        yield from super().furnish()
        yield Measured(self.measurements)

    def feed(self, event: Event) -> None:
        """``hears`` may change what comes in: a broker that says different things to different boards."""
        heard = self.hears(event)
        if heard is not None:
            super().feed(heard)

    def measure(self, measurements: Measurements) -> None:
        """The board measures itself anew."""
        self.measurements = measurements
        self.feed(Measured(measurements))

    def before_effect(self, effect: Effect) -> None:
        super().before_effect(effect)
        if isinstance(effect, Log):
            self.said.append(effect.text)

    def said_something_like(self, text: str) -> bool:
        return any(text in line for line in self.said)

    def _executed(self, key: str, result: InferenceResult) -> None:
        """An engine that lies does so in what others asked for; what it runs a second time is by the truth."""
        job = self.node.execution.running_job(key)
        if self.lies is not None and job is not None and not key.startswith(PREFIX):
            result = self.lies(job.request, result)
        super()._executed(key, result)

    @property
    def attestation(self) -> Attestation:
        found = self.node.trust.attestation
        assert found is not None
        return found


class AttestingFleet(VirtualFleet):
    def __init__(self, seed: int | str = 0, **attest: object) -> None:
        super().__init__(seed)
        settings = AttestSettings(
            secret=bytes(32), bootseed=bytes(32), epoch_us=EPOCH_US, references=REFERENCES,
            operators={"operator": OPERATOR.public_key}, recheck_permille=0,
        )  # fmt: skip
        self.attest = replace(settings, **attest)  # type: ignore[arg-type]
        self.ceiling: dict[str, TrustTier] = {}
        self._serial = 0

    def __enter__(self) -> AttestingFleet:
        super().__enter__()
        return self

    def add_board(
        self, name: str, *offers: ModelOffer, queue: QueueSection | None = None, bounds: Bounds | None = None
    ) -> AttestingBoard:
        self.keys[name] = Signer(name.encode(), seed_of(name)).public_key
        board = self.boards[name] = AttestingBoard(self, name, offers, queue or QueueSection(), bounds)
        return board

    def board(self, name: str) -> AttestingBoard:
        found = self.boards[name]
        assert isinstance(found, AttestingBoard)
        return found

    def check_execution(self, board: str, origin: str, request_id: str) -> None:
        if f"{origin}/" != PREFIX:
            super().check_execution(board, origin, request_id)

    def tier(self, of: str, at: str) -> TrustTier:
        """How far board ``of`` is trusted by board ``at`` now."""
        return self.boards[at].node.trust.tier(of)

    def all_say(self, tier: TrustTier, of: str) -> bool:
        return all(self.tier(of, board.name) is tier for board in self.boards.values() if board.up and board.name != of)

    def all_trusted(self, tier: TrustTier = TrustTier.WARNING) -> bool:
        """Is every board that is up trusted so far by every other one, and by itself?"""
        up = [board.name for board in self.boards.values() if board.up]
        return all(self.tier(of, at) is tier for of in up for at in up)

    def last_quote(self, board: str) -> tuple[Quote, bytes]:
        latest = self.board(board).attestation.attester.latest
        assert latest is not None
        return latest

    def forge(self, board: str, **changes: object) -> bytes:
        """A quote that has the board's own signature, and is otherwise as is wanted: whoever has the key can make it."""
        return sign_quote(replace(self.last_quote(board)[0], **changes), Signer(board.encode(), seed_of(board)))  # type: ignore[arg-type]

    def opened(self, message: bytes) -> Quote:
        return open_quote(message, self.key_of)

    def publish_quote(self, board: str, message: bytes) -> None:
        """Somebody puts a quote onto the topic of a board."""
        self.stranger.publish(Message(self.topics.quote(board), message, retain=True))

    async def let_in_stranger(self) -> None:
        """A link of somebody's own, to say and replay things by."""
        self.stranger = self.link_of("stranger")
        self.stranger.open(lambda event: None, None)
        self.run_for(RTT_US)

    def operator_says(self, board: str, action: Action, reason: str = "") -> None:
        self._serial += 1
        word = OperatorWord("operator", board, self._serial, action, reason)
        self.stranger.publish(Message(self.topics.word(board), sign_word(word, OPERATOR), retain=True))


def run(
    story: Callable[[AttestingFleet], Awaitable[Result]], *boards: tuple[str, ModelOffer], seed: int | str = 0, **attest: object
) -> Result:
    """Tell a story of a fleet whose boards have just booted; ``boards``: each with what it offers."""

    async def told() -> Result:
        with AttestingFleet(seed, **attest) as fleet:
            for name, offers in boards:
                fleet.add_board(name, offers)
            fleet.boot()
            await fleet.let_in_stranger()
            return await story(fleet)

    return asyncio.run(told())


def echoed(request: InferenceRequest, result: InferenceResult) -> InferenceResult:
    """A wrong answer."""
    wrong = {"echo": Tensor("uint8", (16,), bytes(16))}
    return replace(result, outputs=wrong)
