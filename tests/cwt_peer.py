"""Another implementation of what a quote is made of: the library cwt (RFC 8392), with cbor2 < 6 and another crypto library.

Runs in an environment of its own (``make .venv-cwt/cwt.made``) and imports nothing of ours.  ``verify``: reads a token and a
public key, gives its claims.  ``verify_cose``: the same for any signed message and its purpose.  ``make``: reads claims and a
seed, gives a token.  In and out: one JSON object a line, bytes as hex.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

import cbor2
import cwt


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"verify": verified, "verify_cose": verified_cose, "make": made}[asked["do"]](asked)
        except (cwt.VerifyError, cwt.DecodeError, ValueError) as error:
            answer = {"refused": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def verified(asked: dict[str, Any]) -> dict[str, Any]:
    """The claims of a token, as the library decodes them after it has verified the signature."""
    claims = cwt.decode(bytes.fromhex(asked["token"]), public_key(asked))
    return {"claims": cbor2.dumps(claims, canonical=True).hex(), "ours": cbor2.dumps(cbor2.loads(claims[273][0][1])).hex()}


def verified_cose(asked: dict[str, Any]) -> dict[str, Any]:
    """The payload of any COSE_Sign1 with this ``external_aad``."""
    payload = cwt.COSE.new().decode(bytes.fromhex(asked["token"]), public_key(asked), external_aad=asked["aad"].encode())
    return {"payload": payload.hex()}


def made(asked: dict[str, Any]) -> dict[str, Any]:
    """A token of these claims (CBOR of a map), signed, with or without tag 61; the library adds what it always adds."""
    claims = cbor2.loads(bytes.fromhex(asked["claims"]))
    key = cwt.COSEKey.from_jwk(jwk(asked) | {"d": base64url(asked["seed"])})
    return {"token": cwt.encode(claims, key, tagged=asked["tagged"]).hex()}


def public_key(asked: dict[str, Any]) -> Any:
    return cwt.COSEKey.from_jwk(jwk(asked))


def jwk(asked: dict[str, Any]) -> dict[str, str]:
    return {"kty": "OKP", "crv": "Ed25519", "alg": asked["alg"], "kid": asked["kid"], "x": base64url(asked["public_key"])}


def base64url(text: str) -> str:
    return base64.urlsafe_b64encode(bytes.fromhex(text)).rstrip(b"=").decode()


if __name__ == "__main__":
    main()
