"""The agreed table: what is in it, that it is a function of the facts alone, and its bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.cbor import decode, encode
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import KvHome, KvState, Place
from edge_agent.core.values import MAX_TABLE_BYTES, DataClass, ModelOffer, ShapeCost, TrustTier
from edge_agent.core.waits import SLACKS_US
from edge_agent.core.wanted import MAX_RATE_MHZ, Demand, Wanted
from edge_agent.placement.agreed import MAX_FIGURE, MAX_OPTIONS, Ranked
from edge_agent.placement.facts import BoardFacts, above, facts_digest, nearest, rules_digest
from edge_agent.placement.options import BoardView, kv_plan, weigh, why_not_board, why_not_model
from edge_agent.placement.table import EMPTY, MAX_UNITS, MAX_UNITS_EACH, Booking, Entry, Table, TableMaker
from edge_agent.store.ledger import Ledger
from tests.fleet_facts import DIGESTS, Draw, fleet, rules, supply

GOLDEN = Path(__file__).parent / "data" / "golden_tables.json"
RULES = rules()
FACES = Wanted("detect_faces", "", 12, 4096, 1 << 20)
seeds = st.integers(0, 2**31)


def offer(name: str = "faces-big", busy_us: int = 100_000, **changes: Any) -> ModelOffer:
    return replace(ModelOffer(name, "detect_faces", DIGESTS[name], 900, busy_us, 0), **changes)


def board(name: str, *offers: ModelOffer, rate_mhz: int = 0, **changes: Any) -> BoardFacts:
    demand = (Demand(FACES, rate_mhz),) if rate_mhz else ()
    return replace(BoardFacts(name, offers=offers, demand=demand), **changes)


def made(*facts: BoardFacts, **policy: int) -> Table:
    return TableMaker(rules(**policy)).make(facts)


@given(seeds)
def test_an_entry_has_exactly_the_options_that_the_live_filters_leave(seed: int) -> None:
    facts = fleet(seed)
    for entry in TableMaker(RULES).make(facts).entries:
        feasible = set()
        for each in facts:
            view = BoardView(
                each.board, each.offers, local=each.board == entry.ingress, headroom_mdegc=each.headroom_mdegc,
                barred="" if each.up else "down", kv={state.model: state for state in each.kv}, trust=each.trust,
            )  # fmt: skip
            for one in () if why_not_board(entry.wanted, view, RULES) else each.offers:
                lacking = kv_plan(entry.wanted, view, one, (), RULES.policy).lacking
                if entry.wanted.served_by(one) and not why_not_model(entry.wanted, one, RULES) and not lacking:
                    feasible.add((each.board, one.model))
        assert {(option.board, option.model) for option in entry.options} == feasible


@given(seeds)
def test_options_are_ranked_by_cost_model_and_board_and_their_shares_are_whole(seed: int) -> None:
    for entry in TableMaker(RULES).make(fleet(seed)).entries:
        ranks = [(option.cost_us, option.model, option.board) for option in entry.options]
        assert ranks == sorted(ranks)
        shares = sum(option.share_permille for option in entry.options)
        assert shares == (1000 if entry.options else 0) or (entry.wanted.talks and shares < 1000), "only KV memory may run out"


@given(seeds)
def test_demand_of_every_board_that_is_up_and_trusted_has_an_entry(seed: int) -> None:
    facts = fleet(seed)
    table = TableMaker(RULES).make(facts)
    asked = [(f.board, d.wanted, d.rate_mhz) for f in facts if f.up and f.trust > 0 for d in f.demand]
    assert [(entry.ingress, entry.wanted, entry.rate_mhz) for entry in table.entries] == asked
    for ingress, wanted, _ in asked:
        found = table.entry(ingress, wanted)
        assert found is not None and found.wanted == wanted
    assert table.entry("nobody", FACES) is None


def test_bookings_are_the_work_of_the_shares() -> None:
    """4 requests a second, 10 s, 50 ms each: 2 s of work, half of it on each of two equal boards without a link between them."""
    table = made(board("a", offer(busy_us=50_000), rate_mhz=4_000), board("b", offer(busy_us=50_000)), link_latency_us=0)
    (entry,) = table.entries
    assert [(option.board, option.share_permille) for option in entry.options] in (
        [("a", 500), ("b", 500)],
        [("b", 500), ("a", 500)],
    )
    assert [table.booked_us(name) for name in ("a", "b", "c")] == [1_000_000, 1_000_000, 0]
    assert table.planned_us("a", "b") == 1_000_000 and table.planned_us("b", "a") == table.planned_us("a", "c") == 0
    assert table.bookings[0].total_us == 1_000_000


def test_the_cost_of_an_option_is_the_live_cost_on_a_board_that_is_booked_as_planned() -> None:
    facts = [board("a", offer(), rate_mhz=9_000), board("b", offer(busy_us=60_000))]
    table = made(*facts)
    for option in table.entries[0].options:
        assert option.share_permille, "both are used, so both are reckoned with their bookings"
        each = next(one for one in facts if one.board == option.board)
        view = BoardView(each.board, each.offers, local=each.board == "a", booked_us=table.booked_us(each.board))
        plan = kv_plan(FACES, view, each.offers[0], (), RULES.policy)
        assert option.cost_us == weigh(FACES, view, each.offers[0], plan, FACES.deadline_us, RULES.policy).total_us


def test_a_model_that_runs_side_by_side_books_its_part_of_the_board() -> None:
    table = made(board("a", offer(busy_us=40_000, parallel=4), rate_mhz=1_000))
    assert table.booked_us("a") == 160_000, "four at once take the board 1.6 times as long as one, a turn 0.4 times"


def talk(free_bytes: int, rate_mhz: int) -> Table:
    """A board that talks: a turn of 1 s takes 64 tokens of 16 KiB and the answer's 256, so 5 MiB; four run side by side."""
    state = KvState("talker", bytes(32), 4_096, 16_384, free_bytes, 4_096, 0, 64)
    wanted = Wanted("chat", "", 70, 256, 1 << 24)
    talker = ModelOffer("talker", "chat", DIGESTS["talker"], 600, 1_000_000, 0, 4, (ShapeCost(70, 1_000_000, 0),))
    return made(replace(board("a", talker), kv=(state,), demand=(Demand(wanted, rate_mhz),)))


