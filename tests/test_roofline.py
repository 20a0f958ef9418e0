"""The cost model and what it is fed: published figures, laws that any roofline obeys, and models that are broken."""

from __future__ import annotations

import dataclasses
import mmap
import random
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from board_support.profile import BOUNDS, MAX_PROFILE_BYTES, parse_profile
from board_support.roofline import (
    MAX_OPS,
    Cost,
    ModelWork,
    OpWork,
    Profile,
    Trip,
    estimate,
    load_profile,
    profile_names,
)
from board_support.work import model_work
from edge_agent.core.errors import RefusedError
from tests.tiny_models import KINDS, Graph, Op, T, options_table, tiny_model, write_model

PROFILES = Path(__file__).parents[1] / "board_support" / "profiles"


def convolution(side: int, kernel: int, channels: int, outputs: int, number_format: str = "int8") -> OpWork:
    weights = kernel * kernel * channels * outputs
    return OpWork(
        "CONV_2D", side * side * weights, weights, side * side * (channels + outputs),
        side * side, kernel * kernel * channels, outputs, 1, number_format,
    )  # fmt: skip


def depthwise(side: int, channels: int, stride: int) -> OpWork:
    moved = side * side * channels * (1 + stride * stride)
    return OpWork("DEPTHWISE_CONV_2D", side * side * 9 * channels, 9 * channels, moved, side * side, 9, channels, 1, "int8")


def mobilenet_v2() -> ModelWork:
    """Sandler et al., "MobileNetV2", CVPR 2018, table 2: 224 x 224, width 1.0, int8."""
    ops, side, channels = [convolution(112, 3, 3, 32)], 112, 32
    for expansion, outputs, repeats, first_stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for stride in [first_stride] + [1] * (repeats - 1):
            hidden = channels * expansion
            ops += [convolution(side, 1, channels, hidden)] if expansion > 1 else []
            side //= stride
            ops += [depthwise(side, hidden, stride), convolution(side, 1, hidden, outputs)]
            channels = outputs
    ops += [convolution(7, 1, 320, 1280), convolution(1, 1, 1280, 1000)]
    return ModelWork(tuple(ops), 224 * 224 * 3 + 1000)


def test_mobilenet_v2_on_a_coral_takes_what_is_published() -> None:
    work = mobilenet_v2()
    assert round(work.macs / 1e6) == 301  # the paper: 300 M
    assert 2_300 <= estimate(work, load_profile("coral_m2")).busy_us <= 2_500


@pytest.mark.parametrize(
    ("name", "tops"), [("coral_m2", 4), ("orin_nano", 20)], ids=["coral: 4 TOPS", "orin nano: 40 sparse TOPS are 20 dense"]
)
def test_the_arrays_have_the_published_rate(name: str, tops: int) -> None:
    profile = load_profile(name)
    rate = 2 * profile.arrays * profile.array_rows * profile.array_columns * profile.clock_khz * 1000
    assert abs(rate / 1e12 / tops - 1) < 0.05


def test_the_same_work_costs_the_same_bits_everywhere() -> None:
    golden = {
        "coral_m2": Cost(2404, 1855),
        "jalapeno_edge": Cost(376, 1524),
        "orin_nano": Cost(581, 3685),
        "raspberry_pi_5": Cost(2758, 32840),
    }
    assert {name: estimate(mobilenet_v2(), load_profile(name)) for name in profile_names()} == golden


PLAIN = Profile(
    "plain", 10_000, 1_000, array_rows=64, array_columns=64, clock_khz=1_000_000, efficiency_permille=1000, launch_ns=0,
    sram_bytes=0, memory_bytes_per_us=10**9, sram_bytes_per_us=10**9, mac_fj=1000, byte_fj=0,
)  # fmt: skip


def product(positions: int, depth: int, outputs: int, repeats: int = 1) -> ModelWork:
    macs = positions * depth * outputs * repeats
    return ModelWork((OpWork("X", macs, 0, 0, positions, depth, outputs, repeats, "int8"),))


@pytest.mark.parametrize(
    ("work", "cycles"),
    [
        (product(100_000, 64, 64), 100_000),
        (product(100_000, 65, 64), 200_000),
        (product(100_000, 65, 65), 400_000),
        (product(100_000, 1, 1), 100_000),
        (product(50_000, 64, 64, repeats=3), 150_000),
        (ModelWork((OpWork("X", 4096 * 5_000, 0, 0, number_format="int8"),)), 5_000),
    ],
)
def test_a_product_pays_for_every_tile_it_touches(work: ModelWork, cycles: int) -> None:
    assert estimate(work, PLAIN).busy_us == cycles // 1000


