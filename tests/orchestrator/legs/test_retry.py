from __future__ import annotations

import pytest

from orchestrator.errors import (
    BatonError,
    WorkerAnswered,
    WorkerCutShort,
    WorkerGarbage,
    WorkerUnreachable,
)
from orchestrator.legs.retry import BUDGET_LEAST, MOST_LOST, RULES, Failure, Retries, RetryBudget, failure_of

# Word for word what vLLM 0.32 said to a request that was not streamed when it got SIGTERM.
ENGINE_ENDED = (
    b'{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root cause.",'
    b'"type":"InternalServerError","param":null,"code":500}}'
)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (WorkerUnreachable("x"), Failure.UNREACHABLE),
        (WorkerCutShort("x"), Failure.LOST),
        (WorkerAnswered(500, ENGINE_ENDED), Failure.LOST),
        (WorkerAnswered(400, ENGINE_ENDED), Failure.REFUSED),
        (WorkerGarbage("x"), Failure.FAILED),
        (WorkerAnswered(429, b""), Failure.BUSY),
        (WorkerAnswered(503, b""), Failure.BUSY),
        (WorkerAnswered(500, b""), Failure.FAILED),
        (WorkerAnswered(502, b""), Failure.FAILED),
        (WorkerAnswered(504, b""), Failure.FAILED),
        (WorkerAnswered(400, b""), Failure.REFUSED),
        (WorkerAnswered(404, b""), Failure.REFUSED),
        (WorkerAnswered(422, b""), Failure.REFUSED),
    ],
)
def test_every_error_of_a_leg_has_a_class(error: BatonError, failure: Failure) -> None:
    assert failure_of(error) is failure


def test_every_class_has_a_rule() -> None:
    assert set(RULES) == set(Failure)


def retries(open_requests: int = 0) -> tuple[Retries, RetryBudget]:
    budget = RetryBudget(lambda: open_requests)
    return Retries(budget), budget


@pytest.mark.parametrize("failure", [Failure.UNREACHABLE, Failure.LOST])
def test_the_first_replacement_of_a_lost_leg_is_free(failure: Failure) -> None:
    mine, budget = retries()
    assert mine.allows(failure)
    assert budget.in_use == 0
    assert mine.allows(failure)
    assert budget.in_use == 1


def test_a_loss_after_another_failure_is_not_free() -> None:
    mine, budget = retries()
    assert mine.allows(Failure.FAILED)
    assert mine.allows(Failure.LOST)
    assert budget.in_use == 2


@pytest.mark.parametrize("failure", list(Failure))
def test_no_class_is_replaced_more_often_than_its_rule_says(failure: Failure) -> None:
    mine, _ = retries(open_requests=1000)
    assert [mine.allows(failure) for _ in range(RULES[failure].most + 2)] == (
        [True] * RULES[failure].most + [False] * 2
    )


@pytest.mark.parametrize(("open_requests", "most"), [(0, BUDGET_LEAST), (15, 3), (64, 13), (100, 20)])
def test_the_budget_is_a_share_of_the_open_requests(open_requests: int, most: int) -> None:
    budget = RetryBudget(lambda: open_requests)
    asked = [Retries(budget).allows(Failure.BUSY) for _ in range(most + 5)]
    assert asked == [True] * most + [False] * 5


def test_what_the_budget_refuses_is_not_counted_as_tried() -> None:
    budget = RetryBudget(lambda: 0)
    others = [Retries(budget) for _ in range(BUDGET_LEAST)]
    assert all(other.allows(Failure.BUSY) for other in others)
    mine = Retries(budget)
    assert not mine.allows(Failure.FAILED)
    others[0].close()
    assert mine.allows(Failure.FAILED)


def test_a_request_that_ends_gives_back_what_it_took() -> None:
    mine, budget = retries()
    for failure in (Failure.LOST, Failure.LOST, Failure.BUSY):
        assert mine.allows(failure)
    assert budget.in_use == 2
    mine.close()
    mine.close()
    assert budget.in_use == 0


# --- poison -------------------------------------------------------------------------------------


def test_a_request_may_lose_so_many_workers() -> None:
    mine, _ = retries()
    names = [f"w{number}" for number in range(MOST_LOST)]
    found = [mine.is_poison(Failure.LOST, name, was_in_service=True) for name in names]
    assert found == [False] * (MOST_LOST - 1) + [True]
    assert mine.lost == names


def test_the_same_worker_twice_is_one() -> None:
    mine, _ = retries()
    assert not any(mine.is_poison(Failure.LOST, "w", was_in_service=True) for _ in range(5))


@pytest.mark.parametrize("failure", [failure for failure in Failure if failure is not Failure.LOST])
def test_what_is_no_loss_is_nobodys_end(failure: Failure) -> None:
    mine, _ = retries()
    assert not any(mine.is_poison(failure, f"w{number}", was_in_service=True) for number in range(5))


def test_workers_that_were_out_already_are_not_counted() -> None:
    mine, _ = retries()
    assert not any(mine.is_poison(Failure.LOST, f"w{number}", was_in_service=False) for number in range(5))
    assert mine.lost == []
