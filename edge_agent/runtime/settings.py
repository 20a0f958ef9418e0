"""What an engine child may use, as frozen values with bounds.

Rules: defaults are safe; the one unsafe setting has ``unsafe`` in its name.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.core.errors import ConfigError
from edge_agent.core.values import bounded

RUNTIMES = ("auto", "ai_edge_litert", "tflite_runtime")
TFLITE_ENGINE = "edge_agent.runtime.tflite:TfliteEngine"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Raises ``RefusedError`` when built with a value out of bounds.

    ``memory_bytes``: address space for the model and its work, on top of what the libraries take.
    ``arena_bytes``: shared memory for one request's inputs and outputs; only touched pages cost.
    ``max_deaths`` of the child within ``death_window`` invocations quarantine the model.
    ``engine``: ``module:class`` of the ``Engine`` that the child runs.
    """

    runtime: str = "auto"
    threads: int = 1
    memory_bytes: int = 4 * 2**30
    arena_bytes: int = 128 * 2**20
    load_limit_us: int = 60_000_000
    invoke_limit_us: int = 30_000_000
    max_waiting: int = 64
    max_deaths: int = 3
    death_window: int = 100
    engine: str = TFLITE_ENGINE
    unsafe_without_seccomp: bool = False

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise ConfigError("engine runtime", self.runtime, ", ".join(RUNTIMES))
        bounded("engine threads", self.threads, 1, 64)
        bounded("engine memory_bytes", self.memory_bytes, 16 * 2**20, 2**40, "bytes")
        bounded("engine arena_bytes", self.arena_bytes, 2**20, 2**31, "bytes")
        bounded("engine load_limit_us", self.load_limit_us, 1, 3_600_000_000, "µs")
        bounded("engine invoke_limit_us", self.invoke_limit_us, 1, 3_600_000_000, "µs")
        bounded("engine max_waiting", self.max_waiting, 1, 100_000)
        bounded("engine max_deaths", self.max_deaths, 1, 100)
        bounded("engine death_window", self.death_window, 1, 10**6, "invocations")