def test_loading_a_tile_costs_its_cycles_and_several_arrays_share_the_work() -> None:
    work = product(10_000, 128, 128)
    assert estimate(work, dataclasses.replace(PLAIN, pass_cycles=1000)).busy_us == 4 * 11
    assert estimate(work, dataclasses.replace(PLAIN, pass_cycles=1000, arrays=4)).busy_us == 11


def test_weights_that_fit_stay_on_the_chip_and_what_does_not_fit_crosses_the_bus_every_time() -> None:
    bus = dataclasses.replace(PLAIN, memory_bytes_per_us=100)
    work = ModelWork((OpWork("A", 0, 30_000, 0), OpWork("B", 0, 20_000, 0)))
    assert estimate(work, dataclasses.replace(bus, sram_bytes=50_000)).busy_us == 0
    assert estimate(work, dataclasses.replace(bus, sram_bytes=50_000), cold=True).busy_us == 500
    assert estimate(work, dataclasses.replace(bus, sram_bytes=40_000)).busy_us == 100
    assert estimate(work, bus).busy_us == 500


def test_activations_that_fit_do_not_go_to_memory_but_inputs_and_outputs_always_do() -> None:
    bus = dataclasses.replace(PLAIN, memory_bytes_per_us=100)
    work = ModelWork((OpWork("A", 0, 0, 10_000),))
    assert estimate(work, dataclasses.replace(bus, sram_bytes=20_000)).busy_us == 1
    assert estimate(work, bus).busy_us == 100
    assert estimate(dataclasses.replace(work, io_bytes=5_000), dataclasses.replace(bus, sram_bytes=20_000)).busy_us == 51


def test_a_format_that_the_array_does_not_take_is_computed_by_the_host() -> None:
    work = ModelWork((OpWork("X", 1_000_000, 0, 0, 1000, 1000, 1, 1, "float32"),))
    assert estimate(work, dataclasses.replace(PLAIN, float32_permille=0, host_macs_per_us=500)).busy_us == 2000


def test_energy_is_idle_power_over_the_time_and_the_macs_and_bytes_on_top() -> None:
    cost = estimate(product(1_000_000, 64, 64), PLAIN)
    assert cost == Cost(1000, 1000 + 4096)  # 1 W for 1 ms; 4.096 G MACs at 1 pJ
    moving = dataclasses.replace(PLAIN, byte_fj=100_000, memory_bytes_per_us=1000)
    assert estimate(ModelWork((OpWork("A", 0, 1_000_000, 0),)), moving) == Cost(1000, 1000 + 100)


counts = st.integers(0, 10**6)
operators = st.builds(
    lambda m, k, n, r, w, a, f: OpWork("X", m * k * n * r, w, a, m, k, n, r, f),
    st.integers(0, 5000), st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 4), counts, counts,
    st.sampled_from(["int8", "float16", "float32"]),
)  # fmt: skip
works = st.builds(lambda ops, io: ModelWork(tuple(ops), io), st.lists(operators, max_size=6), counts)
profiles = st.sampled_from(profile_names()).map(load_profile)


@given(works, profiles, st.integers(1, 1000))
def test_a_slower_clock_or_a_cold_chip_never_costs_less(work: ModelWork, profile: Profile, clock: int) -> None:
    warm = estimate(work, profile)
    for dearer in (estimate(work, profile, clock), estimate(work, profile, cold=True)):
        assert dearer.busy_us >= warm.busy_us and dearer.energy_uj >= warm.energy_uj


@given(works, profiles, st.integers(2, 50))
def test_more_bandwidth_never_takes_longer_and_no_machine_beats_its_peak(work: ModelWork, profile: Profile, times: int) -> None:
    faster = dataclasses.replace(profile, memory_bytes_per_us=profile.memory_bytes_per_us * times)
    assert estimate(work, faster).busy_us <= estimate(work, profile).busy_us
    cells = profile.arrays * profile.array_rows * profile.array_columns
    ideal_ms = Fraction(0)
    for op in work.ops:
        rate = profile.rate_permille(op.number_format)
        on_array = Fraction(op.macs * 1000, cells * profile.clock_khz * rate) if rate else Fraction(0)
        ideal_ms += on_array
    assert estimate(work, profile).busy_us >= ideal_ms * 1000


@given(works)
def test_work_survives_its_list_form(work: ModelWork) -> None:
    assert ModelWork.from_list(work.to_list()) == work


def op_list(**changes: object) -> list[object]:
    """The list form of an operator, wrong in the fields that are named."""
    fields = [field.name for field in dataclasses.fields(OpWork)]
    return [changes.get(name, good) for name, good in zip(fields, OpWork("A", 1, 1, 1).to_list(), strict=True)]


