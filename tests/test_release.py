"""Releases: a manifest says everything about its files, has one encoding, and passes for no other release."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest

from edge_agent.core.cbor import decode, encode
from edge_agent.core.errors import RefusedError
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
