"""Releases: a manifest says everything about its files, has one encoding, and passes for no other; what is built runs here."""

from __future__ import annotations

import struct
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from edge_agent.attest.measure import library_files
from edge_agent.core.cbor import decode, encode
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from models.card import Card, OwnSource
from models.catalog import card, catalog
from models.language_card import CARD_SUFFIX, FileEntry, LanguageCard, language_catalog
from models.released import card_of
from ota.manifest import (
    AGENT,
    CHUNK_BYTES,
    MAX_RELEASE_BYTES,
    Kind,
    Release,
    ReleasedFile,
    decode_release,
    encode_release,
    manifest_path,
)
from ota.release import build_release, release_of_model
from tests.fetched import model_path


def released(name: str, data: bytes) -> ReleasedFile:
    pieces = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    return ReleasedFile(name, len(data), sha256(data).digest(), b"".join(sha256(each).digest() for each in pieces))


RELEASE = Release(
    "faces", 3, Kind.PERCEPTION, (released("faces.tflite", b"weights" * 20_000), released("more.bin", b"x")), 'name = "faces"\n',
    ("jetson", "coral"), "0.1.0",
)  # fmt: skip


def test_a_manifest_is_read_back_as_it_was_written() -> None:
    for release in (RELEASE, Release(AGENT, 1, Kind.AGENT, (released("agent.whl", b"x"),))):
        assert decode_release(encode_release(release), manifest_path(release.model, release.number)) == release


def test_every_byte_of_a_manifest_counts() -> None:
    data = encode_release(RELEASE)
    for end in range(len(data)):
        with pytest.raises(RefusedError):
            decode_release(data[:end])
    with pytest.raises(RefusedError, match="trailing"):
        decode_release(data + b"\0")
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with suppress(RefusedError):
            assert decode_release(bytes(flipped)) != RELEASE


@pytest.mark.parametrize("path", [manifest_path("faces", 2), manifest_path("hands", 3), "releases/faces/03/release.cbor"])
def test_a_manifest_under_the_name_of_another_release_is_refused(path: str) -> None:
    with pytest.raises(RefusedError, match="release 3 of faces"):
        decode_release(encode_release(RELEASE), path)


