"""Small worlds for the tests of the simulator: a scenario in a few lines, and a fleet that counts what boards say."""

from __future__ import annotations

from collections import Counter

from edge_agent.sim.fleet import SimFleet
from edge_agent.sim.scenario import Scenario, parse_scenario

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
    """Counts what each board publishes, by the last word of the topic, from ``counting_from_us`` of the load on."""

    counting_from_us = 0

    def note(self, text: str, payload: bytes | memoryview = b"") -> None:
        super().note(text, payload)
        words = text.split()
        if len(words) == 5 and words[1:3] == [">", "publish"] and self.since_start_us >= self.counting_from_us:
            self.said[words[0], words[4].split("/")[-1]] += 1

    @property
    def said(self) -> Counter[tuple[str, str]]:
        if not hasattr(self, "_said"):
            self._said = Counter[tuple[str, str]]()
        return self._said
