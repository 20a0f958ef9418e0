"""Endorsements: what hardware says of a quote, and everything that it does not prove.

A TPM is played here by a key in this process, which can say what no TPM says; ``test_tpm.py`` has the real programs.
"""

from __future__ import annotations

import base64
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from typing import Any

import pytest

from board_support.board import BoardSettings
from board_support.device_root import REGISTERS, DeviceRoot, open_statement
from board_support.jalapeno import Jalapeno
from edge_agent.attest.evidence import (
    MAX_ENDORSEMENT_BYTES,
    MAX_MODELS,
    MAX_QUOTE_BYTES,
    KeyKind,
    Measurements,
    ModelMeasurement,
    Quote,
    endorsed_digest,
    sign_quote,
)
from edge_agent.attest.keys import (
    CANNOT_CHECK,
    MAX_LOG,
    MAX_WHY_CHARS,
    Endorsement,
    check_endorsement,
    decode_endorsement,
    encode_endorsement,
    kind_of_key,
    why_not_checked,
)
from edge_agent.attest.tpm import open_attest, open_public, open_signature, pcr_digest, replay
from edge_agent.core.cbor import encode
from edge_agent.core.errors import RefusedError
from tests.attested import MEASURED, a_quote, digest, signer
from tests.needs import needs_module
from tests.swtpm import attest_bytes, public_bytes
from tests.test_protocol import is_a

LOG = tuple(model.mapped for model in MEASURED.models)
SEED = digest("a device root's seed")


