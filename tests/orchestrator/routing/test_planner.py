from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config import RoutingConfig
from orchestrator.errors import Unavailable
from orchestrator.routing.planner import Plan, Planner
from tests.orchestrator.cluster import registry_of


def plan(counts: Any, *, disaggregate: Any = "always", whole_reason: str | None = None) -> Plan:
    planner = Planner(RoutingConfig(disaggregate=disaggregate))
    return planner.plan(registry_of(counts).pools["m"], whole_reason)


def chosen(made: Plan) -> tuple[str | None, str]:
    return made.prefill and made.prefill.address.role, made.decode.address.role


ALL = {"prefill": 1, "decode": 1, "both": 1}
PAIR = {"prefill": 1, "decode": 1}


@pytest.mark.parametrize(
    ("counts", "options", "roles"),
    [
        (PAIR, {}, ("prefill", "decode")),
        (ALL, {}, ("prefill", "decode")),
        ({"both": 1}, {}, (None, "both")),
        ({"both": 1, "decode": 1}, {}, (None, "both")),
        (PAIR, {"whole_reason": "echo"}, (None, "decode")),
        (ALL, {"whole_reason": "echo"}, (None, "both")),
        (PAIR, {"disaggregate": "never"}, (None, "decode")),
        ({"decode": 1}, {"disaggregate": "never"}, (None, "decode")),
        ({"decode": 1}, {"whole_reason": "echo"}, (None, "decode")),
    ],
)
def test_who_serves(counts: Any, options: Any, roles: tuple[str | None, str]) -> None:
    assert chosen(plan(counts, **options)) == roles


@pytest.mark.parametrize(
    ("counts", "options", "says"),
    [
        ({}, {}, "no prefill and no decode worker is ready"),
        ({"prefill": 1}, {}, "no decode worker is ready"),
        ({"decode": 1}, {}, "no prefill worker is ready"),
        ({"prefill": 1}, {"whole_reason": "echo"}, "no decode worker is ready"),
        ({"prefill": 1}, {"disaggregate": "never"}, "no decode worker is ready"),
    ],
)
def test_nobody_can_serve(counts: Any, options: Any, says: str) -> None:
    with pytest.raises(Unavailable, match=says) as caught:
        plan(counts, **options)
    assert caught.value.status == 503
    assert caught.value.retry_after_s


def test_the_reason_is_told() -> None:
    assert plan(PAIR, whole_reason="beam search").reason == "beam search"
    assert plan(PAIR, disaggregate="never").reason == "disaggregation is off"
    assert plan(PAIR).reason == "fewest legs under way"