@pytest.mark.parametrize(
    "values",
    [
        *(None, 7, "ab", b"ab", [], [0], [0, 0], [0, [], 0], [-1, []], [True, []], [2**60, []], ["x", []], [0, "x"]),
        *([0, ["123456789"]], [0, [[]]], [0, [["A", 1, 1]]], [0, [None] * (MAX_OPS + 1)]),
        *([0, [op_list(kind=value)]] for value in ("", "A" * 65, 7, None)),
        *([0, [op_list(number_format=value)]] for value in ("int9", 7, None)),
        *([0, [op_list(**{name: value})]] for name in ("macs", "repeats") for value in (-1, 1.5, "1", True, 2**60)),
    ],
)
def test_a_work_list_from_outside_is_checked_value_by_value(values: object) -> None:
    with pytest.raises(RefusedError):
        ModelWork.from_list(values)


@pytest.mark.parametrize("clock", [0, -1, 1001])
def test_a_clock_outside_its_range_is_the_callers_bug(clock: int) -> None:
    with pytest.raises(ValueError, match="clock_permille"):
        estimate(ModelWork(()), PLAIN, clock)


# Profiles


@pytest.mark.parametrize("name", ["coral_m2", "jalapeno_edge", "orin_nano", "raspberry_pi_5"])
def test_every_figure_of_a_profile_names_its_source(name: str) -> None:
    profile = load_profile(name)
    sources = dict(profile.sources)
    assert set(sources) == {*BOUNDS, "trips"}
    assert profile.assumed is (name == "jalapeno_edge")
    assert all(source.startswith(("assumed", "published")) for source in sources.values())
    assert profile.label == ("emulated, parameters assumed" if profile.assumed else "emulated from published figures")


def test_a_profile_is_found_by_path_too(tmp_path: Path) -> None:
    copy = tmp_path / "mine.toml"
    copy.write_bytes((PROFILES / "coral_m2.toml").read_bytes())
    found = load_profile(str(copy))
    assert found == dataclasses.replace(load_profile("coral_m2"), name="mine")


