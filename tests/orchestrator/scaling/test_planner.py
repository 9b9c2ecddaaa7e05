"""The planner wants as many workers as a load needs, says why, and does not flutter."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.scaling.budget import Price, within
from orchestrator.scaling.reports import Report, Stage, WorkerReport
from orchestrator.scaling.roles import Wish
from orchestrator.wire.info import Role
from tests.orchestrator.scaling.plants import LOOK_S, MODEL, Load, Plant, config_of, planner_of


def plant_of(load: Load, **options: object) -> Plant:
    return Plant(planner_of(config_of(**options)), load)  # type: ignore[arg-type]


def test_prefill_workers_are_wanted_by_what_a_prompt_keeps_busy() -> None:
    plant = plant_of(Load(rate=8.0, busy_s=0.5))
    prefill, _ = plant.run(600)
    assert 5 <= prefill <= 7  # 4 that are never idle, at 65 % busy
    assert "busy seconds each" in plant.wishes()["prefill"].why


def test_decode_workers_are_wanted_by_the_seats_that_are_taken() -> None:
    plant = plant_of(Load(rate=10.0, busy_s=0.01, answer_s=20.0), seats=64)
    _, decode = plant.run(600)
    assert decode == 4  # 200 of 51 each, which may be 59
    assert "seats taken, 80% of 64 each" in plant.wishes()["decode"].why


def test_decode_workers_are_wanted_by_the_pace_of_tokens() -> None:
    fast = plant_of(Load(rate=10.0, busy_s=0.01, answer_s=20.0, gap_s=0.02), seats=1000).run(600)[1]
    slow = plant_of(Load(rate=10.0, busy_s=0.01, answer_s=20.0, gap_s=0.08), seats=1000).run(600)[1]
    assert slow > fast


def test_a_step_of_the_load_is_followed_within_a_minute_and_given_back_one_by_one() -> None:
    plant = plant_of(Load(rate=4.0, busy_s=0.25))
    before = plant.run(600)[0]
    plant.load.busy_s = 1.0
    assert plant.run(60)[0] >= 2 * before
    high = plant.run(120)[0]
    plant.load.busy_s = 0.25
    plant.wanted.clear()
    plant.run(1500)
    steps = [later[0] - earlier[0] for earlier, later in pairwise(plant.wanted)]
    assert set(steps) <= {0, -1}
    assert plant.wanted[-1][0] <= before + 1 < high


def test_nothing_goes_before_it_was_too_much_for_long() -> None:
    plant = plant_of(Load(rate=8.0, busy_s=0.5))
    high = plant.run(600)[0]
    plant.load.rate = 0.5
    assert plant.run(250)[0] == high
    assert plant.run(200)[0] < high


def test_no_worker_goes_while_one_is_drained() -> None:
    plant = plant_of(Load(rate=10.0, busy_s=0.01, answer_s=20.0))
    high = plant.run(600)[1]
    plant.load.rate, plant.draining = 0.5, 1
    assert plant.run(900)[1] == high
    assert "no other is being drained" in plant.wishes()["decode"].why
    plant.draining = 0
    assert plant.run(100)[1] < high


def test_workers_that_do_not_get_ready_are_no_capacity_and_stop_no_other_from_going() -> None:
    plant = plant_of(Load(rate=8.0, busy_s=0.5))
    plant.run(600)
    plant.load.busy_s, plant.is_stuck = 1.0, True
    high = plant.run(300)[0]
    assert plant.wishes()["prefill"].starting > 0
    assert plant.run(900)[0] <= high + 2 <= 20  # it asks for little more than the load needs
    plant.load.rate = 0.5
    assert plant.run(900)[0] < high


def test_one_more_is_wanted_when_first_tokens_are_late_again_because_prompts_wait() -> None:
    plant = plant_of(Load(rate=6.0, busy_s=0.5, first_s=0.3))
    before = plant.run(600)[0]
    plant.load.first_s = 5.0
    assert plant.run(300)[0] == before  # nobody waits for others: prompts are long
    assert "no worker more mends" in plant.wishes()["prefill"].why


def test_one_more_is_wanted_when_tokens_are_slow_again() -> None:
    plant = plant_of(Load(rate=4.0, busy_s=0.01, answer_s=10.0, gap_s=0.03), itl_p95_ms=50)
    before = plant.run(600)[1]
    plant.load.gap_s = 0.08
    assert plant.run(300)[1] > before


def test_without_traffic_the_fewest_are_wanted() -> None:
    plant = plant_of(Load(rate=8.0, busy_s=0.5), prefill="{min: 2, max: 9}")
    plant.run(600)
    plant.load.rate = 0.0
    assert plant.run(1500) == (2, 1)


def test_gpus_go_to_whoever_has_the_smallest_part_of_what_it_wants() -> None:
    def wish(role: Role, wanted: int) -> Wish:
        return Wish(MODEL, role, wanted, 0, 0, 0, "why")

    wishes, prices = [wish("prefill", 12), wish("decode", 6)], [Price(1, 1), Price(2, 1)]
    assert [found.wanted for found in within(wishes, prices, 24)] == [12, 6]
    assert [found.wanted for found in within(wishes, prices, 12)] == [6, 3]
    assert [found.wanted for found in within(wishes, prices, 3)] == [1, 1]


def test_no_more_gpus_are_wanted_than_there_may_be() -> None:
    load = Load(rate=16.0, busy_s=0.5, answer_s=20.0)
    free = plant_of(load).run(600)
    plant = plant_of(load, max_gpus=9)
    prefill, decode = plant.run(600)
    assert prefill + decode == 9 < sum(free)
    assert "do not fit into 9 GPUs" in plant.wishes()["prefill"].why + plant.wishes()["decode"].why


# --- what cannot be so ------------------------------------------------------------------------------


def bad_reports(good: Report) -> list[Report]:
    from dataclasses import replace

    nan, inf = float("nan"), float("inf")
    worker = WorkerReport("prefill", Stage.READY, 0, 0)
    return [
        replace(good, moment=nan),
        replace(good, moment=inf),
        replace(good, entered=-1),
        replace(good, queued=-5),
        replace(good, answered=nan),  # type: ignore[arg-type]
        replace(good, new_tokens=2**60),
        replace(good, workers=[replace(worker, legs=-1)]),
        replace(good, workers=[replace(worker, legs=10**9)]),
        replace(good, workers=[replace(worker, own_legs=nan)]),  # type: ignore[arg-type]
        replace(good, gaps_s=nan),
        replace(good, gaps=[-1] * len(good.gaps)),
    ]


def test_reports_that_cannot_be_true_change_nothing() -> None:
    plant = plant_of(Load(rate=8.0, busy_s=0.5))
    before = plant.run(600)
    for _ in range(20):
        plant.moment += LOOK_S
        for report in bad_reports(plant.report()):
            assert not plant.planner.note(MODEL, report)
    assert plant.run(60) == before


@pytest.mark.parametrize("jump_s", [-500.0, -1.0, 40.0, 1e6])
def test_a_clock_that_jumps_begins_a_new_window_and_changes_nothing(jump_s: float) -> None:
    plant = plant_of(Load(rate=8.0, busy_s=0.5))
    before = plant.run(600)
    plant.moment += jump_s
    plant.wanted.clear()
    assert plant.run(400) == before
    assert set(plant.wanted) == {before}


def test_counters_that_fall_begin_a_new_window_and_change_nothing() -> None:
    plant = plant_of(Load(rate=8.0, busy_s=0.5))
    before = plant.run(600)
    plant._entered = 0.0
    plant.wanted.clear()
    plant.run(200)
    assert set(plant.wanted) == {before}


def test_what_is_there_is_wanted_until_anything_is_known() -> None:
    planner = planner_of(config_of())
    assert planner.wishes() == []
    plant = Plant(planner, Load(rate=0.0))
    plant.ready = {"prefill": 5, "decode": 3}
    planner.note(MODEL, plant.report())
    assert {wish.role: wish.wanted for wish in planner.wishes()} == {"prefill": 5, "decode": 3}


def test_without_a_ready_worker_it_stays_so() -> None:
    plant = plant_of(Load(rate=8.0, busy_s=0.5))
    before = plant.run(600)
    plant.ready = {"prefill": 0, "decode": 0}
    plant.is_stuck = True
    assert plant.run(900) == before
    assert "no worker is ready" in plant.wishes()["prefill"].why


# --- for any load -----------------------------------------------------------------------------------

LOADS = st.builds(
    Load,
    rate=st.floats(0.5, 30.0),
    busy_s=st.floats(0.05, 1.0),
    answer_s=st.floats(0.5, 60.0),
    gap_s=st.floats(0.005, 0.045),
)


def needs_of(load: Load) -> float:
    return load.rate * load.busy_s


@settings(max_examples=15, deadline=None)
@given(LOADS, st.integers(1, 4), st.integers(0, 6))
def test_never_outside_of_the_bounds(load: Load, least: int, more: int) -> None:
    bounds = f"{{min: {least}, max: {least + more}}}"
    plant = plant_of(load, prefill=bounds, decode=bounds)
    plant.ready = {"prefill": least, "decode": least}
    plant.run(900)
    assert all(least <= count <= least + more for pair in plant.wanted for count in pair)


@settings(max_examples=15, deadline=None)
@given(LOADS)
def test_a_constant_load_is_never_followed_up_and_down(load: Load) -> None:
    plant = plant_of(load)
    plant.run(3600)
    for role in (0, 1):
        steps = [later[role] - earlier[role] for earlier, later in pairwise(plant.wanted)]
        turns = [step > 0 for step in steps if step]
        assert sum(one != other for one, other in pairwise(turns)) <= 1


@settings(max_examples=15, deadline=None)
@given(LOADS, st.floats(1.0, 3.0))
def test_more_load_never_wants_fewer_workers(load: Load, times: float) -> None:
    from dataclasses import replace

    light = plant_of(replace(load)).run(1500)
    heavy = plant_of(replace(load, rate=load.rate * times)).run(1500)
    assert heavy[0] >= light[0]
    assert heavy[1] >= light[1]


@settings(max_examples=8, deadline=None)
@given(LOADS)
def test_the_same_reports_give_the_same_answers(load: Load) -> None:
    first, second = plant_of(load), plant_of(load)
    first.run(600)
    second.run(600)
    assert first.wishes() == second.wishes()
    assert first.wanted == second.wanted
