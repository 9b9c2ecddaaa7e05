from __future__ import annotations

from random import Random

import msgspec
import pytest

from worker.sim import faults
from worker.sim.faults import Error, FaultBox, KvLost, Reset, Slow, Stall, Truncate


def box(*armed: faults.Fault) -> FaultBox:
    return FaultBox(armed, Random(1))


def test_one_fault_or_a_list() -> None:
    assert faults.parse('{"kind": "stall", "at_token": 3}') == [Stall(at_token=3)]
    assert faults.parse('[{"kind": "truncate", "clean": false}, {"kind": "kv_lost", "leg": "decode"}]') == [
        Truncate(clean=False),
        KvLost(leg="decode"),
    ]


@pytest.mark.parametrize(
    "content", ["", "{}", '{"kind": "fire"}', '{"kind": "stall", "at": 3}', '{"kind": "error", "leg": "x"}']
)
def test_what_is_no_fault(content: str) -> None:
    with pytest.raises(msgspec.MsgspecError):
        faults.parse(content)


def test_a_fault_strikes_as_often_as_it_says() -> None:
    armed = box(Error(count=2))
    assert [bool(armed.draw("decode").at_head()) for _ in range(4)] == [True, True, False, False]
    assert armed.describe() == [
        {
            "kind": "error",
            "leg": "any",
            "count": 2,
            "probability": 1.0,
            "at_token": None,
            "status": 500,
            "message": "injected fault",
            "retry_after": None,
            "left": 0,
            "struck": 2,
        }
    ]


def test_a_fault_strikes_the_leg_it_is_for() -> None:
    armed = box(Reset(leg="prefill"), Stall(leg="health"))
    assert armed.draw("prefill").at_head() == [Reset(leg="prefill")]
    assert armed.draw("decode").at_head() == []
    assert armed.draw("health").at_head() == [Stall(leg="health")]


def test_any_leg_is_not_the_health_probe() -> None:
    armed = box(Reset())
    assert armed.draw("health").at_head() == []
    assert armed.draw("aggregated").at_head() == [Reset()]


def test_chance_is_the_seeds() -> None:
    def struck(seed: int) -> list[bool]:
        armed = FaultBox([Reset(probability=0.5, count=30)], Random(seed))
        return [bool(armed.draw("decode").at_head()) for _ in range(40)]

    assert struck(1) == struck(1) != struck(2)
    assert 5 < sum(struck(1)) < 35


def test_where_faults_strike() -> None:
    plan = box(Reset(at_token=2), Stall(), Truncate(at_token=-1)).draw("decode")
    assert plan.at_head() == [Stall()]
    assert plan.after_tokens(2) == [Reset(at_token=2)]
    assert plan.after_tokens(-1) == [Truncate(at_token=-1)]
    assert plan.after_tokens(0) == []
    assert plan.in_body() == [Reset(at_token=2), Truncate(at_token=-1)]


def test_slowness_and_loss() -> None:
    plan = box(Slow(factor=3.0), Slow(seconds=0.5), KvLost()).draw("decode")
    assert (plan.slow_factor, plan.slow_s, plan.kv_lost) == (3.0, 0.5, True)
    plan = box().draw("decode")
    assert (plan.slow_factor, plan.slow_s, plan.kv_lost) == (1.0, 0.0, False)


def test_clearing() -> None:
    armed = box(Reset())
    armed.clear()
    armed.add([Stall()])
    assert armed.draw("decode").at_head() == [Stall()]
