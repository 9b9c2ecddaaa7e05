"""What the load wants is done, with all processes in memory: one failure holds up nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from launch.local import operations, scaling, waits
from launch.local.control import CommandFailed
from launch.local.member import Limits
from launch.local.registrar import Wanted
from launch.local.scaling import FIRST_PAUSE_S, Scaling
from launch.plan import ProcessSpec
from tests.launch.local.test_operations import FakeFleet, FakeMember, FakeRegistrar, Site
from tests.orchestrator.cluster import Clock

KEY = ("m", "both")


class Newcomer(FakeMember):
    """A worker that was added; it is ready once it is let, and may take its time to stop."""

    def __init__(self, spec: ProcessSpec, fleet: GrowingFleet) -> None:
        super().__init__(spec)
        self._fleet = fleet
        self.fails = fleet.newcomers_fail
        self.may_stop = asyncio.Event()
        if not fleet.stops_are_slow:
            self.may_stop.set()

    def start(self) -> None:
        self.starts += 1
        self.is_ready = not self._fleet.starts_are_slow

    async def stop(self, limit_s: float, hurry: asyncio.Event) -> None:
        await self.may_stop.wait()
        await super().stop(limit_s, hurry)


class GrowingFleet(FakeFleet):
    starts_are_slow = False
    stops_are_slow = False
    newcomers_fail = False

    def enlist(self, spec: ProcessSpec) -> FakeMember:
        self.members.append(Newcomer(spec, self))
        return self.members[-1]


class ScaledSite(Site):
    """A run whose only pool follows what is `wanted`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.growing = self.fleet = GrowingFleet(self.fleet.of_config)
        self.registrar = FakeRegistrar(self.fleet)
        self.operator = operations.Operator(self.fleet, self.registrar, self.further, "key")  # type: ignore[arg-type]
        self.wanted, self.is_away, self.asked = self.workers, False, 0
        self.before_answer: Callable[[], None] = lambda: None
        self.registrar.wanted = self._wanted  # type: ignore[attr-defined]
        self.scaling = Scaling(self.fleet, self.operator, self.registrar, [KEY], self.caller.say)  # type: ignore[arg-type]
        self.fleet.limits = Limits(start_s=60.0)

    async def _wanted(self) -> list[Wanted]:
        self.asked += 1
        if self.is_away:
            raise CommandFailed("the orchestrator does not answer")
        self.before_answer()
        return [Wanted(*KEY, self.wanted, "so it is"), Wanted("m", "prefill", 9, "nobody has this pool")]

    @property
    def names(self) -> list[str]:
        return [member.spec.name for member in self.fleet.workers]

    async def look(self, wanted: int) -> None:
        """Have so many wanted, and begin with that."""
        self.wanted = wanted
        await self.scaling.look()

    async def settle(self) -> None:
        """Wait until nobody comes or goes."""
        await until(lambda: not self.fleet.moving)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():  # noqa: ASYNC110  # nobody tells of it
            await asyncio.sleep(0.001)


@asynccontextmanager
async def followed(site: ScaledSite) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(site.scaling.run())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scene)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    for module, name in ((waits, "POLL_S"), (waits, "PULLED_S"), (scaling, "LOOK_S")):
        monkeypatch.setattr(module, name, 0.001)
    monkeypatch.setattr(waits, "KNOWN_S", 0.05)
    monkeypatch.setattr(operations, "KNOWN_S", 0.05)
    made = Clock()
    monkeypatch.setattr(scaling, "_now", lambda: made.now)
    return made


def test_as_many_come_as_are_wanted() -> None:
    async def scene() -> None:
        site = ScaledSite(workers=1, room=3)
        async with followed(site):
            site.wanted = 3
            await until(lambda: len(site.names) == 3)
            await site.settle()
            assert site.names == ["m/both/0", "m/both/1", "m/both/2"]
            assert site.starts() == {"m/both/0": 0, "m/both/1": 1, "m/both/2": 1}
        assert site.caller.said == ["m/both: 2 more: so it is"]

    run(scene())