def test_what_kv_memory_does_not_hold_is_shed_and_not_booked() -> None:
    """By Little's law 4 turns a second of 2 s each (1 s to read, 1 s to answer) hold 8 times 5 MiB."""
    (enough,), (half,), (none,) = (talk(mib << 20, 4_000).entries for mib in (40, 20, 4))
    assert [option.share_permille for option in enough.options] == [1000]
    assert [option.share_permille for option in half.options] == [500]
    assert none.options == (), "no room for one turn: the live filter's word"
    assert talk(20 << 20, 4_000).booked_us("a") * 2 == talk(40 << 20, 4_000).booked_us("a")


def test_more_demand_spreads_over_more_boards() -> None:
    def used(rate_mhz: int) -> int:
        boards = [board(name, offer(), rate_mhz=rate_mhz * (name == "a")) for name in "abcd"]
        return sum(1 for option in made(*boards).entries[0].options if option.share_permille)

    assert [used(rate) for rate in (100, 1_000, 30_000)] == sorted(used(rate) for rate in (100, 1_000, 30_000))
    assert used(100) == 1 and used(30_000) == 4


def test_a_board_that_is_down_or_contraindicated_serves_nobody_and_its_word_on_demand_counts_for_nothing() -> None:
    for bad in (
        board("b", offer(), rate_mhz=9_000, up=False),
        board("b", offer(), rate_mhz=9_000, trust=TrustTier.CONTRAINDICATED),
    ):
        table = made(board("a", offer(), rate_mhz=1_000), bad)
        assert [entry.ingress for entry in table.entries] == ["a"]
        assert [option.board for option in table.entries[0].options] == ["a"]


def test_a_class_that_nothing_may_serve_stands_there_without_options() -> None:
    table = made(board("a", rate_mhz=1_000))
    assert table.entries == (Entry("a", FACES, 1_000, ()),) and table.bookings == ()


def test_a_board_that_lies_saturates_and_overflows_nothing() -> None:
    """It claims the largest of everything: the others' entries stay, and the bytes can be read."""
    liar = board("liar", offer(busy_us=10**15, energy_uj=10**15), rate_mhz=MAX_RATE_MHZ)
    table = made(board("a", offer(), rate_mhz=2_000), board("b", offer()), liar, horizon_us=600_000_000)
    assert Table.decode(table.encode()) == table
    honest = table.entry("a", FACES)
    assert honest is not None and sum(o.share_permille for o in honest.options if o.board in "ab") == 1000
    alone = made(liar, horizon_us=600_000_000)
    assert alone.bookings == (Booking("liar", (("liar", MAX_FIGURE),)),) and alone.entries[0].options[0].cost_us == MAX_FIGURE
    assert Table.decode(alone.encode()) == alone