def changed(edit: Callable[[Any], None]) -> bytes:
    entries = decode(encode_release(RELEASE))
    edit(entries)
    return encode(entries)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda r: r.update({9: "critical"}), "unknown key"),
        (lambda r: r[4][0].update({9: "critical"}), "unknown key"),
        (lambda r: r.pop(7), "is missing"),
        (lambda r: r.update({2: 0}), "release number"),
        (lambda r: r.update({2: True}), "type bool"),
        (lambda r: r.update({3: "firmware"}), "manifest kind"),
        (lambda r: r.update({3: "agent"}), "agent for sly-agent and nothing else"),
        (lambda r: r.update({1: AGENT}), "agent for sly-agent and nothing else"),
        (lambda r: r.update({1: "../faces"}), "released model"),
        (lambda r: r.update({4: []}), "files of faces, count"),
        (lambda r: r[4].append(r[4][0]), "every name once"),
        (lambda r: r[4][0].update({1: "../faces.tflite"}), "released file"),
        (lambda r: r[4][0].update({1: ".hidden"}), "released file"),
        (lambda r: r[4][0].update({2: r[4][0][2] + CHUNK_BYTES}), "chunk list"),
        (lambda r: r[4][0].update({4: r[4][0][4][:-32]}), "chunk list"),
        (lambda r: r[4][0].update({3: b"short"}), "digest of"),
        (lambda r: r.update({6: ["Jetson"]}), "board class"),
        (lambda r: r.update({7: "latest"}), "minimum agent"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused_by_name(edit: Callable[[Any], None], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        decode_release(changed(edit))


def test_a_manifest_that_no_message_holds_is_refused_before_it_is_signed() -> None:
    whole = 4 * 2**30
    files = tuple(ReleasedFile(f"part{n}.bin", whole, bytes(32), bytes(whole // CHUNK_BYTES * 32)) for n in range(2))
    with pytest.raises(RefusedError, match=f"at most {MAX_RELEASE_BYTES} bytes"):
        encode_release(replace(RELEASE, files=files))


def test_the_manifest_of_a_136_mb_model_is_a_twentieth_of_a_percent_of_it() -> None:
    size_bytes = 136_000_000
    file = ReleasedFile("stages.tflite", size_bytes, bytes(32), bytes(-(-size_bytes // CHUNK_BYTES) * 32))
    release = Release("smollm2", 2, Kind.LANGUAGE, (file,), "x" * 2_000)
    assert len(encode_release(release)) < size_bytes // 1_900


# ---- cards of one's own


@pytest.mark.parametrize("name", list(catalog()))
def test_a_card_is_read_back_from_its_toml(name: str) -> None:
    own = replace(
        card(name), source=OwnSource("ab" * 32, 2**31, 'a licence of its own "quoted"'), golden={"a lib 2.3 x": "cd" * 32}
    )
    for each in (card(name), own):
        assert Card.from_mapping(tomllib.loads(each.to_toml())) == each


def test_a_model_of_ones_own_is_fetched_from_nowhere() -> None:
    own = replace(card("blazeface-short"), source=OwnSource("ab" * 32, 10, "mine"))
    assert own.filename == "blazeface-short.tflite"
    with pytest.raises(RefusedError, match="sly ota push"):
        own.wheel_source()
    for source in ({"sha256": "ab" * 32, "size_bytes": 10, "licence": "mine"}, {**own.to_mapping()["source"], "path": "x"}):  # type: ignore[dict-item]
        with pytest.raises(RefusedError, match="missing or unknown keys"):
            Card.from_mapping(own.to_mapping() | {"source": source})


# ---- building


def perception_card(release: Release) -> Card:
    read = card_of(False, release.card)
    assert isinstance(read, Card)
    return read


def revised(tmp_path: Path, model: str, edit: Callable[[bytearray], None]) -> Path:
    data = bytearray(model_path(model).read_bytes())
    edit(data)
    path = tmp_path / f"{model}.tflite"
    path.write_bytes(data)
    return path


def one_weight(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def test_a_fetched_model_is_built_with_the_card_of_the_catalog_and_its_golden_answer() -> None:
    path, told = model_path("mobilenet-vww"), list[tuple[int, int]]()
    built = release_of_model("mobilenet-vww", 1, folder=path.parent, progress=lambda done, whole: told.append((done, whole)))
    (file,) = built.release.files
    data = path.read_bytes()
    assert file == released("mobilenet-vww.tflite", data)
    assert built.files == {"mobilenet-vww.tflite": path}
    assert told[-1] == (len(data), len(data))
    read, library = perception_card(built.release), library_files().name
    assert replace(read, golden={}) == replace(card("mobilenet-vww"), golden={})
    assert library in read.golden
    assert read.golden.items() >= card("mobilenet-vww").golden.items(), "this machine answers otherwise than the catalog says"


def test_a_revision_of_a_catalog_model_gets_a_card_of_its_own(tmp_path: Path) -> None:
    path = revised(tmp_path, "mobilenet-vww", one_weight)
    built = release_of_model(str(path), 2, classes=("jetson",), min_agent="0.2.0")
    read, known = perception_card(built.release), card("mobilenet-vww")
    source = known.source
    assert read.source == OwnSource(sha256(path.read_bytes()).hexdigest(), source.size_bytes, source.licence, source.url)
    assert (read.version, read.interpret, read.labels) == (known.version + 1, known.interpret, known.labels)
    assert list(read.golden) == [library_files().name], "the golden answers of the file before are none of this one's"
    assert (built.release.classes, built.release.min_agent) == (("jetson",), "0.2.0")

    again = release_of_model(str(path), 3, before=built.release.card)
    assert perception_card(again.release) == read
    path.write_bytes(model_path("mobilenet-vww").read_bytes()[:-1] + b"!")
    assert perception_card(release_of_model(str(path), 4, before=built.release.card, golden=False).release).version == 3


def test_a_model_of_ones_own_comes_with_its_card(tmp_path: Path) -> None:
    path = model_path("resnet8-cifar10")
    with pytest.raises(RefusedError, match="--card"):
        release_of_model(str(path), 1, name="things")
    text = card("resnet8-cifar10").to_toml().replace('name = "resnet8-cifar10"', 'name = "anything"', 1)
    (tmp_path / "things.toml").write_text(text)
    built = release_of_model(str(path), 1, name="things", card_path=tmp_path / "things.toml")
    assert (built.release.model, built.release.files[0].name) == ("things", "things.tflite")


def test_a_float_model_gets_no_golden_answer_for_cpus_differ() -> None:
    built = release_of_model("blazeface-short", 1, folder=model_path("blazeface-short").parent)
    assert not perception_card(built.release).golden
    assert "floats" in built.notes[0]


def nan_weights(data: bytearray) -> None:
    middle = len(data) // 2 & ~3
    data[middle : middle + 4000] = struct.pack("<f", float("nan")) * 1000


def test_what_does_not_run_here_is_pushed_to_nobody(tmp_path: Path) -> None:
    nan = revised(tmp_path, "blazeface-short", nan_weights)
    with pytest.raises(RefusedError, match="blazeface-short"):
        release_of_model(str(nan), 1)
    assert release_of_model(str(nan), 1, golden=False).release.number == 1
    torn = revised(tmp_path, "blazeface-short", lambda data: data.__delitem__(slice(5000, None)))
    with pytest.raises(SlyError):
        release_of_model(str(torn), 1)
    with pytest.raises(RefusedError, match="inputs of mobilenet-vww"):
        release_of_model(str(model_path("blazeface-short")), 1, name="mobilenet-vww")


def test_a_catalog_model_whose_file_is_another_is_refused_by_name(tmp_path: Path) -> None:
    revised(tmp_path, "blazeface-short", one_weight)
    with pytest.raises(RefusedError, match="just the files that its card names"):
        release_of_model("blazeface-short", 1, folder=tmp_path, golden=False)
    with pytest.raises(UnavailableError, match="blazeface-back"):
        release_of_model("blazeface-back", 1, folder=tmp_path)
    with pytest.raises(RefusedError, match="or a language model that was built"):
        release_of_model("blazeface", 1, folder=tmp_path)


@pytest.fixture
def language(tmp_path: Path) -> LanguageCard:
    """A built language model whose files hold next to nothing."""

    def entry(known: FileEntry) -> FileEntry:
        data = known.filename.encode() * 20_000
        (tmp_path / known.filename).write_bytes(data)
        return FileEntry(known.filename, sha256(data).hexdigest(), len(data))

    known = language_catalog()["smollm2"]
    files = {runtime: entry(each) for runtime, each in known.files.items()}
    built = replace(known, files=files, tokenizer=entry(known.tokenizer))
    (tmp_path / f"smollm2{CARD_SUFFIX}").write_text(built.to_toml())
    return built


def test_a_language_model_is_released_with_every_file_that_its_card_names(tmp_path: Path, language: LanguageCard) -> None:
    told = list[tuple[int, int]]()
    for name in ("smollm2", str(tmp_path / f"smollm2{CARD_SUFFIX}")):
        told.clear()
        release = release_of_model(name, 5, folder=tmp_path, progress=lambda done, whole: told.append((done, whole))).release
        assert (release.model, release.number, release.kind) == ("smollm2", 5, Kind.LANGUAGE)
        assert card_of(True, release.card) == language
        assert {each.name: each.digest.hex() for each in release.files} == {e.filename: e.sha256 for e in language.entries()}
        assert told[-1] == (release.size_bytes, release.size_bytes)
        assert told == sorted(told)
    (tmp_path / language.tokenizer.filename).write_bytes(b"another")
    with pytest.raises(RefusedError, match=r"another smollm2\.tokenizer"):
        release_of_model("smollm2", 5, folder=tmp_path)


def test_a_card_of_another_model_and_a_file_too_many_are_refused(tmp_path: Path, language: LanguageCard) -> None:
    files = {each.filename: tmp_path / each.filename for each in language.entries()}
    with pytest.raises(RefusedError, match="that of smollm2"):
        build_release("smollm", 1, language.to_toml(), files, Kind.LANGUAGE)
    with pytest.raises(RefusedError, match=r"another more\.bin"):
        build_release("smollm2", 1, language.to_toml(), {**files, "more.bin": tmp_path / "smollm2.tokenizer"}, Kind.LANGUAGE)
    with pytest.raises(RefusedError, match="card"):
        build_release("smollm2", 1, "not TOML", files, Kind.LANGUAGE)
