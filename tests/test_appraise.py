"""What a quote is worth: checks, how policies join them, claims, tiers, caps, reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.attest.appraisal import MAX_REASON_CHARS, MAX_REASONS, Vector
from edge_agent.attest.appraise import DEFAULT_POLICY, AllOf, AnyOf, Check, Policy, appraise
from edge_agent.attest.claims import Finding, Verdict, judged, tier_of, vector_tier
from edge_agent.attest.evidence import KeyKind, Measurements, ModelMeasurement, Quote
from edge_agent.attest.settings import References
from edge_agent.core.values import TrustTier
from tests.attested import a_quote, digest, quotes
from tests.verifying import GOOD, MODEL, REFERENCES, settings

AFFIRMING, WARNING, NONE, CONTRAINDICATED = (
    TrustTier.AFFIRMING, TrustTier.WARNING, TrustTier.NONE, TrustTier.CONTRAINDICATED,
)  # fmt: skip
CLAIMS = tuple(Vector.__dataclass_fields__)
ENDORSER = {"b": b"k" * 64}


def quote_of(measured: Measurements = GOOD, **changes: object) -> Quote:
    return a_quote(measurements=measured, **changes)


def with_model(**changes: object) -> Measurements:
    return replace(GOOD, models=(replace(MODEL, **changes),))  # type: ignore[arg-type]


def holds(_quote: Quote, _key: bytes) -> str:
    return ""


def fails(_quote: Quote, _key: bytes) -> str:
    return "signed by another key"


def test_what_is_all_recognized_affirms_and_gives_no_reasons() -> None:
    verdict = appraise(quote_of(), settings())
    assert verdict == Verdict(AFFIRMING, Vector(2, 2, 2, 2), ())


@pytest.mark.parametrize("policy", [AllOf(()), AnyOf(()), AllOf((DEFAULT_POLICY, AllOf(()))), AnyOf((AllOf(()), AnyOf(())))])
def test_the_empty_policy_fails(policy: Policy) -> None:
    verdict = appraise(quote_of(), settings(), policy=policy)
    assert verdict.tier is NONE
    assert "the policy is empty: it has nothing to judge by" in verdict.reasons


def test_any_of_takes_the_part_that_comes_out_best_and_all_of_the_worst() -> None:
    unknown = quote_of(replace(GOOD, code=digest("other")))
    assert appraise(unknown, settings(), policy=AllOf((Check.CODE, Check.POLICY))).tier is WARNING
    assert appraise(unknown, settings(), policy=AnyOf((Check.CODE, Check.POLICY))).tier is AFFIRMING
    assert appraise(unknown, settings(), policy=AnyOf((AllOf(()), Check.CODE))).tier is WARNING


def test_references_that_are_empty_recognize_nothing() -> None:
    verdict = appraise(quote_of(), settings(references=References()))
    assert verdict.tier is WARNING
    assert verdict.vector == Vector(instance_identity=2, configuration=36, executables=33, file_system=32)


@pytest.mark.parametrize(
    ("measured", "tier", "claims", "reason"),
    [
        (replace(GOOD, code=digest("x")), WARNING, {"executables": 33}, "agent code"),
        (replace(GOOD, library=digest("x")), WARNING, {"executables": 33}, "interpreter library litert"),
        (replace(GOOD, delegate=digest("x"), delegate_name="tpu"), WARNING, {"executables": 33}, "delegate library tpu"),
        (replace(GOOD, delegate=digest("delegate")), AFFIRMING, {}, ""),
        (replace(GOOD, policy=digest("x")), WARNING, {"configuration": 36}, "policy"),
        (with_model(offered=digest("x"), mapped=digest("x")), WARNING, {"file_system": 32}, "model blazeface"),
        (with_model(mapped=digest("x")), CONTRAINDICATED, {"executables": 96}, "bytes in memory"),
        (with_model(golden=digest("x")), CONTRAINDICATED, {"executables": 96}, "golden input"),
        (with_model(golden=b""), AFFIRMING, {}, ""),
        (with_model(delegated_permille=0), WARNING, {"configuration": -33}, "runs on the CPU"),
        (with_model(delegated_permille=1), WARNING, {"configuration": 36}, "not measured"),
        (replace(GOOD, models=()), AFFIRMING, {"file_system": 0}, ""),
    ],
)
def test_each_measurement_counts_in_its_claim(
    measured: Measurements, tier: TrustTier, claims: dict[str, int], reason: str
) -> None:
    verdict = appraise(quote_of(measured), settings())
    assert verdict.tier is tier
    assert verdict.vector == replace(Vector(2, 2, 2, 2), **claims)
    assert (len(verdict.reasons), reason in " ".join(verdict.reasons)) == (bool(reason), True)


def test_a_golden_answer_is_right_by_the_library_that_gave_it() -> None:
    other = {(digest("blazeface"), "another"): frozenset({digest("wrong")})}
    verdict = appraise(quote_of(), settings(references=replace(REFERENCES, golden=other)))
    assert verdict.tier is AFFIRMING


def test_of_two_models_the_bad_one_is_named() -> None:
    models = (MODEL, ModelMeasurement("voices", digest("voices"), digest("poisoned")))
    verdict = appraise(quote_of(replace(GOOD, models=models)), settings())
    assert verdict.reasons[0].startswith("model voices: the bytes in memory are")


@pytest.mark.parametrize("most", [AFFIRMING, WARNING, NONE])
def test_a_software_key_is_capped(most: TrustTier) -> None:
    verdict = appraise(quote_of(), settings(software_tier=most))
    assert verdict.tier is most
    assert verdict.reasons == (() if most is AFFIRMING else ("its key is a file",))


@pytest.mark.parametrize(
    ("kind", "emulated", "endorsers", "check", "tier", "hardware", "reason"),
    [
        (KeyKind.TPM, False, ENDORSER, holds, AFFIRMING, 2, ""),
        (KeyKind.TPM, False, ENDORSER, fails, WARNING, -33, "signed by another key"),
        (KeyKind.TPM, False, ENDORSER, None, WARNING, -33, "does not check endorsements"),
        (KeyKind.TPM, False, {}, holds, WARNING, 0, "no key of its hardware is enrolled"),
        (KeyKind.EMULATED, True, {}, holds, WARNING, 0, "emulated board proves nothing"),
        (KeyKind.TPM, True, ENDORSER, holds, WARNING, 2, "emulated"),
        (KeyKind.EMULATED, True, ENDORSER, holds, WARNING, 0, "emulated board proves nothing"),
        (KeyKind.SOFTWARE, False, ENDORSER, holds, WARNING, -33, "a software key alone came"),
        (KeyKind.SOFTWARE, False, {}, holds, WARNING, 0, "its key is a file"),
    ],
)
def test_only_hardware_that_is_enrolled_and_checked_lifts_the_cap(
    kind: KeyKind,
    emulated: bool,
    endorsers: dict[str, bytes],
    check: Callable[[Quote, bytes], str] | None,
    tier: TrustTier,
    hardware: int,
    reason: str,
) -> None:
    quote = quote_of(key_kind=kind, emulated=emulated, endorsement=b"e")
    verdict = appraise(quote, settings(software_tier=WARNING, endorsers=endorsers), check)
    assert (verdict.tier, verdict.vector.hardware) == (tier, hardware)
    assert reason in " ".join(verdict.reasons)


@pytest.mark.parametrize("kind", KeyKind)
def test_hardware_that_is_not_enrolled_is_worth_a_key_file_and_no_reason(kind: KeyKind) -> None:
    quote = quote_of(key_kind=kind, emulated=kind is KeyKind.EMULATED, endorsement=b"e")
    assert appraise(quote, settings(), holds) == appraise(quote_of(), settings(), holds)
    assert appraise(quote, settings(), holds).tier is AFFIRMING and not appraise(quote, settings(), holds).reasons


def test_an_endorsement_that_is_missing_is_not_even_checked() -> None:
    quote = quote_of(key_kind=KeyKind.TPM)
    verdict = appraise(quote, settings(software_tier=NONE, endorsers=ENDORSER), holds)
    assert verdict.tier is NONE
    assert "it is missing" in verdict.reasons[0]


def test_every_claim_value_has_the_tier_of_ar4si() -> None:
    tiers = {
        NONE: {-1, 0, 1},
        AFFIRMING: {*range(2, 32), *range(-32, -1)},
        WARNING: {*range(32, 96), *range(-96, -32)},
        CONTRAINDICATED: {*range(96, 128), *range(-128, -96)},
    }
    assert {value: tier_of(value) for value in range(-128, 128)} == {
        value: tier for tier, them in tiers.items() for value in them
    }


def test_a_claim_takes_the_worst_value_and_the_standard_one_of_equals_whatever_the_order() -> None:
    found = [Finding("executables", value, str(value)) for value in (2, 33, -96, 96, -100)]
    for order in permutations(found):
        assert judged(order) == Verdict(CONTRAINDICATED, Vector(executables=96), ("96", "-100", "33", "-96", "2"))


def test_reasons_are_bounded_and_the_worst_stay() -> None:
    found = [Finding("executables", 33, "x" * 999 + str(number)) for number in range(99)]
    found += [
        Finding("file_system", 96, "the bad one" + "." * 999),
        *(Finding("configuration", 36, f"w{number}") for number in range(9)),
    ]
    verdict = judged(found)
    assert len(verdict.reasons) == MAX_REASONS
    assert verdict.reasons[0].startswith("the bad one")
    assert max(map(len, verdict.reasons)) == MAX_REASON_CHARS


@given(st.lists(st.builds(Finding, st.sampled_from(CLAIMS), st.integers(-128, 127), st.just("")), max_size=8))
def test_the_tier_is_that_of_the_vector(found: list[Finding]) -> None:
    verdict = judged(found)
    assert verdict.tier is vector_tier(verdict.vector)


@given(quotes, st.sampled_from([NONE, WARNING, AFFIRMING]))
def test_any_quote_is_appraised_and_a_cap_never_makes_it_better(quote: Quote, most: TrustTier) -> None:
    verdict = appraise(quote, settings(software_tier=most), holds)
    assert verdict.tier <= appraise(quote, settings(), holds).tier
    assert verdict.tier <= vector_tier(verdict.vector)
    assert quote.key_kind is KeyKind.TPM or verdict.tier <= most


@given(*[st.lists(st.builds(Finding, st.sampled_from(CLAIMS), st.integers(-128, 127), st.just("")), max_size=6)] * 2)
def test_two_verdicts_joined_are_as_bad_as_what_both_found(one: list[Finding], other: list[Finding]) -> None:
    joined, both = judged(one).joined(judged(other)), judged([*one, *other])
    assert joined.vector == both.vector
    assert joined.tier is min(judged(one).tier, judged(other).tier)


def test_a_cap_says_why_and_one_that_does_not_bind_is_silent() -> None:
    verdict = Verdict(WARNING, Vector(2), ("first",))
    assert verdict.capped(AFFIRMING, "no") is verdict
    assert verdict.capped(NONE, "why") == Verdict(NONE, Vector(2), ("first", "why"))
