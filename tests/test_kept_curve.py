"""A model's cost curve outlives the agent, and is never a reason not to start."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.language.kept_curve import MAX_CURVE_BYTES, KeptCurve
from tests.speaking import answer, run, says, serving

CURVE = ((1, 4000), (8, 7000), (64, 24_000))


def kept(path: Path, key: bytes = b"model", log: list[str] | None = None) -> KeptCurve:
    return KeptCurve(path, key, (lambda line: None) if log is None else log.append)


def test_a_curve_is_there_again_for_the_same_model_and_threads_only(tmp_path: Path) -> None:
    path = tmp_path / "curves" / "smollm2"
    assert kept(path).curve == ()
    kept(path).keep(CURVE)
    assert kept(path).curve == CURVE
    assert kept(path, b"another").curve == ()


@given(st.integers(0, 200), st.integers(0, 255), st.booleans())
def test_a_damaged_file_is_no_curve(tmp_path_factory: pytest.TempPathFactory, at: int, value: int, cut: bool) -> None:
    path = tmp_path_factory.mktemp("curves") / "smollm2"
    kept(path).keep(CURVE)
    data = bytearray(path.read_bytes())
    at %= len(data)
    damaged = data[:at] if cut else data[:at] + bytes((value,)) + data[at + 1 :]
    path.write_bytes(damaged)
    found = kept(path).curve
    assert found in ((), CURVE) or len(found) == len(CURVE), "at worst another number, which is learned anew"
    path.write_bytes(bytes(MAX_CURVE_BYTES + 1))
    assert kept(path).curve == ()


def test_a_folder_that_cannot_be_written_is_told_and_not_missed(tmp_path: Path) -> None:
    (tmp_path / "curves").write_text("a file")
    log: list[str] = []
    one = kept(tmp_path / "curves" / "smollm2", log=log)
    one.keep(CURVE)
    assert one.curve == CURVE and len(log) == 1 and "is not kept" in log[0]


def test_a_service_measures_once_and_its_next_start_does_not(tmp_path: Path) -> None:
    curves = []

    async def work() -> None:
        for _ in range(2):
            async with serving(tmp_path) as service:
                assert (await answer(service, says("hi"))).completion_tokens
                assert service.pump.child is not None
                curves.append(service.pump.child.account.curve)

    run(work())
    assert curves[0] == curves[1] and len(list((tmp_path / "curves").iterdir())) == 1
