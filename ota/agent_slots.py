"""The agent's own slots: the environment that is confirmed, the one beside it, and how a board gets from one to the other.

=========== ================== =================== =================================================================
from        event              to                  what the next start takes
=========== ================== =================== =================================================================
EMPTY       ``install``        STAGING, READY      the confirmed agent
READY       ``try_``           TRIAL               the new one; each start is counted and has a time limit (launcher)
READY       ``give_up``        EMPTY               the confirmed agent
TRIAL       ``confirm``        EMPTY               the new one; the one before is kept as ``previous``
TRIAL       ``roll_back``      ROLLED_BACK         the confirmed agent
ROLLED_BACK ``install``        STAGING, READY      the confirmed agent
EMPTY       ``go_back``        ROLLED_BACK         ``previous``, which becomes the confirmed one
=========== ================== =================== =================================================================

Rules: the record and its bytes are the launcher's (``ota.launcher``), every change is made under its lock and is durable when the
call returns; an illegal move raises and changes nothing; an environment is built from nothing in a folder of its own name, and
what no record names is removed; the environment that runs is never touched.  An agent is tried only if the one that is confirmed
can use the ledger afterwards, so a roll back loses nothing that was written meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store.files import Disk, reaching
from edge_agent.store.ledger import SCHEMA, USABLE_FROM
from ota.launcher import (
    FACTORY,
    FOLDER,
    MAX_WHY_CHARS,
    SLOTS_VARIABLE,
    Environment,
    Record,
    State,
    locked,
    read_record,
    write_record,
)
from ota.manifest import Release, encode_release
from ota.slots import Held, IllegalMoveError
from ota.wheelhouse import Progress, build, facts_of, silent

TRIAL_BOOTS = 3
TRIAL_S = 1800


class Told(NamedTuple):
    """What reports say: the confirmed release, the one that is on trial, and its starts so far."""

    confirmed: Held
    tried: Held | None
    boots: int


def launched_from() -> Path | None:
    """The slots that the launcher started this process from; ``None`` if another did: there is no self-update then."""
    folder = os.environ.get(SLOTS_VARIABLE, "")
    return Path(folder) if folder else None


class AgentSlots:
    """The slots in ``folder``, as seen by the agent whose environment is ``prefix``.

    Every method that changes something raises ``IllegalMoveError`` for a move that the table has not, ``UnavailableError`` where
    the disk does not take it; nothing has changed then.
    """

    def __init__(self, folder: Path, disk: Disk | None = None, prefix: Path | None = None) -> None:
        self.folder, self._disk = folder, disk or Disk()
        self._prefix = prefix or Path(sys.prefix)

    @property
    def record(self) -> Record:
        return read_record(self._disk, self.folder)[0]

    @property
    def complaint(self) -> str:
        """What is wrong with a copy of the record; "" for nothing."""
        return read_record(self._disk, self.folder)[1]

    @property
    def state(self) -> State:
        return self.record.state

    @property
    def environment(self) -> str:
        """The folder that this process runs from; "" for the factory's."""
        inside = self._prefix.parent.resolve() == self.folder.resolve() and FOLDER.fullmatch(self._prefix.name)
        return self._prefix.name if inside else FACTORY

    @property
    def running(self) -> Held:
        """The release that this process is of. It is not the confirmed one in a trial, or where that could not be started."""
        record = self.record
        known = (record.candidate, record.confirmed, record.previous)
        return next((held(each) for each in known if each and each.folder == self.environment), Held())

    @property
    def on_trial(self) -> bool:
        """Whether this process is what is tried: it is for it to ``confirm``, or to ``roll_back`` and end."""
        record = self.record
        return record.state is State.TRIAL and record.candidate is not None and record.candidate.folder == self.environment

    def tell(self) -> Told:
        record = self.record
        tried = held(record.candidate) if record.candidate and record.state is State.TRIAL else None
        return Told(held(record.confirmed), tried, record.boots)

    async def install(
        self, release: Release, wheels: Mapping[str, Path], python: str = sys.executable, progress: Progress = silent
    ) -> None:
        """Build ``release`` beside the confirmed agent, from its files ``wheels`` by name.

        Raises ``RefusedError`` for files that are not the release's, or one that cannot run here or be rolled back from, and
        ``UnavailableError`` for a full disk or a build that failed. The slot is empty then.
        """
        facts = facts_of(release, wheels)
        facts.check_platform()
        check_ledger(f"agent release {release.number}", facts.needs, SCHEMA)
        name = f"env-{release.number}-{secrets.token_hex(4)}"
        manifest = sha256(encode_release(release)).hexdigest()
        staged = Environment(name, release.number, manifest, facts.reads, facts.needs)
        self._move(lambda record: self._staged(record, staged))
        try:
            await asyncio.to_thread(self.sweep)
            await build(self.folder / name, release, wheels, python, self._disk, progress)
            self._move(lambda record: _ready(record, staged))
        except BaseException:
            self._abandon(staged)
            raise

    def recover(self) -> None:
        """For an agent's start: what was begun by a process that is gone is given up, and what no record names removed."""
        self._move(lambda record: _emptied(record) if record.state is State.STAGING else record)
        self.sweep()

    def try_(self, boots: int = TRIAL_BOOTS, trial_s: int = TRIAL_S) -> None:
        """The next start takes the new agent: up to ``boots`` starts of ``trial_s`` each until it confirms itself."""

        def tried(record: Record) -> Record:
            _must_be(record, "try", State.READY)
            needs = max(record.needs, record.candidate.needs if record.candidate else 0)
            return replace(record, state=State.TRIAL, boots=0, max_boots=boots, trial_s=trial_s, why="", needs=needs)

        self._move(tried)

    def confirm(self) -> None:
        """For the agent on trial, about itself: every start takes it from now on."""

        def confirmed(record: Record) -> Record:
            _must_be(record, "confirm", State.TRIAL)
            if record.candidate is None or record.candidate.folder != self.environment:
                raise IllegalMoveError(f"agent: {self.environment or 'the factory agent'} cannot confirm {record.candidate}")
            return replace(_emptied(record), confirmed=record.candidate, previous=record.confirmed)

        self._move(confirmed)

    def roll_back(self, why: str) -> None:
        """The next start takes the confirmed agent again."""

        def rolled_back(record: Record) -> Record:
            _must_be(record, "roll back", State.TRIAL)
            return record.rolled_back(why)

        self._move(rolled_back)

    def give_up(self) -> None:
        """What is installed, and was not tried yet, is not wanted any more."""

        def given_up(record: Record) -> Record:
            _must_be(record, "give up", State.READY)
            return _emptied(record)

        self._move(given_up)
        self.sweep()

    def go_back(self, why: str) -> None:
        """The next start takes the agent that was confirmed before. Raises ``RefusedError`` if it could not use the ledger."""

        def gone_back(record: Record) -> Record:
            _must_be(record, "go back", State.EMPTY, State.ROLLED_BACK)
            if record.previous is None:
                raise IllegalMoveError("agent: cannot go back: nothing was confirmed before")
            check_ledger(f"{record.confirmed}, to be left for {record.previous}", record.needs, record.previous.reads)
            left = None if record.confirmed.folder == FACTORY else record.confirmed
            state = State.ROLLED_BACK if left else State.EMPTY
            back = replace(_emptied(record), confirmed=record.previous, previous=None)
            return replace(back, candidate=left, state=state, why=why[:MAX_WHY_CHARS])

        self._move(gone_back)

    def sweep(self) -> None:
        """Remove the environments that no record names, but never the one that runs. Raises ``UnavailableError``.

        One into which a child of a killed agent still writes may stay until the next time.
        """
        with reaching(self.folder):
            kept = self.record.folders | {self.environment}
            for path in self.folder.glob("env-*"):
                if path.name not in kept:
                    _remove(path)

    def _staged(self, record: Record, staged: Environment) -> Record:
        """Only two slots: what was confirmed before makes room, unless it is the factory's or runs now."""
        _must_be(record, "install", State.EMPTY, State.STAGING, State.READY, State.ROLLED_BACK)
        keeps = record.previous is not None and record.previous.folder in (FACTORY, self.environment)
        confirmed = record.confirmed
        if confirmed.folder == self.environment == FACTORY:
            confirmed = replace(confirmed, reads=SCHEMA, needs=USABLE_FROM)
        previous = record.previous if keeps else None
        emptied = replace(_emptied(record), confirmed=confirmed, previous=previous, needs=max(record.needs, USABLE_FROM))
        return replace(emptied, candidate=staged, state=State.STAGING)

    def _abandon(self, staged: Environment) -> None:
        """The bytes first: a full disk has room for the record then. What cannot be done now is done by ``recover``."""
        shutil.rmtree(self.folder / staged.folder, ignore_errors=True)
        with suppress(UnavailableError):
            self._move(lambda record: _emptied(record) if record.candidate == staged else record)

    def _move(self, change: Callable[[Record], Record]) -> None:
        with reaching(self.folder):
            self._disk.make_folder(self.folder)
            with locked(self.folder):
                record, _ = read_record(self._disk, self.folder)
                moved = change(record)
                if moved != record:
                    write_record(self._disk, self.folder, moved)


def held(environment: Environment) -> Held:
    return Held(environment.number, bytes.fromhex(environment.manifest)) if environment.folder else Held()


def check_ledger(subject: str, needs: int, reads: int) -> None:
    """Raises ``RefusedError`` if one that knows the ledger up to ``reads`` cannot use what one with ``needs`` has written."""
    if needs > reads:
        got = f"a ledger that agents before schema {needs} cannot use"
        remedy = "release an agent between the two that knows the new schema and does not write it yet: docs/self-update.md"
        raise RefusedError(subject, got, f"schema {reads or 'not known'} or older, so that a roll back loses nothing", remedy)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


def _must_be(record: Record, event: str, *states: State) -> None:
    if record.state not in states:
        raise IllegalMoveError(f"agent: cannot {event} while {record.state.value}; allowed: {', '.join(states)}")


def _emptied(record: Record) -> Record:
    return replace(record, candidate=None, state=State.EMPTY, boots=0, why="")


def _ready(record: Record, staged: Environment) -> Record:
    if record.state is not State.STAGING or record.candidate != staged:
        raise IllegalMoveError(f"agent: {staged} was built, and is not wanted any more")
    return replace(record, state=State.READY)
