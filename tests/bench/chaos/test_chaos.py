"""What is run, and what is excused; the processes themselves are for `make chaos`."""

from __future__ import annotations

import asyncio
import os
import signal
from itertools import islice
from random import Random

import pytest

from bench.chaos.__main__ import FULL, QUICK, SCENARIOS, arguments_of, chosen, scale_of
from bench.chaos.client import End, Result
from bench.chaos.kills import only_open_failed
from bench.chaos.site import MARKER, marked, wait_for
from bench.chaos.streams import CANCELLED, cancelled, lasting
from bench.shared.processes import Failed
from bench.soak.load import Phase

VICTIM, OTHER = 7, 8  # processes
STRUCK = 10.0

# --- the choice ---------------------------------------------------------------------------------


def names(*arguments: str) -> list[str]:
    return [scenario.name for scenario in chosen(arguments_of(arguments))]


def test_all_are_run_unless_something_else_is_said() -> None:
    assert names() == [scenario.name for scenario in SCENARIOS]
    assert set(names("--quick")) < set(names())
    assert names("--quick", "--only", "times") == ["times"]


def test_names_are_unique() -> None:
    assert len(set(names())) == len(SCENARIOS)


def test_how_much_is_asked() -> None:
    assert scale_of(arguments_of(["--seed", str(FULL.seed)])) == FULL
    assert scale_of(arguments_of(["--quick", "--seed", "3"])).requests == QUICK.requests
    assert scale_of(arguments_of(["--quick", "--requests", "5"])).requests == 5


# --- what is excused when a process is killed ---------------------------------------------------


def result(end: End, began: float, ended: float, process: int | None) -> Result:
    return Result(began, ended, end, process=process)


@pytest.mark.parametrize("process", [VICTIM, None])
def test_requests_that_were_open_in_the_process_may_fail(process: int | None) -> None:
    cut = result(End.CUT, STRUCK - 1, STRUCK + 1, process)
    assert only_open_failed([cut], VICTIM, STRUCK, signal.SIGKILL).holds


@pytest.mark.parametrize(
    "failed",
    [
        pytest.param(result(End.CUT, STRUCK - 1, STRUCK + 1, OTHER), id="in the other process"),
        pytest.param(result(End.CUT, STRUCK - 2, STRUCK - 1, VICTIM), id="before"),
        pytest.param(result(End.REFUSED, STRUCK + 1, STRUCK + 1, None), id="after"),
        pytest.param(result(End.WRONG, STRUCK - 1, STRUCK + 1, VICTIM), id="a wrong answer"),
    ],
)
def test_no_others_may_fail(failed: Result) -> None:
    right = result(End.RIGHT, STRUCK - 1, STRUCK + 1, VICTIM)
    assert not only_open_failed([right, failed], VICTIM, STRUCK, signal.SIGKILL).holds


# --- streams ------------------------------------------------------------------------------------


def test_cancels_come_in_all_phases_of_requests_that_reach_workers() -> None:
    drawn = list(islice(cancelled(Random(1)), 500))
    assert drawn == list(islice(cancelled(Random(1)), 500))
    assert {request.cancel.phase for request in drawn if request.cancel} == set(Phase)
    assert {request.kind.name for request in drawn} == set(CANCELLED)
    assert all(request.cancel for request in drawn)


def test_ids_and_times_are_not_compared_nor_what_a_worker_had_cached() -> None:
    usage = {"completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}
    event = {"id": "a", "created": 7, "choices": [], "usage": usage}
    assert lasting(event) == {"id": None, "created": None, "choices": [], "usage": {"completion_tokens": 5}}
    assert lasting({"choices": [1]}) != lasting({"choices": [2]})


# --- places and waiting -------------------------------------------------------------------------


def test_processes_are_found_by_their_environment() -> None:
    nobody = f"{MARKER} of nobody"
    assert not list(marked(nobody))
    assert os.getpid() in marked(os.environ["PATH"])


async def nobody_answers() -> bool:
    raise Failed("refused")


async def yes() -> bool:
    return True


def test_waiting_asks_again_and_has_a_limit() -> None:
    assert asyncio.run(wait_for(yes, "an answer")) >= 0
    with pytest.raises(Failed, match="waited 0 s for an answer"):
        asyncio.run(wait_for(nobody_answers, "an answer", limit_s=0.0))
