"""When a model that keeps killing its engine is no longer run: a pure state machine.

Owns the rule: ``max_deaths`` deaths with fewer than ``window`` answers between the first and the last of them.  A death
while loading counts like one while running.  Only ``Released`` ends a quarantine, and it forgets what came before.

=============  ==========  ==================================
state          event       next
=============  ==========  ==================================
trusted        Answered    trusted
trusted        Died        trusted, or quarantined by the rule
quarantined    Answered    illegal
quarantined    Died        illegal
any            Released    trusted, nothing held against it
=============  ==========  ==================================
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Answered:
    """The engine gave an answer, or refused a request in an orderly way."""


@dataclass(frozen=True, slots=True)
class Died:
    """The child ended without being told to, or was killed because it hung."""

    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """A person, or an update, wants the model tried again."""


Event = Answered | Died | Released


@dataclass(frozen=True, slots=True)
class Record:
    """What is held against one model. ``deaths``: how many answers had been given at each death that still counts."""

    max_deaths: int
    window: int
    answers: int = 0
    deaths: tuple[tuple[int, str], ...] = field(default=())

    def __post_init__(self) -> None:
        if self.max_deaths < 1 or self.window < 1:
            raise ValueError(f"max_deaths {self.max_deaths}, window {self.window}: both must be at least 1")

    @property
    def quarantined(self) -> bool:
        return len(self.deaths) >= self.max_deaths

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(reason for _, reason in self.deaths)


def step(record: Record, event: Event) -> Record:
    """The record after ``event``. Raises ``RuntimeError`` for an event that a quarantined model cannot have."""
    if isinstance(event, Released):
        return Record(record.max_deaths, record.window)
    if record.quarantined:
        raise RuntimeError(f"{event} for a model in quarantine: nothing may run there")
    if isinstance(event, Answered):
        return Record(record.max_deaths, record.window, record.answers + 1, record.deaths)
    recent = tuple(death for death in record.deaths if record.answers - death[0] < record.window)
    return Record(record.max_deaths, record.window, record.answers, (*recent, (record.answers, event.reason)))