GOOD = (PROFILES / "coral_m2.toml").read_text()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("arrays = 1\n", ""), "no arrays"),
        (("arrays = 1\n", "arrays = 1\nsurplus = 2\n"), "unknown key surplus"),
        (("arrays = 1\n", "arrays = 0\n"), "arrays: got 0"),
        (("arrays = 1\n", "arrays = 1.0\n"), "arrays: got 1.0"),
        (("arrays = 1\n", "arrays = true\n"), "arrays: got True"),
        (("idle_mw = 400", "idle_mw = 2_001"), "at most active_mw"),
        (("at_mdegc = 90_000", "at_mdegc = 85_000"), "hotter and slower"),
        (("clock_permille = 250", "clock_permille = 500"), "hotter and slower"),
        (("clock_permille = 250", "clock = 250"), "at_mdegc, clock_permille"),
        (("die_c_mj_per_k = 2_000", "die_c_mj_per_k = 1"), "die R"),
        (('idle_mw = "assumed"', 'idle_mw = ""'), "1 to 400 characters"),
        (("assumed = false", "assumed = true"), "true if every source"),
        (("assumed = false", 'assumed = "no"'), "true if every source"),
        (("hardware_model = ", "hardware_mode1 = "), "no hardware_model"),
        (("[figures]", "[figures"), "not TOML"),
        (("# Google", "\x00"), "not TOML"),
    ],
)
def test_a_bad_profile_file_is_refused_with_what_is_wrong(change: tuple[str, str], complaint: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(RefusedError, match=complaint.replace("(", r"\(")):
        parse_profile("bad", GOOD.replace(*change, 1).encode())


def test_a_profile_file_has_a_largest_size() -> None:
    with pytest.raises(RefusedError, match=str(MAX_PROFILE_BYTES)):
        parse_profile("big", GOOD.encode() + b"#" * MAX_PROFILE_BYTES)


def test_the_clock_follows_the_hottest_trip_that_is_passed() -> None:
    profile = dataclasses.replace(PLAIN, trips=(Trip(80_000, 600), Trip(85_000, 250)))
    assert [profile.clock_permille(at) for at in (79_999, 80_000, 84_999, 85_000, 120_000)] == [1000, 600, 600, 250, 250]


# Models


@pytest.mark.parametrize(
    ("kind", "macs", "weight_bytes", "io_bytes", "formats"),
    [
        ("conv", [64 * 4 * 27], 448, 1792, {"float32"}),
        ("float", [64 * 8 * 27, 64 * 8 * 9, 10 * 512, 0], 4 * (8 * 27 + 8 + 72 + 8 + 5120 + 10), 768 + 40, {"float32"}),
        ("int8", [64 * 8 * 27, 64 * 8 * 9, 10 * 512], 216 + 32 + 72 + 32 + 5120 + 40, 192 + 10, {"int8"}),
        ("two_inputs", [0], 0, 48, {"float32"}),
        ("slow", [96 * 96 * 32 * 288] * 12, 12 * 4 * (32 * 288 + 32), 2 * 4 * 96 * 96 * 32, {"float32"}),
    ],
)
def test_macs_and_bytes_are_those_of_the_models_own_flatbuffer(
    kind: str, macs: list[int], weight_bytes: int, io_bytes: int, formats: set[str]
) -> None:
    work = model_work(tiny_model(kind))
    assert [op.macs for op in work.ops] == macs
    assert (work.weight_bytes, work.io_bytes) == (weight_bytes, io_bytes)
    assert {op.number_format for op in work.ops} == formats


def one_op(op: Op, *tensors: T, inputs: tuple[int, ...] = (0,)) -> OpWork:
    return model_work(write_model(Graph(tensors, (op,), inputs, op.outputs))).ops[0]


def test_a_transposed_convolution_multiplies_at_its_input_positions() -> None:
    work = one_op(
        Op("TRANSPOSE_CONV", (2, 1, 0), (3,), options_table("TransposeConvOptions", StrideW=2, StrideH=2)),
        T("x", "float32", (1, 5, 7, 6)),
        T("w", "float32", (3, 2, 2, 6), bytes(4 * 72)),
        T("shape", "int32", (4,), bytes(16)),
        T("y", "float32", (1, 10, 14, 3)),
    )
    assert work.macs == 5 * 7 * 6 * (3 * 2 * 2)


@pytest.mark.parametrize(
    ("left", "right", "adjoint"), [((2, 3, 5, 7), (2, 3, 7, 4), {}), ((2, 3, 7, 5), (2, 3, 4, 7), {"AdjX": 1, "AdjY": 1})]
)
def test_a_batched_product_is_counted_in_either_orientation(
    left: tuple[int, ...], right: tuple[int, ...], adjoint: dict[str, int]
) -> None:
    work = one_op(
        Op("BATCH_MATMUL", (0, 1), (2,), options_table("BatchMatMulOptions", **adjoint)),
        T("a", "float32", left),
        T("b", "float32", right),
        T("c", "float32", (2, 3, 5, 4)),
        inputs=(0, 1),
    )
    assert (work.positions, work.depth, work.outputs, work.repeats) == (5, 7, 4, 6)
    assert work.macs == 6 * 5 * 7 * 4


def test_weights_that_are_only_decompressed_are_constants_and_cost_no_launch() -> None:
    tensors = (
        T("x", "float32", (1, 4, 4, 2)),
        T("packed", "int8", (3, 1, 1, 2), bytes(6), (0.5,)),
        T("w", "float32", (3, 1, 1, 2)),
        T("y", "float32", (1, 4, 4, 3)),
    )
    same = options_table("Conv2DOptions", StrideW=1, StrideH=1)
    ops = (Op("DEQUANTIZE", (1,), (2,), options_table("DequantizeOptions")), Op("CONV_2D", (0, 2, -1), (3,), same))
    work = model_work(write_model(Graph(tensors, ops, (0,), (3,))))
    assert [(op.kind, op.weight_bytes, op.activation_bytes) for op in work.ops] == [("CONV_2D", 24, 4 * 16 * 5)]


def test_two_hundred_mutated_models_are_read_or_refused() -> None:
    generator = random.Random(2)
    read = refused = 0
    for _ in range(200):
        model = bytearray(tiny_model(generator.choice(list(KINDS))))
        for _ in range(generator.choice((1, 3, 20))):
            model[generator.randrange(len(model))] = generator.randrange(256)
        if generator.random() < 0.2:
            del model[generator.randrange(len(model)) :]
        try:
            model_work(bytes(model))
            read += 1
        except RefusedError:
            refused += 1
    assert read > 20 and refused > 20


@pytest.mark.parametrize("spoil", [False, True], ids=["sound", "broken"])
def test_a_mapped_model_is_read_in_place_and_let_go(spoil: bool, tmp_path: Path) -> None:
    model = bytearray(tiny_model("float"))
    model[0:4] = b"\xff\xff\xff\x7f" if spoil else model[0:4]
    (tmp_path / "model").write_bytes(model)
    with (tmp_path / "model").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        with memoryview(mapped) as view:
            if spoil:
                with pytest.raises(RefusedError, match="broken flatbuffer"):
                    model_work(view)
            else:
                assert model_work(view) == model_work(bytes(model))
        assert not mapped.closed


@pytest.mark.parametrize("model", [b"", b"TFL3", bytes(8), b"\0\0\0\0TFL3", b"\xff\xff\xff\xffTFL3", b"GGUF" * 10])
def test_what_is_no_model_is_refused(model: bytes) -> None:
    with pytest.raises(RefusedError, match="model"):
        model_work(model)
