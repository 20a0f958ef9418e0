"""What a simulated fleet is and goes through, as frozen values, and the TOML file that says it.

Owns ``Scenario`` and what must agree between its sections (``plans``).  Rules: a file that breaks a rule is one ``ConfigError``;
a scenario that exists can be simulated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Self

from board_support.profile import load_profile
from edge_agent.core.chat import CHAT
from edge_agent.core.config import AgentConfig, AttestSection, PolicySection, QueueSection
from edge_agent.core.errors import ConfigError, RefusedError, shown
from edge_agent.core.values import BOARD_ID, INVOKE, MAX_BOARDS, MODEL_NAME, TASK_NAME, checked
from edge_agent.sim.plans import HOSTILE, MAX_DURATION_S, TRACES, ArrivalPlan, BoardPlan, Fault, LinkPlan, ModelPlan, Outage
from edge_agent.sim.tables import parse_toml, read_bytes, read_rows, read_table, setting

__all__ = [
    "TRACES", "ArrivalPlan", "BoardPlan", "Fault", "LinkPlan", "ModelPlan", "Outage", "Scenario", "load_scenario",
    "parse_scenario", "scenario_names",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scenario:
    """A simulation's whole world. ``boards`` is expanded: one entry a board, ``count`` 1."""

    name: str
    title: str
    duration_us: int
    warmup_us: int
    boards: tuple[BoardPlan, ...]
    models: tuple[ModelPlan, ...]
    arrivals: tuple[ArrivalPlan, ...]
    links: LinkPlan = LinkPlan()
    outages: tuple[Outage, ...] = ()
    faults: tuple[Fault, ...] = ()
    policy: PolicySection = PolicySection()
    queue: QueueSection = QueueSection()
    attest: AttestSection = AttestSection(on=False)
    traces: Path | None = None
    """The folder with the traces."""
    limit: int = 0
    """So many requests at most from all arrivals together; 0: no limit."""

    def __post_init__(self) -> None:
        _check(self)

    def model(self, name: str) -> ModelPlan:
        """Raises ``KeyError`` for one that is not there."""
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(name)

    def at_load(self, permille: int) -> Self:
        """The same with all requests coming so much faster (1000: as they are)."""
        return replace(self, arrivals=tuple(_at_load(each, permille) for each in self.arrivals))

    def shortened(self, duration_us: int | None = None, requests: int | None = None) -> Self:
        """The same, ended after ``duration_us`` of arrivals (a third of them warm-up at most) or so many requests."""
        duration_us = duration_us or self.duration_us
        warmup_us = min(self.warmup_us, duration_us // 3)
        return replace(self, duration_us=duration_us, warmup_us=warmup_us, limit=requests or self.limit)


@dataclass(frozen=True, slots=True)
class _Head:
    title: str = setting()
    duration_s: int = setting(low=1, high=MAX_DURATION_S)
    warmup_s: int = setting(0, high=MAX_DURATION_S)


def scenario_names() -> list[str]:
    """The scenarios that come with this package."""
    folder = resources.files("edge_agent.sim") / "scenarios"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_scenario(name_or_path: str) -> Scenario:
    """A scenario of this package by its name, or any other by the path of its TOML file.

    Raises ``ConfigError`` for a file that breaks a rule, ``UnavailableError`` for one that cannot be read.
    """
    if name_or_path in scenario_names():
        packaged = resources.files("edge_agent.sim") / "scenarios" / f"{name_or_path}.toml"
        return parse_scenario(name_or_path, packaged.read_bytes())
    path = Path(name_or_path)
    if path.suffix != ".toml":
        raise ConfigError("scenario", shown(name_or_path), f"{', '.join(scenario_names())}, or the path of a TOML file")
    return parse_scenario(path.stem, read_bytes(path))


def parse_scenario(name: str, data: bytes) -> Scenario:
    """The scenario that the bytes of a TOML file say. Raises ``ConfigError``."""
    table = parse_toml(f"scenario {name}", data)
    rows: dict[str, Any] = {
        "boards": BoardPlan, "models": ModelPlan, "outages": Outage, "faults": Fault, "arrivals": ArrivalPlan,
    }  # fmt: skip
    read: dict[str, Any] = {key: read_rows(kind, key, table.pop(key, [])) for key, kind in rows.items()}
    sections = {key: table.pop(key, {}) for key in ("policy", "queue", "attest")}
    sections["attest"] = sections["attest"] or {"on": False}
    links = read_table(LinkPlan, "[links]", table.pop("links", {}))
    head = read_table(_Head, "scenario", table)
    return Scenario(
        name=name, title=head.title, duration_us=head.duration_s * 1_000_000, warmup_us=head.warmup_s * 1_000_000,
        boards=tuple(_expanded(read.pop("boards"))), links=links, **_agent_sections(sections), **read,
    )  # fmt: skip


def _agent_sections(sections: Mapping[str, object]) -> dict[str, Any]:
    """``[policy]``, ``[queue]`` and ``[attest]`` are those of an agent's configuration file; without ``[attest]`` it is off."""
    config = AgentConfig.from_mapping({"board": {"id": "any"}, "state": {"folder": "any"}, **sections})
    return {"policy": config.policy, "queue": config.queue, "attest": config.attest}


def _expanded(boards: Iterable[BoardPlan]) -> Iterable[BoardPlan]:
    for board in boards:
        for number in range(1, board.count + 1):
            yield replace(board, id=f"{board.id}-{number}" if board.count > 1 else board.id, count=1)


def _at_load(plan: ArrivalPlan, permille: int) -> ArrivalPlan:
    from edge_agent.sim.statistics import OWN_RATE_MHZ

    if plan.kind == "camera":
        return replace(plan, period_ms=max(1, plan.period_ms * 1000 // permille))
    rate_mhz = plan.rate_mhz or OWN_RATE_MHZ.get(plan.kind, 0)
    return replace(plan, rate_mhz=max(1, rate_mhz * permille // 1000))


def _check(scenario: Scenario) -> None:
    """What must agree between the sections."""
    try:
        for board in scenario.boards:
            checked(BOARD_ID, "[[boards]] id", board.id)
            load_profile(board.profile)
        for model in scenario.models:
            checked(MODEL_NAME, "[[models]] name", model.name)
            checked(TASK_NAME, "[[models]] task", model.task)
    except ConfigError:
        raise
    except RefusedError as error:
        raise ConfigError(error.subject, error.got, error.allowed, error.remedy) from None
    boards, models = [each.id for each in scenario.boards], [each.name for each in scenario.models]
    _once("[[boards]]", boards)
    _once("[[models]]", models)
    if not boards or len(boards) > MAX_BOARDS:
        raise ConfigError("[[boards]]", f"{len(boards)} boards", f"1 to {MAX_BOARDS}")
    for board in scenario.boards:
        _known(f"models of board {board.id}", board.models, models)
    for model in scenario.models:
        _check_model(model)
    for outage in scenario.outages:
        _check_outage(outage, boards)
    for fault in scenario.faults:
        _known(f"boards of the fault {fault.kind}", fault.boards, boards)
        _check_span(f"fault {fault.kind}", fault.from_ms, fault.to_ms)
        if fault.kind in HOSTILE and not scenario.attest.on:
            raise ConfigError(f"fault {fault.kind}", "boards that attest nothing", "a scenario with an [attest] section")
    _known("[attest] verifiers", scenario.attest.verifiers, boards)
    for plan in scenario.arrivals:
        _check_arrivals(plan, scenario, boards)


def _check_model(model: ModelPlan) -> None:
    if model.task == INVOKE:
        raise ConfigError(f"task of {model.name}", INVOKE, "a task that a model does, like detect_faces")
    if model.talks and not (model.kv_bytes and model.parked_bytes and model.window_tokens):
        raise ConfigError(f"model {model.name}", "talk without KV", "kv_bytes, parked_bytes and window_tokens of 1 or more")


def _check_outage(outage: Outage, boards: list[str]) -> None:
    _known(f"boards of the outage {outage.kind}", outage.boards, boards)
    _check_span(f"outage {outage.kind}", outage.from_ms, outage.to_ms)
    if (outage.kind == "cut") != bool(outage.boards):
        raise ConfigError(f"boards of the outage {outage.kind}", list(outage.boards), "boards for a cut, none for the broker")


def _check_arrivals(plan: ArrivalPlan, scenario: Scenario, boards: list[str]) -> None:
    subject = f"arrivals {plan.kind}"
    _known(f"ingress of the {subject}", plan.ingress, boards)
    _check_span(subject, plan.from_ms, plan.to_ms)
    _known(f"task of the {subject}", [plan.task], [each.task for each in scenario.models])
    _known(f"model of the {subject}", [plan.model] if plan.model else [], [each.name for each in scenario.models])
    if plan.kind in ("poisson", "bursty") and not plan.rate_mhz:
        raise ConfigError(f"rate_mhz of the {subject}", 0, "1 or more")
    if plan.task != CHAT and plan.kind in TRACES:
        raise ConfigError(f"task of the {subject}", plan.task, f"{CHAT!r}: the trace is of talk")
    if plan.task == CHAT and plan.kind == "camera":
        raise ConfigError(f"task of the {subject}", plan.task, "a task of perception")


def _check_span(subject: str, from_ms: int, to_ms: int) -> None:
    if to_ms <= from_ms:
        raise ConfigError(f"to_ms of the {subject}", to_ms, f"later than its from_ms, {from_ms}")


def _known(subject: str, names: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(subject, ", ".join(unknown), ", ".join(sorted(set(known))) or "none: there are none")


def _once(subject: str, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(subject, f"{', '.join(twice)} twice", "each name once")
