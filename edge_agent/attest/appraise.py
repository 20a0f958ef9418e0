"""What a quote is worth: policies over reference values, giving a trustworthiness vector (AR4SI) with reasons for a person.

Owns the checks that an appraisal consists of, and how policies join them.  Rules: a policy is a frozen value, a ``Check``, an
``AllOf`` or an ``AnyOf``; one that is empty fails; what is merely not recognized warns, only what cannot be honest
contraindicates; a key that no hardware holds caps the tier, and so does the root of an emulated board.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.attest.claims import (
    CONFIGURATION_UNSEEN,
    DELEGATE_IDLE,
    EXECUTABLES_CONTRAINDICATED,
    EXECUTABLES_UNRECOGNIZED,
    FILES_UNRECOGNIZED,
    MALFUNCTION,
    NOT_ENDORSED,
    RECOGNIZED,
    Finding,
    Verdict,
    judged,
    worst_tier,
)
from edge_agent.attest.evidence import KeyKind, ModelMeasurement, Quote
from edge_agent.attest.settings import AttestSettings, References

SHOWN_HEX = 12

Endorsed = Callable[[Quote, bytes], str]
"""Why the endorsement of a quote does not hold by this public key; empty if it does (``keys.check_endorsement``)."""


class Check(StrEnum):
    """One thing that is looked at. Its function is in ``_FINDINGS``."""

    CODE = "code"
    LIBRARY = "library"
    DELEGATE = "delegate"
    DELEGATE_USED = "delegate_used"
    MODELS_RELEASED = "models_released"
    MODELS_MAPPED = "models_mapped"
    GOLDEN = "golden"
    POLICY = "policy"
    IDENTITY = "identity"
    HARDWARE = "hardware"


@dataclass(frozen=True, slots=True)
class AllOf:
    """Everything that its parts find counts. Without parts it fails."""

    parts: tuple[Policy, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """What the part finds that comes out best, the first of equals. Without parts it fails."""

    parts: tuple[Policy, ...]


Policy = Check | AllOf | AnyOf
DEFAULT_POLICY = AllOf(tuple(Check))


@dataclass(frozen=True, slots=True)
class Grounds:
    """What a quote is held against. ``endorser``: the key of the hardware that should vouch for this board, empty for none."""

    references: References = References()
    endorser: bytes = b""
    endorsed: Endorsed = lambda _quote, _key: "this verifier does not check endorsements"


def appraise(
    quote: Quote, settings: AttestSettings, endorsed: Endorsed | None = None, policy: Policy = DEFAULT_POLICY
) -> Verdict:
    """What ``quote`` is worth by itself, its signature and freshness taken as given."""
    endorser = settings.endorsers.get(quote.board, b"")
    grounds = Grounds(settings.references, endorser, endorsed) if endorsed else Grounds(settings.references, endorser)
    verdict = judged(findings(policy, quote, grounds))
    why = _only_software(quote, grounds)
    return verdict.capped(settings.software_tier, why) if why else verdict


def findings(policy: Policy, quote: Quote, grounds: Grounds) -> tuple[Finding, ...]:
    """What ``policy`` finds in ``quote``."""
    if isinstance(policy, Check):
        return tuple(_FINDINGS[policy](quote, grounds))
    if not policy.parts:
        return (Finding("configuration", MALFUNCTION, "the policy is empty: it has nothing to judge by"),)
    found = [findings(part, quote, grounds) for part in policy.parts]
    if isinstance(policy, AllOf):
        return tuple(finding for part in found for finding in part)
    return max(found, key=worst_tier)


def _hex(digest: bytes) -> str:
    return digest.hex()[:SHOWN_HEX]


def _recognized(claim: str, what: str, digest: bytes, known: frozenset[bytes], unknown: int) -> Finding:
    if digest in known:
        return Finding(claim, RECOGNIZED)
    return Finding(claim, unknown, f"{what} {_hex(digest)} is not one of the {len(known)} that are recognized")


def _code(quote: Quote, grounds: Grounds) -> Iterator[Finding]:
    known = grounds.references.code
    yield _recognized("executables", "agent code", quote.measurements.code, known, EXECUTABLES_UNRECOGNIZED)


def _library(quote: Quote, grounds: Grounds) -> Iterator[Finding]:
    measured = quote.measurements
    what = f"interpreter library {measured.library_name}"
    yield _recognized("executables", what, measured.library, grounds.references.libraries, EXECUTABLES_UNRECOGNIZED)


def _delegate(quote: Quote, grounds: Grounds) -> Iterator[Finding]:
    measured = quote.measurements
    if measured.delegate:
        what = f"delegate library {measured.delegate_name}"
        yield _recognized("executables", what, measured.delegate, grounds.references.libraries, EXECUTABLES_UNRECOGNIZED)


def _delegate_used(quote: Quote, _grounds: Grounds) -> Iterator[Finding]:
    for model in quote.measurements.models:
        if model.delegated_permille == 0:
            yield Finding(
                "configuration", DELEGATE_IDLE, f"model {model.name} runs on the CPU: its delegate takes on nothing of it"
            )
        elif model.delegated_permille and not quote.measurements.delegate:
            share = f"{model.delegated_permille} permille of model {model.name}"
            yield Finding("configuration", CONFIGURATION_UNSEEN, f"{share} run on a delegate that was not measured")


def _models_released(quote: Quote, grounds: Grounds) -> Iterator[Finding]:
    for model in quote.measurements.models:
        yield _recognized("file_system", f"model {model.name}", model.offered, grounds.references.models, FILES_UNRECOGNIZED)


def _models_mapped(quote: Quote, _grounds: Grounds) -> Iterator[Finding]:
    for model in quote.measurements.models:
        if model.mapped == model.offered:
            yield Finding("executables", RECOGNIZED)
        else:
            reason = f"model {model.name}: the bytes in memory are {_hex(model.mapped)}, offered is {_hex(model.offered)}"
            yield Finding("executables", EXECUTABLES_CONTRAINDICATED, reason)


def _golden(quote: Quote, grounds: Grounds) -> Iterator[Finding]:
    for model in quote.measurements.models:
        right = _right_answers(model, quote, grounds.references)
        if model.golden and right and model.golden not in right:
            reason = f"model {model.name}: its answer to the golden input is {_hex(model.golden)}, right is {_some(right)}"
            yield Finding("executables", EXECUTABLES_CONTRAINDICATED, reason)


def _right_answers(model: ModelMeasurement, quote: Quote, references: References) -> frozenset[bytes]:
    return references.golden.get((model.offered, quote.measurements.library_name), frozenset())


def _some(digests: frozenset[bytes]) -> str:
    return " or ".join(_hex(digest) for digest in sorted(digests)[:2])


def _policy(quote: Quote, grounds: Grounds) -> Iterator[Finding]:
    known = grounds.references.policy
    yield _recognized("configuration", "policy", quote.measurements.policy, known, CONFIGURATION_UNSEEN)


def _identity(_quote: Quote, _grounds: Grounds) -> Iterator[Finding]:
    """Only what the key of an enrolled board has signed comes as far as here."""
    yield Finding("instance_identity", RECOGNIZED)


def _hardware(quote: Quote, grounds: Grounds) -> Iterator[Finding]:
    """Of a board whose hardware is not enrolled nothing is expected: whatever vouches for it is worth a key file."""
    if not grounds.endorser:
        return
    if quote.key_kind is KeyKind.SOFTWARE:
        yield Finding("hardware", NOT_ENDORSED, "its hardware should vouch for it, and a software key alone came")
        return
    why = _why_not_endorsed(quote, grounds)
    if why:
        yield Finding("hardware", NOT_ENDORSED, f"the endorsement by {quote.key_kind.value} does not count: {why}")
    elif quote.key_kind is KeyKind.TPM:
        yield Finding("hardware", RECOGNIZED)


def _why_not_endorsed(quote: Quote, grounds: Grounds) -> str:
    if not grounds.endorser:
        return "no key of its hardware is enrolled ([fleet] endorsers)"
    return grounds.endorsed(quote, grounds.endorser) if quote.endorsement else "it is missing"


def _only_software(quote: Quote, grounds: Grounds) -> str:
    """Why the tier is capped; empty for a key that hardware vouches for."""
    if quote.key_kind is KeyKind.EMULATED or quote.emulated:
        return "the root of an emulated board proves nothing"
    if quote.key_kind is KeyKind.SOFTWARE:
        return "its key is a file"
    why = _why_not_endorsed(quote, grounds)
    return f"no hardware vouches for its key: {why}" if why else ""


_FINDINGS: Mapping[Check, Callable[[Quote, Grounds], Iterator[Finding]]] = {
    Check.CODE: _code,
    Check.LIBRARY: _library,
    Check.DELEGATE: _delegate,
    Check.DELEGATE_USED: _delegate_used,
    Check.MODELS_RELEASED: _models_released,
    Check.MODELS_MAPPED: _models_mapped,
    Check.GOLDEN: _golden,
    Check.POLICY: _policy,
    Check.IDENTITY: _identity,
    Check.HARDWARE: _hardware,
}
