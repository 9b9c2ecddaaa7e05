"""What several orchestrators know of the load, in virtual time with the real policies and reports."""

from __future__ import annotations

import pytest

from bench.replicas.seats import Skewed, beside_free_seats
from bench.replicas.views import Site, View, mean_wait_s

FOUR = Site(4, 0.7)


@pytest.mark.parametrize("policy", ["least_loaded", "power_of_two", "least_tokens"])
def test_with_one_orchestrator_reports_change_nothing(policy: str) -> None:
    site = Site(1, 0.7, requests=3000, policy=policy)
    views: list[View] = ["own", "polled", "reported"]
    assert len({mean_wait_s(site, view, 0) for view in views}) == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_more_four_orchestrators_hear_of_one_another_the_shorter_the_waits(seed: int) -> None:
    alone, own = (mean_wait_s(FOUR, view, seed) for view in ("polled alone", "own"))
    polled, reported = (mean_wait_s(FOUR, view, seed) for view in ("polled", "reported"))
    assert reported < polled < own < alone
    assert reported <= 0.6 * own


@pytest.mark.parametrize(
    ("count", "load", "most"), [(2, 0.7, 0.8), (8, 0.7, 0.6), (2, 0.9, 0.9), (8, 0.9, 0.75)]
)
def test_reports_shorten_waits_whatever_the_load(count: int, load: float, most: float) -> None:
    site = Site(count, load, requests=10_000)
    assert mean_wait_s(site, "reported", 0) < most * mean_wait_s(site, "own", 0)


@pytest.mark.parametrize("policy", ["power_of_two", "least_tokens"])
def test_other_policies_hear_of_others_too(policy: str) -> None:
    site = Site(4, 0.7, requests=8000, policy=policy)
    assert mean_wait_s(site, "reported", 0) < 0.9 * mean_wait_s(site, "own", 0)


@pytest.mark.parametrize("is_one", [False, True], ids=["orchestrators", "processes"])
@pytest.mark.parametrize("seed", range(2))
def test_clients_that_stick_to_one_do_not_wait_beside_free_seats(seed: int, is_one: bool) -> None:
    assert beside_free_seats(Skewed("reports", is_one, requests=8000), seed) < 0.01
    assert beside_free_seats(Skewed("shares", is_one, requests=8000), seed) > 0.3


def test_processes_of_one_see_each_others_seats_even_if_there_are_few() -> None:
    assert beside_free_seats(Skewed("reports", is_one=True, seats=16, requests=8000), 0) < 0.01


@pytest.mark.parametrize("seats", [8, 16])
@pytest.mark.parametrize("seed", range(2))
def test_few_do_so_where_there_are_few_seats(seats: int, seed: int) -> None:
    assert beside_free_seats(Skewed("reports", is_one=False, seats=seats, requests=6000), seed) < 0.01
