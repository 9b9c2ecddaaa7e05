"""A source that is not part of Baton, and the discovery that follows it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from random import Random
from typing import NoReturn

import pytest

from orchestrator.config.options import Config, DiscoverConfig
from orchestrator.discovery.base import PoolKey, Source, SourceAway, Take
from orchestrator.discovery.discovery import Discovery, sources_of
from orchestrator.telemetry.events import Events
from orchestrator.wire.member import Member, MemberSet
from orchestrator.workers.registry import Registry
from tests.simulation.loop import run_virtually


class Zone(Source):
    """It finds a worker per pool, at the host that the config names."""

    def __init__(self, host: str, pools: Sequence[PoolKey]) -> None:
        self._members = [
            Member(uid=host, name=host, model=model, role=role, url=f"http://{host}:{80 + place}")
            for place, (model, role) in enumerate(pools)
        ]
        self._host = host

    async def watch(self, take: Take) -> NoReturn:
        if self._host == "broken":
            raise TypeError("a bug")
        if self._host == "away":
            raise SourceAway("there is no such zone")
        while True:
            take(MemberSet(tuple(self._members)))
            await asyncio.sleep(3)


def zone_source(config: DiscoverConfig, pools: Sequence[PoolKey], random: Random) -> Source:
    return Zone((config.dns or "").partition(":")[0], pools)


def config_of(prefill: str, decode: str) -> Config:
    pools = {
        role: {"discover": {"dns": f"{host}:1"}} for role, host in (("prefill", prefill), ("decode", decode))
    }
    return Config.model_validate({"models": [{"name": "m", **pools}]})


async def follow(*configs: Config) -> tuple[Registry, Events]:
    """Follow one config after the other, for a while each."""
    registry, events = Registry((), ["m"], "json"), Events()
    discovery = Discovery(configs[0], registry, events, Random(0), {"dns": zone_source})
    discovery.start()
    for config in configs:
        discovery.reconfigure(config)
        await asyncio.sleep(60)
        registry.settle()
    await discovery.aclose()
    return registry, events


def urls(registry: Registry) -> list[str]:
    return [worker.address.url for worker in registry.workers]


def test_a_source_of_several_pools_is_one_and_each_gets_its_own_workers() -> None:
    assert list(sources_of(config_of("a", "a")).values()) == [(("m", "prefill"), ("m", "decode"))]
    registry, _ = run_virtually(follow(config_of("a", "a")))
    assert urls(registry) == ["http://a:80", "http://a:81"]
    assert [source.name for source in registry.sources] == ["dns a:1"]


def test_another_source_takes_over_what_the_first_one_found() -> None:
    registry, _ = run_virtually(follow(config_of("a", "b"), config_of("a", "c")))
    assert urls(registry) == ["http://a:80", "http://c:80"]
    assert [source.name for source in registry.sources] == ["dns a:1", "dns c:1"]


@pytest.mark.parametrize(("host", "why"), [("away", "there is no such zone"), ("broken", "TypeError: a bug")])
def test_one_that_fails_harms_no_other_and_drops_nobody(
    host: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "baton.discovery")
    registry, events = run_virtually(follow(config_of("a", "b"), config_of("a", host)))
    assert urls(registry) == ["http://a:80", "http://b:80"]
    (away,) = [event for event in events.after() if event.kind == "discovery.away"]
    assert away.message == f"dns {host}:1 cannot be asked: {why}; the workers that were found stay"
    assert registry.sources[1].away == why
