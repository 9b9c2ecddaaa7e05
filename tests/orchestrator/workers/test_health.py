from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import httpx
import pytest

from orchestrator.config.addresses import ranks_of
from orchestrator.config.options import HealthConfig
from orchestrator.workers.health import (
    NAME_EVERY,
    HttpProbe,
    Probe,
    ProbeFailed,
    Prober,
    ProbeRefused,
)
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import WorkerState
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import address, names, seat
from tests.simulation.loop import run_virtually

HEALTH = HealthConfig()


class FakeProbe:
    """Workers that answer, refuse, fail or are silent as a test says; by default they answer at once."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []
        self.refusing: set[str] = set()
        self.failing: set[str] = set()
        self.silent: set[str] = set()

    async def __call__(self, worker: Worker) -> Introduction | None:
        name = worker.name.removeprefix("m/")
        self.asked.append((asyncio.get_running_loop().time(), name))
        if name in self.silent:
            await asyncio.Event().wait()
        if name in self.refusing:
            raise ProbeRefused("refused")
        if name in self.failing:
            raise ProbeFailed("500")
        return None

    def times(self, name: str) -> list[float]:
        return [moment for moment, asked in self.asked if asked == name]


class Cluster:
    """Decode workers under the real prober, in virtual time."""

    def __init__(self, size: int, seed: int = 0) -> None:
        loop = asyncio.get_running_loop()
        self.now = loop.time
        self.probe = FakeProbe()
        addresses = [address("decode", index, port=index + 1) for index in range(size)]
        random = Random(seed)
        self.registry = Registry(addresses, ["m"], "json", health=HEALTH, time=loop.time, random=random)
        self.prober = Prober(self.registry, self.probe, random=random, time=loop.time)
        self.moved = asyncio.Event()
        self.registry.news.moved.add(lambda worker, event: self.moved.set())

    @property
    def first(self) -> Worker:
        return self.registry.workers[0]

    async def wait_state(self, worker: Worker, state: WorkerState) -> float:
        """How long it took."""
        began = self.now()
        while worker.state is not state:
            self.moved.clear()
            await self.moved.wait()
        return self.now() - began


def run(size: int, scenario: Callable[[Cluster], Awaitable[None]], seed: int = 0) -> None:
    async def main() -> None:
        cluster = Cluster(size, seed)
        cluster.prober.start()
        for worker in cluster.registry.workers:
            await cluster.wait_state(worker, WorkerState.READY)
        await scenario(cluster)
        await cluster.prober.aclose()

    run_virtually(main())


@pytest.mark.parametrize("seed", range(20))
def test_a_worker_that_is_killed_is_gone_within_a_second(seed: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        await asyncio.sleep(seed / 7)
        cluster.probe.refusing.add("decode/0")
        assert await cluster.wait_state(cluster.first, WorkerState.GONE) <= 1.0

    run(1, scenario, seed)


@pytest.mark.parametrize("seed", range(20))
def test_silence_ejects_after_three_seconds_at_most(seed: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        await asyncio.sleep(seed / 7)
        cluster.probe.silent.add("decode/0")
        took = await cluster.wait_state(cluster.first, WorkerState.EJECTED)
        assert 3.0 - HEALTH.interval_s * 1.2 <= took <= 3.0 + 1e-6
        assert names(cluster.registry.pools["m"].decode) == ["decode/1"]

    run(2, scenario, seed)


@pytest.mark.parametrize(
    ("trouble", "state", "within_s"),
    [
        ("refusing", WorkerState.GONE, 0.001),
        ("silent", WorkerState.EJECTED, 0.5),
        ("failing", WorkerState.EJECTED, 0.001),
    ],
)
def test_a_reset_is_looked_into_at_once(trouble: str, state: WorkerState, within_s: float) -> None:
    async def scenario(cluster: Cluster) -> None:
        getattr(cluster.probe, trouble).add("decode/0")
        cluster.registry.judge.note_lost(cluster.first, cluster.first.epoch, "reset")
        assert cluster.first.state is WorkerState.SUSPECT
        assert await cluster.wait_state(cluster.first, state) <= within_s

    run(2, scenario)


def test_a_worker_that_lost_one_leg_and_is_well_goes_on() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.registry.judge.note_lost(cluster.first, cluster.first.epoch, "reset")
        assert await cluster.wait_state(cluster.first, WorkerState.READY) < 0.001

    run(2, scenario)


def test_a_probe_from_before_a_reset_decides_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.probe.silent.add("decode/0")
        before = len(cluster.probe.times("decode/0"))
        await asyncio.sleep(HEALTH.interval_s * 1.2)
        assert len(cluster.probe.times("decode/0")) == before + 1
        cluster.registry.judge.note_lost(cluster.first, cluster.first.epoch, "reset")
        await asyncio.sleep(0)  # one is under way, another one begins
        await asyncio.sleep(0)
        assert len(cluster.probe.times("decode/0")) == before + 2

    run(2, scenario)


def test_a_busy_worker_is_ready_for_as_long_as_its_streams_flow() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.probe.silent.add("decode/0")
        for _ in range(100):
            cluster.first.note_heard(cluster.now())
            assert cluster.first.state is WorkerState.READY
            await asyncio.sleep(0.25)
        assert await cluster.wait_state(cluster.first, WorkerState.EJECTED) <= 3.0

    run(2, scenario)


def test_an_ejected_worker_comes_back_half_open() -> None:
    async def scenario(cluster: Cluster) -> None:
        worker, registry = cluster.first, cluster.registry
        cluster.probe.failing.add("decode/0")
        await cluster.wait_state(worker, WorkerState.EJECTED)
        asked = len(cluster.probe.times("decode/0"))
        await asyncio.sleep(60)
        waits = cluster.probe.times("decode/0")[asked:]
        between = [later - earlier for earlier, later in pairwise(waits)]
        assert all(1 <= wait <= 30 for wait in between)
        assert between[-1] >= 8
        assert worker.state is WorkerState.EJECTED
        cluster.probe.failing.clear()
        await cluster.wait_state(worker, WorkerState.PROBING)
        await asyncio.sleep(60)  # nobody asks for anything
        assert worker.state is WorkerState.PROBING
        with seat(worker):
            assert names(registry.pools["m"].candidates("decode")) == ["decode/1"]
            worker.failures = 0  # the leg succeeds
            assert await cluster.wait_state(worker, WorkerState.READY) <= 0.25
        assert not registry.pools["m"].is_steady

    run(2, scenario)


def test_a_pool_keeps_half_of_its_silent_workers_and_all_come_back() -> None:
    async def scenario(cluster: Cluster) -> None:
        everybody = {f"decode/{index}" for index in range(4)}
        cluster.probe.silent |= everybody
        await asyncio.sleep(30)
        assert (
            sorted(worker.state for worker in cluster.registry.workers) == ["ejected"] * 2 + ["suspect"] * 2
        )
        assert len(cluster.registry.pools["m"].decode) == 2
        cluster.probe.silent.clear()
        for worker in cluster.registry.workers:
            if worker.state is WorkerState.SUSPECT:
                assert await cluster.wait_state(worker, WorkerState.READY) <= 2
        for worker in cluster.registry.workers:
            if worker.state is WorkerState.EJECTED:
                await cluster.wait_state(worker, WorkerState.PROBING)

    run(4, scenario)


def test_moves_are_logged_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.probe.failing.add("decode/0")
        await cluster.wait_state(cluster.first, WorkerState.EJECTED)

    with caplog.at_level("INFO", "baton.health"):
        run(2, scenario)
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert sorted(lines[:2]) == [
        ("INFO", "m/decode/0 is ready (answered)"),
        ("INFO", "m/decode/1 is ready (answered)"),
    ]
    assert lines[2:] == [
        ("INFO", "m/decode/0 is suspect (failed): 500"),
        ("WARNING", "m/decode/0 is ejected (failed): 500"),
    ]


def test_the_end_of_a_drained_worker_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(cluster: Cluster) -> None:
        first, second = cluster.registry.workers
        await cluster.wait_state(first, WorkerState.READY)
        cluster.registry.drain(first)
        cluster.probe.refusing |= {"decode/0", "decode/1"}
        await cluster.wait_state(first, WorkerState.GONE)
        await cluster.wait_state(second, WorkerState.GONE)

    with caplog.at_level("INFO", "baton.health"):
        run(2, scenario)
    records = [record for record in caplog.records if " is gone " in record.getMessage()]
    told = {record.getMessage(): record.levelname for record in records}
    assert told["m/decode/0 is gone (refused): it was drained before"] == "INFO"
    assert [level for text, level in told.items() if text.startswith("m/decode/1")] == ["WARNING"]


def test_who_is_needed_again_is_asked_at_once() -> None:
    async def scenario(cluster: Cluster) -> None:
        first, second = cluster.registry.workers
        cluster.probe.failing.add("decode/0")
        await cluster.wait_state(first, WorkerState.EJECTED)
        cluster.probe.failing.clear()
        cluster.registry.judge.mark_gone(second, "refused")
        assert first.state is WorkerState.SUSPECT
        assert await cluster.wait_state(first, WorkerState.READY) < 0.001

    run(2, scenario)


def test_a_refused_worker_is_asked_soon_and_comes_back() -> None:
    async def scenario(cluster: Cluster) -> None:
        epoch = cluster.first.epoch
        cluster.registry.judge.mark_gone(cluster.first, "refused")
        assert await cluster.wait_state(cluster.first, WorkerState.READY) <= 0.1
        assert cluster.first.epoch == epoch + 1

    run(1, scenario)


def test_workers_come_and_go_while_it_probes() -> None:
    async def scenario(cluster: Cluster) -> None:
        added = cluster.registry.add(address("decode", 7, port=7))
        await cluster.wait_state(added, WorkerState.READY)
        cluster.registry.remove(cluster.first)
        await asyncio.sleep(1)
        assert names(cluster.registry.workers) == ["decode/7"]
        last = cluster.probe.times("decode/0")[-1]
        await asyncio.sleep(10)
        assert cluster.probe.times("decode/0")[-1] == last
        assert cluster.probe.times("decode/7")[-1] > last

    run(1, scenario)


def test_probes_of_many_workers_spread() -> None:
    async def scenario(cluster: Cluster) -> None:
        await asyncio.sleep(30)
        assert len({moment for moment, _ in cluster.probe.asked[-8:]}) == 8

    run(8, scenario)


# --- over HTTP ----------------------------------------------------------------------------------

MODELS = {"data": [{"id": "m", "max_model_len": 4096}]}
INFO = {"role": "decode", "model": "m", "decodes": ["json"], "engine": "sim", "engine_version": "1"}
WELL = {"/health": httpx.Response(200), "/v1/models": httpx.Response(200, json=MODELS)}


def probed(
    pages: dict[str, httpx.Response | Exception], state: WorkerState = WorkerState.GONE
) -> tuple[Introduction | None, list[str]]:
    """What a probe returns, and which pages it asked for."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        page = pages.get(request.url.path, httpx.Response(404))
        if isinstance(page, Exception):
            raise page
        return page

    async def scenario() -> Introduction | None:
        probe: Probe = HttpProbe("secret", transport=httpx.MockTransport(answer))
        registry = Registry([address("decode", 0)], ["m"], "json")
        registry.workers[0].state = state
        return await probe(registry.workers[0])

    return asyncio.run(scenario()), asked


