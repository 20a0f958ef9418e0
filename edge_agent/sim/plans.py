"""The sections of a scenario file, as frozen values: boards, models, links, outages, faults, arrivals.

Rules: whole numbers with their unit in the name; every field says what it may be, and has a default that does no harm
(docs/simulator.md explains each).
"""

from __future__ import annotations

from dataclasses import dataclass

from board_support.profile import BOUNDS, FORMATS
from edge_agent.core.chat import CHAT
from edge_agent.core.values import MAX_BOARDS, DataClass, TrustTier
from edge_agent.sim.tables import setting

MAX_DURATION_S = 7 * 86_400
TIERS = tuple(tier.name.lower() for tier in TrustTier)
WAYS = ("both", "to_broker", "from_broker")
TRACES = ("azure", "mooncake")
DECEITS = ("equivocates", "forks_receipts", "denounces", "stale_quotes")
"""What a board's messages are changed for on their way out (``sim.hostile``)."""
HOSTILE = (*DECEITS, "swapped_model", "cloned_key", "rolled_back", "wrong_results")
FAULTS = ("kill", "power_cut", "heat", "engine", "liar", "clock_1970", *HOSTILE)
_AMBIENT = {"low": BOUNDS["ambient_mdegc"][0], "high": BOUNDS["ambient_mdegc"][1]}


@dataclass(frozen=True, slots=True)
class BoardPlan:
    """``[[boards]]``. With ``count`` the ids are ``id-1``, ``id-2`` and so on."""

    id: str = setting()
    profile: str = setting()
    count: int = setting(1, low=1, high=MAX_BOARDS)
    models: tuple[str, ...] = setting(())
    trust: str = setting("affirming", one_of=TIERS)
    ambient_mdegc: int = setting(25_000, **_AMBIENT)
    kv_bytes: int = setting(256 * 2**20, high=2**50)
    """Hot memory for the KV of sessions that talk."""
    ram_bytes: int = setting(256 * 2**20, high=2**50)
    """Memory for parked KV; what does not fit is on disk."""
    joins_ms: int = setting(0, high=MAX_DURATION_S * 1000)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """``[[models]]``. Talk (task ``chat``): the figures are a token's. Perception: they are an inference's.

    ``weight_bytes`` are read once an inference, or once a step of all turns that talk.  ``width`` is the depth and the width of
    its matrix products (0: they fill the array), ``launches`` how many operators one inference or step is.
    """

    name: str = setting()
    task: str = setting()
    quality_permille: int = setting(high=1000)
    macs: int = setting(low=1)
    weight_bytes: int = setting()
    number_format: str = setting("int8", one_of=FORMATS)
    width: int = setting(0, high=2**20)
    launches: int = setting(1, low=1, high=10_000)
    activation_bytes: int = setting(0)
    io_bytes: int = setting(0)
    kv_bytes: int = setting(0, high=2**24)
    """Talk: of one token, while it is hot."""
    parked_bytes: int = setting(0, high=2**24)
    window_tokens: int = setting(0, high=2**20)
    parallel: int = setting(8, low=1, high=256)
    """Talk: turns at once."""

    @property
    def talks(self) -> bool:
        return self.task == CHAT


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """``[links]``: every board's way to the broker. What is lost is sent again after a second."""

    delay_us: int = setting(1_000, high=10**7)
    jitter_us: int = setting(500, high=10**7)
    loss_permille: int = setting(0, high=999)
    bytes_per_ms: int = setting(10_000, low=1, high=10**7)
    """A board's way up; what is sent waits for what was sent before."""


@dataclass(frozen=True, slots=True)
class Outage:
    """``[[outages]]``: the broker is down, or ``boards`` are cut off from it, both ways or one."""

    kind: str = setting(one_of=("broker", "cut"))
    from_ms: int = setting(high=MAX_DURATION_S * 1000)
    to_ms: int = setting(high=MAX_DURATION_S * 1000)
    boards: tuple[str, ...] = setting(())
    way: str = setting("both", one_of=WAYS)
    forgets: bool = setting(False)
    """A broker that comes back without its sessions and retained messages."""


