"""A model run once on the publisher's machine, in the sandbox, before anybody is sent it.

Owns ``rehearse``.  Rules: what does not load, does not fit its card or gives what is no number here is refused before it is
signed; an answer is called the right one only of a model that computes in integers, for floats differ between CPUs
(``docs/measurement.md``).  Imported on the publisher's machine only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from board_support.roofline import ModelWork
from edge_agent.attest.golden import golden_inputs
from edge_agent.attest.measure import library_files
from edge_agent.core.digests import tensors_digest
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import InferenceResult, Status, Tensor, TensorSpec
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.signature import Signature
from edge_agent.runtime.supervisor import EngineSupervisor
from edge_agent.store.files import reaching
from models.card import Card
from ota.health import why_unclean

BUDGET_US = 30_000_000
FLOATS = frozenset({"float32", "float16"})
CONVERSIONS = frozenset({"QUANTIZE", "DEQUANTIZE"})
"""Of each number by itself: the same on every CPU."""


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """``golden``: the right answer, as SHA-256 in hex, by library; empty where there is none. ``note``: what was seen."""

    golden: Mapping[str, str]
    note: str


async def rehearse(card: Card, path: Path, settings: EngineSettings | None = None) -> Rehearsed:
    """Raises ``RefusedError`` for a model that cannot serve, ``UnavailableError`` if it killed its sandbox."""
    settings = settings or EngineSettings()
    supervisor = EngineSupervisor(settings)
    try:
        with reaching(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            loaded = await supervisor.load(card.name, descriptor, bytes.fromhex(card.source.sha256), card)
        finally:
            os.close(descriptor)
        _check_signature(card, loaded.signature)
        inputs = golden_inputs(loaded.signature.inputs)
        if not inputs:
            return Rehearsed({}, "no golden answer: its inputs are too large for a golden input")
        outputs = (await supervisor.invoke(card.name, inputs, BUDGET_US)).outputs
        _check_outputs(card, outputs)
        if not computes_in_integers(loaded.work):
            return Rehearsed({}, "no golden answer: it computes in floats, which differ between CPUs")
        library = library_files(settings.runtime).name
        return Rehearsed({library: tensors_digest(outputs).hex()}, f"golden answer of {library} is in the card")
    finally:
        await supervisor.close()


def computes_in_integers(work: ModelWork) -> bool:
    return all(op.number_format not in FLOATS or op.kind in CONVERSIONS for op in work.ops)


def _check_signature(card: Card, signature: Signature) -> None:
    for kind, said, found in (("inputs", card.inputs, signature.inputs), ("outputs", card.outputs, signature.outputs)):
        named = {each.name: each for each in found}
        if named.keys() != {each.name for each in said} or not all(_fits(each, named[each.name]) for each in said):
            got = ", ".join(f"{each.name} {each}" for each in found)
            allowed = ", ".join(f"{each.name} {each}" for each in said)
            raise RefusedError(f"{kind} of {card.name}", got, f"those of its card: {allowed}", "give the card of this file")


def _fits(said: TensorSpec, found: TensorSpec) -> bool:
    """An open dimension of the file may be any that its card says."""
    alike = len(said.shape) == len(found.shape) and all(f in (-1, s) for s, f in zip(said.shape, found.shape, strict=True))
    return alike and said.dtype == found.dtype


def _check_outputs(card: Card, outputs: Mapping[str, Tensor]) -> None:
    if why := why_unclean(InferenceResult("0" * 32, Status.OK, "here", card.name, outputs=outputs)):
        raise RefusedError(f"model {card.name}", why, "a model that answers its golden input")
