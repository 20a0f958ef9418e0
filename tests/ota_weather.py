"""What a rollout goes through in one seed: power cuts, cut links, a broker that restarts, an operator that goes, and then calm.

Rules: faults only while the weather lasts; when it is over everybody comes to the same end, whether or not the operator is there.

Run one seed, with its trace: ``python -m tests.ota_weather SEED [bad|good|moody]``; many, without: ``... SEED COUNT``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from edge_agent.transport.loopback import Delay, Faults, Partition, Way
from ota.rollout import Action, Verdict
from tests.ota_fleet import BACKENDS, NUMBER, OPERATOR, Flaw, OtaFleet

WEATHER_US = 90_000_000


class Weather:
    """Faults at random times until ``fleet.calm()``."""

    def __init__(self, fleet: OtaFleet, operator_goes: bool = True) -> None:
        self._fleet, self._random = fleet, Random(f"weather {fleet.seed}")
        faults = [self._cut_power, self._cut_power, self._partition, self._partition, self._stop_broker, self._rough_network]
        for _ in range(self._random.randrange(4, 14)):
            self._at_some_time(self._random.choice(faults))
        if operator_goes and self._random.random() < 0.5:
            self._at_some_time(fleet.operator.go)

    def orders(self) -> None:
        """Words of the operator's at random times."""
        for _ in range(self._random.randrange(1, 5)):
            action = self._random.choice((Action.PAUSE, Action.RUN, Action.PAUSE, Action.RUN, Action.ABORT, Action.ROLLBACK))
            self._at_some_time(lambda action=action: self._fleet.operator.change(action))  # type: ignore[misc]

    def _at_some_time(self, what: Callable[[], object]) -> None:
        self._fleet.after(self._random.randrange(WEATHER_US), what)

    def _cut_power(self) -> None:
        """Of some boards, at once or around their next commit."""
        boards = list(self._fleet.boards.values())
        for board in self._random.sample(boards, self._random.randrange(1, 1 + len(boards) // 3)):
            board.dies = self._random.choice(("", "before", "after"))
            if not board.dies:
                board.kill()
            self._fleet.after(self._random.randrange(1_000_000, 20_000_000), board.boot)

    def _partition(self) -> None:
        names = [*self._fleet.boards, OPERATOR]
        cut = frozenset(self._random.sample(names, self._random.randrange(1, 1 + len(names) // 2)))
        ways = self._random.choice((frozenset(Way), frozenset(Way), frozenset({Way.TO_BROKER}), frozenset({Way.FROM_BROKER})))
        self._fleet.note(f"cut off: {', '.join(sorted(cut))}")
        self._fleet.broker.partition(Partition(cut, ways))
        self._fleet.after(self._random.randrange(1_000_000, 30_000_000), self._fleet.broker.heal)

    def _stop_broker(self) -> None:
        broker, keep_sessions = self._fleet.broker, self._random.random() < 0.5
        if not broker.running:
            return
        self._fleet.note("the broker stops")
        broker.stop()
        wait_us = self._random.randrange(100_000, 10_000_000)
        self._fleet.after(wait_us, lambda: None if broker.running else broker.start(keep_sessions))

    def _rough_network(self) -> None:
        draw = self._random.randrange
        self._fleet.broker.wire.faults = Faults(
            Delay(draw(1, 50_000), draw(200_000), draw(100), 2_000_000), loss_permille=draw(300), duplicate_permille=draw(300),
            reorder_permille=draw(300),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """``begun``: the boards that ever fetched something of the release."""

    trace_digest: str
    verdict: Verdict
    begun: frozenset[str]
    virtual_us: int


def ride_out(seed: int, story: str = "moody", boards: int = 12, canary: int = 3, wave: int = 4, verbose: bool = False) -> Outcome:
    """A rollout through one weather. Raises ``BrokenPromiseError``.

    ``bad``: a release that fails where it is tried, if only on one class of hardware; ``good``: one that does not; ``moody``:
    either, and an operator who pauses, resumes, aborts and rolls back.
    """
    random = Random(f"story {seed}")
    fleet = OtaFleet(seed, boards, {"bad": bad, "good": good, "moody": moody}[story](random, boards), verbose)
    fleet.boot()
    fleet.run_for(random.randrange(2_000_000))
    fleet.push(canary, wave, random.choice((0, 20, 200, 500) if story == "moody" else (0, 20, 90)))
    weather = Weather(fleet)
    if story == "moody":
        weather.orders()
    fleet.run_for(WEATHER_US)
    fleet.calm()
    _see_to_it(fleet)
    fleet.run_until(fleet.has_arrived, "everybody comes to the same end")
    verdict = fleet.verdicts()[0]
    assert verdict is not None
    return Outcome(fleet.trace_digest, verdict, frozenset(fleet.begun), fleet.now_us)


def _see_to_it(fleet: OtaFleet) -> None:
    """The operator has to come back only if nobody has heard of its rollout, nobody has its release, or it is paused."""
    operator = fleet.operator
    is_paused = operator.rollout is not None and operator.rollout.action is Action.PAUSE
    if is_paused or not any(board.serving == NUMBER for board in fleet.boards.values()):
        operator.come()
    if is_paused:
        fleet.run_for(10_000_000)
        operator.change(Action.RUN)


def good(random: Random, boards: int) -> Flaw:
    """Nothing is wrong anywhere."""
    return lambda board, when: ""


def bad(random: Random, boards: int) -> Flaw:
    """It fails at its golden input, when it is loaded, or at some inference: everywhere, or on one class of hardware."""
    when = random.choice(("loaded", "probed", "run"))
    classes = set(random.choice((BACKENDS, BACKENDS[:1], BACKENDS[1:2])))

    def flaw(board: str, now: str) -> str:
        hit = BACKENDS[int(board[1:]) % len(BACKENDS)] in classes and now == when
        return {"loaded": "the engine died", "probed": "another answer", "run": "NaN in its outputs"}[now] if hit else ""

    return flaw


def moody(random: Random, boards: int) -> Flaw:
    """It fails on some boards, or on none."""
    unlucky = {f"b{i:02d}" for i in random.sample(range(boards), random.choice((0, 0, 1, 2, boards // 2)))}

    def flaw(board: str, now: str) -> str:
        return "NaN in its outputs" if board in unlucky and now == "run" else ""

    return flaw


def main(arguments: list[str]) -> int:
    if arguments[1:] and arguments[1].isdigit():
        first, count = map(int, arguments)
        begun_s = time.perf_counter()
        for seed in range(first, first + count):
            for story in ("bad", "good", "moody"):
                ride_out(seed, story)
        print(f"{3 * count} runs in {time.perf_counter() - begun_s:.1f} s")
        return 0
    outcome = ride_out(int(arguments[0]), (arguments + ["moody"])[1], verbose=True)
    print(outcome.verdict, outcome.trace_digest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