def test_those_that_are_too_many_go_one_at_a_time_when_their_last_request_has_ended() -> None:
    async def scene() -> None:
        site = ScaledSite(workers=3)
        site.registrar.busy["m/both/2"] = 1
        for _ in range(5):
            await site.look(1)
            assert site.fleet.moving == {"m/both/2"}
        assert site.caller.said == ["m/both/2 goes: so it is"]
        assert len(site.names) == 3
        site.registrar.busy.clear()
        await site.settle()
        assert site.names == ["m/both/0", "m/both/1"]
        await site.look(1)
        assert site.fleet.moving == {"m/both/1"}
        await site.settle()
        await site.look(1)
        assert site.names == [*site.registrar.known] == ["m/both/0"]
        assert site.fleet.moving == set()

    run(scene())


def test_after_starts_that_failed_the_pauses_double(clock: Clock) -> None:
    async def scene() -> None:
        site = ScaledSite(workers=1, room=99)
        site.growing.newcomers_fail = True
        pause_s, at = FIRST_PAUSE_S, []
        for _ in range(3):
            await site.look(3)  # two of them fail, which counts once
            await site.settle()
            at.append(clock.now)
            assert site.names == [*site.registrar.known] == ["m/both/0"]
            said = len(site.caller.said)
            clock.now += pause_s - 0.1
            await site.look(3)
            assert (len(site.caller.said), site.fleet.moving) == (said, set())
            clock.now += 0.2
            pause_s *= 2
        failures = [text for text in site.caller.said if "ended while starting" in text]
        assert [text.rpartition("another try in ")[2] for text in failures[::2]] == ["10 s", "20 s", "40 s"]
        site.growing.newcomers_fail = False
        await site.look(2)
        await site.settle()
        assert len(site.names) == 2
        site.growing.newcomers_fail = True
        await site.look(3)
        await site.settle()
        assert site.caller.said[-1].endswith("another try in 10 s")  # one that came has ended it

    run(scene())


def test_without_room_nothing_comes_and_it_is_tried_again(clock: Clock) -> None:
    async def scene() -> None:
        site = ScaledSite(workers=1, room=0)
        await site.look(2)
        await site.look(2)
        assert site.caller.said == [
            "m/both: 1 more: so it is", "m/both: no GPU is free; another try in 10 s"
        ]  # fmt: skip
        site.further.room = 1
        clock.now += FIRST_PAUSE_S
        await site.look(2)
        await site.settle()
        assert site.names == ["m/both/0", "m/both/1"]

    run(scene())


def test_starts_that_fail_keep_nobody_from_going(clock: Clock) -> None:
    async def scene() -> None:
        site = ScaledSite(workers=2, room=0)
        await site.look(3)
        await site.look(1)
        await site.settle()
        assert site.names == ["m/both/0"]
        site.further.room = 1
        await site.look(2)  # that one went is no reason to start one before its time
        assert site.names == ["m/both/0"]

    run(scene())


def test_one_that_does_not_end_serves_on_and_is_tried_again_after_a_pause(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "DRAIN_S", 0.02)

    async def scene() -> None:
        site = ScaledSite(workers=2)
        site.registrar.busy["m/both/1"] = 2
        await site.look(1)
        await site.settle()
        assert "still serves 2 requests" in site.caller.said[-1]
        assert site.caller.said[-1].endswith("another try in 10 s")
        assert (site.names, site.registrar.drained) == (["m/both/0", "m/both/1"], set())
        await site.look(1)
        assert site.fleet.moving == set()
        site.registrar.busy.clear()
        clock.now += FIRST_PAUSE_S
        await site.look(1)
        await site.settle()
        assert site.names == ["m/both/0"]

    run(scene())


def test_who_is_not_ready_is_the_first_to_go_and_is_stopped_in_full() -> None:
    async def scene() -> None:
        site = ScaledSite(workers=1, room=1)
        site.growing.starts_are_slow = site.growing.stops_are_slow = True
        await site.look(2)
        newcomer = site.fleet.workers[-1]
        assert isinstance(newcomer, Newcomer)
        for _ in range(3):  # what is wanted stays the same while it stops
            await site.look(1)
            await asyncio.sleep(0.01)
        assert newcomer in site.fleet.members
        newcomer.may_stop.set()
        await site.settle()
        assert site.names == [*site.registrar.known] == ["m/both/0"]

    run(scene())


