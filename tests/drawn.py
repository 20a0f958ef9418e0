"""Hypothesis strategies of everything that travels: requests, results, offers, records, presence."""

from __future__ import annotations

from math import prod

from hypothesis import strategies as st

from edge_agent.core.kv import KvHome, KvState, Place
from edge_agent.core.values import (
    DTYPE_BYTES,
    INVOKE,
    MAX_COST,
    MAX_DEADLINE_US,
    SESSION_NAME,
    AnswerPart,
    EnergyKind,
    InferenceRequest,
    InferenceResult,
    Limits,
    ModelOffer,
    Status,
    Tensor,
)
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
limits = st.builds(Limits, st.integers(1, MAX_DEADLINE_US), st.none() | st.integers(1, 10**12), st.integers(0, 1000))
requests = st.builds(
    InferenceRequest, request_ids, task_names.filter(lambda task: task != INVOKE), named_tensors, st.none() | model_names, limits,
    st.just("") | st.from_regex(SESSION_NAME, fullmatch=True),
)  # fmt: skip
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
)
presences = st.builds(Presence, board_ids, st.integers(0, 2**53), st.sampled_from(list(Standing)))
