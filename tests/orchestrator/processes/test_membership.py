from __future__ import annotations

import asyncio

from orchestrator.processes.membership import Follower, Publisher, Report, Snapshot
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import Event, WorkerState
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import address, names, registry_of


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
        assert copy.snapshots() == source.snapshots()
        source.judge.mark_gone(source.workers[1], "silent")
        follower.apply(await publisher.wait_newer(1))
        assert names(copy.pools["m"].decode) == ["decode/1"]

    asyncio.run(scenario())


def test_changes_of_one_turn_are_one_snapshot() -> None:
    async def scenario() -> None:
        source, publisher = supervisor()
        for worker in source.workers:
            source.judge.mark_gone(worker, "silent")
        snapshot = await publisher.wait_newer(1)
        assert snapshot.version == 2
        assert {worker.state for worker in snapshot.workers} == {WorkerState.GONE}

    asyncio.run(scenario())


def test_nothing_is_published_when_nothing_has_changed() -> None:
    async def scenario() -> None:
        source, publisher = supervisor()
        source.judge.mark_gone(source.workers[0], "silent")
        await publisher.wait_newer(1)
        source.judge.mark_gone(source.workers[0], "silent")  # the next probe
        await asyncio.sleep(0)
        assert publisher.snapshot.version == 2

    asyncio.run(scenario())


def test_all_who_wait_get_the_newest() -> None:
    async def scenario() -> None:
        source, publisher = supervisor()
        waiting = [asyncio.create_task(publisher.wait_newer(1)) for _ in range(3)]
        await asyncio.sleep(0)
        source.judge.mark_gone(source.workers[0], "silent")
        assert await asyncio.gather(*waiting) == [publisher.snapshot] * 3

    asyncio.run(scenario())


def test_only_newer_snapshots_are_applied() -> None:
    source = registry_of({"prefill": 1, "decode": 2})
    copy, follower, _ = process()
    follower.apply(Snapshot(7, source.snapshots()))
    source.judge.mark_gone(source.workers[0], "silent")
    for version in (6, 7):
        follower.apply(Snapshot(version, source.snapshots()))
        assert copy.workers[0].state is WorkerState.READY
    follower.apply(Snapshot(8, source.snapshots()))
    assert copy.workers[0].state is WorkerState.GONE


def test_a_worker_that_refuses_one_process_is_gone_for_all() -> None:
    async def scenario() -> None:
        source, publisher = supervisor()
        (one, one_follows, reports), (two, two_follows, _) = process(), process()
        one_follows.apply(publisher.snapshot)
        two_follows.apply(publisher.snapshot)
        one.judge.mark_gone(one.workers[1], "refused")
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
        source.judge.mark_ready(source.workers[1])
        publisher.note(late)
        assert source.workers[1].state is WorkerState.READY

    asyncio.run(scenario())


# --- what legs see, and what follows ------------------------------------------------------------


class Site:
    """A supervisor and two processes, each with its registry; nothing is sent until `exchange`."""

    def __init__(self) -> None:
        self.source, self.publisher = supervisor()
        self.copies = [process() for _ in range(2)]
        self._deliver()

    @property
    def all(self) -> list[Registry]:
        return [self.source, *(copy for copy, _, _ in self.copies)]

    async def exchange(self) -> None:
        """Reports up, then the newest snapshot down."""
        for _, _, reports in self.copies:
            while reports:
                self.publisher.note(reports.pop(0))
        await asyncio.sleep(0)
        self._deliver()

    def _deliver(self) -> None:
        for _, follower, _ in self.copies:
            follower.apply(self.publisher.snapshot)

    def states(self) -> list[list[str]]:
        return [[worker.state.value for worker in registry.workers] for registry in self.all]


def test_a_leg_lost_in_one_process_makes_the_worker_suspect_in_all() -> None:
    async def scenario() -> None:
        site = Site()
        doubted: list[Worker] = []
        site.source.news.doubted.add(doubted.append)
        seen_by = site.all[1]
        seen_by.judge.note_lost(seen_by.workers[1], 1, "reset")
        assert seen_by.workers[1].state is WorkerState.SUSPECT
        await site.exchange()
        assert site.states() == [["ready", "suspect", "ready"]] * 3
        assert doubted == [site.source.workers[1]]
        site.source.judge.mark_ready(doubted[0])
        await site.exchange()
        assert site.states() == [["ready"] * 3] * 3

    asyncio.run(scenario())


def test_a_silent_worker_loses_its_legs_in_all_processes() -> None:
    async def scenario() -> None:
        site = Site()
        gone: list[Worker] = []
        for registry in site.all[1:]:
            registry.news.gone.add(gone.append)
        site.source.judge.note_failed(site.source.workers[1], "500")
        site.source.judge.note_failed(site.source.workers[1], "500")
        await site.exchange()
        assert site.states() == [["ready", "ejected", "ready"]] * 3
        assert gone == [registry.workers[1] for registry in site.all[1:]]

    asyncio.run(scenario())


