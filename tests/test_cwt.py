"""Quotes against another implementation: the library ``cwt`` verifies ours, and we open those that it makes."""

from __future__ import annotations

import json
import re
import subprocess
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.attest.epoch import AAD_EPOCH, EpochMark, sign_epoch
from edge_agent.attest.evidence import KeyKind, open_quote, sign_quote
from edge_agent.core.cbor import decode, encode
from edge_agent.core.cose import decode_sign1
from edge_agent.core.errors import RefusedError
from tests.attested import a_quote, digest, find_key, signer
from tests.needs import needs_cwt

B = signer("b")
QUOTE = a_quote(key_kind=KeyKind.TPM, endorsement=b"by hardware", nonces=(digest("1")[:16], digest("2")[:16]))
WITHIN = {4: QUOTE.issued_s + 3600, 5: QUOTE.issued_s}
"""exp and nbf, which the library adds behind the others unless they are there."""
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """A conversation with the other implementation, in a process of its own environment."""
    command = [needs_cwt(), str(Path(__file__).with_name("cwt_peer.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdin is not None and peer.stdout is not None
        to_peer, from_peer = peer.stdin, peer.stdout

        def say(do: str, kid: str = "b", alg: str = "Ed25519", **rest: object) -> dict[str, Any]:
            asked = {"do": do, "kid": kid, "alg": alg, "public_key": B.public_key.hex(), **rest}
            to_peer.write(json.dumps(asked) + "\n")
            to_peer.flush()
            answer = json.loads(from_peer.readline())
            assert isinstance(answer, dict)
            return answer

        yield say
        to_peer.close()


def payload_of_ours() -> dict[int, Any]:
    claims = decode(decode_sign1(sign_quote(QUOTE, B)).payload)
    assert isinstance(claims, dict)
    return claims


def made(ask: Ask, claims: dict[int, Any], *, alg: str = "EdDSA", tagged: bool = False) -> bytes:
    answer = ask("make", alg=alg, claims=encode(claims).hex(), seed=digest("b").hex(), tagged=tagged)
    return bytes.fromhex(answer["token"])


def test_the_other_implementation_verifies_our_quote_and_reads_the_same_claims(ask: Ask) -> None:
    message = sign_quote(QUOTE, B)
    answer = ask("verify", token=message.hex())
    claims = payload_of_ours()
    assert decode_as_others(answer["claims"]) == claims
    assert bytes.fromhex(answer["ours"]) == claims[273][0][1]


def decode_as_others(text: str) -> object:
    """What it wrote in the key order of RFC 7049: the same values, another order."""
    import cbor2

    return cbor2.loads(bytes.fromhex(text))


def test_the_other_implementation_refuses_our_quote_when_a_bit_is_flipped_or_the_key_is_anothers(ask: Ask) -> None:
    message = sign_quote(QUOTE, B)
    for at in (len(message) - 1, len(message) // 2):
        broken = bytearray(message)
        broken[at] ^= 1
        assert "refused" in ask("verify", token=broken.hex())
    assert "refused" in ask("verify", token=message.hex(), public_key=signer("c").public_key.hex())
    assert "refused" in ask("verify", token=message.hex(), kid="c")


@pytest.mark.parametrize("alg", ["EdDSA", "Ed25519"])
def test_we_open_a_quote_that_the_other_implementation_made(ask: Ask, alg: str) -> None:
    token = made(ask, {**WITHIN, **payload_of_ours()}, alg=alg)
    assert token != sign_quote(QUOTE, B)
    assert open_quote(token, find_key) == QUOTE


def test_we_refuse_what_the_other_implementation_makes_of_another_board_in_tag_61_or_out_of_its_time(ask: Ask) -> None:
    claims = {**WITHIN, **payload_of_ours()}
    for token in (
        made(ask, claims, tagged=True),
        made(ask, {**claims, 4: QUOTE.issued_s}),
        made(ask, {**claims, 256: bytes(17)}),
        made(ask, {key: claim for key, claim in claims.items() if key != 267}),
    ):
        with pytest.raises(RefusedError):
            open_quote(token, find_key)
    with pytest.raises(RefusedError):
        open_quote(made(ask, claims), lambda kid: signer("c").public_key)


def test_of_our_other_messages_the_other_implementation_wants_to_know_the_purpose(ask: Ask) -> None:
    message = sign_epoch(EpochMark("b", 1, 2, bytes(16)), B)
    assert "refused" in ask("verify_cose", token=message.hex(), aad="")
    answer = ask("verify_cose", token=message.hex(), aad=AAD_EPOCH.decode())
    assert bytes.fromhex(answer["payload"]) == decode_sign1(message).payload


def test_a_quote_is_read_as_the_documentation_says(tmp_path: Path) -> None:
    """The block of docs/attestation.md, as it stands there, with a real key and file."""
    page = (Path(__file__).parents[1] / "docs" / "attestation.md").read_text()
    (block,) = re.findall(r"\*\*Reading one\.\*\*.*?```python\n(.*?)```", page, re.DOTALL)
    public_key = urlsafe_b64encode(signer("a").public_key).decode().rstrip("=")
    program = block.replace("<public key, base64url>", public_key).replace("board-a", "a")
    (tmp_path / "quote.cbor").write_bytes(sign_quote(a_quote(board="a"), signer("a")))
    read = subprocess.run([needs_cwt(), "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    assert read.stdout.startswith(f"3 {digest('seed').hex()}\n{{1: 'a', 2: 2, ")