def test_units_are_bounded_for_the_whole_fleet_and_nobody_is_left_without_one() -> None:
    classes = [replace(FACES, shape=shape) for shape in range(32)]
    demand = tuple(Demand(each, 10**6) for each in classes)
    table = made(*[board(f"b{n:03}", offer(), demand=demand) for n in range(40)])
    assert len(table.entries) == MAX_UNITS and all(sum(o.share_permille for o in e.options) == 1000 for e in table.entries)
    few = made(*[board(f"b{n}", offer(), demand=demand[:1]) for n in range(3)])
    shares = [option.share_permille for entry in few.entries for option in entry.options]
    assert all(min(share * MAX_UNITS_EACH % 1000, -share * MAX_UNITS_EACH % 1000) <= MAX_UNITS_EACH for share in shares)


@given(seeds, st.integers(1, 3))
def test_what_the_maker_kept_never_shows_in_the_result(seed: int, changes: int) -> None:
    draw = Draw(seed)
    maker, facts = TableMaker(RULES), fleet(seed)
    maker.make(facts)
    for _ in range(changes):
        at = draw.below(len(facts))
        other = fleet(draw.below(1000))[0]
        match draw.below(4):
            case 0:
                facts[at] = BoardFacts.rounded(facts[at].board, demand=facts[at].demand, **supply(draw))
            case 1:
                facts[at] = replace(facts[at], demand=other.demand)
            case 2 if len(facts) > 1:
                del facts[at]
            case _:
                facts.append(replace(other, board=f"new-{len(facts)}-{at}"))
                facts = list({each.board: each for each in facts}.values())
        kept = maker.make(facts)
        assert kept.encode() == TableMaker(RULES).make(facts).encode()


@given(seeds, st.randoms(use_true_random=False))
def test_the_order_in_which_facts_come_does_not_show(seed: int, rng: Random) -> None:
    facts = fleet(seed)
    shuffled = rng.sample(facts, len(facts))
    assert TableMaker(RULES).make(shuffled).encode() == TableMaker(RULES).make(facts).encode()
    assert facts_digest(shuffled) == facts_digest(facts)


@given(seeds)
def test_a_table_survives_its_bytes(seed: int) -> None:
    table = TableMaker(RULES).make(fleet(seed))
    again = Table.decode(table.encode())
    assert again == table and again.encode() == table.encode() and again.digest == hashlib.sha256(table.encode()).digest()


@settings(max_examples=300)
@given(seeds.map(lambda seed: seed % 50), st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_is_another_table(seed: int, at: int, value: int) -> None:
    data = bytearray(TableMaker(RULES).make(fleet(seed)).encode())
    data[at % len(data)] = value
    try:
        assert Table.decode(bytes(data)).encode() == bytes(data)
    except RefusedError as error:
        assert str(error)


def _written(**changes: object) -> bytes:
    keys = {"facts_digest": 1, "moves": 3, "boards": 5, "models": 6, "entries": 7, "bookings": 8}
    value = decode(made(board("a", offer(), rate_mhz=1_000)).encode())
    assert isinstance(value, dict)
    return encode({**value, **{keys[name]: each for name, each in changes.items()}})


CLASS = ["detect_faces", "", 12, 4096, 1 << 20, 0, 0, 1, "private"]
OPTION = bytes(4) + (1000).to_bytes(2, "big") + (5).to_bytes(8, "big")


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"facts_digest": bytes(31)}, "facts_digest length"),
        ({"moves": -1}, "moves"),
        ({"moves": MAX_FIGURE + 1}, "moves"),
        ({"boards": ["A"]}, "table board"),
        ({"boards": ["a", "b"]}, "another encoding"),
        ({"models": ["faces-big", "faces-big"]}, "another encoding"),
        ({"entries": [[1, CLASS, 5, b""]]}, "table ingress"),
        ({"entries": [[0, CLASS[:-1], 5, b""]]}, "table class"),
        ({"entries": [[0, [*CLASS[:-1], "secret"], 5, b""]]}, "table data class"),
        ({"entries": [[0, [*CLASS[:7], 4, "private"], 5, b""]]}, "table trust"),
        ({"entries": [[0, CLASS, 0, b""]]}, "table rate_mhz"),
        ({"entries": [[0, CLASS, 5, b"x"]]}, "table options length"),
        ({"entries": [[0, CLASS, 5, OPTION * (MAX_OPTIONS + 1)]]}, "table options length"),
        ({"entries": [[0, CLASS, 5, b"\0\1" + OPTION[2:]]]}, "option's board"),
        ({"entries": [[0, CLASS, 5, b"\0\0\0\1" + OPTION[4:]]]}, "option's model"),
        ({"entries": [[0, CLASS, 5, OPTION[:4] + b"\3\xe9" + OPTION[6:]]]}, "table share"),
        ({"entries": [[0, CLASS, 5, OPTION[:6] + b"\xff" * 8]]}, "table cost"),
        ({"entries": [[0, CLASS, 5, OPTION + OPTION]]}, "table options"),
        ({"entries": [[0, ["detect_faces", 0, *CLASS[2:]], 5, b""]]}, "table class"),
        ({"entries": [[0, CLASS, 5]]}, "table entry"),
        ({"bookings": [[0]]}, "table booking"),
        ({"bookings": [[7, b""]]}, "booking's board"),
        ({"bookings": [[0, bytes(9)]]}, "table booking length"),
        ({"bookings": [[0, bytes(20)]]}, "ascending"),
        ({"bookings": [[0, bytes(2) + b"\xff" * 8]]}, "table booking"),
        ({"bookings": [[0, b"\0\7" + bytes(8)]]}, "booking's ingress"),
    ],
)
def test_bytes_that_encode_does_not_write_are_refused(changes: dict[str, Any], subject: str) -> None:
    with pytest.raises(RefusedError, match=subject):
        Table.decode(_written(**changes))