def test_a_leg_that_succeeds_in_one_process_ends_the_trial_in_all() -> None:
    async def scenario() -> None:
        site = Site()
        worker = site.source.workers[1]
        for _ in range(2):
            site.source.judge.note_failed(worker, "500")
        site.source.judge.mark_ready(worker)
        await site.exchange()
        assert site.states() == [["ready", "probing", "ready"]] * 3
        used_by = site.all[1]
        used_by.settle()
        assert used_by.workers[1].state is WorkerState.PROBING
        used_by.workers[1].failures = 0
        used_by.settle()
        await site.exchange()
        assert site.states() == [["ready"] * 3] * 3
        assert len({registry.workers[1].warm_from for registry in site.all}) == 1
        assert not any(registry.pools["m"].is_steady for registry in site.all)

    asyncio.run(scenario())


def test_errors_in_one_process_eject_in_all() -> None:
    async def scenario() -> None:
        site = Site()
        for _ in range(5):
            site.all[2].judge.note_error(site.all[2].workers[2])
        await site.exchange()
        assert site.states() == [["ready", "ready", "ejected"]] * 3
        assert site.source.workers[2].last_error == "answered 5 legs in a row with a 5xx"

    asyncio.run(scenario())


# --- members ------------------------------------------------------------------------------------


def test_workers_that_are_added_drained_and_removed_are_so_in_all_processes() -> None:
    async def scenario() -> None:
        site = Site()
        added = site.source.add(address("decode", 2, port=9))
        await site.exchange()
        assert [names(registry.workers)[-1] for registry in site.all] == ["decode/2"] * 3
        site.source.judge.mark_ready(added)
        site.source.drain(site.source.workers[1])
        await site.exchange()
        assert [names(registry.pools["m"].decode) for registry in site.all] == [["decode/1", "decode/2"]] * 3
        site.source.remove(site.source.workers[1])
        site.source.settle()
        await site.exchange()
        assert [names(registry.workers) for registry in site.all] == [
            ["prefill/0", "decode/1", "decode/2"]
        ] * 3

    asyncio.run(scenario())


def test_a_change_of_one_worker_is_no_work_for_the_others_in_other_processes() -> None:
    source, copy = registry_of({"decode": 50}), registry_of({"decode": 50}, ready=False)
    copy.follow(source.snapshots())
    told: list[str] = []
    copy.news.changed.add(lambda: told.append("changed"))
    source.remove(source.workers[7])
    copy.follow(source.snapshots())
    assert copy.snapshots() == source.snapshots()
    assert len(told) == 1
    copy.judge.note_lost(
        copy.workers[3], copy.workers[3].epoch, "cut"
    )  # here alone: it is not as it was told
    copy.follow(source.snapshots())
    assert copy.snapshots() == source.snapshots()


def test_a_report_on_a_worker_that_was_removed_is_no_news() -> None:
    async def scenario() -> None:
        site = Site()
        copy = site.all[1]
        copy.judge.mark_gone(copy.workers[1], "refused")
        site.source.remove(site.source.workers[1])
        site.source.settle()
        await site.exchange()
        assert [names(registry.workers) for registry in site.all] == [["prefill/0", "decode/1"]] * 3

    asyncio.run(scenario())


def test_another_worker_in_the_same_slot_is_another_worker() -> None:
    async def scenario() -> None:
        site = Site()
        source = site.source
        first = source.add(address("decode", 2, port=8))
        await site.exchange()
        before = site.all[1].workers[-1]
        source.remove(first)
        source.settle()
        second = source.add(address("decode", 2, port=9))
        await site.exchange()
        after = site.all[1].workers[-1]
        assert (first.slot, after.slot) == (second.slot, before.slot)
        assert after is not before
        assert after.origin.port == 9

    asyncio.run(scenario())


def test_a_denied_leg_of_a_process_has_the_supervisor_look() -> None:
    async def scenario() -> None:
        source, publisher = supervisor()
        copy, follower, reports = process()
        follower.apply(publisher.snapshot)
        mine = copy.workers[1]
        copy.judge.note_denied(mine, mine.epoch, 401)
        [report] = reports
        assert (report.event, report.why) == (Event.DENIED, "answered a leg with 401")
        publisher.note(report)
        theirs = source.workers[1]
        assert (theirs.state, theirs.is_denied) == (WorkerState.SUSPECT, True)
        follower.apply(await publisher.wait_newer(1))
        source.judge.note_unfit(
            theirs, "it answers 401 to /v1/models", "refuses the orchestrator's key (401)"
        )
        follower.apply(await publisher.wait_newer(2))
        assert (mine.state, mine.reason) == (WorkerState.UNFIT, "refuses the orchestrator's key (401)")
        source.judge.note_cleared(theirs)
        source.judge.mark_ready(theirs)
        follower.apply(await publisher.wait_newer(3))
        assert (mine.state, mine.is_denied, mine.reason) == (WorkerState.READY, False, None)

    asyncio.run(scenario())
