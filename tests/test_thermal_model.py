"""The heat forecast against a simulated plant that knows nothing of it, and against sensors that lie.

Figures, of 4 seeds a board after 5 minutes of samples, in m°C (mean, 95th percentile; "stays": that it stays as it is):

    board             in 10 s                 in 30 s                 in 60 s
    coral_m2          55,152 (stays 462,1189)  120,351 (1103,2778)    225,672 (1920,4749)
    jalapeno_edge     56,195       (622,1865)  123,313 (1467,3498)    226,612 (2542,6088)
    orin_nano         39,171       (383,1195)   90,341  (891,2427)    155,640 (1484,3602)
    raspberry_pi_5    60,309       (799,2332)  115,414 (1892,4827)    205,848 (3143,7824)

A sensor that counts in whole degrees adds its half degree: about 500,1000 in 10 s and 620,1400 in 60 s.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from board_support.plant import ThermalPlant
from board_support.roofline import load_profile
from edge_agent.placement.thermal import (
    FAST_MS,
    HORIZONS_S,
    MAX_GAP_US,
    MAX_RISE_MDEGC,
    SLOW_MS,
    Heat,
    ThermalModel,
    decay,
    solve,
)

PROFILES = ("coral_m2", "jalapeno_edge", "orin_nano", "raspberry_pi_5")
SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US


@dataclass(frozen=True, slots=True)
class Outcome:
    """Absolute errors in m°C, a list for each of ``HORIZONS_S``."""

    model: tuple[list[int], list[int], list[int]]
    naive: tuple[list[int], list[int], list[int]]
    unknown: int
    asked: int


def weathered(profile_name: str, seed: int, minutes: int, *, warm_us: int = 5 * MINUTE_US, step_mdegc: int = 1) -> Outcome:
    """A board under loads that change at random, seen by a sensor that counts in steps; a forecast every few samples."""
    chance, profile = random.Random(seed), load_profile(profile_name)
    plant, model = ThermalPlant(profile, 0), ThermalModel()
    outcome = Outcome(([], [], []), ([], [], []), 0, 0)
    unknown = asked = now_us = until_us = number = 0
    load_mw = profile.idle_mw
    while now_us < minutes * MINUTE_US:
        if now_us >= until_us:
            share = chance.choice((0, 0, 1000, chance.randrange(1000), chance.randrange(1000)))
            load_mw = profile.idle_mw + (profile.active_mw - profile.idle_mw) * share // 1000
            until_us = now_us + chance.randrange(5, 120) * SECOND_US
        now_us += chance.randrange(1_800_000, 2_300_000)
        plant.advance(now_us, load_mw)
        model.observe(now_us, plant.temperature_mdegc // step_mdegc * step_mdegc, load_mw)
        number += 1
        if now_us < warm_us or number % 7:
            continue
        asked += 1
        if (forecast := model.forecast(load_mw)) is None:
            unknown += 1
            continue
        future = copy.copy(plant)
        for horizon, seconds in enumerate(HORIZONS_S):
            future.advance(now_us + seconds * SECOND_US, load_mw)
            outcome.model[horizon].append(abs(forecast[horizon] - future.temperature_mdegc))
            outcome.naive[horizon].append(abs(plant.temperature_mdegc - future.temperature_mdegc))
    return Outcome(outcome.model, outcome.naive, unknown, asked)


def mean(errors: list[int]) -> int:
    return sum(errors) // len(errors)


def late(errors: list[int]) -> int:
    """The 95th percentile."""
    return sorted(errors)[len(errors) * 95 // 100]


WITHIN = ((80, 400), (160, 550), (300, 1_100))
"""m°C in 10, 30 and 60 s: the mean error and the 95th percentile."""


@pytest.mark.parametrize("profile", PROFILES)
def test_after_five_minutes_the_forecast_is_many_times_nearer_than_that_it_stays_as_it_is(profile: str) -> None:
    runs = [weathered(profile, seed, 15) for seed in range(4)]
    assert sum(each.unknown for each in runs) * 8 <= sum(each.asked for each in runs), "but where nothing ran yet"
    for horizon, (mean_mdegc, late_mdegc) in enumerate(WITHIN):
        model = [error for each in runs for error in each.model[horizon]]
        naive = [error for each in runs for error in each.naive[horizon]]
        assert mean(model) <= mean_mdegc and late(model) <= late_mdegc
        assert 4 * mean(model) < mean(naive) and 3 * late(model) < late(naive)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_sensor_that_counts_in_whole_degrees_costs_what_it_hides(profile: str) -> None:
    runs = [weathered(profile, seed, 15, step_mdegc=1000) for seed in range(4)]
    assert sum(each.unknown for each in runs) * 4 <= sum(each.asked for each in runs)
    errors = [error for each in runs for error in each.model[2]]
    naive = [error for each in runs for error in each.naive[2]]
    assert mean(errors) <= 900 and 2 * mean(errors) < mean(naive)


def driven(model: ThermalModel, plant: ThermalPlant, loads_mw: list[int], period_us: int = 2 * SECOND_US) -> None:
    for load_mw in loads_mw:
        plant.advance(plant.now_us + period_us, load_mw)
        model.observe(plant.now_us, plant.temperature_mdegc, load_mw)


def learned(profile_name: str = "jalapeno_edge") -> tuple[ThermalModel, ThermalPlant]:
    profile = load_profile(profile_name)
    model, plant = ThermalModel(), ThermalPlant(profile, 0)
    driven(model, plant, ([profile.idle_mw] * 20 + [profile.active_mw] * 25) * 5)
    return model, plant


def test_a_board_that_will_be_too_hot_in_a_minute_is_seen_before_it_is() -> None:
    profile = load_profile("jalapeno_edge")
    model, plant = learned()
    driven(model, plant, [profile.idle_mw] * 60 + [profile.active_mw] * 2)
    forecast = model.forecast(profile.active_mw)
    assert forecast is not None and plant.temperature_mdegc < forecast[0] < forecast[1] < forecast[2]
    now_mdegc = plant.temperature_mdegc
    driven(model, plant, [profile.active_mw] * 30)
    assert plant.temperature_mdegc > now_mdegc + 8_000 and abs(forecast[2] - plant.temperature_mdegc) < 1_000


def test_more_power_is_never_forecast_to_be_cooler() -> None:
    model, _ = learned()
    forecasts = [model.forecast(power_mw) for power_mw in range(0, 40_000, 1_000)]
    assert None not in forecasts and forecasts == sorted(forecasts, key=lambda each: each or ())
    assert all(type(each) is int for forecast in forecasts for each in forecast or ())


def test_the_same_samples_give_the_same_bits() -> None:
    (one, _), (other, _) = learned(), learned()
    assert one.forecast(9_000) == other.forecast(9_000) and one._sums == other._sums and one._fit == other._fit


def test_there_is_no_forecast_before_the_model_has_proved_itself() -> None:
    profile = load_profile("orin_nano")
    model, plant = ThermalModel(), ThermalPlant(profile, 0)
    assert model.forecast(1_000) is None and model.recent_mw is None
    driven(model, plant, [profile.idle_mw] * 200)
    assert model.forecast(profile.active_mw) is None, "power that never changed says nothing about power"


def test_a_model_that_was_right_stays_so_while_nothing_but_noise_happens() -> None:
    model, plant = learned()
    chance, profile = random.Random(6), load_profile("jalapeno_edge")
    driven(model, plant, [profile.idle_mw] * 600)
    for _ in range(300):
        plant.advance(plant.now_us + 2 * SECOND_US, profile.idle_mw)
        model.observe(plant.now_us, plant.temperature_mdegc + chance.randrange(-150, 151), profile.idle_mw)
    assert model.forecast(profile.active_mw) is not None


@pytest.mark.parametrize("power_mw", [0, 5_000])
def test_a_sensor_that_is_stuck_gives_no_forecast(power_mw: int) -> None:
    model, chance = ThermalModel(), random.Random(1)
    for number in range(500):
        model.observe(number * 2 * SECOND_US, 55_000, power_mw or chance.randrange(20_000))
        assert model.forecast(20_000) is None


def test_a_sensor_that_jumps_at_random_gives_no_forecast() -> None:
    model, chance, given_out = ThermalModel(), random.Random(2), 0
    for number in range(600):
        model.observe(number * 2 * SECOND_US, chance.randrange(20_000, 90_000), chance.randrange(20_000))
        given_out += model.forecast(10_000) is not None
    assert given_out == 0


def test_a_model_that_was_right_is_not_believed_after_its_sensor_went_mad() -> None:
    model, plant = learned()
    assert model.proven
    chance = random.Random(3)
    for number in range(1, 200):
        model.observe(plant.now_us + number * 2 * SECOND_US, chance.randrange(20_000, 90_000), chance.randrange(20_000))
    assert not model.proven and model.forecast(1_000) is None


def test_a_clock_that_jumps_to_1970_or_far_ahead_begins_the_model_anew() -> None:
    for jump_us in (-(10**15), -1, MAX_GAP_US + 1, 10**15):
        model, plant = learned()
        model.observe(plant.now_us + jump_us, plant.temperature_mdegc, 3_000)
        assert model.forecast(3_000) is None and model._samples == 1
    model, plant = learned()
    before = model.forecast(3_000)
    model.observe(plant.now_us, 90_000, 20_000)
    assert model.forecast(3_000) == before, "a second sample of the same moment is none"


readings = st.tuples(
    st.integers(-(2**70), 2**70) | st.integers(0, 5_000_000),
    st.none() | st.integers(-(2**70), 2**70) | st.integers(20_000, 90_000),
    st.none() | st.integers(-(2**70), 2**70) | st.integers(0, 20_000),
)


@settings(max_examples=60)
@given(st.lists(readings, max_size=120), st.booleans())
def test_whatever_sensors_say_nothing_raises_and_no_forecast_runs_away(
    samples: list[tuple[int, int | None, int | None]], begun: bool
) -> None:
    model, now_us = (learned()[0] if begun else ThermalModel()), 10**9
    for interval_us, temperature_mdegc, power_mw in samples:
        now_us += interval_us
        model.observe(now_us, temperature_mdegc, power_mw)
        for asked_mw in (-(2**70), 0, 2**70):
            forecast = model.forecast(asked_mw)
            assert forecast is None or all(abs(each - model._temperature_mdegc) <= MAX_RISE_MDEGC for each in forecast)


def test_a_busy_share_serves_where_nothing_measures_power() -> None:
    profile = load_profile("raspberry_pi_5")
    model, plant, chance = ThermalModel(), ThermalPlant(profile, 0), random.Random(4)
    for _ in range(12):
        share = chance.randrange(1000)
        for _ in range(20):
            plant.advance(plant.now_us + 2 * SECOND_US, profile.idle_mw + (profile.active_mw - profile.idle_mw) * share // 1000)
            model.observe(plant.now_us, plant.temperature_mdegc, share)
    forecast = model.forecast(1000)
    plant.advance(plant.now_us + 60 * SECOND_US, profile.active_mw)
    assert forecast is not None and abs(forecast[2] - plant.temperature_mdegc) < 1_000


def test_a_board_that_never_measures_power_is_forecast_by_how_busy_it_is_until_it_does() -> None:
    profile = load_profile("raspberry_pi_5")
    heat, plant = Heat(), ThermalPlant(profile, 0)
    for share in ([0] * 20 + [1000] * 25) * 5:
        plant.advance(plant.now_us + 2 * SECOND_US, profile.idle_mw + (profile.active_mw - profile.idle_mw) * share // 1000)
        heat.observe(plant.now_us, plant.temperature_mdegc, 80_000, None, share)
    assert heat.forecast_mdegc is not None
    heat.observe(plant.now_us + SECOND_US, plant.temperature_mdegc, 80_000, profile.idle_mw, 1000)
    assert heat.forecast_mdegc is None, "per mille and mW are not mixed"
    heat.observe(plant.now_us + 2 * SECOND_US, plant.temperature_mdegc, 80_000, None, 1000)
    assert heat.model.recent_mw == profile.idle_mw


@pytest.mark.parametrize("profile_name", PROFILES)
def test_a_power_sensor_that_sees_only_moments_still_serves(profile_name: str) -> None:
    """Jobs are shorter than the time between two readings: each reading is full or idle power, right on the mean only."""
    chance, profile = random.Random(5), load_profile(profile_name)
    plant, model = ThermalPlant(profile, 0), ThermalModel()
    errors, naive = list[int](), list[int]()
    for _ in range(25):
        share = chance.randrange(1000)
        load_mw = profile.idle_mw + (profile.active_mw - profile.idle_mw) * share // 1000
        for number in range(25):
            plant.advance(plant.now_us + 2 * SECOND_US, load_mw)
            seen_mw = profile.active_mw if chance.randrange(1000) < share else profile.idle_mw
            model.observe(plant.now_us, plant.temperature_mdegc, seen_mw)
            if number % 8 == 0 and (forecast := model.forecast(load_mw)) is not None:
                future = copy.copy(plant)
                future.advance(plant.now_us + 60 * SECOND_US, load_mw)
                errors.append(abs(forecast[2] - future.temperature_mdegc))
                naive.append(abs(plant.temperature_mdegc - future.temperature_mdegc))
    assert len(errors) > 40 and 3 * mean(errors) < 2 * mean(naive)


def test_headroom_is_to_the_warmest_of_now_and_what_is_forecast() -> None:
    profile = load_profile("jalapeno_edge")
    heat, plant = Heat(), ThermalPlant(profile, 0)
    heat.observe(0, 40_000, 85_000, None)
    assert (heat.headroom_mdegc, heat.forecast_mdegc) == (45_000, None)
    heat.observe(0, None, 85_000, 3_000)
    assert (heat.headroom_mdegc, heat.forecast_mdegc) == (None, None)
    for load_mw in ([profile.idle_mw] * 20 + [profile.active_mw] * 25) * 5 + [profile.idle_mw] * 40 + [profile.active_mw] * 8:
        plant.advance(plant.now_us + 2 * SECOND_US, load_mw)
        heat.observe(plant.now_us, plant.temperature_mdegc, 85_000, load_mw)
    assert heat.forecast_mdegc is not None and heat.headroom_mdegc == 85_000 - heat.forecast_mdegc[2]
    assert heat.headroom_mdegc < 85_000 - plant.temperature_mdegc - 500
    for _ in range(20):
        plant.advance(plant.now_us + 2 * SECOND_US, profile.idle_mw)
        heat.observe(plant.now_us, plant.temperature_mdegc, 85_000, profile.idle_mw)
    assert heat.headroom_mdegc == 85_000 - plant.temperature_mdegc, "it cools: now is warmest"


@given(st.integers(0, 120_000), st.sampled_from((*FAST_MS, *SLOW_MS)))
def test_a_decay_is_the_exponential(interval_ms: int, constant_ms: int) -> None:
    assert abs(decay(interval_ms, constant_ms) - 65_536 * math.exp(-interval_ms / constant_ms)) <= 3


@given(st.lists(st.lists(st.integers(-50, 50), min_size=4, max_size=4), min_size=4, max_size=4), st.lists(
    st.integers(-50, 50), min_size=4, max_size=4))  # fmt: skip
def test_a_system_that_is_solved_is_solved(rows: list[list[int]], wanted: list[int]) -> None:
    matrix = [[sum(a * b for a, b in zip(one, other, strict=True)) + (i == j) for j, other in enumerate(rows)]
              for i, one in enumerate(rows)]  # fmt: skip
    right = [sum(each * x for each, x in zip(row, wanted, strict=True)) for row in matrix]
    assert solve(matrix, right) == [each << 16 for each in wanted]
    assert solve([[0] * 4] * 4, right) is None
