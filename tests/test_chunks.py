"""Pieces and wants as they travel: what does not fit is refused, whatever it is, and nothing that was signed can be changed."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.cbor import encode
from edge_agent.core.cose import Signer, sign1
from edge_agent.core.errors import RefusedError
from ota import chunks
from ota.chunks import (
    AAD,
    MAX_PIECES,
    MAX_WANTS,
    MAX_WANTS_BYTES,
    MAX_WHOLE_BYTES,
    Artefact,
    Want,
    Wants,
    artefact_of,
    decode_chunk,
    encode_chunk,
    open_wants,
    pieces_of,
    set_of,
    sign_wants,
    want_of,
)
from ota.fetching import Fetching
from ota.manifest import CHUNK_BYTES, MAX_FILE_BYTES, ReleasedFile

SIGNER = Signer(b"attic", bytes(range(32)))
DATA = b"".join(sha256(b"%d" % number).digest() for number in range(3 * CHUNK_BYTES // 32)) + b"the end"
PIECES = [DATA[start : start + CHUNK_BYTES] for start in range(0, len(DATA), CHUNK_BYTES)]
MODEL = Artefact(sha256(DATA).digest(), len(DATA), b"".join(sha256(each).digest() for each in PIECES))
OTHER = Artefact(bytes(32), 5 * CHUNK_BYTES, b"".join(sha256(b"%d" % number).digest() for number in range(5)))


def key_of(kid: bytes) -> bytes | None:
    return SIGNER.public_key if kid == SIGNER.kid else None


def signed(payload: object, signer: Signer = SIGNER, aad: bytes = AAD) -> bytes:
    return sign1(encode(payload), signer, aad)


def test_an_artefact_is_a_file_of_a_release_in_pieces() -> None:
    file = ReleasedFile("model.tflite", len(DATA), MODEL.digest, MODEL.chunks)
    assert artefact_of(file) == MODEL
    assert (MODEL.count, MODEL.step_bytes, MODEL.whole) == (4, CHUNK_BYTES, 0b1111)
    assert [MODEL.piece_bytes(index) for index in range(4)] == [len(each) for each in PIECES]
    for index, piece in enumerate(PIECES):
        MODEL.check(index, piece)
        MODEL.check(index, memoryview(piece))


def test_a_small_target_is_one_piece_whose_digest_is_that_of_the_whole() -> None:
    whole = Artefact(sha256(DATA).digest(), len(DATA))
    assert (whole.count, whole.step_bytes, whole.piece_bytes(0)) == (1, len(DATA), len(DATA))
    whole.check(0, DATA)
    with pytest.raises(RefusedError, match="bytes that hash to"):
        whole.check(0, DATA[:-1] + b"!")
    with pytest.raises(RefusedError, match=f"from 1 to {MAX_WHOLE_BYTES} bytes"):
        Artefact(bytes(32), MAX_WHOLE_BYTES + 1)


@pytest.mark.parametrize("size_bytes", [0, -1, MAX_FILE_BYTES + 1])
def test_an_artefact_of_an_impossible_size_is_refused(size_bytes: int) -> None:
    with pytest.raises(RefusedError, match="size of artefact"):
        Artefact(bytes(32), size_bytes, bytes(32))


def test_a_chunk_list_that_does_not_fit_the_size_is_refused() -> None:
    for length in (len(MODEL.chunks) - 32, len(MODEL.chunks) + 32, len(MODEL.chunks) - 1):
        with pytest.raises(RefusedError, match="chunk list of artefact"):
            Artefact(bytes(32), len(DATA), bytes(length))


def test_a_corrupt_chunk_is_refused_at_every_bit_of_a_small_one() -> None:
    end = PIECES[3]
    for bit in range(8 * len(end)):
        bad = (int.from_bytes(end, "big") ^ 1 << bit).to_bytes(len(end), "big")
        with pytest.raises(RefusedError, match="piece 3 of artefact .*bytes that hash to"):
            Fetching(MODEL).heard(3, bad)


def test_a_duplicated_chunk_is_nothing_new_and_is_not_hashed_again() -> None:
    fetching = Fetching(MODEL)
    assert fetching.heard(1, PIECES[1])
    assert not fetching.heard(1, PIECES[1])
    assert not fetching.heard(1, b"whatever comes for a piece that is held")
    assert fetching.lacking == 0b1101


def test_chunks_out_of_order_are_all_taken() -> None:
    fetching = Fetching(MODEL)
    for index in (3, 0, 2, 1):
        assert not fetching.done
        assert fetching.heard(index, PIECES[index])
    assert (fetching.done, fetching.permille, fetching.lacking) == (True, 1000, 0)


def test_a_chunk_at_the_wrong_offset_is_refused() -> None:
    fetching = Fetching(MODEL)
    for index in (0, 2):
        with pytest.raises(RefusedError, match="bytes that hash to"):
            fetching.heard(index, PIECES[1])
    for index in (-1, 4, MAX_PIECES):
        with pytest.raises(RefusedError, match="a whole number from 0 to 3"):
            fetching.heard(index, PIECES[1])
    assert fetching.lacking == MODEL.whole


def test_a_chunk_longer_than_declared_or_shorter_is_refused() -> None:
    for index, data in ((3, PIECES[3] + b"\0"), (0, PIECES[0][:-1]), (0, b""), (0, DATA)):
        with pytest.raises(RefusedError, match=rf"piece {index} of artefact \w+: got {len(data)} bytes"):
            Fetching(MODEL).heard(index, data)


def test_trailing_data_after_a_chunk_is_refused() -> None:
    with pytest.raises(RefusedError, match="trailing"):
        decode_chunk(encode_chunk(0, PIECES[0]) + b"\0")


def test_chunks_of_another_artefact_are_refused_though_they_come_interleaved() -> None:
    data = bytes(2 * CHUNK_BYTES)
    other = Artefact(sha256(data).digest(), len(data), sha256(bytes(CHUNK_BYTES)).digest() * 2)
    mine, theirs = Fetching(MODEL), Fetching(other)
    for index in (0, 1):
        with pytest.raises(RefusedError):
            mine.heard(index, data[:CHUNK_BYTES])
        assert theirs.heard(index, data[:CHUNK_BYTES])
        assert mine.heard(index, PIECES[index])
    assert (mine.lacking, theirs.done) == (0b1100, True)


def test_a_piece_that_could_not_be_kept_is_lacking_again() -> None:
    fetching = Fetching(MODEL, {0, 1, 2})
    assert fetching.heard(3, PIECES[3])
    fetching.lost(3)
    assert fetching.lacking == 0b1000
    assert fetching.heard(3, PIECES[3])


@given(st.binary(max_size=300), st.integers(0, MAX_PIECES - 1))
def test_a_chunk_says_what_was_put_in(data: bytes, index: int) -> None:
    assert decode_chunk(encode_chunk(index, memoryview(data))) == (index, data)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        encode([0]),
        encode([0, b"x", b"y"]),
        encode({0: b"x"}),
        encode(["0", b"x"]),
        encode([0, "x"]),
        encode([True, b"x"]),
        encode([-1, b"x"]),
        encode([MAX_PIECES, b"x"]),
        encode([2**63, b"x"]),
        bytes.fromhex("8218004178"),
        bytes.fromhex("9f004178ff"),
        bytes.fromhex("82005f4178ff"),
    ],
)
def test_what_is_no_chunk_is_refused(payload: bytes) -> None:
    with pytest.raises(RefusedError, match="chunk"):
        decode_chunk(payload)


def test_a_chunk_larger_than_any_artefact_of_one_piece_is_refused_unread() -> None:
    assert decode_chunk(encode_chunk(0, bytes(MAX_WHOLE_BYTES)))[0] == 0
    with pytest.raises(RefusedError, match="chunk length"):
        decode_chunk(encode_chunk(0, bytes(MAX_WHOLE_BYTES + 100)))


@given(st.sets(st.integers(0, 5000)))
def test_a_set_of_pieces_is_its_indices(indices: set[int]) -> None:
    assert pieces_of(set_of(indices, 5001)) == sorted(indices)


WANTS = (want_of(MODEL, 0b1010), want_of(OTHER, 0b10001, stalled=True))


def test_wants_say_what_was_signed() -> None:
    told = open_wants(sign_wants("attic", 7, 3, WANTS, SIGNER), key_of)
    assert told == Wants("attic", 7, 3, WANTS)
    assert told.newness == (7, 3)
    assert [each.fits(MODEL) for each in told.wants] == [True, False]
    assert open_wants(sign_wants("attic", 7, 4, (), SIGNER), key_of).wants == ()


def test_every_single_bit_flip_and_truncation_of_wants_is_refused() -> None:
    message = sign_wants("attic", 7, 3, WANTS, SIGNER)
    for bit in range(8 * len(message)):
        with pytest.raises(RefusedError):
            open_wants((int.from_bytes(message, "big") ^ 1 << bit).to_bytes(len(message), "big"), key_of)
    for length in range(len(message)):
        with pytest.raises(RefusedError):
            open_wants(message[:length], key_of)
    with pytest.raises(RefusedError):
        open_wants(message + b"\0", key_of)


def test_wants_of_another_board_of_a_stranger_or_for_another_purpose_are_refused() -> None:
    with pytest.raises(RefusedError, match="a board's own signature"):
        open_wants(sign_wants("cellar", 7, 3, WANTS, SIGNER), key_of)
    with pytest.raises(RefusedError, match="kid"):
        open_wants(sign_wants("attic", 7, 3, WANTS, Signer(b"stranger", bytes(32))), key_of)
    with pytest.raises(RefusedError, match="signature"):
        open_wants(signed({1: "attic", 2: 7, 3: 3, 4: []}, aad=b"sly/1/record"), key_of)


@pytest.mark.parametrize(
    "entry",
    [
        [bytes(32), len(DATA), CHUNK_BYTES, b"\x00", False],
        [bytes(32), len(DATA), CHUNK_BYTES, b"\x10", False],
        [bytes(32), len(DATA), CHUNK_BYTES, b"\x01\x00", False],
        [bytes(32), len(DATA), CHUNK_BYTES, b"", False],
        [bytes(31), len(DATA), CHUNK_BYTES, b"\x01", False],
        [bytes(32), 0, CHUNK_BYTES, b"\x01", False],
        [bytes(32), len(DATA), 0, b"\x01", False],
        [bytes(32), len(DATA), len(DATA) + 1, b"\x01", False],
        [bytes(32), MAX_FILE_BYTES, 1, b"\x01", False],
        [bytes(32), len(DATA), CHUNK_BYTES, b"\x01", 0],
        [bytes(32), len(DATA), CHUNK_BYTES, b"\x01"],
        [bytes(32), len(DATA), CHUNK_BYTES, 1, False],
        [bytes(32), MAX_FILE_BYTES + 1, CHUNK_BYTES, b"\x01", False],
    ],
)
def test_a_want_that_cannot_be_is_refused_though_its_board_signed_it(entry: list[object]) -> None:
    good = [MODEL.digest, len(DATA), CHUNK_BYTES, b"\x01", False]
    assert open_wants(signed({1: "attic", 2: 1, 3: 1, 4: [good]}), key_of).wants == (want_of(MODEL, 1),)
    with pytest.raises(RefusedError):
        open_wants(signed({1: "attic", 2: 1, 3: 1, 4: [entry]}), key_of)


def test_an_artefact_that_is_wanted_twice_is_refused() -> None:
    good = [MODEL.digest, len(DATA), CHUNK_BYTES, b"\x01", False]
    with pytest.raises(RefusedError, match="each once"):
        open_wants(signed({1: "attic", 2: 1, 3: 1, 4: [good, good]}), key_of)


def test_of_more_wants_than_a_message_holds_the_first_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [Want(number.to_bytes(32), CHUNK_BYTES, CHUNK_BYTES, 1) for number in range(MAX_WANTS + 5)]
    assert open_wants(sign_wants("attic", 1, 1, many, SIGNER), key_of).wants == tuple(many[:MAX_WANTS])
    large = [Want(number.to_bytes(32), MAX_FILE_BYTES, CHUNK_BYTES, 1) for number in range(3)]
    message = sign_wants("attic", 1, 2, large, SIGNER)
    assert open_wants(message, key_of).wants == tuple(large[:2])
    assert len(message) < MAX_WANTS_BYTES
    monkeypatch.setattr(chunks, "MAX_WANTED_BITS", 10 * MAX_PIECES)
    with pytest.raises(RefusedError, match="length"):
        open_wants(sign_wants("attic", 1, 3, [*large, *(large_one(number) for number in range(3, 6))], SIGNER), key_of)


def large_one(number: int) -> Want:
    return Want(number.to_bytes(32), MAX_FILE_BYTES, CHUNK_BYTES, 1)
