from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.sim.blocks import Allocation, BlockPool, hash_blocks


def admit(pool: BlockPool, tokens: list[int], salt: str = "") -> Allocation | None:
    """As the engine does: allocate, compute, commit."""
    hashes = hash_blocks(tokens, pool.block_size, salt)
    allocation = pool.allocate(len(tokens), hashes)
    if allocation is not None:
        pool.commit(allocation, hashes)
    return allocation


def must_admit(pool: BlockPool, tokens: list[int], salt: str = "") -> Allocation:
    allocation = admit(pool, tokens, salt)
    assert allocation is not None
    return allocation


def test_hashes_cover_everything_up_to_the_end_of_the_block() -> None:
    one, other = hash_blocks([1, 2, 3, 4, 5], 2), hash_blocks([9, 2, 3, 4, 5], 2)
    assert len(one) == 2
    assert not set(one) & set(other)
    assert hash_blocks([1, 2, 3, 4], 2, "salt") != one


def test_whole_blocks_of_a_known_beginning_are_cached() -> None:
    pool = BlockPool(8, 4)
    first = must_admit(pool, list(range(10)))
    second = must_admit(pool, [*range(9), 99])
    assert (first.cached_blocks, second.cached_blocks) == (0, 2)
    assert first.block_ids[:2] == second.block_ids[:2]
    assert first.block_ids[2] != second.block_ids[2]
    assert pool.used == 4


def test_the_last_token_is_never_cached() -> None:
    pool = BlockPool(8, 4)
    must_admit(pool, list(range(8)))
    assert must_admit(pool, list(range(8))).cached_blocks == 1


def test_a_salt_keeps_prompts_apart() -> None:
    pool = BlockPool(8, 4)
    must_admit(pool, list(range(9)), "a")
    assert must_admit(pool, list(range(9)), "b").cached_blocks == 0


def test_what_was_not_computed_is_not_cached() -> None:
    pool = BlockPool(8, 4)
    hashes = hash_blocks(list(range(9)), 4)
    aborted = pool.allocate(9, hashes)
    assert aborted is not None
    pool.free(aborted.block_ids)
    assert must_admit(pool, list(range(9))).cached_blocks == 0


def test_freed_blocks_stay_cached_until_they_are_needed() -> None:
    pool = BlockPool(4, 4)
    pool.free(must_admit(pool, list(range(9))).block_ids)
    assert pool.used == 0
    again = must_admit(pool, list(range(9)))
    assert again.cached_blocks == 2
    pool.free(again.block_ids)
    pool.free(must_admit(pool, list(range(100, 116))).block_ids)  # takes all four
    assert must_admit(pool, list(range(9))).cached_blocks == 0


def test_the_longest_idle_goes_first() -> None:
    pool = BlockPool(4, 4)
    old, new = list(range(5)), list(range(50, 55))
    pool.free(must_admit(pool, old).block_ids)
    pool.free(must_admit(pool, new).block_ids)
    pool.free(must_admit(pool, list(range(90, 95))).block_ids)
    assert must_admit(pool, new).cached_blocks == 1
    assert must_admit(pool, old).cached_blocks == 0


def test_no_blocks_left() -> None:
    pool = BlockPool(2, 4)
    held = must_admit(pool, list(range(5)))
    assert admit(pool, list(range(50, 55))) is None
    pool.free(held.block_ids)
    assert admit(pool, list(range(50, 55))) is not None
    assert pool.usage == 1.0


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20)
steps = st.lists(st.tuples(st.booleans(), prompts), max_size=40)


@given(steps)
def test_blocks_are_neither_lost_nor_given_twice(steps: list[tuple[bool, list[int]]]) -> None:
    pool = BlockPool(12, 3)
    held: list[Allocation] = []
    for frees, tokens in steps:
        if frees and held:
            pool.free(held.pop(0).block_ids)
        elif allocation := admit(pool, tokens):
            assert len(allocation.block_ids) == pool.blocks_for(len(tokens))
            assert 0 <= allocation.cached_blocks * 3 < len(tokens)
            held.append(allocation)
        assert pool.used == len({block for one in held for block in one.block_ids}) <= 12
    for allocation in held:
        pool.free(allocation.block_ids)
    assert pool.used == 0
    assert admit(pool, [7] * 36) is not None
