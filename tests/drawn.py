"""Hypothesis strategies of everything that travels: requests, results, offers, records, presence, digests."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from hypothesis import strategies as st

from edge_agent.core.kv import KvHome, KvState, Place
from edge_agent.core.values import (
    DTYPE_BYTES,
    INVOKE,
    MAX_ANSWER_TOKENS,
    MAX_BOARDS,
    MAX_COST,
    MAX_DEADLINE_US,
    MAX_MEASURED,
    MAX_SHAPE,
    SESSION_NAME,
    AnswerPart,
    DataClass,
    EnergyKind,
    InferenceRequest,
    InferenceResult,
    Limits,
    ModelOffer,
    ShapeCost,
    Status,
    Tensor,
    TrustTier,
)
from edge_agent.core.waits import SLACKS_US
from edge_agent.core.wanted import MAX_RATE_MHZ, MAX_SIZE_BYTES, Demand, Wanted
from edge_agent.gossip.agreement import MAX_PASSED_ON, BoardDigest, Version
from edge_agent.gossip.presence import Presence, Standing
from edge_agent.gossip.record import BoardRecord

board_ids = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,31}", fullmatch=True)
model_names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
task_names = st.from_regex(r"[a-z][a-z0-9_]{0,31}", fullmatch=True)
request_ids = st.binary(min_size=16, max_size=16).map(bytes.hex)
texts = st.text(st.characters(codec="utf-8"), max_size=40)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size_bytes = prod(shape) * DTYPE_BYTES[dtype]
    return Tensor(dtype, shape, draw(st.binary(min_size=size_bytes, max_size=size_bytes)))


named_tensors = st.dictionaries(texts.filter(bool), tensors(), max_size=3)
trusts = st.sampled_from([TrustTier.NONE, TrustTier.WARNING, TrustTier.AFFIRMING])
data_classes = st.sampled_from(list(DataClass))
limits = st.builds(Limits, st.integers(1, MAX_DEADLINE_US), st.none() | st.integers(1, 10**12), st.integers(0, 1000), trusts)
requests = st.builds(
    InferenceRequest, request_ids, task_names.filter(lambda task: task != INVOKE), named_tensors, st.none() | model_names, limits,
    st.just("") | st.from_regex(SESSION_NAME, fullmatch=True), data_classes, st.just(0) | st.integers(1, MAX_ANSWER_TOKENS),
)  # fmt: skip
wanted = st.builds(
    Wanted, task_names.filter(lambda task: task != INVOKE), st.just("") | model_names, st.integers(0, MAX_SHAPE),
    st.integers(0, MAX_SIZE_BYTES), st.integers(1, MAX_DEADLINE_US), st.integers(0, 1000), st.just(0) | st.integers(1, MAX_COST),
    trusts, data_classes,
).map(Wanted.classed)  # fmt: skip
demands = st.lists(st.builds(Demand, wanted, st.integers(1, MAX_RATE_MHZ)), max_size=3, unique_by=lambda each: each.wanted).map(
    lambda some: tuple(sorted(some))
)
costs = st.integers(0, MAX_COST)
shapes = st.lists(
    st.builds(ShapeCost, st.integers(0, MAX_SHAPE), st.integers(1, MAX_COST), costs, st.integers(0, MAX_MEASURED)),
    max_size=3, unique_by=lambda each: each.shape,
).map(lambda some: tuple(sorted(some, key=lambda each: each.shape)))  # fmt: skip
waits = st.just((0, ())) | st.lists(costs, min_size=1 + len(SLACKS_US), max_size=1 + len(SLACKS_US)).map(
    lambda some: (max(some), tuple(sorted(some)[:-1]))
)
"""A queue, and what urgent jobs wait in it."""
parts = st.builds(AnswerPart, request_ids, st.integers(0, 2**20), texts.filter(bool), st.integers(0, 2**20))
results = st.builds(
    InferenceResult,
    request_ids,
    st.sampled_from(list(Status)),
    board_ids,
    st.just("") | model_names,
    st.just(b"") | st.binary(min_size=32, max_size=32),
    named_tensors,
    st.integers(0, 10**12),
    st.integers(0, 10**15),
    st.sampled_from(list(EnergyKind)),
    texts,
)
offers = st.builds(
    ModelOffer,
    model_names,
    task_names,
    st.binary(min_size=32, max_size=32),
    st.integers(0, 1000),
    st.integers(1, MAX_COST),
    st.integers(0, MAX_COST),
    st.integers(1, 256),
    shapes,
    st.integers(0, MAX_MEASURED),
)
homes = st.builds(KvHome, st.binary(min_size=16, max_size=16), st.integers(0, 2**31), st.sampled_from(list(Place)))
speeds = st.integers(0, 10**9)
kv_states = st.builds(
    KvState,
    model_names,
    st.binary(min_size=32, max_size=32),
    st.integers(1, 2**24),
    st.integers(1, 2**24),
    st.integers(0, 2**50),
    st.integers(1, 2**31),
    st.integers(0, MAX_COST),
    speeds,
    speeds,
    speeds,
    st.lists(homes, max_size=3, unique_by=lambda home: home.session).map(tuple),
)
kv_states = st.builds(lambda state, wait: replace(state, queue_us=wait[0], waits_us=wait[1]), kv_states, waits)
temperatures = st.none() | st.integers(-1_000_000, 1_000_000)
records = st.builds(
    BoardRecord,
    board_ids,
    st.integers(0, 2**53),
    st.integers(0, 2**53),
    texts,
    st.booleans(),
    st.booleans(),
    st.integers(0, MAX_COST),
    temperatures,
    temperatures,
    st.lists(offers, max_size=3, unique_by=lambda offer: offer.model).map(tuple),
    st.lists(kv_states, max_size=2, unique_by=lambda state: state.model).map(tuple),
    demands,
    st.none() | st.tuples(*[st.integers(-1_000_000, 1_000_000)] * 3),
)
records = st.builds(lambda record, wait: replace(record, queue_us=wait[0], waits_us=wait[1]), records, waits)
presences = st.builds(Presence, board_ids, st.integers(0, 2**53), st.sampled_from(list(Standing)))
counts, digest_bytes = st.integers(0, 2**53), st.binary(min_size=32, max_size=32)
versions = st.lists(st.builds(Version, board_ids, counts, counts), max_size=4, unique_by=lambda version: version.board).map(
    lambda some: tuple(sorted(some, key=lambda version: version.board))
)
digests = st.builds(
    BoardDigest, board_ids, counts, counts, digest_bytes, digest_bytes, digest_bytes, st.integers(0, MAX_BOARDS), versions,
    st.lists(st.binary(max_size=20), max_size=MAX_PASSED_ON).map(tuple),
)  # fmt: skip
