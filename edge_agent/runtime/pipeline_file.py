"""Pipelines in TOML files: those that come with the product, by name, and a person's own.

Rules: a key that is not known is refused, never ignored; an error names the file, the stage and the key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_agent.core.errors import RefusedError, UnavailableError, shown
from edge_agent.core.values import DataClass, Limits, TrustTier, checked
from edge_agent.runtime.pipeline import NAME, Gate, Kind, Pipeline, Reference, Stage

MAX_PIPELINE_BYTES = 64 * 2**10
SUFFIX = ".toml"
SHIPPED = Path(__file__).with_name("pipelines")

_PIPELINE = {"name": str, "summary": str, "inputs": dict, "stage": list, "results": list, "limits": dict}
_STAGE = {
    "name": str, "task": str, "model": str, "inputs": dict, "for_each": str, "at_most": int, "when": dict, "prompt": str,
    "max_tokens": int, "quality": int,
}  # fmt: skip
_GATE = {"stage": str, "label": str, "at_least": (int, float)}
_LIMITS = {"deadline_ms": int, "energy_mj": int, "quality": int, "trust": str, "data": str}
_TIERS = {tier.name.lower(): tier for tier in TrustTier if tier is not TrustTier.CONTRAINDICATED}


def pipeline_from_mapping(mapping: Mapping[str, Any]) -> Pipeline:
    """The pipeline in a TOML document. Raises ``RefusedError`` naming the field."""
    told = _fields("pipeline", mapping, _PIPELINE, ("name", "inputs", "stage", "results"))
    limits, data = _limits(told.get("limits", {}))
    return Pipeline(
        told["name"],
        {checked(NAME, "pipeline input", name): _kind(name, kind) for name, kind in told["inputs"].items()},
        tuple(_stage(number, each) for number, each in enumerate(told["stage"], 1)),
        tuple(checked(NAME, "pipeline results", each) for each in told["results"]),
        told.get("summary", ""),
        limits,
        data,
    )


def pipeline_from_toml(text: str) -> Pipeline:
    """Raises ``RefusedError`` for what is no TOML or no pipeline."""
    try:
        mapping = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RefusedError("pipeline", str(error), "a TOML document") from None
    return pipeline_from_mapping(mapping)


def read_pipeline(path: Path) -> Pipeline:
    """The pipeline in a file. Raises ``RefusedError`` naming the file, ``UnavailableError`` if it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PIPELINE_BYTES + 1)
    except OSError as error:
        remedy = f"name a file, or one of: {', '.join(shipped())}"
        raise UnavailableError(f"pipeline {path}", error.strerror or str(error), remedy) from error
    if len(data) > MAX_PIPELINE_BYTES:
        raise RefusedError(f"pipeline {path}", f"more than {MAX_PIPELINE_BYTES} bytes", f"at most {MAX_PIPELINE_BYTES} bytes")
    try:
        return pipeline_from_toml(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RefusedError(f"pipeline {path}", str(error), "text in UTF-8") from None
    except RefusedError as error:
        raise RefusedError(f"{path}: {error}") from error


def shipped() -> tuple[str, ...]:
    """The names of the pipelines that come with the product."""
    return tuple(sorted(path.stem for path in SHIPPED.glob(f"*{SUFFIX}")))


def pipeline_named(name: str | Path) -> Pipeline:
    """One that comes with the product, by its name, or the one in a file; raises as ``read_pipeline``."""
    return read_pipeline(SHIPPED / f"{name}{SUFFIX}" if str(name) in shipped() else Path(name))


def _fields(subject: str, table: object, known: Mapping[str, Any], needed: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise RefusedError(subject, shown(table), "a table")
    for name, value in table.items():
        if name not in known:
            raise RefusedError(subject, f"unknown key {name}", ", ".join(known))
        if not isinstance(value, known[name]) or isinstance(value, bool):
            raise RefusedError(f"{subject}, {name}", shown(value), _kinds(known[name]))
    for name in needed:
        if name not in table:
            raise RefusedError(subject, f"no {name}", f"all of {', '.join(needed)}")
    return dict(table)


def _kinds(kind: type | tuple[type, ...]) -> str:
    words = {str: "text", int: "a whole number", float: "a number", dict: "a table", list: "a list"}
    return words[kind[-1] if isinstance(kind, tuple) else kind]


def _kind(name: str, kind: object) -> Kind:
    if kind not in tuple(Kind):
        raise RefusedError(f"pipeline input {name}", shown(kind), ", ".join(Kind))
    return Kind(str(kind))


def _stage(number: int, table: object) -> Stage:
    told = _fields(
        f"stage {table.get('name', number) if isinstance(table, Mapping) else number}", table, _STAGE, ("name", "task")
    )
    subject = f"stage {told['name']}"
    inputs = {port: Reference.parsed(f"{subject}, input {port}", text) for port, text in told.pop("inputs", {}).items()}
    each = told.pop("for_each", None)
    gate = told.pop("when", None)
    return Stage(
        inputs=inputs,
        for_each=None if each is None else Reference.parsed(f"{subject}, for_each", each),
        when=None if gate is None else _gate(f"{subject}, when", gate),
        quality_permille=told.pop("quality", 0),
        **told,
    )


def _gate(subject: str, table: object) -> Gate:
    told = _fields(subject, table, _GATE, tuple(_GATE))
    if not 0 <= told["at_least"] <= 1:
        raise RefusedError(f"{subject}, at_least", told["at_least"], "a score from 0 to 1")
    return Gate(told["stage"], told["label"], round(told["at_least"] * 1000))


def _limits(table: object) -> tuple[Limits, DataClass]:
    told = _fields("limits", table, _LIMITS)
    default = Limits()
    limits = Limits(
        told["deadline_ms"] * 1000 if "deadline_ms" in told else default.deadline_us,
        told["energy_mj"] * 1000 if "energy_mj" in told else None,
        told.get("quality", 0),
        _TIERS[_one_of("limits trust", told.get("trust", "none"), _TIERS)],
    )
    return limits, DataClass(_one_of("limits data", told.get("data", DataClass.PRIVATE.value), tuple(DataClass)))


def _one_of(subject: str, value: str, allowed: Iterable[str]) -> str:
    if value not in allowed:
        raise RefusedError(subject, value, ", ".join(allowed))
    return value
