"""A release on trial is believed by what it does: one crash, hang, NaN or wrong answer condemns it, silence never clears it."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.attest.golden import golden_inputs
from edge_agent.core.digests import tensors_digest
from edge_agent.core.errors import RefusedError, SlyError
from edge_agent.core.values import InferenceResult, Status, Tensor, failure
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.supervisor import EngineState, EngineSupervisor
from edge_agent.store.blobs import BlobStore
from ota.health import Health, Trial, tells_of_model, why_unclean
from ota.slots import MAX_WHY_CHARS
from tests.odd_engines import ROGUE
from tests.sandboxes import BUDGET_US, MODEL, child_pid, load, run, supervised, words
from tests.tiny_models import Graph, Op, T, options_table, tiny_model, write_model

ID, RIGHT, WRONG = "0" * 32, b"r" * 32, b"w" * 32
FORMS = {"float16": "e", "float32": "f", "float64": "d"}


def result_of(*numbers: float, dtype: str = "float32") -> InferenceResult:
    data = struct.pack(f"<{len(numbers)}{FORMS[dtype]}", *numbers)
    return InferenceResult(ID, Status.OK, "board", outputs={"scores": Tensor(dtype, (1, len(numbers)), data)})


def test_the_golden_answer_and_then_so_many_clean_inferences_make_it_sound() -> None:
    trial = Trial(3, frozenset({RIGHT})).heard_golden(RIGHT)
    for _ in range(3):
        assert trial.verdict is Health.OPEN
        trial = trial.ran()
    assert trial.verdict is Health.SOUND


def test_inferences_before_the_golden_answer_do_not_clear_it_but_may_condemn_it() -> None:
    early = Trial(1).ran().ran().ran()
    assert early.heard_golden(RIGHT).verdict is Health.OPEN
    assert early.ran("NaN").verdict is Health.BAD


def test_a_golden_answer_alone_is_not_enough_and_a_later_one_stands_for_an_inference() -> None:
    trial = Trial(2, frozenset({RIGHT})).heard_golden(RIGHT)
    assert trial.verdict is Health.OPEN
    assert trial.heard_golden(RIGHT).verdict is Health.OPEN
    assert trial.heard_golden(RIGHT).heard_golden(RIGHT).verdict is Health.SOUND
    assert trial.heard_golden(RIGHT).heard_golden(WRONG).verdict is Health.BAD


@pytest.mark.parametrize(
    ("digest", "why", "said"),
    [
        (WRONG, "", "wrong answer to the golden input: 7777777777777777…, right is 7272727272727272…"),
        (b"", "", "no answer to the golden input"),
        (b"short", "", "an answer to the golden input of 5 bytes, not 32"),
        (b"", "engine died: SIGSEGV", "engine died: SIGSEGV"),
        (RIGHT, "no answer within 10 s", "no answer within 10 s"),
    ],
)
def test_a_wrong_golden_answer_a_crash_and_a_hang_condemn_it(digest: bytes, why: str, said: str) -> None:
    trial = Trial(1, frozenset({RIGHT})).heard_golden(digest, why)
    assert (trial.verdict, trial.why) == (Health.BAD, said)


def test_without_an_expected_answer_any_clean_one_will_do() -> None:
    assert Trial(1).heard_golden(WRONG).ran().verdict is Health.SOUND


def test_a_model_without_a_golden_input_is_judged_by_its_inferences_alone() -> None:
    trial = Trial(2).heard_golden(b"").heard_golden(b"").ran()
    assert trial.verdict is Health.OPEN
    assert trial.ran().verdict is Health.SOUND


def test_case_22_health_check_regresses_later_within_the_trial() -> None:
    trial = Trial(5, frozenset({RIGHT})).heard_golden(RIGHT)
    for _ in range(4):
        trial = trial.ran(why_unclean(result_of(0.5)))
    trial = trial.ran(why_unclean(result_of(0.5, math.nan)))
    assert (trial.verdict, trial.clean) == (Health.BAD, 4)
    assert "element 1 of float32[1,2] is NaN or infinite" in trial.why


@given(st.lists(st.sampled_from(["golden", "wrong", "crash", "clean", "NaN"])), st.integers(1, 4))
def test_a_verdict_that_was_reached_stands_and_one_bad_sign_is_enough(events: list[str], needed: int) -> None:
    trial, verdicts = Trial(needed, frozenset({RIGHT})), [Health.OPEN]
    steps = {
        "golden": lambda t: t.heard_golden(RIGHT),
        "wrong": lambda t: t.heard_golden(WRONG),
        "crash": lambda t: t.heard_golden(b"", "crash"),
        "clean": lambda t: t.ran(),
        "NaN": lambda t: t.ran("NaN"),
    }
    for event in events:
        trial = steps[event](trial)
        verdicts.append(trial.verdict)
        decided = [each for each in verdicts if each is not Health.OPEN]
        assert len(set(decided)) <= 1 and decided == verdicts[len(verdicts) - len(decided) :]
    first_bad = next((n for n, event in enumerate(events) if event in ("wrong", "crash", "NaN")), len(events))
    if trial.verdict is Health.SOUND:
        before = events[:first_bad]
        assert "golden" in before and len(before[before.index("golden") + 1 :]) >= needed
    elif first_bad < len(events):
        assert trial.verdict is Health.BAD


def test_a_reason_is_cut_to_what_a_record_holds() -> None:
    assert len(Trial(1).ran("x" * 5000).why) == MAX_WHY_CHARS


@pytest.mark.parametrize("needed", [0, 10_001])
def test_a_trial_of_no_inferences_is_refused(needed: int) -> None:
    with pytest.raises(RefusedError, match="clean inferences needed"):
        Trial(needed)
    with pytest.raises(RefusedError, match="expected golden digest, length"):
        Trial(1, frozenset({b"short"}))


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("number", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_nan_and_infinity_are_found_wherever_they_stand(dtype: str, number: float, at: int) -> None:
    numbers = [0.0, 1.0, -1.0, 65504.0, -65504.0, 6e-8, -0.0]
    assert why_unclean(result_of(*numbers, dtype=dtype)) == ""
    numbers[at] = number
    assert f"output scores: element {at} of {dtype}[1,7] is NaN or infinite" in why_unclean(result_of(*numbers, dtype=dtype))


@given(st.sampled_from(sorted(FORMS)), st.binary(min_size=8, max_size=64))
def test_any_bytes_are_judged_as_the_processor_judges_them(dtype: str, data: bytes) -> None:
    size_bytes = struct.calcsize(FORMS[dtype])
    data = data[: len(data) // size_bytes * size_bytes]
    numbers = struct.unpack(f"<{len(data) // size_bytes}{FORMS[dtype]}", data)
    tensor = Tensor(dtype, (1, len(numbers)), memoryview(data))
    result = InferenceResult(ID, Status.OK, "board", outputs={"y": tensor})
    assert bool(why_unclean(result)) == (not all(map(math.isfinite, numbers)))


def results() -> Iterator[tuple[InferenceResult, str, bool]]:
    nothing = Tensor("float32", (0, 4), b"")
    yield InferenceResult(ID, Status.OK, "b", outputs={"boxes": nothing}), "", True
    yield InferenceResult(ID, Status.OK, "b", outputs={"n": Tensor("int8", (2,), b"\x7f\xff")}), "", True
    yield InferenceResult(ID, Status.OK, "b"), "an answer without outputs", True
    empty = Tensor("float32", (1, 0), b"")
    yield InferenceResult(ID, Status.OK, "b", outputs={"y": empty}), "output y: float32[1,0] is empty", True
    yield failure(ID, Status.FAILED, "b", "the engine died"), "failed: the engine died", True
    yield failure(ID, Status.REFUSED, "b", "no picture"), "refused: no picture", False
    yield failure(ID, Status.SHED, "b", "too late"), "shed: too late", False


@pytest.mark.parametrize(("result", "why", "tells"), list(results()))
def test_what_is_no_answer_is_unclean_and_what_never_ran_says_nothing_of_the_model(
    result: InferenceResult, why: str, tells: bool
) -> None:
    assert (why_unclean(result), tells_of_model(result)) == (why, tells)


def dividing() -> bytes:
    """``y = x / x`` of float32 [1, 2]: 1 for its golden input, NaN for a request that has a 0 in it."""
    tensors = (T("x", "float32", (1, 2)), T("y", "float32", (1, 2)))
    return write_model(Graph(tensors, (Op("DIV", (0, 0), (1,), options_table("DivOptions")),), (0,), (1,)))


def not_a_number() -> bytes:
    """``y = x + NaN``."""
    nan = T("nan", "float32", (1, 2), struct.pack("<2f", math.nan, math.nan))
    tensors = (T("x", "float32", (1, 2)), nan, T("y", "float32", (1, 2)))
    return write_model(Graph(tensors, (Op("ADD", (0, 1), (2,), options_table("AddOptions")),), (0,), (2,)))


async def answer(supervisor: EngineSupervisor, inputs: Mapping[str, Tensor]) -> tuple[InferenceResult, bytes]:
    """What a real engine in its sandbox makes of ``inputs``, as a result, and the SHA-256 of its outputs."""
    try:
        outputs = (await supervisor.invoke(MODEL, inputs, BUDGET_US)).outputs
    except SlyError as error:
        return failure(ID, Status.FAILED, "board", str(error)), b""
    return InferenceResult(ID, Status.OK, "board", outputs=outputs), tensors_digest(outputs)


def trial_of(model: bytes, settings: EngineSettings, *later: Mapping[str, Tensor], golden: Tensor | None = None) -> Trial:
    """A trial with a real engine: the golden input (``golden`` in its place), then ``later`` requests."""

    async def story() -> Trial:
        async with supervised(model, settings) as (supervisor, loaded, _):
            asked = {"order": golden} if golden else golden_inputs(loaded.signature.inputs)
            result, digest = await answer(supervisor, asked)
            trial = Trial(2).heard_golden(digest, why_unclean(result))
            for inputs in later:
                result, _digest = await answer(supervisor, inputs)
                trial = trial.ran(why_unclean(result))
            return trial

    return run(story())


def pair(*numbers: float) -> dict[str, Tensor]:
    return {"x": Tensor("float32", (1, 2), struct.pack("<2f", *numbers))}


def test_case_22_health_check_hangs() -> None:
    trial = trial_of(tiny_model("endless"), EngineSettings(invoke_limit_us=150_000, max_deaths=2))
    assert trial.verdict is Health.BAD and "hung" in trial.why


@pytest.mark.parametrize("order", ["segfault", "exit"])
def test_case_22_health_check_crashes(order: str) -> None:
    trial = trial_of(tiny_model(), EngineSettings(engine=ROGUE), golden=words(order))
    assert trial.verdict is Health.BAD and trial.why.startswith("failed: ")


def test_case_22_health_check_returns_nan() -> None:
    trial = trial_of(not_a_number(), EngineSettings())
    assert (trial.verdict, trial.why) == (Health.BAD, "output y: element 0 of float32[1,2] is NaN or infinite")


def test_case_22_health_check_regresses_later_on_a_real_request() -> None:
    assert trial_of(dividing(), EngineSettings(), pair(3, 4), pair(5, 6)).verdict is Health.SOUND
    trial = trial_of(dividing(), EngineSettings(), pair(3, 4), pair(5, 0))
    assert (trial.verdict, trial.clean) == (Health.BAD, 1)


@pytest.mark.parametrize("left_bytes", [0, 100, 4096])
def test_case_21_file_truncated_while_mapped_ends_no_agent_and_is_refused_at_the_next_load(
    tmp_path: Path, left_bytes: int
) -> None:
    """Whatever the engine does (SIGBUS ends its child, or it has read all of it before): right answers or failed requests."""
    model, store = tiny_model("float"), BlobStore(tmp_path, 10**7)
    digest = hashlib.sha256(model).digest()
    store.add([model], digest)

    async def story() -> None:
        supervisor = EngineSupervisor(EngineSettings())
        try:
            fd = store.open_verified(digest)
            try:
                loaded = await supervisor.load(MODEL, fd, digest)
            finally:
                os.close(fd)
            inputs = golden_inputs(loaded.signature.inputs)
            right = (await answer(supervisor, inputs))[1]
            os.truncate(store.path_of(digest), left_bytes)
            assert {(await answer(supervisor, inputs))[1] for _ in range(5)} <= {right, b""}
            os.kill(child_pid(supervisor), 9)
            assert {(await answer(supervisor, inputs))[1] for _ in range(2)} <= {right, b""}, "a truncated model was loaded"
            await load(supervisor, tiny_model(), "other")
            assert supervisor.state("other") is EngineState.READY
        finally:
            await supervisor.close()

    run(story())
    with pytest.raises(RefusedError, match="set aside; fetch the model again"):
        store.open_verified(digest)