@dataclass(frozen=True, slots=True)
class Fault:
    """``[[faults]]`` on ``boards``, from ``from_ms`` to ``to_ms``.

    ``kill`` and ``power_cut``: down from one to the other.  ``heat``: the air is at ``ambient_mdegc``.  ``engine``: of 1000 jobs
    ``fail_permille`` fail half-way.  ``liar``: its records say that nothing waits there, and costs of ``cost_permille`` of 1000.
    ``clock_1970``: its wall clock has never been set.

    Where boards attest (``[attest]``), they may be hostile: ``swapped_model`` (other bytes of its first model are mapped than it
    offers), ``equivocates`` (half of the boards are shown other quotes than the rest), ``cloned_key`` (a second board with its
    key), ``rolled_back`` (at ``from_ms`` its ledger is put back to two boots before), ``forks_receipts`` (receipts of one number
    for many answers), ``wrong_results`` (signed answers that are wrong), ``denounces`` (it appraises everybody as
    contraindicated), ``stale_quotes`` (it shows nothing).
    """

    kind: str = setting(one_of=FAULTS)
    boards: tuple[str, ...] = setting()
    from_ms: int = setting(0, high=MAX_DURATION_S * 1000)
    to_ms: int = setting(MAX_DURATION_S * 1000, high=MAX_DURATION_S * 1000)
    ambient_mdegc: int = setting(45_000, **_AMBIENT)
    fail_permille: int = setting(500, high=1000)
    cost_permille: int = setting(1000, low=1, high=1000)


@dataclass(frozen=True, slots=True)
class ArrivalPlan:
    """``[[arrivals]]``: where requests come from.

    ``azure`` and ``mooncake`` replay a trace (or, without its file, a process with its statistics), at its own speed or at
    ``rate_mhz`` (thousandths of a request a second).  ``poisson`` and ``bursty`` draw at ``rate_mhz``; ``cv_permille`` is how
    uneven ``bursty`` is.  ``camera``: a request every ``period_ms`` at each board of ``ingress``.
    """

    kind: str = setting(one_of=(*TRACES, "poisson", "bursty", "camera"))
    deadline_ms: int = setting(low=1, high=3_600_000)
    task: str = setting(CHAT)
    model: str = setting("")
    from_ms: int = setting(0, high=MAX_DURATION_S * 1000)
    to_ms: int = setting(MAX_DURATION_S * 1000, high=MAX_DURATION_S * 1000)
    rate_mhz: int = setting(0, high=10**8)
    period_ms: int = setting(1_000, low=1, high=86_400_000)
    limit: int = setting(0)
    """So many requests at most; 0: no limit."""
    cv_permille: int = setting(3_000, low=1_000, high=20_000)
    deadline_token_us: int = setting(0, high=10**7)
    """On top of the deadline for each token of the answer."""
    quality_permille: int = setting(0, high=1000)
    energy_mj: int = setting(0, high=10**9)
    trust: str = setting("none", one_of=TIERS[1:])
    data: str = setting("private", one_of=tuple(DataClass))
    size_bytes: int = setting(16_384, low=1, high=2**22)
    """Of a picture."""
    prompt_permille: int = setting(1000, low=1, high=10_000)
    answer_permille: int = setting(1000, low=1, high=10_000)
    """Of the lengths in the trace."""
    max_prompt_tokens: int = setting(4_096, low=1, high=65_000)
    turns: int = setting(1, low=1, high=1_000)
    """``poisson``, ``bursty``: how many turns a talk has on average; 1: each stands for itself."""
    clients: int = setting(64, low=1, high=100_000)
    roam_permille: int = setting(50, high=1000)
    """How many of 1000 requests come in at another board than their client's own."""
    ingress: tuple[str, ...] = setting(())
    """The boards at which they come in; all when empty."""
