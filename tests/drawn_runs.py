"""Runs made up for pictures and reports: no simulation, every kind of outcome."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from edge_agent.core.chat import CHAT
from edge_agent.core.values import Status
from edge_agent.core.wanted import TALK_SHAPE, Wanted
from edge_agent.sim.results import BoardUse, Run, Sample, Served
from edge_agent.sim.scenario import ArrivalPlan, BoardPlan, ModelPlan, Scenario

PROFILES = ("orin_nano", "orin_nano", "raspberry_pi_5", "jalapeno_edge")
MODELS = (
    ModelPlan("talk-small", CHAT, 600, 10**8, 10**8, kv_bytes=1024, parked_bytes=512, window_tokens=2048),
    ModelPlan("faces", "detect_faces", 800, 10**8, 10**6),
)


def drawn_scenario() -> Scenario:
    boards = tuple(BoardPlan(f"b{n}", profile, models=("talk-small", "faces")) for n, profile in enumerate(PROFILES))
    arrivals = (ArrivalPlan("poisson", 5_000, rate_mhz=2_000), ArrivalPlan("camera", 500, "detect_faces"))
    return Scenario("drawn", "made up", 60_000_000, 0, boards, MODELS, arrivals)


def drawn_run(seed: int = 0, requests: int = 200, placer: str = "table") -> Run:
    draw, scenario = Random(seed), drawn_scenario()
    served = tuple(_served(draw, number) for number in range(requests))
    samples = tuple(
        Sample(second * 10**6, board.id, 40_000 + second * 300 + 2_000 * n, 5_000, draw.randrange(10**6), draw.randrange(3))
        for second in range(60)
        for n, board in enumerate(scenario.boards)
    )
    boards = tuple(
        BoardUse(b.id, b.profile, requests // 4, 60_000_000, 20_000_000, 10**8, 5 * 10**7, 60_000, 0) for b in scenario.boards
    )
    incidents = ((20_000_000, "b2 is lost"),)
    return Run(scenario, seed, placer, served, ("f" * 32,), samples, boards, incidents, "0" * 64, 60_000_000, 65_000_000)


def _served(draw: Random, number: int) -> Served:
    talks = draw.random() < 0.5
    wanted = (
        Wanted(CHAT, "", TALK_SHAPE + draw.choice((5, 7, 9)), 2048, 8_000_000)
        if talks
        else Wanted("detect_faces", "", 15, 16_384, 500_000)
    )
    arrived_us = draw.randrange(55_000_000)
    busy_us = draw.randrange(100_000, 4_000_000) if talks else draw.randrange(5_000, 200_000)
    began_us = arrived_us + draw.randrange(1_000, 400_000)
    done = Served(
        f"{number:032x}", f"b{draw.randrange(4)}", wanted, f"s{number % 7}" if talks else "", arrived_us, began_us,
        began_us + busy_us, began_us + busy_us + 2_000, f"b{draw.randrange(4)}", "talk-small" if talks else "faces",
        Status.OK, "", busy_us, busy_us * 5, 700, draw.choice(("resident", "peer", "none")),
    )  # fmt: skip
    if draw.random() < 0.1:
        return replace(
            done, status=Status.SHED, began_us=0, ended_us=0, board="", model="", reason="no board in time", energy_uj=0
        )
    return done
