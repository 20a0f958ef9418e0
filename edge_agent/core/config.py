"""The agent's configuration as frozen values.

Owns every setting, its bounds and its default.  Rules: this file is pure (the shell reads the file and hands in the
mapping); an unknown section or key is refused, never ignored; numbers carry their unit in the name; the defaults are safe
(no gateway, no anonymous members, no emulation unless the board is named).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from edge_agent.core.errors import ConfigError
from edge_agent.core.values import BOARD_ID, MODEL_NAME

MAX_CONFIG_BYTES = 256 * 2**10

_Section = TypeVar("_Section")


def _setting(default: Any = MISSING, *, low: int = 0, high: int = 2**62, one_of: tuple[str, ...] = (), text: str = "") -> Any:
    """A field with its bounds: ``low``/``high`` for numbers, ``one_of`` or ``text`` (a regular expression) for strings."""
    metadata = {"low": low, "high": high, "one_of": one_of, "text": text}
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class BoardSection:
    """``[board]``: who this board is and what it stands on."""

    id: str = _setting(text=BOARD_ID.pattern)
    backend: str = _setting("auto", text=r"[a-z][a-z0-9_]{0,31}")
    profile: str = _setting("")
    paced: bool = _setting(True)


@dataclass(frozen=True, slots=True)
class FleetSection:
    """``[fleet]``: the federation. ``members`` maps a board id to its Ed25519 public key in hex."""

    name: str = _setting("home", text=r"[a-z0-9][a-z0-9_-]{0,23}")
    members: Mapping[str, str] = _setting({}, text=r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class BrokerSection:
    """``[broker]``: where the MQTT 5 broker is; an empty host is a board that stands alone."""

    host: str = _setting("")
    port: int = _setting(1883, low=1, high=65535)
    ca_file: str = _setting("")
    certificate_file: str = _setting("")
    key_file: str = _setting("")
    keepalive_s: int = _setting(10, low=5, high=3600)
    reconnect_max_ms: int = _setting(30_000, low=100, high=3_600_000)
    will_delay_s: int = _setting(0, low=0, high=3600)


@dataclass(frozen=True, slots=True)
class StateSection:
    """``[state]``: what must survive a power cut, and how much room it may take."""

    folder: Path = _setting()
    cache_bytes: int = _setting(512 * 2**20, low=2**20)


@dataclass(frozen=True, slots=True)
class ModelsSection:
    """``[models]``: the catalog names that this board hosts. ``folder`` is where set-up put the files."""

    serve: tuple[str, ...] = _setting((), text=MODEL_NAME.pattern)
    folder: str = _setting("")


@dataclass(frozen=True, slots=True)
class EngineSection:
    """``[engine]``: the sandboxed child that holds the interpreter."""

    runtime: str = _setting("auto", one_of=("auto", "ai_edge_litert", "tflite_runtime"))
    threads: int = _setting(1, low=1, high=64)
    memory_bytes: int = _setting(4 * 2**30, low=256 * 2**20)
    invoke_timeout_ms: int = _setting(30_000, low=10, high=3_600_000)
    max_deaths: int = _setting(3, low=1, high=100)


@dataclass(frozen=True, slots=True)
class QueueSection:
    """``[queue]``: how much may wait."""

    max_requests: int = _setting(1024, low=1, high=100_000)
    max_bytes: int = _setting(64 * 2**20, low=2**20)


@dataclass(frozen=True, slots=True)
class PolicySection:
    """``[policy]``: the exchange rates of placement; all boards of a fleet hold the same."""

    energy_us_per_mj: int = _setting(200, low=0, high=10**6)
    lateness_factor: int = _setting(10, low=1, high=1000)
    quality_us_per_permille: int = _setting(20, low=0, high=10**6)
    link_bytes_per_ms: int = _setting(10_000, low=1, high=10**7)
    link_latency_us: int = _setting(2_000, low=0, high=10**7)
    guard_band_mdegc: int = _setting(2_000, low=0, high=50_000)


@dataclass(frozen=True, slots=True)
class GatewaySection:
    """``[gateway]``: HTTP, off by default, loopback by default."""

    on: bool = _setting(False)
    host: str = _setting("127.0.0.1")
    port: int = _setting(8460, low=0, high=65535)
    token_file: str = _setting("")
    max_body_bytes: int = _setting(16 * 2**20, low=1024, high=64 * 2**20)
    max_concurrent: int = _setting(32, low=1, high=10_000)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    board: BoardSection
    state: StateSection
    fleet: FleetSection = FleetSection()
    broker: BrokerSection = BrokerSection()
    models: ModelsSection = ModelsSection()
    engine: EngineSection = EngineSection()
    queue: QueueSection = QueueSection()
    policy: PolicySection = PolicySection()
    gateway: GatewaySection = GatewaySection()

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> AgentConfig:
        """The configuration that parsed TOML holds. Raises ``ConfigError`` naming the key, what came and what is allowed."""
        known = get_type_hints(cls)
        for name, section in mapping.items():
            if name not in known:
                raise ConfigError(f"section [{name}]", "an unknown section", ", ".join(f"[{n}]" for n in known))
            if not isinstance(section, Mapping):
                raise ConfigError(f"section [{name}]", section, "a table")
        return cls(**{name: _section(kind, name, mapping.get(name, {})) for name, kind in known.items()})


def _section(kind: type[_Section], name: str, given: Any) -> _Section:
    settings = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in settings:
            raise ConfigError(f"[{name}] {key}", "an unknown key", ", ".join(settings))
    hints = get_type_hints(kind)
    return kind(
        **{
            key: _checked(f"[{name}] {key}", hints[key], given[key], entry)
            for key, entry in settings.items()
            if key in given or _required(f"[{name}] {key}", entry)
        }
    )


def _required(where: str, entry: Field[Any]) -> bool:
    if entry.default is MISSING and entry.default_factory is MISSING:
        raise ConfigError(where, "nothing", _allowed(entry), "it has no default: set it")
    return False


def _checked(where: str, kind: Any, value: Any, entry: Field[Any]) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        if entry.metadata["low"] <= value <= entry.metadata["high"]:
            return value
    elif kind is str and isinstance(value, str):
        return _text(where, value, entry)
    elif kind is Path and isinstance(value, str) and value and "\0" not in value:
        return Path(value).expanduser()
    elif get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_checked(f"{where}[{i}]", get_args(kind)[0], item, entry) for i, item in enumerate(value))
    elif get_origin(kind) is Mapping and isinstance(value, Mapping):
        return {key: _checked(f"{where}.{key}", str, item, entry) for key, item in sorted(value.items())}
    raise ConfigError(where, value, _allowed(entry, kind))


def _text(where: str, value: str, entry: Field[Any]) -> str:
    one_of, pattern = entry.metadata["one_of"], entry.metadata["text"]
    if "\0" in value or (one_of and value not in one_of) or (pattern and not re.fullmatch(pattern, value)):
        raise ConfigError(where, value, _allowed(entry))
    return value


def _allowed(entry: Field[Any], kind: Any = None) -> str:
    if entry.metadata["one_of"]:
        return ", ".join(entry.metadata["one_of"])
    if entry.metadata["text"]:
        return f"text matching {entry.metadata['text']}"
    if kind is int:
        return f"a whole number from {entry.metadata['low']} to {entry.metadata['high']}"
    return {bool: "true or false", str: "text", Path: "a path"}.get(kind, "a path" if entry.name == "folder" else "a list")