class PlayedTpm:
    """A P-256 key that signs whatever it is given, as no TPM does."""

    kind = KeyKind.TPM

    def __init__(self) -> None:
        needs_module("cryptography", "tpm")
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        self._key = ec.generate_private_key(ec.SECP256R1())
        self.public_key = self._key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    def signature(self, statement: bytes) -> bytes:
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
        from cryptography.hazmat.primitives.hashes import SHA256

        r, s = decode_dss_signature(self._key.sign(statement, ECDSA(SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    def endorsement(self, challenge: bytes, log: tuple[bytes, ...]) -> Endorsement:
        statement = attest_bytes(challenge, pcr_digest(log))
        return Endorsement(KeyKind.TPM, statement, self.signature(statement), 23, log)


class Root:
    kind = KeyKind.EMULATED

    def __init__(self, seed: bytes = SEED) -> None:
        self._seed, self.public_key = seed, DeviceRoot(seed).public_key

    def endorsement(self, challenge: bytes, log: tuple[bytes, ...]) -> Endorsement:
        root = DeviceRoot(self._seed)
        for each in log:
            root.extend(0, each)
        return Endorsement(KeyKind.EMULATED, *root.sign(challenge), 0, log)


@cache
def played(kind: KeyKind) -> PlayedTpm | Root:
    return PlayedTpm() if kind is KeyKind.TPM else Root()


@dataclass
class Vouched:
    """A quote and the endorsement that holds for it."""

    hardware: PlayedTpm | Root
    quote: Quote
    endorsement: Endorsement

    def why(self, endorsement: Endorsement | bytes | None = None, key: bytes = b"", **changes: Any) -> str:
        """Why it does not hold by this key with another endorsement, in a quote that says something else."""
        given = self.endorsement if endorsement is None else endorsement
        data = encode_endorsement(given) if isinstance(given, Endorsement) else given
        return check_endorsement(replace(self.quote, endorsement=data, **changes), key or self.hardware.public_key)


@pytest.fixture(params=[KeyKind.TPM, KeyKind.EMULATED], ids=str)
def vouched(request: pytest.FixtureRequest) -> Vouched:
    hardware = played(request.param)
    quote = a_quote(key_kind=hardware.kind, emulated=hardware.kind is KeyKind.EMULATED)
    return Vouched(hardware, quote, hardware.endorsement(endorsed_digest(quote), LOG))


@pytest.fixture
def tpm() -> PlayedTpm:
    hardware = played(KeyKind.TPM)
    assert isinstance(hardware, PlayedTpm)
    return hardware


@pytest.fixture
def by_tpm(tpm: PlayedTpm) -> Vouched:
    quote = a_quote(key_kind=KeyKind.TPM)
    return Vouched(tpm, quote, tpm.endorsement(endorsed_digest(quote), LOG))


def test_an_endorsement_holds_for_its_quote_by_the_enrolled_key(vouched: Vouched) -> None:
    assert vouched.why() == ""


def test_what_was_loaded_since_the_start_and_is_gone_may_stay_in_the_log(vouched: Vouched) -> None:
    longer = vouched.hardware.endorsement(endorsed_digest(vouched.quote), (digest("gone"), *LOG))
    assert vouched.why(longer) == ""


def test_an_endorsement_is_of_one_quote_alone(vouched: Vouched) -> None:
    for change in ({"counter": 3}, {"nonces": ()}, {"board": "c"}, {"receipts": 8}, {"bootcount": 4}, {"uptime_s": 62}):
        assert "that of another quote" in vouched.why(**change)


def test_a_model_that_is_not_in_the_log_is_named(vouched: Vouched) -> None:
    challenge = endorsed_digest(vouched.quote)
    assert "blazeface" in vouched.why(vouched.hardware.endorsement(challenge, LOG[1:]))
    assert "nothing of blazeface, smollm2" in vouched.why(vouched.hardware.endorsement(challenge, ()))


def test_the_log_must_be_what_the_register_was_extended_by(vouched: Vouched) -> None:
    for log in ((*LOG, digest("hidden")), tuple(reversed(LOG)), (*LOG, *LOG), LOG[:1], ()):
        assert "other digests" in vouched.why(replace(vouched.endorsement, log=log))


def test_a_model_loaded_besides_the_log_shows_in_the_register(vouched: Vouched) -> None:
    hidden = vouched.hardware.endorsement(endorsed_digest(vouched.quote), (*LOG, digest("hidden")))
    assert "other digests" in vouched.why(replace(hidden, log=LOG))


def test_another_boards_hardware_does_not_vouch_for_this_one(vouched: Vouched) -> None:
    other = PlayedTpm() if vouched.hardware.kind is KeyKind.TPM else Root(digest("another device"))
    assert vouched.why(other.endorsement(endorsed_digest(vouched.quote), LOG))
    assert vouched.why(key=other.public_key)


def test_no_endorsement_does_not_hold(vouched: Vouched) -> None:
    assert "got none" in vouched.why(b"")


def test_the_kind_is_that_of_the_quote_and_of_the_enrolled_key(vouched: Vouched) -> None:
    others = [kind for kind in KeyKind if kind is not vouched.hardware.kind]
    for kind in others:
        assert "as enrolled" in vouched.why(key_kind=kind)
    other = KeyKind.EMULATED if vouched.hardware.kind is KeyKind.TPM else KeyKind.TPM
    assert "as enrolled" in vouched.why(replace(vouched.endorsement, kind=other))
    assert "as enrolled" in vouched.why(replace(vouched.endorsement, kind=other), key_kind=other)


def test_an_emulated_root_vouches_for_no_board_that_says_it_is_real() -> None:
    root, quote = Root(), a_quote(key_kind=KeyKind.EMULATED)
    made = encode_endorsement(root.endorsement(endorsed_digest(quote), LOG))
    assert "says it is real" in check_endorsement(replace(quote, endorsement=made), root.public_key)


def test_every_truncation_and_every_bit_flip_is_refused(vouched: Vouched) -> None:
    whole = encode_endorsement(vouched.endorsement)
    for end in range(len(whole)):
        assert vouched.why(whole[:end]), end
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        assert vouched.why(bytes(flipped)), bit
    assert vouched.why(whole + b"\0")


def test_every_flip_of_the_enrolled_key_is_refused(vouched: Vouched) -> None:
    for bit in range(8 * len(vouched.hardware.public_key)):
        key = bytearray(vouched.hardware.public_key)
        key[bit // 8] ^= 1 << bit % 8
        assert vouched.why(key=bytes(key)), bit


WRONG_STATEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "not made by a TPM": ({"magic": 0xFF544348}, "magic"),
    "a certificate of a key": ({"kind": 0x8017}, "type"),
    "another PCR": ({"pcr": 16}, "register"),
    "two PCRs": ({"also_pcr": 7}, "PCRs selected"),
    "two banks": ({"selections": 2}, "PCR selections"),
    "the bank of SHA-1": ({"bank": 0x0004}, "PCR bank"),
    "a bitmap of another size": ({"select_bytes": 4}, "length"),
    "bytes after its end": ({"tail": b"\0"}, "left over"),
}


@pytest.mark.parametrize(("changes", "why"), WRONG_STATEMENTS.values(), ids=WRONG_STATEMENTS.keys())
def test_a_well_signed_statement_of_anything_else_is_refused(
    by_tpm: Vouched, tpm: PlayedTpm, changes: dict[str, Any], why: str
) -> None:
    statement = attest_bytes(endorsed_digest(by_tpm.quote), pcr_digest(LOG), **changes)
    signed = replace(by_tpm.endorsement, statement=statement, signature=tpm.signature(statement))
    assert why in by_tpm.why(signed)


def test_a_statement_cut_anywhere_is_refused_though_it_is_signed(by_tpm: Vouched, tpm: PlayedTpm) -> None:
    whole = by_tpm.endorsement.statement
    for end in range(1, len(whole)):
        assert by_tpm.why(replace(by_tpm.endorsement, statement=whole[:end], signature=tpm.signature(whole[:end]))), end


@pytest.mark.parametrize("signature", [bytes(64), b"\xff" * 64, bytes(63) + b"\1", b"\0" * 31 + b"\1" + bytes(31) + b"\1"])
def test_signatures_of_no_number_fit_nothing(by_tpm: Vouched, signature: bytes) -> None:
    assert "does not fit" in by_tpm.why(replace(by_tpm.endorsement, signature=signature))


def test_the_value_of_a_pcr_is_not_its_digest(by_tpm: Vouched, tpm: PlayedTpm) -> None:
    statement = attest_bytes(endorsed_digest(by_tpm.quote), replay(LOG))
    assert "other digests" in by_tpm.why(replace(by_tpm.endorsement, statement=statement, signature=tpm.signature(statement)))


def test_a_verifier_without_the_library_says_so_of_itself_and_accepts_nothing(
    by_tpm: Vouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    why = by_tpm.why()
    assert why.startswith(CANNOT_CHECK) and "pip install 'slyos-edge[tpm]'" in why
    assert "slyos-edge[tpm]" in why_not_checked(by_tpm.hardware.public_key)
    assert why_not_checked(Root().public_key) == ""


def test_what_is_enrolled_must_be_a_key(tpm: PlayedTpm) -> None:
    assert (kind_of_key(tpm.public_key), kind_of_key(Root().public_key)) == (KeyKind.TPM, KeyKind.EMULATED)
    for wrong in (b"", bytes(33), bytes(65), b"\x04" + bytes(63), b"\x02" + tpm.public_key[1:]):
        with pytest.raises(RefusedError, match="sly identity"):
            kind_of_key(wrong)
    assert "no point" in why_not_checked(b"\x04" + bytes(64))


MALFORMED: dict[str, Callable[[Endorsement], object]] = {
    "a software key": lambda e: {1: "software", 2: e.statement, 3: e.signature, 4: 23, 5: []},
    "a kind of key that is none": lambda e: {1: "sgx", 2: e.statement, 3: e.signature, 4: 23, 5: []},
    "no statement": lambda e: {1: "tpm", 2: b"", 3: e.signature, 4: 23, 5: []},
    "a statement without end": lambda e: {1: "tpm", 2: bytes(513), 3: e.signature, 4: 23, 5: []},
    "half a signature": lambda e: {1: "tpm", 2: e.statement, 3: bytes(32), 4: 23, 5: []},
    "a PCR that there is not": lambda e: {1: "tpm", 2: e.statement, 3: e.signature, 4: 24, 5: []},
    "half a digest": lambda e: {1: "tpm", 2: e.statement, 3: e.signature, 4: 23, 5: [bytes(31)]},
    "a log that is too long": lambda e: {1: "tpm", 2: e.statement, 3: e.signature, 4: 23, 5: [bytes(32)] * (MAX_LOG + 1)},
    "a number for a digest": lambda e: {1: "tpm", 2: e.statement, 3: e.signature, 4: 23, 5: [7]},
    "a field too many": lambda e: {1: "tpm", 2: e.statement, 3: e.signature, 4: 23, 5: [], 6: 0},
    "a field too few": lambda e: {1: "tpm", 2: e.statement, 3: e.signature, 4: 23},
    "no map": lambda e: [e.statement, e.signature],
}


@pytest.mark.parametrize("made", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_endorsement_is_refused(made: Callable[[Endorsement], object]) -> None:
    data = encode(made(Root().endorsement(bytes(32), ())))
    with pytest.raises(RefusedError):
        decode_endorsement(data)
    why = check_endorsement(a_quote(key_kind=KeyKind.EMULATED, emulated=True, endorsement=data), Root().public_key)
    assert 0 < len(why) <= MAX_WHY_CHARS


def test_the_longest_endorsement_of_each_kind_comes_back_as_it_was_and_fits(vouched: Vouched) -> None:
    log = tuple(digest(str(number)) for number in range(MAX_LOG))
    longest = vouched.hardware.endorsement(bytes(32), log)
    data = encode_endorsement(longest)
    assert decode_endorsement(data) == longest
    assert len(data) <= MAX_ENDORSEMENT_BYTES


def test_the_protocols_grammar_has_every_endorsement_and_nothing_that_is_malformed(vouched: Vouched) -> None:
    assert is_a("endorsement", encode_endorsement(vouched.endorsement))
    for name, made in MALFORMED.items():
        assert not is_a("endorsement", encode(made(Root().endorsement(bytes(32), ())))), name


def test_the_protocols_grammar_has_the_roots_statement() -> None:
    assert is_a("root-statement", DeviceRoot(SEED).sign(bytes(32))[0])


# the root of an emulated board


def jalapeno(seed: bytes = SEED) -> Jalapeno:
    return Jalapeno(BoardSettings(root_seed=seed))


def root_of(board: Jalapeno) -> DeviceRoot:
    root = board.device_root()
    assert root is not None
    return root


def registers_of(root: DeviceRoot) -> tuple[bytes, ...]:
    return open_statement(*root.sign(bytes(32)), root.public_key).registers


def test_registers_are_zero_when_the_device_is_and_only_grow() -> None:
    root = root_of(jalapeno())
    assert registers_of(root) == (bytes(32),) * REGISTERS
    seen = [registers_of(root)[3]]
    for each in ("a", "b", "a"):
        root.extend(3, digest(each))
        assert registers_of(root)[3] == sha256(seen[-1] + digest(each)).digest()
        seen.append(registers_of(root)[3])
    assert len(set(seen)) == 4
    assert [each for number, each in enumerate(registers_of(root)) if number != 3] == [bytes(32)] * (REGISTERS - 1)
    assert registers_of(root_of(jalapeno())) == (bytes(32),) * REGISTERS


def test_a_device_keeps_its_key_over_a_reset_and_another_has_another() -> None:
    assert root_of(jalapeno()).public_key == root_of(jalapeno()).public_key
    assert root_of(jalapeno()).public_key != root_of(jalapeno(digest("another"))).public_key


def test_a_device_without_a_seed_has_no_root() -> None:
    assert Jalapeno().device_root() is None
    with pytest.raises(ValueError):
        jalapeno(bytes(16))


@pytest.mark.parametrize(("register", "size"), [(-1, 32), (REGISTERS, 32), (0, 31), (0, 0)])
def test_there_is_no_other_register_and_no_other_digest(register: int, size: int) -> None:
    with pytest.raises(ValueError):
        DeviceRoot(SEED).extend(register, bytes(size))


def test_a_root_signs_challenges_of_32_bytes_alone() -> None:
    with pytest.raises(RefusedError):
        DeviceRoot(SEED).sign(b"anything")


def test_a_roots_secret_is_in_nothing_that_is_shown() -> None:
    board, root = jalapeno(), DeviceRoot(SEED)
    shown = "".join(map(repr, (board.settings, board, root, vars(root), root.sign(bytes(32)), vars(board))))
    for form in (SEED.hex(), repr(SEED), base64.b64encode(SEED).decode()):
        assert form not in shown
    with pytest.raises(TypeError):
        pickle.dumps(root)


# structures of a TPM

POINT = b"\x04" + bytes(range(1, 65))
WRONG_KEYS: dict[str, tuple[dict[str, int], str]] = {
    "an RSA key": ({"kind": 0x0001}, "type"),
    "a key that can leave its TPM": ({"attributes": 0x00050470}, "attributes"),
    "a key that another key may take out": ({"attributes": 0x00050462}, "attributes"),
    "a key that was made elsewhere": ({"attributes": 0x00050452}, "attributes"),
    "a key that signs whatever it is given": ({"attributes": 0x00040472}, "attributes"),
    "a key that does not sign": ({"attributes": 0x00010472}, "attributes"),
    "a key that decrypts too": ({"attributes": 0x00070472}, "attributes"),
    "a key on another curve": ({"curve": 0x0004}, "curve"),
}


def test_the_public_point_of_an_attestation_key_is_read() -> None:
    assert open_public(public_bytes(POINT)) == POINT


@pytest.mark.parametrize(("changes", "why"), WRONG_KEYS.values(), ids=WRONG_KEYS.keys())
def test_no_other_key_is_taken_for_an_attestation_key(changes: dict[str, int], why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        open_public(public_bytes(POINT, **changes))


@pytest.mark.parametrize(
    ("read", "whole"),
    [
        (open_public, public_bytes(POINT)),
        (open_attest, attest_bytes(bytes(32), bytes(32))),
        (open_signature, b"\x00\x18\x00\x0b\x00\x20" + bytes(32) + b"\x00\x20" + bytes(32)),
    ],
)
def test_a_structure_cut_anywhere_or_with_more_behind_it_is_refused(read: Callable[[bytes], object], whole: bytes) -> None:
    read(whole)
    for end in range(len(whole)):
        with pytest.raises(RefusedError):
            read(whole[:end])
    for more in (b"\0", bytes(1000)):
        with pytest.raises(RefusedError):
            read(whole + more)


def test_short_numbers_of_a_signature_are_filled_up() -> None:
    assert open_signature(b"\x00\x18\x00\x0b\x00\x01\x07\x00\x02\x01\x02") == bytes(31) + b"\x07" + bytes(30) + b"\x01\x02"


@pytest.mark.parametrize("head", [b"\x00\x14\x00\x0b", b"\x00\x18\x00\x04"], ids=["RSASSA", "SHA-1"])
def test_no_other_signature_scheme_is_taken(head: bytes) -> None:
    with pytest.raises(RefusedError):
        open_signature(head + b"\x00\x01\x07\x00\x01\x07")


def test_many_models_and_a_long_log_fit_into_a_quote() -> None:
    models = tuple(
        ModelMeasurement(f"{number:02}" + "m" * 30, digest(f"o{number}"), digest(f"m{number}"), digest("g"))
        for number in range(MAX_MODELS)
    )
    measurements = Measurements(digest("c"), digest("l"), "l" * 128, digest("p"), digest("d"), "d" * 128, models)
    log = tuple(digest(str(number)) for number in range(MAX_LOG))
    endorsement = encode_endorsement(Root().endorsement(bytes(32), log))
    nonces = tuple(digest(str(number))[:16] for number in range(64))
    quote = a_quote(nonces=nonces, measurements=measurements, key_kind=KeyKind.EMULATED, emulated=True, endorsement=endorsement)
    assert len(sign_quote(quote, signer("b"))) <= MAX_QUOTE_BYTES
    assert MAX_MODELS <= MAX_LOG
