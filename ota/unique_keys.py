"""A threshold is of keys, not of names of keys.

python-tuf counts key ids, which a root may give freely: one key under two of them would meet a threshold of two.  Rules: pure;
what is refused here python-tuf would have taken, and nothing else is refused.
"""

from __future__ import annotations

from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from tuf.api import exceptions as tuf
from tuf.api.metadata import Metadata, Root

from edge_agent.core.errors import RefusedError


def refuse_twins(delegator: Root | None, role: str, document: bytes) -> None:
    """Raise ``RefusedError`` if ``document`` has enough signatures only because one key stands under two names in ``delegator``
    (``None``: the document itself, a root).

    What is no metadata passes, and what lacks signatures: python-tuf refuses that.  Source: TUF specification 1.0.33, section
    5.3.4: a threshold is of unique keys.
    """
    try:
        metadata = Metadata[Any].from_bytes(document)
    except tuf.RepositoryError:
        return
    by = metadata.signed if delegator is None else delegator
    if not isinstance(by, Root) or not _has_twins(by, role):
        return
    result = by.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    keys = len({_material(key) for key in result.signed.values()})
    if result.verified and keys < result.threshold:
        got = f"{len(result.signed)} signatures of {keys} keys"
        raise RefusedError(f"update metadata: {role}", got, f"{result.threshold} keys", "name every key once in the root")


def _has_twins(root: Root, role: str) -> bool:
    materials = [_material(root.keys[keyid]) for keyid in root.roles[role].keyids if keyid in root.keys]
    return len(set(materials)) < len(materials)


def _material(key: Any) -> str:
    """The same text for the same key (of securesystemslib), however it is written."""
    public = str(key.keyval.get("public"))
    if not public.lstrip().startswith("-----"):
        return public.lower()
    try:
        loaded = serialization.load_pem_public_key(public.encode())
    except (ValueError, UnsupportedAlgorithm):
        return public
    return loaded.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo).hex()
