"""Small worlds for the tests of the simulator: a scenario in a few lines, and a fleet that counts what boards say."""

from __future__ import annotations

from collections import Counter

from edge_agent.sim.fleet import SimFleet
from edge_agent.sim.scenario import Scenario, parse_scenario
from edge_agent.transport.topics import Topics

MODELS = """
[[models]]
name = "detector"
task = "detect_objects"
quality_permille = 600
macs = 300_000_000
weight_bytes = 4_500_000

[[models]]
name = "talker"
task = "chat"
quality_permille = 550
macs = 135_000_000
weight_bytes = 135_000_000
kv_bytes = 12_240
parked_bytes = 6_480
window_tokens = 2048
"""
BOARDS = """
[[boards]]
id = "pi"
count = 2
profile = "raspberry_pi_5"
models = ["detector", "talker"]
[[boards]]
id = "orin"
profile = "orin_nano"
models = ["detector", "talker"]
"""
CAMERAS = '[[arrivals]]\nkind = "camera"\ntask = "detect_objects"\nperiod_ms = 500\ndeadline_ms = 400\n'
TALK = '[[arrivals]]\nkind = "poisson"\nrate_mhz = 1000\nprompt_permille = 250\nanswer_permille = 250\ndeadline_ms = 8000\n'


def world(*parts: str, duration_s: int = 8, boards: str = BOARDS) -> Scenario:
    """A scenario of the models and boards above, and of what ``parts`` say."""
    text = "\n".join((f'title = "test"\nduration_s = {duration_s}', MODELS, boards, *parts))
    return parse_scenario("test", text.encode())


class Overheard(SimFleet):
    """Counts what each board publishes, by the kind of topic, from ``counting_from_us`` of the load on; and each job that a board
    begins."""

    def __init__(self, scenario: Scenario, seed: int = 0, placer: str = "table") -> None:
        self.counting_from_us = 0
        self.said = Counter[tuple[str, str]]()
        self.executed = Counter[tuple[str, str]]()
        self._topics = Topics("home")
        super().__init__(scenario, seed, placer)

    def note(self, text: str, payload: bytes | memoryview = b"") -> None:
        super().note(text, payload)
        words = text.split()
        if words[1:3] == [">", "publish"] and self.since_start_us >= self.counting_from_us:
            topic = self._topics.parse(words[4])
            self.said[words[0], topic.kind.name] += 1
        elif words[1:3] == [">", "execute"]:
            self.executed[words[0], words[3]] += 1