def test_a_worker_in_service_is_asked_for_its_health_only() -> None:
    for state in (WorkerState.READY, WorkerState.SUSPECT, WorkerState.DRAINING):
        assert probed(WELL, state) == (None, ["/health"])


def test_a_worker_that_comes_introduces_itself() -> None:
    introduction, _ = probed({**WELL, "/baton/info": httpx.Response(200, json=INFO)})
    assert introduction is not None
    assert introduction.info is not None
    assert (introduction.info.engine, introduction.max_model_len) == ("sim", 4096)
    assert probed(WELL)[0] == Introduction(None, 4096)


def cards(*names: str, parent: str | None = "m") -> list[dict[str, Any]]:
    return [{"id": name, "parent": parent} for name in names]


@pytest.mark.parametrize(
    ("listed", "known"),
    [
        (cards("sql", "poems"), ("sql", "poems")),
        (cards("alias", parent=None), ()),  # another name of the same model
        (cards("m", "", "a" * 257, "a" * 256), ("a" * 256,)),
        (cards(*map(str, range(1500))), tuple(map(str, range(1000)))),
    ],
    ids=["adapters", "names", "odd names", "too many"],
)
def test_adapters_are_the_models_that_have_a_parent(listed: list[Any], known: tuple[str, ...]) -> None:
    pages: Any = {**WELL, "/v1/models": httpx.Response(200, json={"data": [*MODELS["data"], *listed]})}
    assert probed(pages)[0] == Introduction(None, 4096, known)


