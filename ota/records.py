"""What a board's ledger knows of the slots of its models.

Owns the documents ``ota/slots/...`` and ``ota/models/...`` and the high-water marks ``ota/<model>``.  Rules:

* Every record lies there twice, with a counter and a check sum.  A save replaces the older copy, so the newer one is untouched
  until the save is durable; the newest copy that is valid wins.  (The ledger's transactions are all or nothing; two copies
  are for what that does not see: a bit that rots, a page that an old kernel tore.)
* Both copies invalid: the factory's release runs, and ``notes`` says so.  No release is lost by that but the record of it.
* The security floor of a model is a high-water mark besides, so it outlives its record.
* A start within a trial is counted here, durably, before anything is loaded: what takes the board down with it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from hashlib import sha256
from typing import Protocol, TypeVar

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import DIGEST_BYTES, MODEL_NAME, bounded, checked
from ota.slots import Held, ModelSlots, State, boot

VERSION = 1
MAX_RECORD_BYTES = 8192
MAX_MODELS = 64
"""Of which one board keeps slots."""
MAX_COUNTER = 2**63 - 1

T = TypeVar("T")

_PAIR = {0: ("version", int), 1: ("name", str), 2: ("counter", int), 3: ("body", object)}
_SLOTS = {0: ("confirmed", list), 1: ("state", str), 2: ("boots", int), 3: ("floor", int), 4: ("why", str)}
_BESIDE = {5: ("previous", list), 6: ("candidate", list)}


class Books(Protocol):
    """What this needs of ``store.ledger.Ledger``; it raises what that raises."""

    def document(self, name: str) -> bytes | None: ...

    def put_document(self, name: str, data: bytes) -> None: ...

    def high_water(self, name: str) -> int: ...

    def raise_high_water(self, name: str, value: int) -> None: ...

    def transaction(self) -> AbstractContextManager[None]: ...


class Records:
    """The slots of all models, in ``books``. Every method raises as the ledger's do."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._notes: dict[str, None] = {}

    def take_notes(self) -> list[str]:
        """What was found damaged since the last call, a line each, every line once."""
        notes, self._notes = list(self._notes), {}
        return notes

    def models(self) -> list[str]:
        """The models whose slots were ever saved, sorted."""
        body = self._newest("ota/models", _names)
        return sorted(body[1]) if body else []

    def load(self, model: str) -> ModelSlots:
        """The slots of ``model``; the factory's release, and nothing beside it, where nothing (valid) is known."""
        found = self._newest(_document(model), lambda body: _slots(model, body))
        slots = found[1] if found else ModelSlots(model)
        return replace(slots, floor=max(slots.floor, self._books.high_water(_mark(model))))

    def save(self, slots: ModelSlots) -> None:
        """Keep ``slots`` in place of what was known of the model; to be called within a transaction of the ledger's.

        Raises ``RefusedError`` when its floor is below the one that is known: somebody works on an old state.
        """
        self._books.raise_high_water(_mark(slots.model), slots.floor)
        known = self.models()
        if slots.model not in known:
            bounded("models with slots, count", len(known) + 1, 1, MAX_MODELS)
            self._put("ota/models", sorted([*known, slots.model]), _names)
        self._put(_document(slots.model), _body(slots), lambda body: _slots(slots.model, body))

    def count_start(self, max_boots: int, hosted: Iterable[str] = ()) -> dict[str, ModelSlots]:
        """The agent starts: the slots of every model that has some or is ``hosted``, trials counted, those over ``max_boots``
        rolled back.

        Durable when it returns; to be called outside a transaction, and before any candidate is loaded.
        """
        with self._books.transaction():
            started = {model: self.load(model) for model in sorted({*self.models(), *hosted})}
            for model, slots in started.items():
                if slots.state is State.TRIAL:
                    started[model] = boot(slots, max_boots)
                    self.save(started[model])
        return started

    def _newest(self, name: str, read: Callable[[object], T]) -> tuple[int, T] | None:
        """Counter and content of the newest valid copy."""
        copies = [self._copy(name, which, read) for which in (0, 1)]
        valid = [each for each in copies if each is not None]
        if not valid and any(self._books.document(f"{name}/{which}") is not None for which in (0, 1)):
            self._notes[f"record {name}: no valid copy is left; it counts as never written: the factory's release runs"] = None
        return max(valid, key=lambda each: each[0], default=None)

    def _put(self, name: str, body: object, read: Callable[[object], T]) -> None:
        copies = [self._copy(name, which, read) for which in (0, 1)]
        counters = [each[0] if each else 0 for each in copies]
        record = encode({0: VERSION, 1: name, 2: max(counters) + 1, 3: body})
        self._books.put_document(f"{name}/{counters.index(min(counters))}", record + sha256(record).digest())

    def _copy(self, name: str, which: int, read: Callable[[object], T]) -> tuple[int, T] | None:
        data = self._books.document(f"{name}/{which}")
        if data is None:
            return None
        try:
            counter, body = _opened(name, data)
            return counter, read(body)
        except RefusedError as error:
            self._notes[f"{error}; copy {which + 1} of 2 is not used"] = None
            return None


def _opened(name: str, data: bytes) -> tuple[int, object]:
    record, check_sum = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if sha256(record).digest() != check_sum:
        raise RefusedError(f"record {name}", f"{len(data)} bytes with another check sum", "what was written")
    came = fields(decode(record, MAX_RECORD_BYTES, subject=f"record {name}"), f"record {name}", _PAIR)
    bounded(f"record {name}, version", came["version"], VERSION, VERSION)
    if came["name"] != name:
        raise RefusedError(f"record {name}", f"one of {shown(came['name'])}", name)
    return bounded(f"record {name}, counter", came["counter"], 1, MAX_COUNTER), came["body"]


def _body(slots: ModelSlots) -> dict[int, object]:
    beside = {5: slots.previous, 6: slots.candidate}
    held = {key: [each.number, each.manifest] for key, each in beside.items() if each is not None}
    confirmed = [slots.confirmed.number, slots.confirmed.manifest]
    return {0: confirmed, 1: slots.state.value, 2: slots.boots, 3: slots.floor, 4: slots.why, **held}


def _slots(model: str, body: object) -> ModelSlots:
    subject = f"slots of {model}"
    came = fields(body, subject, _SLOTS, _BESIDE)
    if came["state"] not in list(State):
        raise RefusedError(f"{subject}, state", shown(came["state"]), ", ".join(State))
    for name in {"confirmed", "previous", "candidate"} & came.keys():
        came[name] = _held(f"{subject}, {name}", came[name])
    came["state"] = State(came["state"])
    try:
        return ModelSlots(model, **came)
    except ValueError as error:
        raise RefusedError(subject, str(error)) from error


def _held(subject: str, value: object) -> Held:
    items = list_of(value, subject, object, 2)
    if len(items) != 2 or not isinstance(items[0], int) or not isinstance(items[1], bytes):
        raise RefusedError(subject, shown(value), "a number and a digest")
    return Held(items[0], items[1])


def _names(body: object) -> list[str]:
    return [checked(MODEL_NAME, "model with slots", each) for each in list_of(body, "models with slots", str, MAX_MODELS)]


def _document(model: str) -> str:
    return f"ota/slots/{checked(MODEL_NAME, 'slots of', model)}"


def _mark(model: str) -> str:
    return f"ota/{model}"
