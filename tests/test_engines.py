"""The same laws for every TFLite runtime that is installed: in the sandbox a model answers as it does outside, bit by bit."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from board_support.board import Delegate
from board_support.work import model_work
from edge_agent.commands import run as run_command
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.core.values import Tensor, TensorSpec, encoded_image
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.supervisor import EngineSupervisor
from edge_agent.runtime.tflite import WARM_UP_MODEL
from models.catalog import card
from tests.fetched import model_path, picture_path
from tests.fuzz_models import fuzz
from tests.mutants import mutant
from tests.sandboxes import BUDGET_US, INSTALLED, MODEL, each_runtime, filled, load, run, supervised
from tests.tiny_models import Graph, Op, T, tiny_model, write_model

MUTANTS_IN_CI = 520
WHOLE_WAY_MUTANTS = 24
FACES = "blazeface-short"


def interpreter(runtime: str, model: bytes) -> Any:
    made = importlib.import_module(f"{runtime}.interpreter").Interpreter(model_content=model, num_threads=1)
    made.allocate_tensors()
    return made


def bare(runtime: str, model: bytes, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the interpreter answers outside of any sandbox."""
    made = interpreter(runtime, model)
    details = made.get_signature_runner().get_input_details()
    for name, array in inputs.items():
        made.resize_tensor_input(details[name]["index"], array.shape)
    made.allocate_tensors()
    for name, array in inputs.items():
        made.set_tensor(details[name]["index"], array)
    made.invoke()
    return {name: made.get_tensor(each["index"]) for name, each in made.get_signature_runner().get_output_details().items()}


def drawn(spec: TensorSpec, rows: int = 1) -> np.ndarray:
    generator = np.random.default_rng(7)
    shape = tuple(rows if n < 0 else n for n in spec.shape)
    if spec.dtype == "float32":
        return generator.standard_normal(shape).astype(np.float32)
    return generator.integers(-100, 100, shape).astype(spec.dtype)


def tensor(array: np.ndarray) -> Tensor:
    return Tensor(array.dtype.name, array.shape, array.tobytes())


@each_runtime
@pytest.mark.parametrize("kind", ["conv", "float", "int8", "two_inputs", "slow"])
def test_a_model_answers_in_the_sandbox_bit_by_bit_as_outside(runtime: str, kind: str) -> None:
    async def story() -> None:
        settings = EngineSettings(runtime=runtime)
        async with supervised(tiny_model(kind), settings) as (supervisor, loaded, _):
            assert loaded.library.startswith(runtime + " ")
            assert loaded.work == model_work(tiny_model(kind))
            assert loaded.resident_bytes > 2**20
            for rows in (1, 3, 1):
                inputs = {spec.name: drawn(spec, rows) for spec in loaded.signature.inputs}
                expected = bare(runtime, tiny_model(kind), inputs)
                result = await supervisor.invoke(MODEL, {n: tensor(a) for n, a in inputs.items()}, BUDGET_US)
                assert result.outputs == {n: tensor(a) for n, a in expected.items()}
                assert 0 < result.elapsed_us < BUDGET_US

    run(story())


@each_runtime
def test_two_threads_give_the_same_shapes_and_nearly_the_same_numbers(runtime: str) -> None:
    async def scores(threads: int) -> np.ndarray:
        settings = EngineSettings(runtime=runtime, threads=threads)
        async with supervised(tiny_model("slow"), settings) as (supervisor, loaded, _):
            inputs = {spec.name: tensor(drawn(spec)) for spec in loaded.signature.inputs}
            result = await supervisor.invoke(MODEL, inputs, BUDGET_US)
            return np.frombuffer(result.outputs["y"].data, np.float32)

    assert np.allclose(run(scores(1)), run(scores(2)), rtol=1e-3, atol=1e-3)


@each_runtime
def test_a_model_is_mapped_from_the_file_that_was_hashed(runtime: str, tmp_path: Path) -> None:
    async def story() -> None:
        path = tmp_path / "model.tflite"
        path.write_bytes(tiny_model("slow"))
        supervisor = EngineSupervisor(EngineSettings(runtime=runtime))
        with path.open("rb") as file:
            path.unlink()
            (tmp_path / "model.tflite").write_bytes(tiny_model("conv"))
            loaded = await supervisor.load(MODEL, file.fileno(), hashlib.sha256(tiny_model("slow")).digest())
        assert loaded.signature.inputs[0].shape == (1, 96, 96, 32)
        await supervisor.close()

    run(story())


