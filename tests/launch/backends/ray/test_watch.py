from __future__ import annotations

from typing import Any

import pytest

from launch.backends.ray.watch import LONGEST_DELAY_S, SILENT_S, STABLE_S, Watched
from launch.local.processes import UNKNOWN_CODE
from tests.launch.backends.ray.fakes import ActorDiedError, ActorUnavailableError, FakeActor, FakeRay


@pytest.fixture
def actor() -> FakeActor:
    return FakeActor()


@pytest.fixture
def watched(actor: FakeActor) -> Watched:
    return Watched(FakeRay(), "m/both/0", "m/both/0#1", actor)


def report(
    uid: str = "a", *, code: int | None = None, offset: int = 0, output: bytes = b""
) -> dict[str, Any]:
    return {"uid": uid, "ready_url": "http://h:1/health", "code": code, "offset": offset, "output": output}


def tend(watched: Watched, *moments: float) -> list[Any]:
    return [news for now in moments for news in watched.tend(now)]


def test_what_an_actor_tells_is_told(watched: Watched, actor: FakeActor) -> None:
    assert tend(watched, 0.0) == []
    actor.answers.append(report(offset=3, output=b"hi\n"))
    (news,) = tend(watched, 1.0)
    assert news["report"]["output"] == "hi\n"
    assert watched.is_reached
    tend(watched, 1.1)
    assert actor.asked[-1][:2] == ("a", 3)  # goes on from there


def test_an_actor_that_is_silent_is_out_of_reach(watched: Watched, actor: FakeActor) -> None:
    actor.answers.append(report())
    tend(watched, 0.0, 0.1, 0.2)
    tend(watched, 0.2 + SILENT_S)
    assert watched.is_reached
    tend(watched, 0.3 + SILENT_S)
    assert not watched.is_reached


def test_an_actor_that_is_unavailable_is_asked_again(watched: Watched, actor: FakeActor) -> None:
    actor.answers.append(ActorUnavailableError("away"))
    assert tend(watched, 0.0, 0.1) == []
    assert not watched.is_lost_for_good(1000.0)
    actor.answers.append(report("b"))
    (news,) = tend(watched, 1.0, 1.1)
    assert news["report"]["uid"] == "b"


def test_an_engine_that_ends_again_and_again_is_started_ever_later(
    watched: Watched, actor: FakeActor
) -> None:
    for number in range(8):
        actor.answers.append(report(str(number), code=1))
        tend(watched, number, number + 0.5)
    delays = [asked[2] for asked in actor.asked]
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_an_engine_that_has_run_for_long_is_started_soon(watched: Watched, actor: FakeActor) -> None:
    for number in range(3):
        actor.answers.append(report(str(number), code=1))
        tend(watched, number, number + 0.5)
    actor.answers.append(report("later"))
    tend(watched, 10.0, 10.5)
    tend(watched, 10.5 + STABLE_S)
    assert actor.asked[-1][2] == 1.0


def test_an_actor_that_ray_does_not_start_again_is_replaced(watched: Watched, actor: FakeActor) -> None:
    actor.answers.append(ActorDiedError("killed by hand"))
    (news,) = tend(watched, 0.0, 0.1)
    assert news["report"]["code"] == UNKNOWN_CODE
    assert "killed by hand" in news["report"]["output"]
    assert not watched.is_lost_for_good(1.0)
    assert watched.is_lost_for_good(1.2)
    other = FakeActor()
    watched.replace("m/both/0#2", other)
    tend(watched, 2.0)
    assert len(other.asked) == 1


def test_a_node_without_baton_is_named(watched: Watched, actor: FakeActor) -> None:
    actor.answers.append(ActorDiedError("ModuleNotFoundError: No module named 'launch'"))
    (news,) = tend(watched, 0.0, 0.1)
    assert news["report"]["output"].startswith("Baton is not installed on that node: pip install baton-serve")


def test_no_delay_is_without_bound(watched: Watched, actor: FakeActor) -> None:
    for number in range(20):
        actor.answers.append(ActorDiedError("again"))
        tend(watched, 100.0 * number, 100.0 * number + 0.1)
        assert watched.is_lost_for_good(100.0 * number + 0.1 + LONGEST_DELAY_S)
        watched.replace(f"m/both/0#{number}", actor)
