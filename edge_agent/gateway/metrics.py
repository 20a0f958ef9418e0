"""Figures of the HTTP door as Prometheus reads them.

Rules: written by hand (120 lines against a dependency that keeps a global registry); every label comes from a set that the
code or the configuration bounds, never from a client; times in seconds, as Prometheus wants them.  Source: Prometheus text
exposition format 0.0.4.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from edge_agent.core.chat import TurnEnd
from edge_agent.gateway.talker import Figure

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "sly_"
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts of values at or under each of ``bounds``, their number and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum!r}"
        yield f"{name}_count {total}"


class GatewayMetrics:
    """What this door counts of its own; the agent's figures are added at each scrape."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.turns: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.served_now = 0
        self.first_token_s = Histogram(FIRST_TOKEN_S)
        self.between_tokens_s = Histogram(BETWEEN_TOKENS_S)

    def ended(self, end: TurnEnd) -> None:
        self.turns[end.finish.value] += 1
        for kind in ("prompt", "cached", "recomputed", "completion", "drafted", "accepted"):
            self.tokens[kind] += getattr(end, f"{kind}_tokens")

    def text(self, figures: Iterable[Figure]) -> str:
        lines: list[str] = []
        for family, samples in _families([*self._own(), *figures]).items():
            lines += [f"# HELP {family} {_help(samples[0].about)}", f"# TYPE {family} {samples[0].kind}"]
            lines += [f"{family}{_labelled(sample.labels)} {_number(sample.value)}" for sample in samples]
        lines += _histogram("gateway_first_token_seconds", "From a request's arrival to its first text", self.first_token_s)
        lines += _histogram("gateway_between_tokens_seconds", "Between two tokens of an answer", self.between_tokens_s)
        return "\n".join(lines) + "\n"

    def _own(self) -> Iterator[Figure]:
        for (route, status), count in sorted(self.requests.items()):
            labels = (("route", route), ("status", str(status)))
            yield Figure("gateway_requests_total", "Requests answered, by route and status", count, "counter", labels)
        yield Figure("gateway_requests_served_now", "Turns in work at this door", self.served_now)
        for outcome in ("stop", "length", "cancelled", "refused", "failed"):
            about = "Turns by how they ended; cancelled: the client went away"
            yield Figure("gateway_turns_total", about, self.turns[outcome], "counter", (("outcome", outcome),))
        for kind in ("prompt", "cached", "recomputed", "completion", "drafted", "accepted"):
            about = "Tokens by kind; cached and recomputed are parts of prompt"
            yield Figure("gateway_tokens_total", about, self.tokens[kind], "counter", (("kind", kind),))


def _families(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    families: dict[str, list[Figure]] = {}
    for figure in figures:
        families.setdefault(PREFIX + figure.name, []).append(figure)
    return families


def _histogram(name: str, about: str, histogram: Histogram) -> list[str]:
    return [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} histogram", *histogram.lines(PREFIX + name)]


def _labelled(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