@each_runtime
def test_every_bad_input_is_refused_by_name_and_the_engine_goes_on(runtime: str) -> None:
    async def story() -> None:
        async with supervised(tiny_model("float"), EngineSettings(runtime=runtime)) as (supervisor, loaded, _):
            good = filled(loaded.signature.inputs[0])
            expected = await supervisor.invoke(MODEL, {"image": good}, BUDGET_US)
            bad: list[tuple[dict[str, Tensor], str]] = [
                ({}, "'image': got nothing"),
                ({"picture": good}, "'picture': got an unknown input"),
                ({"image": Tensor("int8", good.shape, bytes(192))}, r"'image': got int8\[1,8,8,3\]; allowed: float32\[1,8,8,3\]"),
                ({"image": Tensor("float32", (1, 8, 8, 1), bytes(256))}, r"'image': got float32\[1,8,8,1\]"),
                ({"image": Tensor("float32", (0, 8, 8, 3), b"")}, r"'image': got float32\[0,8,8,3\]"),
                ({"image": filled(loaded.signature.inputs[0], float("nan"))}, "'image': got NaN or infinity at element 0"),
            ]
            for inputs, said in bad:
                with pytest.raises(RefusedError, match=said):
                    await supervisor.invoke(MODEL, inputs, BUDGET_US)
            assert (await supervisor.invoke(MODEL, {"image": good}, BUDGET_US)).outputs == expected.outputs

    run(story())


@each_runtime
@pytest.mark.parametrize("data", [b"x", b"", bytes(64), b"\x1c\0\0\0TFL3" + b"\xff" * 100])
def test_a_file_that_is_no_model_is_refused(runtime: str, data: bytes) -> None:
    async def story() -> None:
        supervisor = EngineSupervisor(EngineSettings(runtime=runtime))
        with pytest.raises((RefusedError, UnavailableError)):
            await load(supervisor, data)
        await supervisor.close()

    run(story())


def test_a_runtime_that_is_not_installed_is_named() -> None:
    missing = {"ai_edge_litert", "tflite_runtime"} - set(INSTALLED)
    if not missing:
        pytest.skip("both runtimes are installed")

    async def story() -> None:
        supervisor = EngineSupervisor(EngineSettings(runtime=missing.pop()))
        with pytest.raises(UnavailableError, match="No module named"):
            await load(supervisor, tiny_model())

    run(story())


@each_runtime
def test_a_delegate_that_is_not_there_is_named(runtime: str) -> None:
    async def story() -> None:
        supervisor = EngineSupervisor(EngineSettings(runtime=runtime), Delegate("libnothing.so.1"))
        with pytest.raises(UnavailableError, match=r"libnothing\.so\.1"):
            await load(supervisor, tiny_model())

    run(story())


def test_the_warm_up_model_is_the_one_its_comment_names() -> None:
    tensors = (T("x", "float32", (1,)), T("y", "float32", (1,)))
    assert write_model(Graph(tensors, (Op("RELU", (0,), (1,)),), (0,), (1,))) == WARM_UP_MODEL


@each_runtime
def test_41_a_crafted_tflite_at_load_allocate_or_invoke_never_reaches_the_agent(runtime: str) -> None:
    outcomes: Counter[str] = Counter()

    def count(outcome: str) -> None:
        outcomes[outcome] += 1

    asyncio.run(fuzz(MUTANTS_IN_CI, runtime, count=count))
    assert outcomes.total() == MUTANTS_IN_CI
    assert sum(number for outcome, number in outcomes.items() if "ran" in outcome) > MUTANTS_IN_CI // 10, outcomes
    assert outcomes["refused"] > MUTANTS_IN_CI // 20, outcomes


