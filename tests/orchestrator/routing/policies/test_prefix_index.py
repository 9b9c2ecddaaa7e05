from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.routing.policies.prefix_index import (
    FINE,
    MOST_BYTES,
    WIDTH,
    Holder,
    PrefixIndex,
    bytes_of,
    hashed,
)

LARGE = 1 << 40


def text(size: int, seed: int = 1) -> bytes:
    return Random(seed).randbytes(size)


def send(index: PrefixIndex, holder: Holder, prompt: bytes, now: float = 0.0) -> None:
    index.record(holder, index.find(hashed(prompt, 0)), now)


def held(index: PrefixIndex, holder: Holder, prompt: bytes) -> int:
    """How many bytes of a prompt a holder has by the index."""
    found = index.find(hashed(prompt, 0))
    steps = max((run.end for run in found.runs if run.holders & holder.bit), default=0)
    if found.partial is not None and found.partial.holders & holder.bit:
        steps = found.steps
    return bytes_of(steps)


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 255, 256, 300, 2048, 2049, 8192, 10_239, 10_240, 100_000, MOST_BYTES])
def test_a_hash_stands_for_all_before_it(size: int) -> None:
    prompt = text(size)
    hashes = hashed(prompt, 0)
    assert bytes_of(len(hashes) // WIDTH) <= size < bytes_of(len(hashes) // WIDTH + 1)
    other = bytearray(prompt)
    if hashes:
        other[0] ^= 1
        changed = hashed(bytes(other), 0)
        assert all(changed[i : i + 8] != hashes[i : i + 8] for i in range(0, len(hashes), WIDTH))


def test_a_prompt_that_goes_on_begins_with_the_same_hashes() -> None:
    prompt = text(50_000)
    assert hashed(prompt, 0).startswith(hashed(prompt[:30_000], 0))
    assert hashed(prompt, 1) != hashed(prompt, 0)


def test_no_more_than_a_mebibyte_is_hashed() -> None:
    prompt = text(MOST_BYTES)
    assert hashed(prompt + prompt, 0) == hashed(prompt, 0)
    assert len(hashed(prompt, 0)) == 522 * WIDTH


# --- what is known ------------------------------------------------------------------------------


def test_a_prompt_is_known_as_far_as_it_was_sent() -> None:
    index = PrefixIndex(LARGE)
    one, other = index.holder(LARGE), index.holder(LARGE)
    send(index, one, text(10_240))
    assert held(index, one, text(10_240) + text(5_000, 2)) == 10_240
    assert held(index, other, text(10_240)) == 0
    assert held(index, one, text(4_096) + text(5_000, 2)) == 4_096
    assert held(index, one, text(9_000, 3)) == 0


def test_beginnings_that_are_shared_are_kept_once() -> None:
    index = PrefixIndex(LARGE)
    one, other = index.holder(LARGE), index.holder(LARGE)
    send(index, one, text(100_000))
    memory = index.memory
    send(index, other, text(100_000)[:60_000] + text(1_000, 2))
    assert held(index, one, text(100_000)) == bytes_of(58)
    assert held(index, other, text(100_000)) == held(index, one, text(60_000)) == bytes_of(39)
    assert index.memory < memory + 1_500


def test_the_end_of_the_oldest_prompt_is_forgotten_first() -> None:
    index = PrefixIndex(LARGE)
    holder = index.holder(20_480)
    send(index, holder, text(10_240, 1), 1.0)
    send(index, holder, text(10_240, 2), 2.0)
    assert holder.size == 20_480
    assert holder.tail() == 1.0
    send(index, holder, text(4_096, 3), 3.0)
    assert held(index, holder, text(10_240, 1)) == 6_144
    assert held(index, holder, text(10_240, 2)) == 10_240
    assert holder.size <= 20_480


def test_a_prompt_larger_than_the_cache_is_known_by_its_beginning() -> None:
    index = PrefixIndex(LARGE)
    holder = index.holder(20_480)
    send(index, holder, text(100_000))
    assert held(index, holder, text(100_000)) == 20_480


def test_what_is_too_coarse_to_be_shortened_goes_as_a_whole() -> None:
    index = PrefixIndex(LARGE)
    holder = index.holder(LARGE)
    beginning = text(12_288)
    for seed in (2, 3):
        send(index, holder, beginning + text(6144, seed), now=float(seed))
    holder.capacity = holder.size - 6144 + 2 * FINE  # less is left of the older end than a step has there
    send(index, holder, beginning + text(6144, 3), now=4.0)
    assert held(index, holder, beginning + text(6144, 2)) == 12_288
    assert holder.size == sum(run.size() for run in holder.runs) == 12_288 + 6144


def test_who_is_cleared_holds_nothing_and_others_hold_what_they_did() -> None:
    index = PrefixIndex(LARGE)
    one, other = index.holder(LARGE), index.holder(LARGE)
    send(index, one, text(10_240))
    send(index, other, text(10_240) + text(9_000, 2))
    index.clear(one)
    assert (one.size, held(index, one, text(10_240))) == (0, 0)
    assert held(index, other, text(10_240)) == 10_240
    index.remove(other)
    assert index.memory == 0
    assert index.holder(1).slot == other.slot


def test_all_together_is_bounded_too() -> None:
    index = PrefixIndex(100_000)
    holders = [index.holder(LARGE) for _ in range(4)]
    for number in range(2_000):
        send(index, holders[number % 4], text(300 + number, number))
        assert index.memory <= 100_000


# --- fan-out ------------------------------------------------------------------------------------


def fan_out(index: PrefixIndex, prompt: bytes) -> list[int]:
    return [run.fan_out for run in index.find(hashed(prompt, 0)).runs]


def test_a_conversation_has_no_fan_out() -> None:
    index = PrefixIndex(LARGE)
    holder = index.holder(LARGE)
    for turn in range(1, 6):
        send(index, holder, text(50_000)[: turn * 10_000])
    assert fan_out(index, text(50_000)) == [0, 0, 0, 0, 0]
    send(index, holder, text(50_000))
    assert fan_out(index, text(50_000)) == [0, 0, 0, 0, 0]  # the same prompt is no other continuation


def test_different_continuations_are_counted() -> None:
    index = PrefixIndex(LARGE)
    holder = index.holder(LARGE)
    common = text(10_240)
    for seed in range(2, 7):
        send(index, holder, common + text(5_000, seed))
    assert fan_out(index, common) == [4]
    assert fan_out(index, common + text(5_000, 3)) == [4, 0]


# --- whatever is sent ---------------------------------------------------------------------------

PIECES = [text(FINE, seed) for seed in range(3)]
PROMPTS = st.lists(st.integers(0, 2), max_size=20).map(lambda drawn: b"".join(PIECES[i] for i in drawn))
ACTS = st.lists(st.tuples(st.sampled_from(["send", "clear"]), st.integers(0, 2), PROMPTS), max_size=40)


@given(ACTS, st.integers(0, 12_000), st.integers(500, 20_000))
@settings(max_examples=150, deadline=None)
def test_whoever_holds_a_run_holds_all_before_it(
    acts: list[tuple[str, int, bytes]], capacity: int, most: int
) -> None:
    index = PrefixIndex(most)
    holders = [index.holder(capacity) for _ in range(3)]
    for now, (act, number, prompt) in enumerate(acts):
        if act == "clear":
            index.clear(holders[number])
        else:
            send(index, holders[number], prompt, float(now))
        for holder in holders:
            assert holder.size == sum(run.size() for run in holder.runs)
        assert max(holder.size for holder in holders) <= capacity
        assert index.memory <= most
        check_prefixes(index, prompt)
    for holder in holders:
        index.remove(holder)
    assert index.memory == 0


def check_prefixes(index: PrefixIndex, prompt: bytes) -> None:
    found = index.find(hashed(prompt, 0))
    runs = found.runs + ([] if found.partial is None else [found.partial])
    for before, after in pairwise(runs):
        assert after.begin == before.end
        assert after.holders & ~before.holders == 0
    assert all(run.holders for run in runs)
