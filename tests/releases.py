"""Releases of a tiny picture model, and a host that has them in its cache: real files, real engine children."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from board_support.board import BoardSettings
from board_support.jalapeno import Jalapeno
from edge_agent.core.chat import ChatMessage, Sampling, Turn
from edge_agent.core.clock import SystemClock
from edge_agent.core.config import AgentConfig
from edge_agent.core.values import INVOKE, AnswerPart, InferenceRequest, InferenceResult, Limits, Tensor, TensorSpec
from edge_agent.hosting import Host
from edge_agent.node.events import Execute
from edge_agent.node.streams import turn_request
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.supervisor import EngineSupervisor
from edge_agent.store.blobs import BlobStore
from models.card import Card, ClassReading, Preparation, Source
from models.installed import Installed
from models.language_card import FileEntry, LanguageCard
from models.tokenizer import Tokenizer
from tests.moody_engines import MOODY
from tests.tiny_llama import IM_END, PLAIN, tiny_model
from tests.tiny_models import DENSE, SAME, SOFTMAX, Graph, Op, T, floats, write_model

MODEL, LANGUAGE = "tiny-classes", "tiny"
BUDGET_US = 60_000_000
SETTINGS = EngineSettings(engine=MOODY)
INPUT = {"image": Tensor("float32", (1, 8, 8, 3), array("f", [0.25] * 192).tobytes())}


def tiny_release(seed: int, mood: str = "") -> bytes:
    """conv -> fully connected -> softmax with weights of ``seed``; ``mood`` as ``moody_engines`` has it."""
    tensors = (
        T("image", "float32", (1, 8, 8, 3)),
        T("w1", "float32", (8, 3, 3, 3), floats(100 + seed, 8, 3, 3, 3)),
        T("b1", "float32", (8,), floats(200 + seed, 8)),
        T("h1", "float32", (1, 8, 8, 8)),
        T("w2", "float32", (10, 512), floats(300 + seed, 10, 512)),
        T("b2", "float32", (10,), floats(400 + seed, 10)),
        T("h2", "float32", (1, 10)),
        T("scores", "float32", (1, 10)),
    )
    ops = (
        Op("CONV_2D", (0, 1, 2), (3,), SAME),
        Op("FULLY_CONNECTED", (3, 4, 5), (6,), DENSE),
        Op("SOFTMAX", (6,), (7,), SOFTMAX),
    )
    return write_model(Graph(tensors, ops, (0,), (7,))) + (f"|{mood}".encode() if mood else b"")


def tiny_card(model: bytes) -> Card:
    sha256 = hashlib.sha256(model).hexdigest()
    return Card(
        MODEL, 1, "classify_picture", "a tiny model", 500, "none", Source(
            "tiny", "1.0", "py3-none-any", "0" * 64, "tiny.tflite", sha256, len(model), "MIT", "https://example.org"
        ),
        (TensorSpec("image", "float32", (1, 8, 8, 3)),), (TensorSpec("scores", "float32", (1, 10)),),
        Preparation("stretch", 0, 1, 0), ClassReading("scores", 0, 1), tuple(f"label {number}" for number in range(10)),
    )  # fmt: skip


@cache
def tiny_language(seed: int, mood: str = "", says: str = "") -> tuple[LanguageCard, dict[str, bytes]]:
    """The card and the files by name of a tiny language model, which never ends an answer by itself."""
    with TemporaryDirectory(prefix="sly-tiny-") as folder:
        card, _ = tiny_model(Path(folder), LANGUAGE, seed, says=says or PLAIN)
        files = {each.filename: (Path(folder) / each.filename).read_bytes() for each in card.entries()}
    if mood:
        stages = {}
        for runtime, each in card.files.items():
            data = files[each.filename] = files[each.filename] + f"|{mood}".encode()
            stages[runtime] = FileEntry(each.filename, hashlib.sha256(data).hexdigest(), len(data))
        card = replace(card, files=stages)
    return card, files


@dataclass
class Rig:
    """A host, what it told of trials, and what it reported."""

    host: Host
    blobs: BlobStore
    supervisor: EngineSupervisor
    trials: list[str]
    reports: list[str]
    requests: count[int] = field(default_factory=count)

    def install(self, number: int, mood: str = "", seed: int | None = None) -> Installed:
        model = tiny_release(number if seed is None else seed, mood)
        digest = hashlib.sha256(model).digest()
        self.blobs.add([model], digest)
        return Installed(MODEL, number, tiny_card(model), {"tiny.tflite": digest})

    @staticmethod
    def foreign(number: int) -> Installed:
        """A release whose file is not in the cache."""
        model = tiny_release(1000 + number)
        return Installed(MODEL, number, tiny_card(model), {"tiny.tflite": hashlib.sha256(model).digest()})

    async def ask(self, budget_us: int = BUDGET_US) -> InferenceResult:
        request_id = f"{next(self.requests):032x}"
        request = InferenceRequest(request_id, INVOKE, INPUT, MODEL)
        return await self.host.execute(Execute(f"kitchen/{request_id}", request, MODEL, budget_us), lambda part: None)

    def install_language(self, number: int, mood: str = "", seed: int | None = None, says: str = "") -> Installed:
        """A release of the tiny language model; ``mood`` as ``moody_language_worker`` has it."""
        card, files = tiny_language(number if seed is None else seed, mood, says)
        held = {}
        for each in card.entries():
            data, digest = files[each.filename], bytes.fromhex(each.sha256)
            self.blobs.add([data], digest)
            held[each.filename] = digest
        return Installed(LANGUAGE, number, card, held)

    def with_other_tokenizer(self, installed: Installed) -> Installed:
        """The same release with a tokenizer of other bytes, which makes the same tokens of the same text."""
        card = installed.card
        assert isinstance(card, LanguageCard)
        entry = card.tokenizer
        tokenizer = Tokenizer.from_bytes(self.blobs.path_of(bytes.fromhex(entry.sha256)).read_bytes())
        tokenizer.stop_ids = frozenset({IM_END})
        data = tokenizer.to_bytes()
        other = FileEntry(entry.filename, hashlib.sha256(data).hexdigest(), len(data))
        digest = bytes.fromhex(other.sha256)
        self.blobs.add([data], digest)
        return replace(installed, card=replace(card, tokenizer=other), files={**installed.files, entry.filename: digest})

    async def say(
        self,
        text: str,
        session: str = "",
        tokens: int = 24,
        budget_us: int = BUDGET_US,
        heard: Callable[[str], None] | None = None,
    ) -> tuple[InferenceResult, str]:
        """The result of a turn, and its parts put together."""
        request_id, parts = f"{next(self.requests):032x}", list[str]()

        def take(part: AnswerPart) -> None:
            assert part.offset == sum(map(len, parts)), "no gap and no overlap"
            parts.append(part.text)
            if heard is not None:
                heard(part.text)

        turn = Turn((ChatMessage("user", text),), session=session, max_tokens=tokens, sampling=Sampling(1000, seed=7))
        request = turn_request(request_id, turn, LANGUAGE, Limits())
        result = await self.host.execute(Execute(f"kitchen/{request_id}", request, LANGUAGE, budget_us), take)
        return result, "".join(parts)

    async def until_gone(self) -> None:
        await self.host.at_ease()


@asynccontextmanager
async def hosting(folder: Path, settings: EngineSettings = SETTINGS, first: int | None = 1) -> AsyncIterator[Rig]:
    """A host without configured models, whose release ``first`` serves."""
    config = AgentConfig.from_mapping(
        {
            "board": {"id": "kitchen", "backend": "jalapeno", "paced": False},
            "state": {"folder": str(folder)},
            "language": {"window_tokens": 256, "speculate": False},
        }
    )
    reports: list[str] = []
    board = Jalapeno(BoardSettings(profile="raspberry_pi_5", paced=False))
    blobs = BlobStore(folder / "models", config.state.cache_bytes)
    supervisor = EngineSupervisor(settings, report=reports.append)
    host = Host(config, board, blobs, supervisor, SystemClock(), settings, reports.append)
    rig = Rig(host, blobs, supervisor, [], reports)
    host.on_trial = lambda name, why: rig.trials.append(why)
    try:
        if first is not None:
            await host.load(MODEL, rig.install(first))
        yield rig
    finally:
        await host.close()
        await supervisor.close()