def test_a_table_over_its_bound_is_refused_before_it_is_read() -> None:
    with pytest.raises(RefusedError, match="table length"):
        Table.decode(bytes(MAX_TABLE_BYTES + 1))
    assert Table.decode(EMPTY.encode()) == EMPTY


def test_a_table_of_a_thousand_classes_with_all_their_options_can_be_kept_by_a_ledger(tmp_path: Path) -> None:
    ways = tuple(sorted((Ranked(f"b{n:03}", "m", 3, MAX_FIGURE) for n in range(MAX_OPTIONS)), key=lambda each: each.board))
    entries = tuple(Entry("b000", replace(FACES, shape=n % 64, energy_uj=1 << n // 64), 1, ways) for n in range(1_000))
    table = replace(EMPTY, entries=tuple(sorted(entries, key=lambda each: each.wanted)))
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.put_document("table", table.encode())
        assert Table.decode(ledger.document("table") or b"") == table


@pytest.mark.parametrize("sequence", ["entries", "bookings"])
def test_entries_and_bookings_that_are_not_ascending_are_refused(sequence: str) -> None:
    table = made(*[board(name, offer(), rate_mhz=20_000) for name in "ab"])
    turned = replace(table, **{sequence: getattr(table, sequence)[::-1]})
    with pytest.raises(RefusedError, match="ascending"):
        Table.decode(turned.encode())


def test_a_board_that_is_there_twice_is_a_bug_of_the_caller() -> None:
    twice = [board("a", offer()), board("a")]
    for call in (facts_digest, TableMaker(RULES).make):
        with pytest.raises(ValueError, match="twice"):
            call(twice)


@pytest.mark.parametrize("changes", [{"offers": (offer("faces-small"), offer("faces-big"))}, {"demand": (Demand(FACES, 1),) * 2}])
def test_facts_that_are_not_ascending_are_a_bug_of_the_caller(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not ascending"):
        board("a", **changes)


@given(st.integers(0, 2**60), st.integers(1, 8))
def test_rounding_keeps_so_many_bits_and_is_off_by_at_most_one_of_them(number: int, bits: int) -> None:
    for rounded in (nearest(number, bits), above(number, bits)):
        assert len(bin(rounded).rstrip("0")) - 2 <= bits
        assert abs(rounded - number) * 2 ** (bits - 1) <= number
        assert nearest(rounded, bits) == above(rounded, bits) == rounded
    assert above(number, bits) >= number


@given(seeds)
def test_rounded_facts_are_never_better_than_the_board(seed: int) -> None:
    told = supply(Draw(seed))
    facts = BoardFacts.rounded("a", demand=(), **told)
    assert facts.headroom_mdegc is None or facts.headroom_mdegc <= told["headroom_mdegc"]
    for rounded, true in zip(facts.offers, sorted(told["offers"], key=lambda o: o.model), strict=True):
        assert rounded.busy_us >= true.busy_us and rounded.energy_uj >= true.energy_uj
    assert BoardFacts.rounded("a", demand=(), **{**told, **_parts(facts)}) == facts, "rounding twice is rounding once"


def _parts(facts: BoardFacts) -> dict[str, Any]:
    return {name: getattr(facts, name) for name in ("headroom_mdegc", "offers", "kv")}


def test_noise_and_what_concerns_only_the_moment_do_not_change_the_facts() -> None:
    told = supply(Draw(0))
    offers: tuple[ModelOffer, ...] = told["offers"]
    kv = told["kv"]
    assert kv and offers
    noisy = {
        **told,
        "headroom_mdegc": 9_500,
        "offers": tuple(
            replace(o, measured=o.measured + 1, shapes=tuple(replace(s, measured=99) for s in o.shapes)) for o in offers
        ),
        "kv": tuple(replace(state, queue_us=state.queue_us + 7, free_bytes=state.free_bytes + 1) for state in kv),
    }
    home = KvHome(bytes(16), 9, Place.HOT)
    noisy["kv"] = tuple(replace(state, homes=(home,), waits_us=(0,) * len(SLACKS_US)) for state in noisy["kv"])
    base = BoardFacts.rounded("a", demand=(), **{**told, "headroom_mdegc": 15_900})
    assert BoardFacts.rounded("a", demand=(), **noisy) == base


def test_offers_of_the_cloud_are_a_boards_own_affair() -> None:
    told: dict[str, Any] = {"up": True, "trust": TrustTier.NONE, "headroom_mdegc": None, "kv": (), "demand": ()}
    assert BoardFacts.rounded("a", offers=[offer(cloud=True)], **told).offers == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"up": False}, {"trust": TrustTier.WARNING}, {"headroom_mdegc": 0}, {"offers": ()},
        {"offers": (offer(busy_us=1),)}, {"offers": (offer(parallel=2),)}, {"demand": ()}, {"board": "b"},
    ],
)  # fmt: skip
def test_every_fact_counts_in_the_digest(changes: dict[str, Any]) -> None:
    facts = board("a", offer(), rate_mhz=1_000)
    assert facts_digest([replace(facts, **changes)]) != facts_digest([facts])


def test_every_rule_counts_in_the_digest() -> None:
    assert rules_digest(RULES) == rules_digest(rules())
    assert len({rules_digest(each) for each in (RULES, rules(gain_us=999), replace(RULES, releases=frozenset()))}) == 3


def test_private_data_and_local_data_stay_where_they_may() -> None:
    demand = tuple(sorted(Demand(replace(FACES, data=data), 1_000) for data in DataClass))
    table = made(board("a", offer(busy_us=900_000), demand=demand), board("b", offer(busy_us=1_000)))
    for entry in table.entries:
        assert [option.board for option in entry.options] == (["a"] if entry.wanted.data is DataClass.LOCAL else ["b", "a"])


def golden() -> dict[str, dict[str, object]]:
    """The digests of tables over fleets that are drawn by integer arithmetic alone."""
    sizes = {
        "small": (3, 3, 2),
        "usual": (8, 6, 2_000),
        "crowded": (5, 8, 40_000),
        "wide": (24, 5, 4_000),
        "single": (1, 4, 9_000),
    }
    digests: dict[str, dict[str, object]] = {}
    for number, (name, (boards, classes, most_mhz)) in enumerate(sizes.items()):
        table = TableMaker(RULES).make(fleet(number + 1, boards, classes, most_mhz))
        digests[name] = {
            "table": table.digest.hex(), "facts": table.facts_digest.hex(), "entries": len(table.entries), "moves": table.moves,
        }  # fmt: skip
    return digests


def test_golden_tables_come_out_to_the_bit() -> None:
    """They may change only with the model, the rounding or the encoding; then ``python -m tests.test_table``, and say why."""
    assert golden() == json.loads(GOLDEN.read_text())["digests"]


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_the_order_of_hashes_does_not_show(seed: str) -> None:
    code = "import json, tests.test_table as t; print(json.dumps(t.golden()))"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=GOLDEN.parents[2], capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == json.loads(GOLDEN.read_text())["digests"]


if __name__ == "__main__":
    note = "SHA-256 of the tables of tests.test_table.golden(); made anew by `python -m tests.test_table`."
    why = "When the model, the rounding or the encoding of tables changes; then all boards of a fleet change together."
    GOLDEN.write_text(json.dumps({"about": note, "may change": why, "digests": golden()}, indent=2) + "\n")
