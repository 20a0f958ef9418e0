"""Reads the tables of a scenario file into frozen values: strictly, with one clear error.

Rules: every field of a value says in its metadata what it may be; an unknown or missing key, a wrong type and a number out of
bounds are ``ConfigError``, which names the place, what came and what is allowed; nothing is guessed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from edge_agent.core.errors import ConfigError, UnavailableError, shown

MAX_SCENARIO_BYTES = 256 * 2**10
MAX_ROWS = 1024
"""Of one kind of table: boards, models, outages, faults, arrivals."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Allowed:
    """``low`` to ``high`` for numbers; ``one_of`` for texts and for the texts in lists."""

    low: int = 0
    high: int = 2**53
    one_of: tuple[str, ...] = ()


def setting(default: Any = MISSING, **allowed: Any) -> Any:
    """A field that a file may set (must, without a default), with what is ``Allowed``."""
    return field(default=default, metadata={"allowed": Allowed(**allowed)})


def read_table(kind: type[_Value], where: str, given: object) -> _Value:
    """The value that a TOML table says. Raises ``ConfigError``."""
    if not isinstance(given, Mapping):
        raise ConfigError(where, shown(given), "a table")
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise ConfigError(f"{where} {shown(key)}", "an unknown key", ", ".join(known))
    hints, values = get_type_hints(kind), {}
    for key, entry in known.items():
        if key in given:
            values[key] = _checked(f"{where} {key}", hints[key], given[key], entry.metadata["allowed"])
        elif entry.default is MISSING:
            raise ConfigError(f"{where} {key}", "nothing", _words(hints[key], entry.metadata["allowed"]), "it has no default")
    return kind(**values)


def read_rows(kind: type[_Value], name: str, given: object) -> tuple[_Value, ...]:
    """The values of an array of tables, ``[[name]]``. Raises ``ConfigError``."""
    if not isinstance(given, list) or len(given) > MAX_ROWS:
        raise ConfigError(f"[[{name}]]", shown(given), f"at most {MAX_ROWS} tables")
    return tuple(read_table(kind, f"[[{name}]] {number}", row) for number, row in enumerate(given, 1))


def parse_toml(subject: str, data: bytes) -> dict[str, Any]:
    """The mapping in the bytes of a TOML file. Raises ``ConfigError``."""
    if len(data) > MAX_SCENARIO_BYTES:
        raise ConfigError(subject, f"more than {MAX_SCENARIO_BYTES} bytes", f"at most {MAX_SCENARIO_BYTES} bytes")
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(subject, f"not TOML: {error}", "a TOML file", "see docs/simulator.md") from None


def read_bytes(path: Path) -> bytes:
    """The bytes of a scenario file, one more than is allowed at most. Raises ``UnavailableError``."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_SCENARIO_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnavailableError(f"scenario {path}", reason, "see: sly sim --list") from None


def _checked(where: str, kind: Any, value: Any, allowed: Allowed) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and type(value) is int and allowed.low <= value <= allowed.high:
        return value
    if kind is str and isinstance(value, str) and (not allowed.one_of or value in allowed.one_of):
        return value
    if kind == tuple[str, ...] and isinstance(value, list) and len(value) <= MAX_ROWS and _are_texts(value):
        return tuple(value)
    raise ConfigError(where, shown(value), _words(kind, allowed))


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(each, str) for each in values) and len(set(values)) == len(values)


def _words(kind: Any, allowed: Allowed) -> str:
    if kind is int:
        return f"a whole number from {allowed.low} to {allowed.high}"
    return {bool: "true or false", str: ", ".join(allowed.one_of) or "text"}.get(kind, "a list of texts, each once")
