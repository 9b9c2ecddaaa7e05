"""What simulated decode workers refuse: nothing is prefilled, or its blocks are known to be free."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.config.options import RoutingConfig
from orchestrator.routing.planner import Planner
from orchestrator.telemetry.counters import LeaseState
from tests.orchestrator.fakes import FakeExchange
from tests.orchestrator.legs.test_frozen_engines import CHAT, Site, in_thread, run
from tests.waiting import wait_for

LEASE_S = 30.0
REFUSED = [{"n": 0}, {"stream_options": {"include_usage": True}}, {"max_tokens": -1}, {"min_tokens": 99}]


async def refused(here: Site, fields: dict[str, Any]) -> None:
    exchange = FakeExchange(json.dumps(CHAT | fields).encode())
    await here.core.data_plane.handle(exchange)
    assert exchange.status == 400, exchange.sent


@pytest.mark.parametrize("fields", REFUSED, ids=json.dumps)
def test_nothing_is_prefilled_for_what_decode_refuses(fields: dict[str, Any]) -> None:
    async def test(here: Site) -> None:
        await refused(here, fields)
        await in_thread(assert_pinned, here, 0)

    run(test, 1, RoutingConfig(), lease_s=LEASE_S)


@pytest.mark.pure  # a method is replaced
@pytest.mark.parametrize("fields", REFUSED[:2], ids=json.dumps)
def test_the_ledger_knows_what_a_refusal_has_freed(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Planner.plan
    monkeypatch.setattr(
        Planner, "plan", lambda planner, view, pools, why, avoid: plan(planner, view, pools, None, avoid)
    )

    async def test(here: Site) -> None:
        await refused(here, fields)
        await here.core.flow.aclose()
        ledger, telemetry = here.core.flow.ledger, here.core.telemetry
        ledger.sweep()
        ends = telemetry.layout.leases
        assert telemetry.row[ends + LeaseState.RELEASED] == 1
        assert ledger.open == set()
        await in_thread(assert_pinned, here, 1)

    run(test, 1, RoutingConfig(), lease_s=LEASE_S)


def assert_pinned(here: Site, count: int) -> None:
    """So many blocks were pinned, all of them are free, and nobody asked for any that were free already."""
    wait_for(lambda: here.prefill.ledger()["released"] >= count, "the decode engine's word")
    ledger = here.prefill.ledger()
    assert (ledger["pinned"], ledger["released"], ledger["unknown"]) == (count, count, 0)
