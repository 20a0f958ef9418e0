"""What boards say of themselves: signed, joined by version, the same on every board that heard the same."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.cbor import decode, encode
from edge_agent.core.cose import Signer, sign1
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import MAX_HOMES, KvHome, KvState, Place
from edge_agent.core.values import MAX_BOARDS, MAX_COST, MAX_MEASURED, MAX_SHAPES, DataClass, ShapeCost, TrustTier
from edge_agent.core.wanted import MAX_DEMANDS, Demand, Wanted
from edge_agent.gossip.presence import AAD as PRESENCE_AAD
from edge_agent.gossip.presence import Presence, Standing, open_presence, sign_presence
from edge_agent.gossip.record import AAD as RECORD_AAD
from edge_agent.gossip.record import MAX_KV_STATES, MAX_OFFERS, MAX_RECORD_BYTES, BoardRecord, open_record, sign_record
from edge_agent.gossip.state import FleetState
from tests.drawn import presences, records
from tests.virtual_board import offer

SIGNER = Signer(b"b", b"\7" * 32)
RECORD = BoardRecord("b", 3, 5, "Orin Nano", offers=(offer("small", 1000), offer("large", 3000)))
PRESENCE = Presence("b", 3, Standing.ONLINE)
DEMAND_MAP = {1: "detect_faces", 3: 5, 4: 16, 5: 1 << 20, 10: 500}
OFFER_MAP = {1: "small", 2: "detect_faces", 3: bytes(32), 4: 1, 5: 1, 6: 1}
WANTED = Wanted("detect_faces", "", 5, 16, 1 << 20)
few_records = st.lists(
    st.builds(BoardRecord, st.sampled_from("abc"), st.integers(1, 3), st.integers(1, 3), queue_us=st.integers(0, 1)),
    max_size=12,
)


def key_of(kid: bytes) -> bytes | None:
    return {b"b": SIGNER.public_key}.get(kid)


def joined(heard: list[BoardRecord]) -> FleetState:
    state = FleetState()
    for record in heard:
        state.join(record)
    return state


@given(few_records, st.data())
def test_the_join_is_commutative_associative_and_idempotent(heard: list[BoardRecord], data: st.DataObject) -> None:
    once = joined(heard)
    again = data.draw(st.lists(st.sampled_from(heard), max_size=6)) if heard else []
    shuffled = data.draw(st.permutations(heard)) + again
    assert joined(shuffled).digest() == once.digest()
    parts = data.draw(st.integers(0, len(heard)))
    left, right = joined(heard[:parts]), joined(heard[parts:])
    assert joined([*right.records(), *left.records()]).digest() == once.digest()
    assert joined([*once.records(), *heard]).digest() == once.digest()


@given(few_records)
def test_only_the_newest_records_matter(heard: list[BoardRecord]) -> None:
    state = joined(heard)
    for record in state.records():
        assert record.version == max(each.version for each in heard if each.board == record.board)
    assert joined(list(state.records())).digest() == state.digest()


@given(few_records, few_records)
def test_digests_are_equal_only_over_equal_records(one: list[BoardRecord], other: list[BoardRecord]) -> None:
    first, second = joined(one), joined(other)
    assert (first.digest() == second.digest()) == (list(first.records()) == list(second.records()))


def test_33_a_board_that_tells_two_stories_under_one_version_divides_nobody() -> None:
    one, other = (BoardRecord("b", 1, 1, queue_us=queue_us) for queue_us in (5, 9))
    assert joined([one, other]).digest() == joined([other, one]).digest()


def test_a_digest_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "from tests.test_gossip import joined, RECORD; from dataclasses import replace;"
        "print(joined([replace(RECORD, board=name) for name in 'dacb']).digest().hex())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, check=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert digests == {joined([replace(RECORD, board=name) for name in "abcd"]).digest().hex() + "\n"}


def test_a_join_says_whether_there_was_anything_new() -> None:
    state = FleetState()
    assert state.join(RECORD) and not state.join(RECORD)
    assert not state.join(replace(RECORD, sequence=4)) and not state.join(replace(RECORD, boot_epoch=2, sequence=99))
    assert state.join(replace(RECORD, boot_epoch=4, sequence=0))


def test_35_a_table_of_invented_boards_is_bounded() -> None:
    state = FleetState()
    for i in range(MAX_BOARDS):
        state.join(replace(RECORD, board=f"b{i}"))
        state.join_presence(replace(PRESENCE, board=f"b{i}"))
    with pytest.raises(RefusedError, match=f"at most {MAX_BOARDS}"):
        state.join(replace(RECORD, board="one-more"))
    with pytest.raises(RefusedError, match=f"at most {MAX_BOARDS}"):
        state.join_presence(replace(PRESENCE, board="one-more"))
    assert state.join(replace(RECORD, board="b7", sequence=6))


@pytest.mark.parametrize(
    ("words", "standing"),
    [
        ([], Standing.ONLINE),
        ([(1, Standing.ONLINE)], Standing.ONLINE),
        ([(1, Standing.ONLINE), (1, Standing.OFFLINE)], Standing.OFFLINE),
        ([(2, Standing.ONLINE), (1, Standing.OFFLINE)], Standing.ONLINE),
        ([(1, Standing.OFFLINE), (1, Standing.ONLINE)], Standing.ONLINE),
        ([(1, Standing.STOPPED)], Standing.STOPPED),
        ([(1, Standing.STOPPED), (2, Standing.ONLINE), (1, Standing.STOPPED)], Standing.ONLINE),
    ],
)
def test_the_last_word_of_the_newest_boot_counts(words: list[tuple[int, Standing]], standing: Standing) -> None:
    state = FleetState()
    for epoch, word in words:
        state.join_presence(Presence("b", epoch, word))
    assert state.standing("b") is standing


def test_a_record_of_a_later_boot_outlives_the_will_of_an_earlier_one() -> None:
    state = FleetState()
    state.join_presence(Presence("b", 3, Standing.OFFLINE))
    state.join(RECORD)
    assert state.standing("b") is Standing.OFFLINE
    state.join(replace(RECORD, boot_epoch=4))
    assert state.standing("b") is Standing.ONLINE


@given(records)
def test_a_record_comes_back_as_it_was(record: BoardRecord) -> None:
    signer = Signer(record.board.encode(), b"\7" * 32)
    assert open_record(sign_record(record, signer), lambda kid: signer.public_key) == record


@given(presences)
def test_a_presence_comes_back_as_it_was(presence: Presence) -> None:
    signer = Signer(presence.board.encode(), b"\7" * 32)
    assert open_presence(sign_presence(presence, signer), lambda kid: signer.public_key) == presence


@pytest.mark.parametrize(
    ("message", "read"),
    [
        pytest.param(sign_record(RECORD, SIGNER), open_record, id="record"),
        pytest.param(sign_presence(PRESENCE, SIGNER), open_presence, id="presence"),
    ],
)
def test_34_every_bit_flip_truncation_and_extension_is_refused(message: bytes, read: object) -> None:
    read(message, key_of)  # type: ignore[operator]
    flipped = [message[:i] + bytes((message[i] ^ 1 << bit,)) + message[i + 1 :] for i in range(len(message)) for bit in range(8)]
    for wrong in flipped + [message[:size] for size in range(len(message))] + [message + b"\0"]:
        with pytest.raises(RefusedError):
            read(wrong, key_of)  # type: ignore[operator]


def test_a_board_cannot_speak_for_another() -> None:
    for message, read in (
        (sign_record(replace(RECORD, board="c"), SIGNER), open_record),
        (sign_presence(replace(PRESENCE, board="c"), SIGNER), open_presence),
    ):
        with pytest.raises(RefusedError, match="a board's own signature"):
            read(message, key_of)


def test_a_signature_for_one_purpose_is_worth_nothing_for_another() -> None:
    as_presence = sign1(encode(RECORD.to_map()), SIGNER, PRESENCE_AAD)
    as_record = sign1(encode({1: "b", 2: 3, 3: "online"}), SIGNER, RECORD_AAD)
    for message, read in ((as_presence, open_record), (as_record, open_presence)):
        with pytest.raises(RefusedError, match="signature"):
            read(message, key_of)


def signed(changes: dict[int, object], gone: int = 0) -> bytes:
    entry = {**RECORD.to_map(), **changes}
    entry.pop(gone, None)
    return sign1(encode(entry), SIGNER, RECORD_AAD)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({2: -1}, "boot_epoch"),
        ({3: 2**54}, "sequence"),
        ({4: "x" * 129}, "hardware"),
        ({5: 1}, "emulated"),
        ({7: -1}, "queue_us"),
        ({8: 10**7}, "temperature_mdegc"),
        ({9: "hot"}, "trip_mdegc"),
        ({10: [{1: "m"}]}, "offer"),
        ({10: [7]}, "offers"),
        ({99: 0}, "unknown key"),
        ({1: "../b"}, "board"),
        ({11: []}, "kv"),
        ({12: []}, "demand"),
        ({12: [{}]}, "demand"),
        ({12: [DEMAND_MAP, DEMAND_MAP]}, "each once, ascending"),
        ({12: [{**DEMAND_MAP, 1: "b"}, {**DEMAND_MAP, 1: "a"}]}, "each once, ascending"),
        ({12: [{**DEMAND_MAP, 4: 17}]}, "a request class"),
        ({12: [{**DEMAND_MAP, 5: 3}]}, "a request class"),
        ({12: [{**DEMAND_MAP, 8: 0}]}, "trust"),
        ({12: [{**DEMAND_MAP, 9: "private"}]}, "data"),
        ({12: [{**DEMAND_MAP, 10: 0}]}, "rate_mhz"),
        ({12: [{**DEMAND_MAP, 1: f"t{i:02}"} for i in range(MAX_DEMANDS + 1)]}, "demand"),
        ({13: [1, 2]}, "forecast_mdegc"),
        ({13: [1, 2, 10**7]}, "forecast_mdegc"),
        ({10: [{**OFFER_MAP, 7: 1}]}, "parallel"),
        ({10: [{**OFFER_MAP, 8: []}]}, "shapes"),
        ({10: [{**OFFER_MAP, 8: [[1, 2, 3]]}]}, "shape"),
        ({10: [{**OFFER_MAP, 8: [[2, 1, 1, 1], [1, 1, 1, 1]]}]}, "ascending"),
        ({10: [{**OFFER_MAP, 8: [[1, 0, 1, 1]]}]}, "busy_us"),
        ({10: [{**OFFER_MAP, 8: [[n, 1, 0, 0] for n in range(MAX_SHAPES + 1)]}]}, "shapes"),
        ({10: [{**OFFER_MAP, 9: 0}]}, "measured"),
        ({10: [{**OFFER_MAP, 10: True}]}, "unknown key"),
    ],
)
def test_a_record_that_is_signed_and_wrong_is_refused_naming_the_field(changes: dict[int, object], named: str) -> None:
    with pytest.raises(RefusedError, match=named):
        open_record(signed(changes), key_of)


@pytest.mark.parametrize("key", [1, 2, 3, 4, 5, 6, 7, 10])
def test_a_record_without_a_required_field_is_refused(key: int) -> None:
    with pytest.raises(RefusedError, match="is missing"):
        open_record(signed({}, gone=key), key_of)


def test_offers_are_bounded_and_one_a_model() -> None:
    for offers in ((offer("m", 1), offer("m", 2)), tuple(offer(f"m{i}", 1) for i in range(MAX_OFFERS + 1))):
        with pytest.raises(RefusedError, match="one a model"):
            replace(RECORD, offers=offers)
    most = replace(RECORD, offers=tuple(offer(f"m{i}" + "m" * 55, 1) for i in range(MAX_OFFERS)))
    assert open_record(sign_record(most, SIGNER), key_of) == most


@pytest.mark.parametrize("changes", [{1: "B"}, {2: -1}, {3: "alive"}, {3: 1}, {4: 0}])
def test_a_presence_that_is_signed_and_wrong_is_refused(changes: dict[int, object]) -> None:
    entry = decode(encode({1: "b", 2: 3, 3: "online"}))
    assert isinstance(entry, dict)
    with pytest.raises(RefusedError):
        open_presence(sign1(encode({**entry, **changes}), SIGNER, PRESENCE_AAD), key_of)


@pytest.mark.parametrize(("temperature", "trip", "headroom"), [(50, 85, 35), (None, 85, None), (50, None, None), (90, 85, -5)])
def test_headroom_is_known_only_when_both_sensors_are(temperature: int | None, trip: int | None, headroom: int | None) -> None:
    assert replace(RECORD, temperature_mdegc=temperature, trip_mdegc=trip).headroom_mdegc == headroom


@pytest.mark.parametrize(("forecast", "headroom"), [(None, 35), ((51, 60, 70), 15), ((49, 40, 30), 35), ((90, 60, 50), -5)])
def test_headroom_is_that_of_the_hottest_moment_that_is_known_or_forecast(
    forecast: tuple[int, int, int] | None, headroom: int
) -> None:
    assert replace(RECORD, temperature_mdegc=50, trip_mdegc=85, forecast_mdegc=forecast).headroom_mdegc == headroom


def test_a_record_of_before_there_was_demand_is_read_as_one_without() -> None:
    first_of_all = {1: "b", 2: 3, 3: 5, 4: "Orin Nano", 5: False, 6: True, 7: 0, 10: [OFFER_MAP]}
    record = open_record(sign1(encode(first_of_all), SIGNER, RECORD_AAD), key_of)
    assert record.demand == () and record.forecast_mdegc is None and record.offers[0].shapes == ()
    assert record.to_map() == first_of_all, "and is written as it was"


@pytest.mark.parametrize("changes", [{"cloud": True}, {"cloud": True, "price_us": 5}, {"price_us": 5}])
def test_what_runs_in_a_cloud_is_in_no_record(changes: dict[str, object]) -> None:
    with pytest.raises(RefusedError, match="what runs on the board itself"):
        replace(RECORD, offers=(replace(offer("small", 1000), **changes),))  # type: ignore[arg-type]


def test_the_fullest_record_there_is_fits_into_its_message() -> None:
    def name(number: int) -> str:
        return f"{number:064}"

    shapes = tuple(ShapeCost(120 + number, MAX_COST, MAX_COST, MAX_MEASURED) for number in range(MAX_SHAPES))
    offers = [
        replace(offer(name(number), MAX_COST), parallel=256, shapes=shapes, measured=MAX_MEASURED) for number in range(MAX_OFFERS)
    ]
    homes = tuple(KvHome(number.to_bytes(16, "big"), 2**31, Place.DISK) for number in range(MAX_HOMES))
    kv = [
        KvState(name(number), bytes(32), 2**24, 2**24, 2**50, 2**31, MAX_COST, 10**9, 10**9, 10**9, homes, (MAX_COST,) * 9)
        for number in range(MAX_KV_STATES)
    ]
    demand = [
        Demand(Wanted("detect_faces", name(number), 127, 2**40, 2**31, 990, 2**49, TrustTier.WARNING, DataClass.PUBLIC), 10**9)
        for number in range(MAX_DEMANDS)
    ]
    full = BoardRecord(
        "b" * 32, 2**53, 2**53, "\U0001f600" * 128, True, True, MAX_COST, 10**6, 10**6, tuple(offers), tuple(kv), tuple(demand),
        (10**6,) * 3, (MAX_COST,) * 9,
    )  # fmt: skip
    signer = Signer(b"b" * 32, b"\7" * 32)
    message = sign_record(full, signer)
    assert len(message) <= MAX_RECORD_BYTES and open_record(message, lambda kid: signer.public_key) == full


def test_a_boards_own_record_is_reckoned_with_and_is_not_one_of_the_others() -> None:
    state = FleetState("b")
    assert not state.knows_others
    state.join(RECORD)
    assert list(state.records()) == [] and list(state.all_records()) == [RECORD] and not state.knows_others
    state.join(replace(RECORD, board="a"))
    assert [record.board for record in state.records()] == ["a"] and state.knows_others
    assert state.digest() == joined([RECORD, replace(RECORD, board="a")]).digest()


def test_only_what_is_new_counts_as_a_change() -> None:
    state = FleetState()
    assert [(state.join(record), state.changes) for record in (RECORD, RECORD)] == [(True, 1), (False, 1)]
    assert [(state.join_presence(word), state.changes) for word in (PRESENCE, PRESENCE)] == [(True, 2), (False, 2)]


def test_what_can_be_passed_on_of_a_board_is_that_it_is_gone_or_else_its_record() -> None:
    state = FleetState()
    assert state.signed("b") == b""
    state.join(RECORD, signed=b"record")
    state.join_presence(PRESENCE, b"birth")
    assert state.signed("b") == b"record"
    state.join_presence(replace(PRESENCE, standing=Standing.OFFLINE), b"will")
    assert state.signed("b") == b"will"
    state.join(replace(RECORD, boot_epoch=4), signed=b"next record")
    assert state.signed("b") == b"next record" and state.presence("b") is None
