"""The agent's configuration as frozen values.

Owns every setting, its bounds and its default.  Rules: this file is pure (the shell reads the file and hands in the
mapping); an unknown section or key is refused, never ignored; numbers carry their unit in the name; the defaults are safe
(no broker, no members, no models, no emulation unless the board is named).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from edge_agent.core.errors import ConfigError, shown
from edge_agent.core.values import BOARD_ID, MAX_BOARDS, MODEL_NAME

MAX_CONFIG_BYTES = 256 * 2**10

_Section = TypeVar("_Section")


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What a setting is ``about``, and what it may be: ``low``/``high`` for numbers, ``one_of`` or ``text`` (a regular
    expression) for texts and the texts in lists and tables, ``names`` for the keys of a table, ``entries`` for how many there
    may be."""

    about: str = ""
    low: int = 0
    high: int = 2**62
    one_of: tuple[str, ...] = ()
    text: str = ""
    names: str = ""
    entries: int = MAX_BOARDS


def _setting(about: str, default: Any = MISSING, **bounds: Any) -> Any:
    """A field with its ``_Bounds``."""
    metadata = {"bounds": _Bounds(about, **bounds)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class BoardSection:
    """``[board]``: who this board is and what it stands on."""

    id: str = _setting("this board's name in the fleet", text=BOARD_ID.pattern)
    backend: str = _setting(
        "auto takes the first real board that is here; jalapeno emulates, and only when named",
        "auto",
        text=r"[a-z][a-z0-9_]{0,31}",
    )
    profile: str = _setting("a roofline profile, by name or as the path of a TOML file; empty for the board's own", "")
    paced: bool = _setting("an emulated board waits out the modelled time", True)


@dataclass(frozen=True, slots=True)
class FleetSection:
    """``[fleet]``: the federation. ``members`` maps a board id to its Ed25519 public key in hex."""

    name: str = _setting("the fleet that this board belongs to; a part of every topic", "home", text=r"[a-z0-9][a-z0-9_-]{0,23}")
    members: Mapping[str, str] = _setting(
        "every board's Ed25519 public key, as sly identity prints it", {}, text=r"[0-9a-f]{64}", names=BOARD_ID.pattern
    )
    trust: Mapping[str, str] = _setting(
        "the most that a board is trusted, whatever its appraisal: contraindicated, none, warning or affirming",
        {}, text=r"contraindicated|none|warning|affirming", names=BOARD_ID.pattern,
    )  # fmt: skip
    operators: Mapping[str, str] = _setting(
        "who may clear and revoke boards: Ed25519 public keys, as sly trust key prints them", {},
        text=r"[0-9a-f]{64}", names=BOARD_ID.pattern,
    )  # fmt: skip
    endorsers: Mapping[str, str] = _setting(
        "public keys of boards whose quotes are endorsed by hardware, as sly identity prints them", {},
        text=r"[0-9a-f]{64,512}", names=BOARD_ID.pattern,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class BrokerSection:
    """``[broker]``: where the MQTT 5 broker is; an empty host is a board that stands alone."""

    host: str = _setting("the MQTT 5 broker; empty for a board that stands alone", "")
    port: int = _setting("its port; 8883 is usual with TLS", 1883, low=1, high=65535)
    ca_file: str = _setting("PEM of the CA that signed the broker's certificate; empty for a plain connection", "")
    certificate_file: str = _setting("PEM of this board's client certificate, if the broker asks for one", "")
    key_file: str = _setting("PEM of its key", "")
    keepalive_s: int = _setting("a silent connection is given up after one and a half times this", 10, low=5, high=3600)
    reconnect_max_ms: int = _setting("the longest wait between two attempts to connect", 30_000, low=100, high=3_600_000)
    untrusted: str = _setting(
        "what a start does when the broker is there and its certificate is wrong", "stop", one_of=("stop", "go_on")
    )
    will_delay_s: int = _setting(
        "how long the broker waits before it tells the others that this board vanished", 0, low=0, high=3600
    )


@dataclass(frozen=True, slots=True)
class StateSection:
    """``[state]``: what must survive a power cut, and how much room it may take."""

    folder: Path = _setting("ledger, identity key, model cache and agent.sock; this is what must survive")
    cache_bytes: int = _setting("how large the model cache may grow", 512 * 2**20, low=2**20)


@dataclass(frozen=True, slots=True)
class ModelsSection:
    """``[models]``: the catalog names that this board hosts. ``folder`` is where set-up put the files."""

    serve: tuple[str, ...] = _setting("models of the catalog that this board hosts", (), text=MODEL_NAME.pattern, entries=64)
    folder: str = _setting("where sly models fetch put them; empty for its default", "")
    releases: tuple[str, ...] = _setting(
        "SHA-256 of models that may run besides those of the catalog and those built here", (), text=r"[0-9a-f]{64}", entries=256
    )


@dataclass(frozen=True, slots=True)
class EngineSection:
    """``[engine]``: the sandboxed child that holds the interpreter."""

    runtime: str = _setting(
        "the TFLite library; auto takes ai_edge_litert before tflite_runtime",
        "auto",
        one_of=("auto", "ai_edge_litert", "tflite_runtime"),
    )
    threads: int = _setting("of the interpreter", 1, low=1, high=64)
    memory_bytes: int = _setting("address space of an engine child beyond its libraries", 4 * 2**30, low=256 * 2**20)
    max_deaths: int = _setting("so many deaths of its child put a model into quarantine", 3, low=1, high=100)


@dataclass(frozen=True, slots=True)
class LanguageSection:
    """``[language]``: the KV cache of language models, in tiers."""

    window_tokens: int = _setting("how far back attention sees, besides the sinks; a multiple of 64", 2048, low=256, high=2**20)
    hot_bytes: int = _setting("shared memory for the KV of sessions that talk now", 192 * 2**20, low=2**20)
    ram_bytes: int = _setting("parked KV kept in memory, besides on disk", 32 * 2**20)
    disk_bytes: int = _setting("parked KV on disk; unnamed sessions give way first", 512 * 2**20, low=2**20)
    max_sessions: int = _setting("sessions that may talk at once", 16, low=1, high=256)
    max_waiting: int = _setting("turns that may wait for room", 64, low=0, high=10_000)
    speculate: bool = _setting("guess tokens from what was said before; greedy answers stay the same", True)


@dataclass(frozen=True, slots=True)
class GatewaySection:
    """``[gateway]``: the OpenAI-compatible HTTP door."""

    on: bool = _setting("serve HTTP", False)
    host: str = _setting("the address to listen on", "127.0.0.1")
    port: int = _setting("its port; 0 takes a free one", 8080, low=0, high=65535)
    token: str = _setting("the bearer token that clients send; empty is allowed on a loopback address only", "")
    max_body_bytes: int = _setting("the largest request body", 512 * 2**10, low=1024, high=2**26)
    max_requests: int = _setting("requests served at once; more get 429", 32, low=1, high=4096)


@dataclass(frozen=True, slots=True)
class QueueSection:
    """``[queue]``: how much may wait."""

    max_requests: int = _setting("requests that may wait here", 1024, low=1, high=100_000)
    max_bytes: int = _setting("bytes of their inputs", 64 * 2**20, low=2**20)
    order: str = _setting(
        "which waiting request is next: edf takes the earliest deadline, fifo the oldest", "edf", one_of=("edf", "fifo")
    )
    shed_late: bool = _setting("answer at once, with the reason, what no board can do in time", True)


@dataclass(frozen=True, slots=True)
class PolicySection:
    """``[policy]``: the exchange rates of placement; all boards of a fleet hold the same."""

    energy_us_per_mj: int = _setting("what a millijoule is worth in microseconds", 700, low=0, high=10**6)
    lateness_factor: int = _setting("what a microsecond past the deadline is worth", 10, low=1, high=1000)
    quality_us_per_permille: int = _setting("what a per mille of model quality is worth", 20, low=0, high=10**6)
    link_bytes_per_ms: int = _setting("the throughput that a message between boards is reckoned with", 10_000, low=1, high=10**7)
    link_latency_us: int = _setting("and its latency", 2_000, low=0, high=10**7)
    guard_band_mdegc: int = _setting("a board nearer than this to its trip point takes nothing new", 2_000, low=0, high=50_000)
    horizon_us: int = _setting("the stretch of time that the table plans for", 10_000_000, low=10_000, high=600_000_000)
    congestion_factor: int = _setting(
        "what a busy microsecond is worth, in microseconds, on a board that is booked for the whole horizon", 50, low=0, high=1000
    )
    gain_us: int = _setting("the table is settled when no request gains so much by another option", 1_000, low=1, high=10**9)


@dataclass(frozen=True, slots=True)
class CloudSection:
    """``[cloud]``: an OpenAI-compatible endpoint outside the fleet, for turns of talk whose data is marked public."""

    on: bool = _setting("let public turns go there when that is the best option", False)
    url: str = _setting("its base URL, with the version: https://example.com/v1", "", text=r"(https?://[^\s]+)?")
    model: str = _setting("the model to ask for there", "")
    token_file: str = _setting("a file with the bearer token; empty for none", "")
    quality_permille: int = _setting("the quality of its answers", 900, low=0, high=1000)
    price_us: int = _setting("what one turn costs, in the microseconds of [policy]", 5_000_000, low=0, high=10**12)
    busy_us: int = _setting("how long a turn takes there, before any was measured", 3_000_000, low=1, high=10**9)
    parallel: int = _setting("turns there at once", 4, low=1, high=64)


@dataclass(frozen=True, slots=True)
class AttestSection:
    """``[attest]``: what this board shows of itself, and how it judges what others show."""

    on: bool = _setting("show evidence, appraise the others, and sign a receipt for each answer", True)
    epoch_s: int = _setting("evidence is fresh for this epoch and the next", 30, low=1, high=3600)
    missed: int = _setting("after so many epochs without fresh evidence nothing is known of a board", 3, low=1, high=1000)
    verifiers: tuple[str, ...] = _setting(
        "whose appraisals count; empty: every member's, each for its neighbours", (), text=BOARD_ID.pattern, entries=64
    )
    agree: int = _setting("how many of them must say so", 1, low=1, high=64)
    software_keys: str = _setting(
        "the most that a board is trusted whose key is a file", "warning", one_of=("none", "warning", "affirming")
    )
    key: str = _setting(
        "what vouches for this board besides its key file: auto takes a TPM 2.0, or the device root of an emulated board",
        "auto",
        one_of=("auto", "software", "tpm"),
    )
    tcti: str = _setting("how tpm2-tools reach the TPM, as in TPM2TOOLS_TCTI; empty for /dev/tpmrm0", "")
    pcr: int = _setting("the PCR that model digests are extended into: 16 or 23, which software may reset", 23, low=16, high=23)
    rehash_bytes_per_s: int = _setting(
        "how fast loaded models are hashed again in the background", 8 * 2**20, low=4096, high=2**33
    )
    recheck_permille: int = _setting("of the answers of other boards so many are run here once more", 16, low=0, high=1000)
    code: tuple[str, ...] = _setting(
        "SHA-256 of agents besides this one that are recognized", (), text=r"[0-9a-f]{64}", entries=64
    )
    libraries: tuple[str, ...] = _setting(
        "SHA-256 of interpreter libraries and delegates besides this board's own that are recognized",
        (),
        text=r"[0-9a-f]{64}",
        entries=64,
    )


@dataclass(frozen=True, slots=True)
class OtaSection:
    """``[ota]``: what comes over the air, believed as far as the fleet's root of trust reaches."""

    root: str = _setting("the fleet's TUF root, as sly fleet enroll wrote it; empty: nothing is taken over the air", "")
    trial_inferences: int = _setting("clean inferences of a new model until it is confirmed", 5, low=1, high=10_000)
    trial_s: int = _setting("after so long without enough requests golden inputs stand in for them", 60, low=1, high=86_400)
    trial_boots: int = _setting("starts within a trial until it counts as failed", 3, low=1, high=100)
    confirm_s: int = _setting("a new agent is confirmed after so long with a broker", 300, low=1, high=86_400)
    serve: bool = _setting("give the boards around what this one holds of a release", True)
    max_bytes_per_s: int = _setting("how fast this board gives", 4 * 2**20, low=65_536, high=2**33)
    url: str = _setting("an HTTP mirror of the fleet's repository, asked besides the broker", "", text=r"(https?://[^\s]+)?")


@dataclass(frozen=True, slots=True)
class AgentConfig:
    board: BoardSection
    state: StateSection
    fleet: FleetSection = FleetSection()
    broker: BrokerSection = BrokerSection()
    models: ModelsSection = ModelsSection()
    engine: EngineSection = EngineSection()
    language: LanguageSection = LanguageSection()
    gateway: GatewaySection = GatewaySection()
    queue: QueueSection = QueueSection()
    policy: PolicySection = PolicySection()
    cloud: CloudSection = CloudSection()
    attest: AttestSection = AttestSection()
    ota: OtaSection = OtaSection()

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


def template() -> str:
    """Every setting as TOML, commented out where it has a default: a file to begin with."""
    lines = []
    for name, kind in get_type_hints(AgentConfig).items():
        lines.append(f"[{name}]")
        for entry in fields(kind):
            lines += [f"# {entry.metadata['bounds'].about}", _template_line(entry)]
        lines.append("")
    return "\n".join(lines)


def _template_line(entry: Field[Any]) -> str:
    if entry.default_factory is not MISSING:
        return f'# {entry.name} = {{ kitchen = "8f0c..." }}'
    if entry.default is MISSING:
        return f'{entry.name} = ""'
    default = list(entry.default) if isinstance(entry.default, tuple) else entry.default
    return f"# {entry.name} = {json.dumps(default)}"


def _section(kind: type[_Section], name: str, given: Any) -> _Section:
    settings = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in settings:
            raise ConfigError(f"[{name}] {key}", "an unknown key", ", ".join(settings))
    hints = get_type_hints(kind)
    values = {}
    for key, entry in settings.items():
        bounds = entry.metadata["bounds"]
        if key in given:
            values[key] = _checked(f"[{name}] {key}", hints[key], given[key], bounds)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ConfigError(f"[{name}] {key}", "nothing", _allowed(hints[key], bounds), "it has no default: set it")
    return kind(**values)


def _checked(where: str, kind: Any, value: Any, bounds: _Bounds) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and type(value) is int and bounds.low <= value <= bounds.high:
        return value
    if kind is str and isinstance(value, str) and _fits(value, bounds):
        return value
    if kind is Path and isinstance(value, str) and value and "\0" not in value:
        return Path(value).expanduser()
    if get_origin(kind) is tuple and isinstance(value, list) and len(value) <= bounds.entries:
        if len({str(item) for item in value}) != len(value):
            raise ConfigError(where, "one entry twice", _allowed(kind, bounds))
        return tuple(_checked(f"{where}[{i}]", str, item, bounds) for i, item in enumerate(value))
    if get_origin(kind) is Mapping and isinstance(value, Mapping) and len(value) <= bounds.entries:
        for name in value:
            _checked(f"{where}, a name in it", str, name, _Bounds(text=bounds.names))
        return {name: _checked(f"{where}.{name}", str, item, bounds) for name, item in sorted(value.items())}
    raise ConfigError(where, shown(value), _allowed(kind, bounds))


def _fits(value: str, bounds: _Bounds) -> bool:
    if "\0" in value or (bounds.one_of and value not in bounds.one_of):
        return False
    return not bounds.text or re.fullmatch(bounds.text, value) is not None


def _allowed(kind: Any, bounds: _Bounds) -> str:
    text = f"text matching {bounds.text}" if bounds.text else ", ".join(bounds.one_of) or "text"
    if get_origin(kind) is tuple:
        return f"a list of at most {bounds.entries}, each once: {text}"
    if get_origin(kind) is Mapping:
        return f"a table of at most {bounds.entries}, its names matching {bounds.names}: {text}"
    numbers = f"a whole number from {bounds.low} to {bounds.high}"
    return {bool: "true or false", int: numbers, Path: "a path"}.get(kind, text)
