"""What simulated boards attest: their settings, what they measure, and outputs that can be compared.

Rules: secrets and seeds are drawn from the run's seed, the board and its life, so that a run can be repeated, and no two lives
share one; every honest board measures what all of them recognize; an output is a function of the model's bytes and the inputs, so
that honest boards give the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

from edge_agent.attest.evidence import Measurements, ModelMeasurement
from edge_agent.attest.settings import AttestSettings, References
from edge_agent.core.chat import CHAT
from edge_agent.core.config import AttestSection
from edge_agent.core.digests import tensors_digest
from edge_agent.core.values import InferenceRequest, Tensor, TrustTier
from edge_agent.sim.costs import digest_of
from edge_agent.sim.plans import ModelPlan

LIBRARY_NAME = "simulated 1.0"
CODE, LIBRARY, POLICY = (sha256(b"simulated " + what).digest() for what in (b"agent", b"library", b"policy"))
VERSION = "simulated"
MAX_SKEW_US = 600_000_000
"""So far off at most is an honest board's wall clock."""


def drawn(*what: object) -> bytes:
    """32 bytes that belong to these words."""
    return sha256(" ".join(map(str, what)).encode()).digest()


def skew_us(seed: int, board: str) -> int:
    """How far a board's wall clock is off: up to ``MAX_SKEW_US`` either way."""
    return int.from_bytes(drawn(seed, board, "skew")[:8]) % (2 * MAX_SKEW_US + 1) - MAX_SKEW_US


def attest_settings(section: AttestSection, seed: int, board: str, life: int, models: Iterable[ModelPlan]) -> AttestSettings:
    """Of one life of a board; ``models`` are all that are released."""
    references = References(
        code=frozenset({CODE, *map(bytes.fromhex, section.code)}),
        libraries=frozenset({LIBRARY, *map(bytes.fromhex, section.libraries)}),
        models=frozenset(digest_of(model.name) for model in models),
        policy=frozenset({POLICY}),
    )
    return AttestSettings(
        secret=drawn(seed, board, life, "secret"),
        bootseed=drawn(seed, board, life, "boot"),
        epoch_us=section.epoch_s * 1_000_000,
        missed=section.missed,
        verifiers=frozenset(section.verifiers),
        agree=section.agree,
        software_tier=TrustTier[section.software_keys.upper()],
        recheck_permille=section.recheck_permille,
        references=references,
        version=VERSION,
    )


def measurements(models: Iterable[str], swapped: str = "") -> Measurements:
    """What a board with these models measures; of ``swapped`` other bytes are mapped than are offered."""
    measured = (
        ModelMeasurement(name, digest_of(name), digest_of(f"{name}, swapped" if name == swapped else name)) for name in models
    )
    return Measurements(CODE, LIBRARY, LIBRARY_NAME, POLICY, models=tuple(measured))


def outputs(model: str, request: InferenceRequest, *, wrong: bool = False) -> dict[str, Tensor]:
    """What a model gives for a request: 32 bytes; nothing for a turn, of which no text is made."""
    if request.task == CHAT:
        return {}
    right = sha256(digest_of(model) + tensors_digest(request.inputs)).digest()
    return {"boxes": Tensor("uint8", (32,), bytes(each ^ 0x55 for each in right) if wrong else right)}
