"""How often workers are asked for what other orchestrators have there."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest

from orchestrator.config.options import Config
from orchestrator.wire.info import Role
from orchestrator.workers.health import Prober
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.registry import Registry
from orchestrator.workers.scarcity import MOST_PER_S, OFTEN_S, Scarcity
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import announcement, registry_of
from tests.simulation.loop import run_virtually

USUAL_S = 0.75
SEATS = 16


class Site:
    """Workers of one model, and who says how often they are asked."""

    def __init__(self, counts: dict[Role, int], **changes: Any) -> None:
        self.registry = registry_of(counts)
        for worker in self.registry.workers:
            self.registry.announce(worker, Introduction(announcement("json"), None))
        roles = {"prefill", "decode"} if "both" not in counts else {"both"}
        pools = {role: {"urls": ["http://h:1" if role == "prefill" else "http://h:2"]} for role in roles}
        for role in roles - {"prefill"}:
            pools[role]["seats"] = SEATS  # type: ignore[assignment]
        config = Config.model_validate({"models": [{"name": "m", **pools}]})
        self.scarcity = Scarcity(config, self.registry.pools)

    def take(self, own: int, others: int, role: Role = "decode") -> None:
        """Have so many seats taken at each worker of the role."""
        for worker in self.registry.workers:
            if worker.address.role == role:
                worker.count_leg(own)
                worker.note_others(others)

    def pause_s(self, index: int = 0) -> float:
        return self.scarcity.pause_s(self.registry.workers[index], USUAL_S)


def test_workers_are_asked_more_often_while_seats_are_scarce() -> None:
    site = Site({"decode": 4})
    assert site.pause_s() == USUAL_S
    site.take(8, 6)
    assert site.pause_s() == USUAL_S  # an eighth is left
    site.take(1, 6)
    assert site.pause_s() == OFTEN_S
    site.take(0, 4)
    assert site.pause_s() == USUAL_S


def test_all_workers_count_together_whatever_their_role() -> None:
    site = Site({"both": 2})
    first, second = site.registry.workers
    first.count_leg(2 * SEATS - 1)
    assert site.pause_s(1) == USUAL_S
    second.note_others(1)
    assert site.pause_s(0) == site.pause_s(1) == OFTEN_S


def test_where_nobody_else_sends_nothing_is_asked_more_often() -> None:
    site = Site({"decode": 2})
    site.take(SEATS, 0)
    assert site.pause_s() == USUAL_S


def test_prefill_workers_have_no_seats() -> None:
    site = Site({"prefill": 1, "decode": 1})
    site.take(SEATS, SEATS)
    site.take(SEATS, SEATS, "prefill")
    assert (site.pause_s(0), site.pause_s(1)) == (USUAL_S, OFTEN_S)


def test_a_worker_without_our_plugin_is_not_asked_for_metrics_more_often() -> None:
    site = Site({"decode": 1})
    site.take(SEATS, 1)
    site.registry.announce(site.registry.workers[0], Introduction(None, None))
    assert site.pause_s() == USUAL_S


@pytest.mark.parametrize("count", [1, 8, 20, 64])
def test_many_workers_are_asked_no_more_often_than_we_can_bear(count: int) -> None:
    site = Site({"decode": count})
    site.take(SEATS, 1)
    assert site.pause_s() == pytest.approx(min(USUAL_S, max(OFTEN_S, count / MOST_PER_S)))


def test_the_prober_asks_as_often() -> None:
    site = Site({"decode": 1})
    worker = site.registry.workers[0]
    assert probes(site.registry, site.scarcity, 7.5) <= 13
    worker.note_others(SEATS)
    assert 60 < probes(site.registry, site.scarcity, 7.5) < 100
    assert probes(site.registry, None, 7.5) <= 13


def probes(registry: Registry, scarcity: Scarcity | None, seconds: float) -> int:
    asked: list[Worker] = []

    async def ask(worker: Worker) -> None:
        asked.append(worker)

    async def main() -> None:
        time = asyncio.get_running_loop().time
        prober = Prober(registry, ask, random=Random(1), time=time, scarcity=scarcity)
        prober.start()
        await asyncio.sleep(seconds)
        await prober.aclose()

    run_virtually(main())
    return len(asked)
