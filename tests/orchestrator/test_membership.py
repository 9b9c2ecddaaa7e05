from __future__ import annotations

import asyncio

from orchestrator.membership import Follower, Publisher, Report, Snapshot
from orchestrator.workers import Event, Registry, WorkerState
from tests.orchestrator.cluster import names, registry_of


def supervisor() -> tuple[Registry, Publisher]:
    registry = registry_of({"prefill": 1, "decode": 2})
    return registry, Publisher(registry)


def process() -> tuple[Registry, Follower, list[Report]]:
    registry = registry_of({"prefill": 1, "decode": 2}, ready=False)
    reports: list[Report] = []
    return registry, Follower(registry, reports.append), reports


def test_a_process_knows_what_the_supervisor_knows() -> None:
    async def scenario() -> None:
        source, publisher = supervisor()
        copy, follower, _ = process()
        follower.apply(publisher.snapshot)
        assert copy.standings() == source.standings()
        source.mark_gone(source.workers[1], "silent")
        follower.apply(await publisher.wait_newer(1))
        assert names(copy.pools["m"].decode) == ["decode/1"]

    asyncio.run(scenario())


def test_changes_of_one_turn_are_one_snapshot() -> None:
    async def scenario() -> None:
        source, publisher = supervisor()
        for worker in source.workers:
            source.mark_gone(worker, "silent")
        snapshot = await publisher.wait_newer(1)
        assert snapshot.version == 2
        assert {standing.state for standing in snapshot.standings} == {WorkerState.GONE}

    asyncio.run(scenario())


def test_nothing_is_published_when_nothing_has_changed() -> None:
    async def scenario() -> None:
        source, publisher = supervisor()
        source.mark_gone(source.workers[0], "silent")
        await publisher.wait_newer(1)
        source.mark_gone(source.workers[0], "silent")  # the next probe
        await asyncio.sleep(0)
        assert publisher.snapshot.version == 2

    asyncio.run(scenario())


def test_all_who_wait_get_the_newest() -> None:
    async def scenario() -> None:
        source, publisher = supervisor()
        waiting = [asyncio.create_task(publisher.wait_newer(1)) for _ in range(3)]
        await asyncio.sleep(0)
        source.mark_gone(source.workers[0], "silent")
        assert await asyncio.gather(*waiting) == [publisher.snapshot] * 3

    asyncio.run(scenario())


def test_only_newer_snapshots_are_applied() -> None:
    source = registry_of({"prefill": 1, "decode": 2})
    copy, follower, _ = process()
    follower.apply(Snapshot(7, source.standings()))
    source.mark_gone(source.workers[0], "silent")
    for version in (6, 7):
        follower.apply(Snapshot(version, source.standings()))
        assert copy.workers[0].state is WorkerState.READY
    follower.apply(Snapshot(8, source.standings()))
    assert copy.workers[0].state is WorkerState.GONE


def test_a_worker_that_refuses_one_process_is_gone_for_all() -> None:
    async def scenario() -> None:
        source, publisher = supervisor()
        (one, one_follows, reports), (two, two_follows, _) = process(), process()
        one_follows.apply(publisher.snapshot)
        two_follows.apply(publisher.snapshot)
        one.mark_gone(one.workers[1], "refused")
        [report] = reports
        publisher.note(report)
        two_follows.apply(await publisher.wait_newer(1))
        for registry in (source, one, two):
            assert names(registry.pools["m"].decode) == ["decode/1"]
            assert registry.workers[1].last_error == "refused"

    asyncio.run(scenario())


def test_a_refusal_from_before_the_return_counts_no_more() -> None:
    async def scenario() -> None:
        source, publisher = supervisor()
        late = Report("m/decode/0", source.workers[1].epoch, Event.REFUSED, "refused")
        publisher.note(late)
        source.mark_ready(source.workers[1])
        publisher.note(late)
        assert source.workers[1].state is WorkerState.READY

    asyncio.run(scenario())
