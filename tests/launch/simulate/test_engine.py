"""Virtual time equals what is reckoned by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.simulate.cache import PrefixCache
from launch.simulate.figures import tpot_s, ttft_s
from launch.simulate.heap import VirtualClock
from tests.launch.simulate.sites import STEPS, config_of, jobs_of, row, site_of

near = pytest.approx


def test_one_request_is_prefilled_and_decoded(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, [row(0, 100, 11)], config_of())
    assert ttft_s(job) == near(1.0 + 0.1)  # the prompt, and the first step
    assert job.ended_at - job.received_at == near(1.0 + 11 * 0.1)
    assert tpot_s(job) == near(0.1)


def test_prompts_are_computed_one_after_the_other(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, [row(0, 100), row(500, 200), row(600, 50)], config_of())
    assert [ttft_s(job) for job in jobs] == near([1.1, 0.5 + 2.0 + 0.1, 2.4 + 0.5 + 0.1])


def test_what_is_cached_is_not_computed_again(tmp_path: Path) -> None:
    rows = [row(0, 1100, 1, (7, 8, 9)), row(60_000, 1600, 1, (7, 8, 10)), row(120_000, 1024, 1, (7, 8))]
    jobs = jobs_of(tmp_path, rows, config_of())
    assert [job.cached_tokens for job in jobs] == [0, 1024, 1023]  # the last token is always computed
    assert [job.computed_s for job in jobs] == near([11.0, 5.76, 0.01])


def test_a_prefill_has_its_fixed_time_and_its_share_of_attention(tmp_path: Path) -> None:
    sim = {"prefill_ms": 20, "prefill_us_per_token": 90, "prefill_ns_per_token_squared": 0.6}
    (job,) = jobs_of(tmp_path, [row(0, 10_000)], config_of(sim=sim))
    assert job.computed_s == near(0.020 + 0.9 + 0.06)


def test_transfers_into_a_worker_come_one_after_the_other(tmp_path: Path) -> None:
    sim = {"transfer_ms": 100, "transfer_us_per_token": 1000}
    jobs = jobs_of(tmp_path, [row(0, 400), row(0, 400)], config_of(prefill=2, sim=sim))
    assert sorted(ttft_s(job) for job in jobs) == near([0.5, 1.0])


def test_a_step_is_as_long_as_the_batch_is_large(tmp_path: Path) -> None:
    sim = {"decode_ms_per_token": 100, "decode_ms_per_running": 50}
    jobs = jobs_of(tmp_path, [row(0, 10, 20), row(0, 10, 10)], config_of(sim=sim))
    # Ten steps of two at 150 ms, then ten of one at 100.
    assert [job.ended_at - job.received_at for job in jobs] == near([2.5, 1.5])


def test_steps_grow_with_the_kv_caches(tmp_path: Path) -> None:
    sim = {"decode_ms_per_token": 10, "decode_ns_per_kv_token": 1_000_000}  # a millisecond per token
    (job,) = jobs_of(tmp_path, [row(0, 10, 100)], config_of(sim=sim))
    # The integral of 10 ms + 1 ms x (10 + x) over 100 steps.
    assert job.ended_at - job.received_at == near(100 * 0.020 + 0.001 * 100**2 / 2)


def test_a_request_that_comes_later_slows_down_those_that_are_there(tmp_path: Path) -> None:
    sim = {"decode_ms_per_token": 100, "decode_ms_per_running": 100}
    jobs = jobs_of(tmp_path, [row(0, 10, 20), row(1000, 10, 5)], config_of(sim=sim))
    # Ten steps alone, five of two at 200 ms, five alone again.
    assert [job.ended_at - job.received_at for job in jobs] == near([1.0 + 1.0 + 0.5, 1.0])


def test_a_whole_request_has_its_first_token_with_its_prompt(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, [row(0, 100, 11)], config_of(prefill=0))
    assert ttft_s(job) == near(1.0)
    assert job.ended_at - job.received_at == near(1.0 + 10 * 0.1)


def test_a_prompt_is_computed_between_the_steps_of_others(tmp_path: Path) -> None:
    sim = {"prefill_us_per_token": 100, "decode_ms_per_token": 100, "num_blocks": 10**6}
    rows = [row(0, 2048, 200), row(1000, 8192, 1)]
    jobs = jobs_of(tmp_path, rows, config_of(prefill=0, sim=sim))
    # Four chunks of 204.8 ms, with a step of 100 ms each.
    assert ttft_s(jobs[1]) == near(4 * 0.3048)
    assert jobs[0].ended_at - jobs[0].received_at == near(0.2048 + 199 * 0.1 + 0.8192)


def test_who_finds_no_room_in_the_kv_cache_waits(tmp_path: Path) -> None:
    sim = {"decode_ms_per_token": 100, "num_blocks": 2, "block_size": 512}
    jobs = jobs_of(tmp_path, [row(0, 600, 10), row(0, 600, 10)], config_of(sim=sim))
    assert [ttft_s(job) for job in jobs] == near([0.1, 1.1])


def test_who_finds_no_seat_waits_at_the_gate(tmp_path: Path) -> None:
    config = config_of(sim=STEPS)
    decode = config.models[0].decode
    assert decode is not None
    model = config.models[0].model_copy(update={"decode": decode.model_copy(update={"seats": 1})})
    jobs = jobs_of(tmp_path, [row(0, 10, 10)] * 3, config.model_copy(update={"models": [model]}))
    assert [ttft_s(job) for job in jobs] == near([0.1, 1.1, 2.1])
    assert [job.record.admitted - job.received_at for job in jobs] == near([0.0, 1.0, 2.0])


def test_who_would_wait_for_too_long_is_refused(tmp_path: Path) -> None:
    config = config_of(sim={"decode_ms_per_token": 1000})
    decode = config.models[0].decode
    assert decode is not None
    model = config.models[0].model_copy(update={"decode": decode.model_copy(update={"seats": 1})})
    jobs = jobs_of(tmp_path, [row(0, 10, 100)] * 3, config.model_copy(update={"models": [model]}))
    assert [job.is_refused for job in jobs] == [False, True, True]  # after queue.timeout_s, 30 s


def test_without_times_everything_is_done_at_once(tmp_path: Path) -> None:
    zero = {"prefill_us_per_token": 0, "decode_ms_per_token": 1e-9}
    jobs = jobs_of(tmp_path, [row(0, 100, 50), row(1, 100, 1)], config_of(sim=zero))
    assert [ttft_s(job) for job in jobs] == near([0.0, 0.0], abs=1e-6)


def test_engines_of_a_config_without_times_are_those_of_a_large_model(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, [row(0, 10_000, 1)], config_of(sim={}))
    assert job.computed_s == near(0.020 + 0.9 + 0.06)


# --- caches and clocks --------------------------------------------------------------------------


def test_the_least_recently_used_blocks_go_first_and_ends_before_beginnings() -> None:
    cache = PrefixCache(4)
    cache.put((1, 2, 3))
    cache.put((1, 9))
    cache.put((5,))
    assert [cache.matched(blocks) for blocks in ((1, 2, 3), (1, 9), (5,))] == [2, 2, 1]
    assert len(cache) == 4
    cache.clear()
    assert cache.matched((1,)) == len(cache) == 0


def test_what_is_due_at_once_happens_in_the_order_in_which_it_was_asked_for() -> None:
    clock, seen = VirtualClock(), []
    for name in "abc":
        clock.at(5.0, seen.append, name)
    clock.at(2.0, seen.append, "first")
    clock.run()
    assert seen == ["first", "a", "b", "c"]
    assert clock.now == 5.0


# --- whatever comes -----------------------------------------------------------------------------


def any_row(at_ms: int, prompt: int, answer: int, blocks: list[int]) -> dict[str, Any]:
    """A row whose last block is short of `prompt` tokens, if it has blocks."""
    return row(at_ms, len(blocks) * 512 - prompt % 512 if blocks else prompt, answer, tuple(blocks))


ROWS = st.lists(
    st.builds(
        any_row,
        st.integers(0, 20_000),
        st.integers(1, 4000),
        st.integers(0, 60),
        st.lists(st.integers(0, 5), max_size=8),
    ),
    min_size=1,
    max_size=25,
)
TIMES = st.fixed_dictionaries(
    {
        "prefill_us_per_token": st.sampled_from([0.1, 90, 2000]),
        "prefill_ns_per_token_squared": st.sampled_from([0, 0.6]),
        "transfer_us_per_token": st.sampled_from([0, 8]),
        "decode_ms_per_token": st.sampled_from([0, 28]),
        "decode_ns_per_kv_token": st.sampled_from([0, 40]),
        "num_blocks": st.sampled_from([4, 100_000]),
    }
)


@settings(deadline=None)
@given(rows=ROWS, times=TIMES, prefill=st.integers(0, 2), variant=st.sampled_from(["prefix", "random@never"]))
def test_all_end_and_nothing_is_held(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    times: dict[str, float],
    prefill: int,
    variant: str,
) -> None:
    config = config_of(prefill, 2, sim=times, routing={"decode": "least_tokens"})
    site = site_of(tmp_path_factory.mktemp("traces"), rows, config, variant)
    assert len(site.jobs) == len(rows)
    for job in site.jobs:
        assert job.received_at <= job.first_at <= job.ended_at + 1e-9
        assert job.first_at - job.received_at >= job.computed_s - 1e-6
        assert 0 <= job.cached_tokens < job.arrival.prompt_tokens
    assert {worker.in_flight for worker in site.engines} == {0}
    assert all(engine.is_idle for engine in site.engines.values())
