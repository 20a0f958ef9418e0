"""What a simulated model costs on a machine: the roofline of ``board_support`` over the figures of a scenario's ``[[models]]``.

Owns the works of an inference, a prefill and a decode step, and the honest priors that a board offers before it has measured.
Rules: integers; the weights of a language model cross the memory bus anew in every step (no board here holds them on the chip);
reading KV is memory traffic on top.  "Dynamic" energy is what is above the machine's idle power.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

from board_support.profile import Profile
from board_support.roofline import ModelWork, OpWork, estimate
from edge_agent.core.values import ModelOffer
from edge_agent.core.wanted import TYPICAL_ANSWER_TOKENS
from edge_agent.sim.scenario import ModelPlan

CHUNK_TOKENS = 128
"""Of a prompt, in one pass over the weights, as the engine does it."""
MAX_KNOWN = 4096
RESTORE_SHARE = 8
"""Turning parked KV into hot KV runs at an eighth of the memory's speed: the share that is assumed for a CPU's unpacking loop."""
DISK_BYTES_PER_US = 40
"""An SD card's sequential read, assumed."""
TYPICAL_CONTEXT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Spent:
    """Time of the whole accelerator, and dynamic energy."""

    busy_us: int
    dynamic_nj: int


def digest_of(model: str) -> bytes:
    """The digest that stands for a simulated model's file."""
    return sha256(b"simulated " + model.encode()).digest()


class Costs:
    """The costs of models on one machine; what was reckoned is kept."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._known: dict[tuple[str, int, int, bool], Spent] = {}

    def inference(self, model: ModelPlan, clock_permille: int = 1000, *, cold: bool = False) -> Spent:
        """Of a perception model; ``cold``: another model's weights are on the chip."""
        return self._work(model, 1, clock_permille, cold)

    def prefill(self, model: ModelPlan, tokens: int, cached_tokens: int = 0, clock_permille: int = 1000) -> Spent:
        """Of ``tokens`` new tokens after ``cached_tokens`` whose KV is there."""
        whole, rest = divmod(max(1, tokens), CHUNK_TOKENS)
        busy_us = dynamic_nj = read_tokens = 0
        for chunk_tokens, times in ((CHUNK_TOKENS, whole), (rest, 1 if rest else 0)):
            if times:
                each = self._work(model, chunk_tokens, clock_permille, cold=True)
                busy_us, dynamic_nj = busy_us + times * each.busy_us, dynamic_nj + times * each.dynamic_nj
        chunks = whole + bool(rest)
        read_tokens = cached_tokens * chunks + CHUNK_TOKENS * chunks * (chunks - 1) // 2
        return self._with_kv(Spent(busy_us, dynamic_nj), model, read_tokens)

    def step(self, model: ModelPlan, turns: int, context_tokens: int, clock_permille: int = 1000) -> Spent:
        """One decode step of ``turns`` turns together, ``context_tokens`` the KV of all of them."""
        return self._with_kv(self._work(model, turns, clock_permille, cold=True), model, context_tokens)

    def _work(self, model: ModelPlan, rows: int, clock_permille: int, cold: bool) -> Spent:
        key = (model.name, rows, clock_permille, cold)
        if key not in self._known:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            cost = estimate(work_of(model, rows), self.profile, clock_permille, cold=cold)
            self._known[key] = Spent(cost.busy_us, max(0, cost.energy_uj * 1000 - self.profile.idle_mw * cost.busy_us))
        return self._known[key]

    def _with_kv(self, spent: Spent, model: ModelPlan, tokens: int) -> Spent:
        read_bytes = min(tokens, 2**40) * model.kv_bytes
        busy_us = read_bytes // self.profile.sustained_bytes_per_us
        return Spent(max(1, spent.busy_us + busy_us), spent.dynamic_nj + read_bytes * self.profile.byte_fj // 10**6)

    # what a board says of itself before it has measured anything

    def offer(self, model: ModelPlan) -> ModelOffer:
        """The roofline prior. Of talk: a typical answer alone, as ``placement.options.weigh`` adds the prefill to it."""
        spent = self._answer(model, TYPICAL_ANSWER_TOKENS) if model.talks else self.inference(model)
        return ModelOffer(
            model.name, model.task, digest_of(model.name), model.quality_permille, max(1, spent.busy_us), self.energy_uj(spent),
            parallel=model.parallel if model.talks else 1,
        )  # fmt: skip

    def _answer(self, model: ModelPlan, tokens: int) -> Spent:
        step = self.step(model, 1, TYPICAL_CONTEXT_TOKENS)
        return Spent(step.busy_us * tokens, step.dynamic_nj * tokens)

    def energy_uj(self, spent: Spent) -> int:
        """As a board reports it: with its idle power for as long."""
        return (spent.dynamic_nj + self.profile.idle_mw * spent.busy_us) // 1000

    def prefill_tok_s(self, model: ModelPlan) -> int:
        return max(1, CHUNK_TOKENS * 1_000_000 // self.prefill(model, CHUNK_TOKENS).busy_us)

    def ram_tok_s(self, model: ModelPlan) -> int:
        moved_bytes = (model.parked_bytes + model.kv_bytes) * RESTORE_SHARE
        return max(1, min(10**9, self.profile.sustained_bytes_per_us * 1_000_000 // moved_bytes))

    def disk_tok_s(self, model: ModelPlan) -> int:
        from_disk_us = model.parked_bytes * 1000 // DISK_BYTES_PER_US
        return max(1, min(self.ram_tok_s(model), 10**9 // max(1, from_disk_us)))


def work_of(model: ModelPlan, rows: int) -> ModelWork:
    """One inference of a perception model, or one pass of ``rows`` tokens through a language model, as operators."""
    macs, launches = model.macs * rows, model.launches
    product = model.width * model.width
    ops = OpWork(
        kind=model.task,
        macs=max(1, macs // launches),
        weight_bytes=model.weight_bytes // launches,
        activation_bytes=model.activation_bytes // launches,
        positions=rows if product else 0,
        depth=model.width,
        outputs=model.width,
        repeats=max(1, model.macs // launches // product) if product else 1,
        number_format=model.number_format,
    )
    return ModelWork((ops,) * launches, model.io_bytes)