@pytest.mark.parametrize(("engines", "is_fit"), [(None, True), (2, True), (1, False)])
def test_a_worker_without_the_engine_of_a_rank_is_unfit(engines: int | None, is_fit: bool) -> None:
    info: dict[str, Any] = INFO | ({} if engines is None else {"data_parallel_size": engines})
    pages: Any = {**WELL, "/baton/info": httpx.Response(200, json=info)}

    async def scenario() -> None:
        transport = httpx.MockTransport(lambda request: pages.get(request.url.path, httpx.Response(404)))
        _, second = ranks_of(address("decode", 0), 2)
        await HttpProbe(None, transport=transport)(Registry([second], ["m"], "json").workers[0])

    if is_fit:
        asyncio.run(scenario())
    else:
        with pytest.raises(ProbeFailed, match="it has 1 data-parallel engines, and none of rank 1"):
            asyncio.run(scenario())


def test_a_worker_in_service_is_asked_again_when_it_lists_other_adapters() -> None:
    data: list[Any] = [*MODELS["data"]]

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.path != "/baton/info" else 404, json={"data": data})

    async def scenario() -> list[tuple[str, ...] | None]:
        probe: Probe = HttpProbe(None, transport=httpx.MockTransport(answer))
        worker = Registry([address("decode", 0)], ["m"], "json").workers[0]
        worker.state = WorkerState.READY
        seen: list[tuple[str, ...] | None] = []
        for change in ([], cards("sql"), []):
            data.extend(change)
            for _ in range(NAME_EVERY):
                introduction = await probe(worker)
                seen += [None if introduction is None else introduction.adapters]
                if introduction is not None:
                    worker.announce(introduction)
        return seen

    pause: list[tuple[str, ...] | None] = [None] * (NAME_EVERY - 1)
    assert asyncio.run(scenario()) == [*pause, None, *pause, ("sql",), *pause, None]


