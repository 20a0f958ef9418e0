"""The messages of updates, for ``tests.test_protocol``: one of each kind as bytes, what the code takes of them, and bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from edge_agent.core.cbor import encode
from edge_agent.core.config import PolicySection
from edge_agent.core.cose import Signer, decode_sign1, sign1
from edge_agent.core.errors import RefusedError
from ota.charter import Charter, Enrolled, decode_charter, encode_charter
from ota.chunks import AAD as WANT_AAD
from ota.chunks import Want, decode_chunk, encode_chunk, open_wants, sign_wants
from ota.manifest import CHUNK_BYTES, Kind, Release, ReleasedFile, decode_release, encode_release
from ota.orders import REPORT_AAD, ROLLOUT_AAD, open_report, open_rollout, report_map, rollout_map
from ota.rollout import Plan, Progress, Report, Rollout, SlotReport, Step

SIGNER = Signer(b"b", b"\7" * 32)
MAX_NUMBER = 2**31 - 1


def by_code(read: Callable[[bytes], object]) -> Callable[[bytes], bool]:
    """Whether ``read`` takes bytes."""

    def taken(data: bytes) -> bool:
        try:
            read(data)
        except RefusedError:
            return False
        return True

    return taken


def _signed(read: Callable[..., object], aad: bytes) -> Callable[[bytes], bool]:
    return by_code(lambda data: read(sign1(data, SIGNER, aad), lambda kid: SIGNER.public_key))


FILE = {1: "vww.tflite", 2: 1, 3: bytes(32), 4: bytes(32)}
PLAN = Plan(5, "vww", 3, bytes(32), ("a", "b"), 1, 1)
WANT = Want(b"x" * 32, 9 * CHUNK_BYTES, CHUNK_BYTES, 0b1_0000_0001)
PROGRESS, SLOTS = {1: "vww", 2: 5, 3: "fetching", 4: 370}, {1: "vww", 2: 0, 3: 4, 4: "staging"}
CHARTER = Charter("home", 3, {"a": Enrolled(b"k" * 32, "coral", ("yard",), b"e" * 65, "lost")}, {"b": b"o" * 32})
RELEASE = Release("vww", 3, Kind.PERCEPTION, (ReleasedFile("vww.tflite", 1, bytes(32), bytes(32)),), "card", ("coral",), "0.1.0")
REPORT = Report(
    "b", 1, 2, "0.1.0", (Progress("vww", 5, Step.FETCHING, 370, "so far"),), (SlotReport("vww", 0, 4, "staging", "new"),), "full"
)
EXAMPLES: dict[str, tuple[bytes, Callable[[bytes], bool]]] = {
    "manifest": (encode_release(RELEASE), by_code(decode_release)),
    "charter": (encode_charter(CHARTER), by_code(decode_charter)),
    "rollout": (encode(rollout_map(Rollout(PLAN, "b", reason="now"))), _signed(open_rollout, ROLLOUT_AAD)),
    "report": (encode(report_map(REPORT)), _signed(open_report, REPORT_AAD)),
    "wants": (decode_sign1(sign_wants("b", 1, 2, [WANT], SIGNER)).payload, _signed(open_wants, WANT_AAD)),
}
CHUNK, takes_chunk = encode_chunk(7, b"bytes"), by_code(decode_chunk)

_BOARD: dict[int, object] = {1: b"k" * 32}
_POLICY = asdict(PolicySection())
_REFERENCES: dict[int, object] = {1: [], 2: [], 3: [], 4: []}
_GOLDEN = {1: bytes(32), 2: "litert", 3: [bytes(32)]}
_PLAN: dict[int, object] = rollout_map(Rollout(PLAN, "b"))[1]  # type: ignore[assignment]
_WANT = [WANT.digest, WANT.size_bytes, WANT.piece_bytes, WANT.bitmap, False]
BOUNDS: list[tuple[str, int, object, object]] = [
    ("manifest", 1, "m" * 64, "Not a model"),
    ("manifest", 2, MAX_NUMBER, MAX_NUMBER + 1),
    ("manifest", 3, "language", "cloud"),
    ("manifest", 4, [FILE], []),
    ("manifest", 4, [{**FILE, 1: f"f{n}"} for n in range(64)], [{**FILE, 1: f"f{n}"} for n in range(65)]),
    ("manifest", 4, [{**FILE, 1: "a+b_1-c.whl"}], [{**FILE, 1: "../a"}]),
    ("manifest", 4, [FILE], [{**FILE, 2: 0}]),
    ("manifest", 4, [{**FILE, 2: CHUNK_BYTES}], [{**FILE, 2: 2**32 + 1}]),
    ("manifest", 4, [FILE], [{**FILE, 3: bytes(31)}]),
    ("manifest", 4, [{**FILE, 2: CHUNK_BYTES + 1, 4: bytes(64)}], [{**FILE, 4: b""}]),
    ("manifest", 5, "x" * 2**18, "x" * (2**18 + 1)),
    ("manifest", 6, [], ["Coral"]),
    ("manifest", 6, [f"c{n}" for n in range(64)], [f"c{n}" for n in range(65)]),
    ("manifest", 7, "1.2.3.4", "1.2.3.4.5"),
    ("manifest", 7, "0.0", "1"),
    ("charter", 1, "home", "My home"),
    ("charter", 2, 2**53, 2**53 + 1),
    ("charter", 2, 1, 0),
    ("charter", 3, {"a": _BOARD}, {"a": {1: b"k"}}),
    ("charter", 3, {"a": {**_BOARD, 3: ["g"]}}, {"a": {**_BOARD, 3: []}}),
    ("charter", 3, {"a": {**_BOARD, 4: b"e" * 256}}, {"a": {**_BOARD, 4: b"e" * 257}}),
    ("charter", 3, {"a": {**_BOARD, 5: "x" * 256}}, {"a": {**_BOARD, 5: ""}}),
    ("charter", 3, {"a": _BOARD}, {"a": {**_BOARD, 6: "x"}}),
    ("charter", 4, {}, {"ann": bytes(33)}),
    ("charter", 5, _POLICY, {}),
    ("charter", 5, {**_POLICY, "gain_us": 10**9}, {**_POLICY, "gain_us": 10**9 + 1}),
    *(("charter", 5, _POLICY, {key: value for key, value in _POLICY.items() if key != left}) for left in _POLICY),
    ("charter", 6, {**_REFERENCES, 1: [bytes(32)]}, {**_REFERENCES, 1: [bytes(31)]}),
    ("charter", 6, {**_REFERENCES, 4: [_GOLDEN]}, {**_REFERENCES, 4: [{**_GOLDEN, 3: []}]}),
    ("charter", 6, {**_REFERENCES, 4: [{**_GOLDEN, 2: "x" * 128}]}, {**_REFERENCES, 4: [{**_GOLDEN, 2: ""}]}),
    ("rollout", 1, {**_PLAN, 1: 2**53}, {**_PLAN, 1: 0}),
    ("rollout", 1, {**_PLAN, 3: MAX_NUMBER}, {**_PLAN, 3: 0}),
    ("rollout", 1, {**_PLAN, 4: b"x" * 32}, {**_PLAN, 4: b""}),
    ("rollout", 1, {**_PLAN, 5: ["a"]}, {**_PLAN, 5: []}),
    ("rollout", 1, {**_PLAN, 6: 2}, {**_PLAN, 6: 0}),
    ("rollout", 1, {**_PLAN, 7: 2}, {**_PLAN, 7: 1025}),
    ("rollout", 1, {**_PLAN, 8: 0}, {**_PLAN, 8: 1001}),
    ("rollout", 1, {**_PLAN, 9: 1000}, {**_PLAN, 9: 0}),
    ("rollout", 1, {**_PLAN, 10: 2**40}, {**_PLAN, 10: 2**40 + 1}),
    ("rollout", 3, 2**31, 2**31 + 1),
    ("rollout", 4, "rollback", "resume"),
    ("rollout", 5, "x" * 240, ""),
    ("report", 2, 2**53, 2**53 + 1),
    ("report", 4, "x" * 64, ""),
    ("report", 5, [PROGRESS], []),
    ("report", 5, [{**PROGRESS, 2: n} for n in range(1, 65)], [{**PROGRESS, 2: n} for n in range(1, 66)]),
    ("report", 5, [{**PROGRESS, 3: "returned"}], [{**PROGRESS, 3: "lost"}]),
    ("report", 5, [{**PROGRESS, 4: 1000}], [{**PROGRESS, 4: 0}]),
    ("report", 5, [{**PROGRESS, 6: True}], [{**PROGRESS, 6: False}]),
    ("report", 6, [SLOTS], []),
    ("report", 6, [{**SLOTS, 2: MAX_NUMBER}], [{**SLOTS, 2: -1}]),
    ("report", 6, [{**SLOTS, 3: MAX_NUMBER}], [{**SLOTS, 3: 0}]),
    ("report", 6, [{**SLOTS, 4: "rolled_back"}], [{**SLOTS, 4: "empty"}]),
    ("report", 7, "x" * 240, "x" * 961),
    ("wants", 3, 2**53, 2**53 + 1),
    ("wants", 4, [], [[]]),
    ("wants", 4, [_WANT], [[bytes(31), *_WANT[1:]]]),
    ("wants", 4, [[bytes(32), 2**32, 2**16, b"\1" * 2**13, True]], [[bytes(32), 2**32 + 1, 2**16, b"\1" * 2**13, True]]),
    ("wants", 4, [[bytes(32), 3 * 2**20, 3 * 2**20, b"\1", True]], [[bytes(32), 4 * 2**20, 4 * 2**20, b"\1", True]]),
    ("wants", 4, [_WANT], [[*_WANT[:3], b"", False]]),
    ("wants", 4, [_WANT], [[*_WANT[:4], 0]]),
    ("wants", 4, [_WANT], [[*_WANT, 0]]),
]
CHUNK_BOUNDS: list[tuple[object, object]] = [
    ([0, b"x"], [-1, b"x"]),
    ([65_535, b"x"], [65_536, b"x"]),
    ([0, bytes(3 * 2**20)], [0, bytes(3 * 2**20 + 17)]),
    ([0, b"x"], [0]),
    ([0, b"x"], [0, b"x", 0]),
    ([0, b"x"], [b"x", 0]),
    ([0, b"x"], {0: b"x"}),
]
