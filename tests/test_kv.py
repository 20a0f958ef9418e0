"""The arithmetic of blocks: where they begin, when they are sealed, and what names them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import (
    BLOCK_TOKENS,
    SINK_TOKENS,
    KvFormat,
    block_start,
    chain,
    full_blocks,
    next_name,
    packed_ids,
    room_in_block,
    root_name,
    sealed_blocks,
    unpacked_ids,
)

PRINT = bytes(range(32))
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=400)


@given(st.integers(0, 10**7))
def test_what_is_not_sealed_is_at_most_two_blocks_less_one_token(tokens: int) -> None:
    unsealed = tokens - (block_start(sealed_blocks(tokens)) if tokens >= SINK_TOKENS else 0)
    assert 0 <= unsealed < 2 * BLOCK_TOKENS


@given(st.integers(0, 10**7))
def test_a_block_is_sealed_exactly_when_the_one_after_it_is_full(tokens: int) -> None:
    assert sealed_blocks(tokens) == sum(block_start(block + 2) <= tokens for block in _near(full_blocks(tokens))) + max(
        0, full_blocks(tokens) - 4
    )


def _near(full: int) -> range:
    return range(max(0, full - 4), full + 1)


@given(st.integers(0, 10**7))
def test_the_room_in_a_block_ends_where_the_next_one_begins(tokens: int) -> None:
    room = room_in_block(tokens)
    assert 1 <= room <= BLOCK_TOKENS + SINK_TOKENS
    assert full_blocks(tokens + room) == full_blocks(tokens) + 1
    assert full_blocks(tokens + room - 1) == full_blocks(tokens)


@given(IDS, IDS)
def test_two_texts_share_the_names_of_their_common_blocks_and_no_other(ids: list[int], others: list[int]) -> None:
    common = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
    names, other_names = list(chain(PRINT, ids)), list(chain(PRINT, others))
    shared = 0 if common < SINK_TOKENS else 1 + full_blocks(common)
    assert names[:shared] == other_names[:shared]
    assert not set(names[shared:]) & set(other_names)


def test_every_block_of_a_chain_has_another_name() -> None:
    names = list(chain(PRINT, [7] * (SINK_TOKENS + 5 * BLOCK_TOKENS)))
    assert len(names) == len(set(names)) == 6
    assert list(chain(PRINT, [7] * (SINK_TOKENS - 1))) == []


def test_another_fingerprint_gives_other_names() -> None:
    assert root_name(PRINT, [1, 2, 3, 4]) != root_name(bytes(32), [1, 2, 3, 4])


def test_a_name_is_of_whole_blocks_only() -> None:
    with pytest.raises(ValueError, match="4 tokens, not 3"):
        root_name(PRINT, [1, 2, 3])
    with pytest.raises(ValueError, match="64 tokens, not 63"):
        next_name(PRINT, [1] * 63)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_ids_survive_packing(ids: list[int]) -> None:
    assert unpacked_ids(packed_ids(ids)) == tuple(ids)


def test_half_an_id_is_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes"):
        unpacked_ids(bytes(5))


def test_a_format_has_sizes_within_bounds() -> None:
    assert KvFormat(PRINT, 12_240, 414_720, 92_160, 32).window_tokens == 4 + 34 * 64
    with pytest.raises(RefusedError, match="fingerprint"):
        KvFormat(b"short", 1, 1, 1, 1)
    with pytest.raises(RefusedError, match="window_blocks"):
        KvFormat(PRINT, 1, 1, 1, 0)
