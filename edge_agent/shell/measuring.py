"""What runs here, measured all the time: models, library and delegate hashed again in the background, golden inputs run.

Owns the descriptors of what it measures.  Rules: files are read in pieces beside the event loop, never faster than
``attest.rounds`` allows; every file's marks are looked at about once a second; a model counts as long as its files are held here,
also in quarantine; what is told is ``Measured``, when something differs from what was told before.  A golden input is run when
its engine is idle, and when that goes wrong it is as any other inference that goes wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

from edge_agent.attest.evidence import MAX_LIBRARY_CHARS, MAX_MODELS, Measurements, ModelMeasurement
from edge_agent.attest.measure import FileSet, MappedFile, MappedModel, Software, code_digest, read_into, set_digest
from edge_agent.attest.rounds import Pace, Rounds
from edge_agent.core.clock import Clock
from edge_agent.core.errors import UnavailableError
from edge_agent.hosting import Host
from edge_agent.node.events import Event, Measured
from edge_agent.shell.goldens import Goldens
from edge_agent.shell.watched_file import AT_PATH, WatchedFile

LOOK_US = 1_000_000
CODE_US = 600_000_000
"""Between two digests of the agent's code, from which every new engine child is started."""
MODEL = "model "
"""What the names of models' files begin with."""

T = TypeVar("T")


class Measuring:
    """``begin``, then ``measure_for_ever`` and ``goldens.run_for_ever`` as tasks, ``close`` when they have ended.

    ``policy``: the digest of the rules of this board; ``feed`` takes the node's events, ``say`` what is for people.
    """

    def __init__(
        self, host: Host, software: Software, policy: bytes, bytes_per_s: int, clock: Clock, feed: Callable[[Event], None],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._host, self._software, self._policy = host, software, policy
        self._clock, self._feed, self._say = clock, feed, say
        self.rounds = Rounds(bytes_per_s)
        self.goldens = Goldens(host, clock, self.tell)
        self._code = software.code
        self._files: dict[str, WatchedFile] = {}
        self._models: dict[str, MappedModel] = {}
        self._hashers: dict[tuple[str, Pace], hashlib._Hash] = {}
        self._told: Measurements | None = None
        self._unreadable: set[str] = set()

    def rule(self, policy: bytes) -> None:
        """This board places and appraises by other rules now."""
        self._policy = policy
        self.tell()

    def begin(self) -> None:
        """Take in what is there, and tell it: what was hashed while it was loaded counts as hashed."""
        for files, digests in (
            (self._software.library, self._software.library_digests),
            (self._software.delegate, self._software.delegate_digests),
        ):
            for name, path in files.files.items():
                self._watch(_software_key(files, name), MappedFile(path, digests[name]))
        self.look()

    async def measure_for_ever(self) -> None:
        look_us = code_us = self._clock.monotonic_us()
        while True:
            now_us = self._clock.monotonic_us()
            if now_us >= look_us:
                look_us = now_us + LOOK_US
                self.look()
            if now_us >= code_us:
                code_us = now_us + CODE_US
                await self._measure_code()
            await self._hash_what_is_due()
            due_us = min(look_us, self.rounds.due_us() or look_us)
            await asyncio.sleep(max(0, due_us - self._clock.monotonic_us()) / 1e6)

    def look(self) -> None:
        """Notice models that came or went and files that changed."""
        self._models = {model.name: model for model in self._host.mapped()[:MAX_MODELS]}
        held = {_model_key(name, place): file for name, model in self._models.items() for place, file in enumerate(model.files)}
        for key in [key for key in self._files if key.startswith(MODEL) and key not in held]:
            self._files.pop(key).close()
        for key, file in held.items():
            if key in self._files and not self._files[key].maps(file.fd):
                self._files.pop(key).close()
            if key not in self._files:
                self._watch(key, file)
        for watched in self._files.values():
            watched.look()
        self.tell()

    def tell(self) -> None:
        measurements = self.measurements()
        if measurements != self._told:
            self._told = measurements
            self._feed(Measured(measurements))

    def measurements(self) -> Measurements:
        """As far as it was measured until now."""
        software = self._software
        return Measurements(
            code=self._code,
            library=set_digest(self._digests(software.library, software.library_digests)),
            library_name=_library_name(software),
            policy=self._policy,
            delegate=set_digest(self._digests(software.delegate, software.delegate_digests)) if software.delegate.files else b"",
            delegate_name=software.delegate.name,
            models=tuple(self._measured(self._models[name]) for name in sorted(self._models)),
        )

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _watch(self, key: str, file: MappedFile) -> None:
        try:
            self._files[key] = WatchedFile(key, file, file.digest, self.rounds)
            self._unreadable.discard(key)
        except OSError as error:
            self._say_once(key, f"{file.path} cannot be measured: {error.strerror}")

    def _digests(self, files: FileSet, expected: Mapping[str, bytes]) -> dict[str, bytes]:
        return {name: self._digest(_software_key(files, name), expected[name]) for name in files.files}

    def _digest(self, key: str, expected: bytes) -> bytes:
        return self._files[key].digest(expected) if key in self._files else expected

    def _measured(self, model: MappedModel) -> ModelMeasurement:
        found = [self._digest(_model_key(model.name, place), file.digest) for place, file in enumerate(model.files)]
        golden = self.goldens.digest_of(model.name, model.offered)
        mapped = model.digest_of(*found)
        return ModelMeasurement(model.name, model.offered, mapped, golden, model.delegated_permille, model.version, model.slot)

    async def _measure_code(self) -> None:
        try:
            self._code = await asyncio.to_thread(code_digest)
            self.tell()
        except UnavailableError as error:
            self._say_once("code", str(error))

    async def _hash_what_is_due(self) -> None:
        piece = self.rounds.next(self._clock.monotonic_us())
        if piece is None:
            return
        watched = self._files[piece.file.removesuffix(AT_PATH)]
        pass_ = (piece.file, piece.pace)
        if not piece.offset:
            self._hashers[pass_] = hashlib.sha256()
        hasher = self._hashers.get(pass_)
        if hasher is None:
            return
        try:
            await _beside(lambda: read_into(hasher, watched.fds[piece.file], piece.offset, piece.size_bytes))
        except OSError as error:
            self._hashers.pop(pass_, None)
            self._say_once(piece.file, f"{piece.file} cannot be hashed again: {error.strerror}")
            return
        if piece.last:
            watched.hashed(piece.file, self._hashers.pop(pass_).digest())
            self._unreadable.discard(piece.file)
            self.tell()

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._unreadable:
            self._unreadable.add(what)
            self._say(text)


def _library_name(software: Software) -> str:
    """Of what runs the models: what is known of the library alone is not known of it with a delegate."""
    names = [each.name for each in (software.library, software.delegate) if each.name]
    return " with ".join(names)[:MAX_LIBRARY_CHARS]


def _model_key(model: str, place: int) -> str:
    return f"{MODEL}{model}, file {place + 1}"


def _software_key(files: FileSet, name: str) -> str:
    return f"{files.name}: {name}"


async def _beside(work: Callable[[], T]) -> T:
    """``work`` in a thread; who breaks this off waits until it has ended, for it reads a descriptor that is closed after."""
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