def test_when_the_run_ends_who_is_not_ready_is_stopped_and_who_was_to_go_stays() -> None:
    async def scene() -> None:
        site = ScaledSite(workers=2, room=1)
        site.registrar.busy["m/both/1"] = 1
        site.growing.starts_are_slow = True
        async with followed(site):
            site.wanted = 1
            await until(lambda: "m/both/1" in site.registrar.drained)
            site.wanted = 2
            await until(lambda: len(site.names) == 3)
        assert site.names == ["m/both/0", "m/both/1"]
        assert (site.registrar.drained, site.fleet.moving) == (set(), set())

    run(scene())


def test_nothing_is_begun_while_a_command_is_under_way() -> None:
    async def scene() -> None:
        site = ScaledSite(workers=2, room=1)
        site.fleet.operation = "a roll"
        await site.look(3)
        await site.look(1)
        assert (site.asked, site.caller.said, site.fleet.moving) == (0, [], set())
        site.fleet.operation, site.fleet.is_ready = None, False
        await site.look(3)
        assert site.asked == 0

    run(scene())


@pytest.mark.parametrize("wanted", [1, 3])
def test_a_command_that_comes_while_the_orchestrator_is_asked_goes_first(wanted: int) -> None:
    async def scene() -> None:
        site = ScaledSite(workers=2, room=1)
        site.before_answer = lambda: setattr(site.fleet, "operation", "a roll")
        await site.look(wanted)
        assert (site.asked, site.caller.said, site.fleet.moving) == (1, [], set())

    run(scene())


def test_commands_are_refused_from_the_moment_that_one_is_chosen() -> None:
    async def scene() -> None:
        site = ScaledSite(workers=1, room=1)
        site.growing.starts_are_slow = True
        refused: list[str] = []
        add = site.operator.add

        async def asked_meanwhile(*of: Any) -> Any:
            with pytest.raises(CommandFailed) as raised:
                await site.ask("restart", workers=[])
            refused.append(str(raised.value))
            return await add(*of)

        site.operator.add = asked_meanwhile  # type: ignore[method-assign]
        await site.look(2)
        assert refused == ["the load has m/both started or stopped: try again when that is done"]
        with pytest.raises(CommandFailed, match="the load has m/both/1 started or stopped"):
            await site.ask("restart", workers=[])
        site.fleet.workers[-1].is_ready = True
        await site.settle()
        with pytest.raises(CommandFailed, match="the load decides how many workers m/both has"):
            await site.ask("scale", model="m", role="both", count=1)
        assert await site.ask("restart", workers=["m/both/0"]) == {"restarted": ["m/both/0"]}

    run(scene())


def test_an_orchestrator_that_is_away_is_told_of_once() -> None:
    async def scene() -> None:
        site = ScaledSite(workers=1, room=1)
        site.is_away = True
        told = ["nobody knows how many workers are wanted: the orchestrator does not answer"]
        for _ in range(3):
            await site.look(2)
        assert site.caller.said == told
        site.is_away = False
        await site.look(1)
        site.is_away = True
        await site.look(1)
        assert site.caller.said == told * 2

    run(scene())


def test_a_machine_that_cannot_be_asked_for_room_ends_nothing() -> None:
    async def scene() -> None:
        site = ScaledSite(workers=1, room=1)

        def refuse(*_: object) -> ProcessSpec:
            raise OSError("too many open files")

        site.further.plan = refuse  # type: ignore[method-assign]
        site.wanted = 2
        await site.look(3)
        assert [told for told in site.caller.said if "too many open files" in told] == [
            "m/both: too many open files; another try in 10 s"
        ]

    run(scene())


def test_without_pools_that_follow_nobody_is_asked() -> None:
    async def scene() -> None:
        site = ScaledSite()
        site.scaling = Scaling(site.fleet, site.operator, site.registrar, [], site.caller.say)  # type: ignore[arg-type]
        async with followed(site):
            await asyncio.sleep(0.02)
        assert site.asked == 0

    run(scene())
