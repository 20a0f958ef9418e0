"""The emulated board: modelled time, heat that slows it, faults that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from board_support.board import BoardInfo, BoardSettings, Unavailable
from board_support.faults import BitFlips, ChannelLoss, Hang, Throttle
from board_support.jalapeno import Jalapeno
from board_support.plant import STEP_US, ThermalPlant
from board_support.roofline import ModelWork, OpWork, Profile, Trip, estimate, load_profile, profile_names
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import EnergyKind

PROFILES = Path(__file__).parents[1] / "board_support" / "profiles"
SECOND_US = 1_000_000
WORK = ModelWork((OpWork("CONV_2D", 10**10, 10**6, 10**6, 10**4, 1000, 1000, 1, "int8"),), 1000)
OTHER = ModelWork((OpWork("CONV_2D", 10**6, 10**5, 10**5, 100, 100, 100, 1, "int8"),), 1000)


def board(profile: str = "coral_m2") -> Jalapeno:
    return Jalapeno(BoardSettings(profile=profile))


@pytest.mark.parametrize("name", profile_names())
def test_time_and_energy_are_the_rooflines_whatever_the_real_cpu_took(name: str) -> None:
    emulated, profile = board(name), load_profile(name)
    first = emulated.execution(WORK, 0, elapsed_us=1)
    second = emulated.execution(WORK, first.busy_us, elapsed_us=10**9)
    cold, warm = estimate(WORK, profile, cold=True), estimate(WORK, profile)
    assert (first.busy_us, first.energy_uj, first.energy_kind) == (cold.busy_us, cold.energy_uj, EnergyKind.EMULATED)
    assert (second.busy_us, second.energy_uj) == (warm.busy_us, warm.energy_uj)


def test_a_second_model_swaps_the_weights_of_the_first_out() -> None:
    emulated, profile = board(), load_profile("coral_m2")
    costs = [emulated.execution(work, i * 60 * SECOND_US, 0).busy_us for i, work in enumerate((WORK, WORK, OTHER, WORK))]
    assert costs == [
        estimate(WORK, profile, cold=True).busy_us,
        estimate(WORK, profile).busy_us,
        estimate(OTHER, profile, cold=True).busy_us,
        estimate(WORK, profile, cold=True).busy_us,
    ]


def hot_profile(tmp_path: Path) -> str:
    """A Coral without a heat sink, on a hot day."""
    text = (PROFILES / "coral_m2.toml").read_text()
    for old, new in (("ambient_mdegc = 25_000", "ambient_mdegc = 60_000"), ("idle_mw = 400", "idle_mw = 1_000")):
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "hot.toml"
    path.write_text(text)
    return str(path)


def test_heat_slows_the_clock_at_the_trip_and_the_sensors_say_why(tmp_path: Path) -> None:
    emulated = board(hot_profile(tmp_path))
    busy, now_us = [], 0
    while now_us < 300 * SECOND_US:
        busy.append(emulated.execution(WORK, now_us, 0).busy_us)
        now_us += busy[-1]
    sensors = emulated.read_sensors(now_us)
    assert sensors.temperature_mdegc is not None and sensors.temperature_mdegc >= 85_000
    assert sensors.trip_mdegc == 85_000
    assert max(busy[1:]) > 1.5 * busy[1]
    assert "clock at" in sensors.throttled[0] and "emulated" in sensors.throttled[0]


def test_a_board_that_rests_cools_to_where_its_idle_power_holds_it() -> None:
    emulated, profile = board(), load_profile("coral_m2")
    rest = profile.ambient_mdegc + profile.idle_mw * (profile.die_r_mk_per_w + profile.sink_r_mk_per_w) // 1000
    now_us = 0
    for _ in range(100):
        now_us += emulated.execution(WORK, now_us, 0).busy_us
    warm = emulated.read_sensors(now_us).temperature_mdegc
    assert warm is not None and warm > rest + 1000
    assert emulated.read_sensors(now_us + 24 * 3600 * SECOND_US).temperature_mdegc == rest


def test_power_is_that_of_the_work_while_it_runs_and_idle_after_it() -> None:
    emulated = board()
    cost = emulated.execution(WORK, 0, 0)
    assert emulated.read_sensors(cost.busy_us // 2).power_mw == cost.energy_uj * 1000 // cost.busy_us
    assert emulated.read_sensors(cost.busy_us).power_mw == load_profile("coral_m2").idle_mw


def test_an_invocation_that_arrives_during_another_adds_its_heat_after_it() -> None:
    together, apart = board(), board()
    costs = [together.execution(WORK, 0, 0) for _ in range(2)]
    now_us = 0
    for _ in range(2):
        now_us += apart.execution(WORK, now_us, 0).busy_us
    assert sum(cost.busy_us for cost in costs) == now_us
    assert together.read_sensors(now_us) == apart.read_sensors(now_us)


def test_asking_often_or_seldom_gives_the_same_temperature() -> None:
    seldom, often = board(), board()
    for emulated in (seldom, often):
        for _ in range(20):
            emulated.execution(WORK, 0, 0)
    begun_us = often._busy_until_us
    for step in range(1, 1000):
        often.read_sensors(begun_us + step * 7_919)
    end_us = begun_us + 1000 * 7_919
    assert often.read_sensors(end_us) == seldom.read_sensors(end_us)


def test_the_plant_settles_at_power_times_resistance_over_ambient() -> None:
    profile = load_profile("raspberry_pi_5")
    plant = ThermalPlant(profile, 0)
    for i in range(1, 40_001):
        plant.advance(i * STEP_US, 5_000)
    rise = 5_000 * (profile.die_r_mk_per_w + profile.sink_r_mk_per_w) // 1000
    assert abs(plant.temperature_mdegc - (profile.ambient_mdegc + rise)) <= 20


def test_the_plant_follows_the_exponential_of_one_node() -> None:
    """With a sink of immense capacity the die alone moves: after one time constant 1 - 1/e of the rise is there."""
    profile = Profile("one node", 10_000, 0, die_r_mk_per_w=2_000, die_c_mj_per_k=5_000, sink_c_mj_per_k=10**9)
    plant = ThermalPlant(profile, 0)
    plant.advance(10 * SECOND_US, 10_000)
    rise_mdegc = plant.temperature_mdegc - plant.sink_mdegc
    assert abs(rise_mdegc - 20_000 * 0.63212) < 60


def test_time_that_has_passed_changes_nothing() -> None:
    plant = ThermalPlant(load_profile("coral_m2"), 0)
    plant.advance(SECOND_US, 2_000)
    before = plant.temperature_mdegc
    plant.advance(0, 10**6)
    assert (plant.now_us, plant.temperature_mdegc) == (SECOND_US, before)


def test_bit_flips_are_the_asked_number_and_the_same_for_the_same_seed() -> None:
    emulated, output = board(), bytes(range(256))
    assert emulated.corrupt(output) == output
    emulated.inject([BitFlips(seed=7, flips=3)])
    wrong = emulated.corrupt(output)
    assert sum((a ^ b).bit_count() for a, b in zip(output, wrong, strict=True)) == 3
    other = board("orin_nano")
    other.inject([BitFlips(seed=7, flips=3)])
    assert other.corrupt(output) == wrong
    emulated.execution(WORK, 0, 0)
    assert emulated.corrupt(output) not in (output, wrong)
    assert emulated.corrupt(b"") == b""
    assert emulated.corrupt(b"\0")[0].bit_count() == 3
    emulated.inject([])
    assert emulated.corrupt(output) == output


def test_an_injected_throttle_slows_the_board_and_is_shown() -> None:
    emulated = board()
    emulated.inject([Throttle(100)])
    cost = emulated.execution(WORK, 0, 0)
    assert cost.busy_us == estimate(WORK, load_profile("coral_m2"), 100, cold=True).busy_us
    assert emulated.read_sensors(cost.busy_us).throttled == ("injected throttle: clock at 100 permille",)


def test_a_hang_outlasts_any_deadline_and_ends_with_the_fault() -> None:
    emulated = board()
    emulated.inject([Hang()])
    assert emulated.execution(WORK, 0, 0).busy_us > 3_600_000_000
    emulated.inject([])
    assert emulated.execution(WORK, 10**11, 0).busy_us < SECOND_US


def test_a_lost_memory_channel_takes_its_share_of_the_bandwidth() -> None:
    streaming = ModelWork((OpWork("GATHER", 0, 10**9, 0),))
    sound, wounded = board("jalapeno_edge"), board("jalapeno_edge")
    wounded.inject([ChannelLoss(2)])
    ratio = wounded.execution(streaming, 0, 0).busy_us / sound.execution(streaming, 0, 0).busy_us
    assert 1.99 < ratio < 2.01
    with pytest.raises(RefusedError, match="fewer than the profile's 4"):
        wounded.inject([ChannelLoss(2), ChannelLoss(2)])


@pytest.mark.parametrize(
    ("kind", "value"), [(BitFlips, -1), (BitFlips, 2**64), (Throttle, 0), (Throttle, 1001), (Hang, 0), (ChannelLoss, 0)]
)
def test_a_fault_out_of_bounds_is_refused(kind: Callable[[int], object], value: int) -> None:
    with pytest.raises(RefusedError):
        kind(value)


def test_a_bad_profile_makes_the_emulator_unavailable_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("hardware_model = 7")
    found = board(str(path)).probe()
    assert isinstance(found, Unavailable)
    assert "board profile bad" in found.reasons[0]


def test_nothing_about_the_fictional_board_is_called_published() -> None:
    info = board("").probe()
    assert isinstance(info, BoardInfo)
    assert "emulated, parameters assumed" in info.notes
    assert load_profile("jalapeno_edge").trips == (Trip(85_000, 500), Trip(95_000, 250))
