"""What a session consists of, told to the board that it moves to: its ids, and the digests of its KV bytes.

Rules: pure; bounded; deterministic CBOR.  Names of blocks are not told, they follow from the ids.  Who made a manifest is for its
envelope to say (it travels signed): the digests in it bind every byte that is fetched afterwards, from whomever, to that word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import MAX_TOKEN_ID, KvFormat, block_start, chain, full_blocks, sealed_blocks, unpacked_ids
from edge_agent.core.values import DIGEST_BYTES, SESSION_NAME, bounded, checked

MAX_MANIFEST_TOKENS = 2**19
"""A longer session does not move: its ids alone are 2 MiB."""
MAX_MANIFEST_BYTES = 4 * MAX_MANIFEST_TOKENS + 2**20
_VERSION = 1
_FIELDS = {
    1: ("version", int), 2: ("name", str), 3: ("fingerprint", bytes), 4: ("ids", bytes), 5: ("tokens", int), 6: ("sealed", int),
    7: ("files", list), 8: ("rows", bytes),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Manifest:
    """The session ``name``: packed ``ids``, of which ``tokens`` are in KV as ``sealed`` sealed blocks and rows.

    ``files``: the SHA-256 of the prelude's file and of each sealed block's in the window, oldest first (as each file ends with).
    ``rows``: the SHA-256 of the packed rows.  Raises ``RefusedError`` for what no session can be.
    """

    name: str
    fingerprint: bytes
    ids: bytes
    tokens: int
    sealed: int
    files: tuple[bytes, ...]
    rows: bytes

    def __post_init__(self) -> None:
        checked(SESSION_NAME, "name of a moved session", self.name.removeprefix("~"))
        bounded("number of ids", len(self.ids) // 4, 0, MAX_MANIFEST_TOKENS, "tokens")
        if len(self.ids) % 4 or max(unpacked_ids(self.ids), default=0) > MAX_TOKEN_ID:
            raise RefusedError("ids of a moved session", f"{len(self.ids)} bytes", f"token ids of 4 bytes up to {MAX_TOKEN_ID}")
        bounded("tokens in KV", self.tokens, 0, len(self.ids) // 4, "tokens")
        bounded("sealed blocks", self.sealed, sealed_blocks(self.tokens), full_blocks(self.tokens))
        for digest in (self.fingerprint, *self.files, self.rows):
            if not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES:
                raise RefusedError("digest in a manifest", digest, f"{DIGEST_BYTES} bytes")

    def encode(self) -> bytes:
        values = (_VERSION, self.name, self.fingerprint, self.ids, self.tokens, self.sealed, list(self.files), self.rows)
        return encode(dict(zip(_FIELDS, values, strict=True)))

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Manifest:
        """Inverse of ``encode``. Raises ``RefusedError`` for anything else."""
        entry = fields(decode(data, MAX_MANIFEST_BYTES, subject="KV manifest"), "KV manifest", _FIELDS)
        bounded("version of a KV manifest", entry.pop("version"), _VERSION, _VERSION)
        files = list_of(entry.pop("files"), "files of a KV manifest", bytes, MAX_MANIFEST_TOKENS)
        return cls(files=tuple(files), **entry)

    def rows_bytes(self, kv_format: KvFormat) -> int:
        return max(0, self.tokens - block_start(self.sealed)) * kv_format.row_bytes

    def must_fit(self, kv_format: KvFormat) -> None:
        """Raises ``RefusedError`` if this is a session of another model, or its files are not those of its window."""
        if self.fingerprint != kv_format.fingerprint:
            mine = kv_format.fingerprint.hex()[:16]
            raise RefusedError("KV manifest", f"fingerprint {self.fingerprint.hex()[:16]}", mine, "host the same model on both")
        expected = 1 + min(self.sealed, kv_format.window_blocks) if self.tokens else 0
        if len(self.files) != expected or 0 < self.tokens < block_start(0):
            raise RefusedError("KV manifest", f"{len(self.files)} files for {self.tokens} tokens", f"{expected} files")

    def names(self, kv_format: KvFormat) -> dict[bytes, tuple[int, bytes]]:
        """By name: number (-1 is the prelude) and SHA-256 of everything that is fetched by name."""
        if not self.tokens:
            return {}
        links = enumerate(islice(chain(self.fingerprint, unpacked_ids(self.ids)), self.sealed + 1), -1)
        wanted = {-1, *range(max(0, self.sealed - kv_format.window_blocks), self.sealed)}
        return {name: (block, digest) for (block, name), digest in zip(_of(links, wanted), self.files, strict=True)}


def _of(links: Iterator[tuple[int, bytes]], wanted: set[int]) -> Iterator[tuple[int, bytes]]:
    return (link for link in links if link[0] in wanted)
