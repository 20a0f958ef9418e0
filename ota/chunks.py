"""What travels of a release: pieces of artefacts, and who lacks which.

Owns ``Artefact``, ``Want``, ``Wants`` and their bytes.  Rules: pure; a piece is believed by its own digest, whoever sent it, and
a board's wants by its signature; a set of pieces is an ``int`` whose bit ``i`` is piece ``i``, on the wire its bytes, little
endian, of the one length that fits; who asks has subscribed to ``ota/chunk/<digest>`` before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import BOARD_ID, DIGEST_BYTES, bounded, checked
from ota.manifest import CHUNK_BYTES, MAX_FILE_BYTES, MAX_RELEASE_BYTES, ReleasedFile

AAD = b"sly/1/want"
MAX_WHOLE_BYTES = MAX_RELEASE_BYTES
"""Of an artefact that travels as one piece."""
MAX_PIECES = MAX_FILE_BYTES // CHUNK_BYTES
MAX_WANTS = 64
"""Artefacts that a board asks for at once."""
MAX_WANTED_BITS = 2 * MAX_PIECES
"""Of all the bitmaps of one message."""
MAX_WANTS_BYTES = 32 * 2**10
MAX_COUNT = 2**53
_CHUNK_HEAD_BYTES = 16
_MAX_WANTS_ITEMS = 16 + 8 * MAX_WANTS


@dataclass(frozen=True, slots=True)
class Artefact:
    """Bytes that a board fetches. ``digest``: SHA-256 of the whole; ``chunks``: SHA-256 of every ``CHUNK_BYTES`` of it, one after
    another, or nothing for an artefact of one piece, of at most ``MAX_WHOLE_BYTES``.

    Raises ``RefusedError`` for sizes that do not fit each other.
    """

    digest: bytes
    size_bytes: int
    chunks: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        bounded("digest of an artefact, length", len(self.digest), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        most_bytes = MAX_FILE_BYTES if self.chunks else MAX_WHOLE_BYTES
        bounded(f"size of artefact {self}", self.size_bytes, 1, most_bytes, "bytes")
        if self.chunks:
            expected_bytes = -(-self.size_bytes // CHUNK_BYTES) * DIGEST_BYTES
            bounded(f"chunk list of artefact {self}, length", len(self.chunks), expected_bytes, expected_bytes, "bytes")

    def __str__(self) -> str:
        return self.digest.hex()[:16]

    @property
    def step_bytes(self) -> int:
        """The length of every piece but the last."""
        return min(CHUNK_BYTES, self.size_bytes) if self.chunks else self.size_bytes

    @property
    def count(self) -> int:
        return max(1, len(self.chunks) // DIGEST_BYTES)

    @property
    def whole(self) -> int:
        """The set of all its pieces."""
        return (1 << self.count) - 1

    def piece_bytes(self, index: int) -> int:
        """The length of piece ``index``."""
        return min(self.step_bytes, self.size_bytes - index * self.step_bytes)

    def piece_digest(self, index: int) -> bytes:
        return self.chunks[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] if self.chunks else self.digest

    def check(self, index: int, data: bytes | memoryview) -> None:
        """Return if ``data`` is piece ``index``; raise ``RefusedError`` saying what does not fit if it is not."""
        bounded(f"piece of artefact {self}", index, 0, self.count - 1)
        if len(data) != self.piece_bytes(index):
            raise RefusedError(f"piece {index} of artefact {self}", f"{len(data)} bytes", f"{self.piece_bytes(index)} bytes")
        actual = sha256(data).digest()
        if actual != self.piece_digest(index):
            expected = self.piece_digest(index).hex()
            raise RefusedError(f"piece {index} of artefact {self}", f"bytes that hash to {actual.hex()}", expected)


def artefact_of(file: ReleasedFile) -> Artefact:
    return Artefact(file.digest, file.size_bytes, file.chunks)


@dataclass(frozen=True, slots=True)
class Want:
    """What a board lacks of one artefact: at least one piece. ``stalled``: it asked before and nothing has come for a while, so
    nothing is on its way.

    Raises ``RefusedError`` for a set that does not fit the sizes.
    """

    digest: bytes
    size_bytes: int
    piece_bytes: int
    lacking: int = field(repr=False)
    stalled: bool = False

    def __post_init__(self) -> None:
        bounded("digest of a wanted artefact, length", len(self.digest), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        bounded("size of a wanted artefact", self.size_bytes, 1, MAX_FILE_BYTES, "bytes")
        bounded("piece of a wanted artefact", self.piece_bytes, 1, min(self.size_bytes, MAX_WHOLE_BYTES), "bytes")
        bounded("pieces of a wanted artefact", self.count, 1, MAX_PIECES)
        if not 0 < self.lacking < 1 << self.count:
            raise RefusedError(
                "pieces that a board lacks", "a set that is empty or too large", f"1 to {self.count} of its pieces"
            )

    @property
    def count(self) -> int:
        return -(-self.size_bytes // self.piece_bytes)

    @property
    def bitmap(self) -> bytes:
        return self.lacking.to_bytes(-(-self.count // 8), "little")

    def fits(self, artefact: Artefact) -> bool:
        """Whether it speaks of this artefact as it is."""
        return (self.digest, self.size_bytes, self.piece_bytes) == (artefact.digest, artefact.size_bytes, artefact.step_bytes)


def want_of(artefact: Artefact, lacking: int, stalled: bool = False) -> Want:
    return Want(artefact.digest, artefact.size_bytes, artefact.step_bytes, lacking, stalled)


@dataclass(frozen=True, slots=True)
class Wants:
    """All that a board lacks; ``boot_epoch`` and ``number`` order the wants of one board. None: it lacks nothing."""

    board: str
    boot_epoch: int
    number: int
    wants: tuple[Want, ...] = ()

    def __post_init__(self) -> None:
        checked(BOARD_ID, "wanting board", self.board)
        bounded("wants' boot_epoch", self.boot_epoch, 0, MAX_COUNT)
        bounded("wants' number", self.number, 0, MAX_COUNT)
        bounded("wants, count", len(self.wants), 0, MAX_WANTS)
        bounded("pieces of all wants, count", sum(each.count for each in self.wants), 0, MAX_WANTED_BITS)
        if len({each.digest for each in self.wants}) != len(self.wants):
            raise RefusedError("wants", "an artefact twice", "each once")

    @property
    def newness(self) -> tuple[int, int]:
        return self.boot_epoch, self.number


def sign_wants(board: str, boot_epoch: int, number: int, wants: Iterable[Want], signer: Signer) -> bytes:
    """The signed message for ``ota/want/<board>``: of ``wants``, from the first on, as many as one message may hold."""
    told = Wants(board, boot_epoch, number, _as_many_as_fit(wants))
    listed = [[each.digest, each.size_bytes, each.piece_bytes, each.bitmap, each.stalled] for each in told.wants]
    return sign1(encode({1: told.board, 2: told.boot_epoch, 3: told.number, 4: listed}), signer, AAD)


def _as_many_as_fit(wants: Iterable[Want]) -> tuple[Want, ...]:
    fitting: list[Want] = []
    bits = 0
    for each in wants:
        bits += each.count
        if bits > MAX_WANTED_BITS or len(fitting) == MAX_WANTS:
            break
        fitting.append(each)
    return tuple(fitting)


_WANTS = {1: ("board", str), 2: ("boot_epoch", int), 3: ("number", int), 4: ("wants", list)}


def open_wants(message: bytes, find_key: Callable[[bytes], bytes | None]) -> Wants:
    """The wants in a signed message. Raises ``RefusedError`` unless it is well-formed and signed by its own board."""
    signed = verify1(message, find_key, AAD, MAX_WANTS_BYTES)
    value = decode(signed.payload, MAX_WANTS_BYTES, max_items=_MAX_WANTS_ITEMS, subject="wants")
    entry = fields(value, "wants", _WANTS)
    if signed.kid != entry["board"].encode():
        raise RefusedError("wants", f"board {shown(entry['board'])} signed by {shown(signed.kid)}", "a board's own signature")
    listed = list_of(entry["wants"], "wants", list, MAX_WANTS)
    return Wants(entry["board"], entry["boot_epoch"], entry["number"], tuple(_read_want(each) for each in listed))


def _read_want(value: list[object]) -> Want:
    if tuple(map(type, value)) != (bytes, int, int, bytes, bool):
        raise RefusedError("want", shown(value), "digest, size, length of a piece, bitmap, whether it stalled")
    digest, size_bytes, piece_bytes, bitmap, stalled = value
    assert isinstance(digest, bytes) and isinstance(size_bytes, int) and isinstance(piece_bytes, int)
    assert isinstance(bitmap, bytes) and isinstance(stalled, bool)
    want = Want(digest, size_bytes, piece_bytes, int.from_bytes(bitmap, "little"), stalled)
    if len(bitmap) != -(-want.count // 8):
        raise RefusedError("want: bitmap", f"{len(bitmap)} bytes", f"{-(-want.count // 8)} bytes for {want.count} pieces")
    return want


def encode_chunk(index: int, data: bytes | memoryview) -> bytes:
    """The message for ``ota/chunk/<digest>``: piece ``index`` of the artefact that the topic names."""
    return encode([index, data])


def decode_chunk(payload: bytes) -> tuple[int, bytes]:
    """Index and bytes of a piece, which must then be checked. Raises ``RefusedError`` for anything else, trailing bytes too."""
    value = decode(payload, MAX_WHOLE_BYTES + _CHUNK_HEAD_BYTES, max_items=3, subject="chunk")
    if type(value) is not list or tuple(map(type, value)) != (int, bytes):
        raise RefusedError("chunk", shown(value), "an array of index and bytes")
    index, data = value
    return bounded("chunk index", index, 0, MAX_PIECES - 1), data


def pieces_of(pieces: int) -> list[int]:
    """The indices in a set of pieces, ascending."""
    found, at = [], 0
    for byte in pieces.to_bytes(-(-pieces.bit_length() // 8), "little"):
        while byte:
            low = byte & -byte
            found.append(at + low.bit_length() - 1)
            byte ^= low
        at += 8
    return found


def set_of(indices: Iterable[int], count: int) -> int:
    """The set of these pieces, of an artefact of ``count``."""
    bits = bytearray(-(-count // 8))
    for index in indices:
        bits[index >> 3] |= 1 << (index & 7)
    return int.from_bytes(bits, "little")