@each_runtime
def test_41_a_crafted_tflite_on_the_whole_way_is_loaded_refused_or_a_dead_child(runtime: str) -> None:
    async def one(supervisor: EngineSupervisor, seed: int, places: asyncio.Semaphore) -> str:
        name = f"m{seed}"
        async with places:
            try:
                loaded = await load(supervisor, mutant(tiny_model("float"), seed), name=name)
                inputs = {spec.name: filled(spec) for spec in loaded.signature.inputs}
                await supervisor.invoke(name, inputs, BUDGET_US)
            except (RefusedError, UnavailableError) as error:
                return type(error).__name__
            finally:
                if name in supervisor._engines:
                    await supervisor.unload(name)
        return "answered"

    async def story() -> Counter[str]:
        supervisor = EngineSupervisor(EngineSettings(runtime=runtime, memory_bytes=2**30))
        places = asyncio.Semaphore(2)
        outcomes = await asyncio.gather(*(one(supervisor, seed, places) for seed in range(WHOLE_WAY_MUTANTS)))
        await supervisor.close()
        return Counter(outcomes)

    outcomes = run(story())
    assert outcomes["answered"] and outcomes["RefusedError"], outcomes
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@each_runtime
def test_a_picture_becomes_boxes_inside_the_sandbox(runtime: str) -> None:
    """The decoder, the model and the reading of its boxes all run in the child; the agent only ever sees bytes."""
    faces = card(FACES)
    model, picture = model_path(FACES).read_bytes(), picture_path("grace_hopper").read_bytes()

    async def story() -> None:
        async with supervised(model, EngineSettings(runtime=runtime), faces) as (supervisor, loaded, reports):
            result = await supervisor.invoke(MODEL, {"image": encoded_image(picture)}, BUDGET_US)
            assert result.outputs["boxes"].dtype == "float32" and result.outputs["boxes"].shape == (1, 4)
            left, top, right, bottom = np.frombuffer(result.outputs["boxes"].data, np.float32)
            assert 100 < left < right < 450 and 50 < top < bottom < 400

            for bad in (picture[: len(picture) // 2], b"no picture", b"", b"\x89PNG\r\n\x1a\n" + bytes(100)):
                with pytest.raises(RefusedError, match="picture"):
                    await supervisor.invoke(MODEL, {"image": encoded_image(bad)}, BUDGET_US)
            raw = {spec.name: filled(spec) for spec in loaded.signature.inputs}
            assert set((await supervisor.invoke(MODEL, raw, BUDGET_US)).outputs) == {s.name for s in loaded.signature.outputs}
            assert await supervisor.invoke(MODEL, {"image": encoded_image(picture)}, BUDGET_US)
            assert reports == []

    run(story())


def shell(*arguments: str) -> int:
    """``sly run`` with these arguments, up to the errors that ``sly`` turns into one line."""
    parser = argparse.ArgumentParser()
    run_command.add(parser.add_subparsers())
    chosen = parser.parse_args(["run", *arguments])
    code: int = chosen.run(chosen)
    return code


@each_runtime
def test_sly_run_prints_and_writes_what_the_bare_interpreter_gives(
    runtime: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, array = tmp_path / "net.tflite", drawn(TensorSpec("image", "float32", (1, 8, 8, 3)))
    model.write_bytes(tiny_model("float"))
    np.save(tmp_path / "x.npy", array)
    expected = bare(runtime, tiny_model("float"), {"image": array})["scores"]
    folder = tmp_path / "out"
    options = ["--runtime", runtime, "--output", str(folder)]
    assert shell(str(model), "--input", f"image={tmp_path / 'x.npy'}", "--json", *options) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["outputs"][0]["shape"] == [1, 10] and answer["outputs"][0]["max"] == pytest.approx(expected.max())
    assert (np.load(folder / "scores.npy") == expected).all()
    assert shell(str(model), "--input", str(tmp_path / "x.npy"), "--runtime", runtime) == 0
    assert "scores" in capsys.readouterr().out


def test_sly_run_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    model = tmp_path / "net.tflite"
    model.write_bytes(tiny_model("float"))
    np.save(tmp_path / "objects.npy", np.array([{}]))
    np.save(tmp_path / "wrong.npy", np.zeros((1, 8, 8, 3)))
    (tmp_path / "text.npy").write_text("x")
    (tmp_path / "picture.png").write_bytes(b"x")
    for arguments, said in (
        ([str(model)], r"'image': got nothing"),
        ([str(model), "--input", str(tmp_path / "objects.npy")], "objects.npy"),
        ([str(model), "--input", str(tmp_path / "text.npy")], "text.npy"),
        ([str(model), "--input", str(tmp_path / "missing.npy")], "No such file"),
        ([str(model), "--input", str(tmp_path / "wrong.npy")], r"float64\[1,8,8,3\]; allowed: float32"),
        ([str(model), "--input", str(tmp_path / "picture.png")], "a model without a card"),
        ([str(model), "--input", "a=x.npy", "--input", "a=y.npy"], "once for each"),
        ([str(tmp_path / "missing.tflite")], "No such file"),
        (["missing"], "see: sly models list"),
        ([str(model), "--threads", "0"], "threads"),
    ):
        with pytest.raises(SlyError, match=said):
            shell(*arguments)


@each_runtime
def test_sly_run_finds_the_face_and_draws_it(runtime: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_path(FACES)
    arguments = [FACES, "--input", str(picture_path("grace_hopper")), "--runtime", runtime, "--output", str(tmp_path)]
    assert shell(*arguments) == 0
    assert "face" in capsys.readouterr().out
    assert (tmp_path / "annotated.png").read_bytes().startswith(b"\x89PNG")