@pytest.mark.parametrize(
    ("pages", "why"),
    [
        ({"/health": httpx.Response(503)}, "503"),
        ({"/health": httpx.ReadError("reset")}, "ReadError: reset"),
        ({"/health": httpx.ConnectError("no such host")}, "ConnectError: no such host"),
        ({**WELL, "/v1/models": httpx.Response(200, content=b"?")}, "DecodeError"),
        (
            {**WELL, "/v1/models": httpx.Response(200, json={"data": [{"id": "x"}]})},
            "it serves .'x'., not 'm'",
        ),
    ],
)
def test_a_worker_that_is_not_as_it_should_be(pages: dict[str, httpx.Response | Exception], why: str) -> None:
    with pytest.raises(ProbeFailed, match=why):
        probed(pages)


@pytest.mark.parametrize("gets_it", [True, False])
def test_the_key_goes_only_to_workers_that_are_to_get_it(gets_it: bool) -> None:
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("authorization"))
        return WELL.get(request.url.path, httpx.Response(404))

    async def scenario() -> None:
        there = replace(address("decode", 0), gets_credential=gets_it)
        registry = Registry([there], ["m"], "json")
        await HttpProbe("secret", transport=httpx.MockTransport(answer))(registry.workers[0])

    asyncio.run(scenario())
    assert set(asked) == ({"Bearer secret"} if gets_it else {None})


def test_nobody_listens_there() -> None:
    async def scenario() -> None:
        probe = HttpProbe(None)
        try:
            await probe(Registry([address("decode", 0, port=1)], ["m"], "json").workers[0])
        finally:
            await probe.aclose()

    with pytest.raises(ProbeRefused, match="ConnectError"):
        asyncio.run(scenario())
