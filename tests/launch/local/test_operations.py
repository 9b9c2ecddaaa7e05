"""What operators ask for, with all processes in memory: whatever goes wrong leaves nobody drained."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from launch.engines.base import PlanError
from launch.local import operations, waits
from launch.local.control import CommandFailed
from launch.local.member import Limits, StartFailed
from launch.local.operations import Operator
from launch.local.registrar import Row
from launch.plan import ProcessSpec
from tests.launch.planning import config, model, plan_of


class FakeMember:
    """A process that is ready as soon as it is started, unless it `fails`."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.is_ready = True
        self.fails = False
        self.is_expiring = False
        self.starts = 0

    @property
    def is_running(self) -> bool:
        return self.is_ready

    @contextmanager
    def held(self) -> Any:
        yield

    def start(self) -> None:
        self.starts += 1
        self.is_ready = True

    start_anew = start

    def check_started(self) -> None:
        if self.fails:
            raise StartFailed(f"{self.spec.name} ended while starting")

    async def stop(self, limit_s: float, hurry: asyncio.Event) -> None:
        self.is_ready = False


class FakeFleet:
    def __init__(self, specs: Sequence[ProcessSpec]) -> None:
        self.limits = Limits(start_s=0.5)
        self.hurry = asyncio.Event()
        self.is_ready = True
        self.moving: set[str] = set()
        self.scaled: list[tuple[str, str]] = []
        self.operation: str | None = None
        self.progress = FakeCaller()
        self.is_in_step = True
        self.of_config = specs
        self.dismissed: set[tuple[str, str]] = set()
        self.left_drained: set[str] = set()
        self.members = [FakeMember(spec) for spec in specs]

    def note(self) -> None:
        """Write nothing."""

    @property
    def orchestrator(self) -> FakeMember:
        return self.orchestrators[0]

    @property
    def orchestrators(self) -> list[FakeMember]:
        return [member for member in self.members if member.spec.role == "orchestrator"]

    @property
    def workers(self) -> list[FakeMember]:
        return [member for member in self.members if member.spec.role != "orchestrator"]

    def expiring(self) -> list[FakeMember]:
        return [m for m in self.workers if m.is_expiring and m.spec.name not in self.moving]

    def find(self, name: str) -> FakeMember | None:
        return next((member for member in self.members if member.spec.name == name), None)

    def enlist(self, spec: ProcessSpec) -> FakeMember:
        self.members.insert(0, FakeMember(spec))
        return self.members[0]

    def rename(self, member: FakeMember, name: str) -> None:
        member.spec = replace(member.spec, name=name)

    def dismiss(self, member: FakeMember) -> None:
        self.members.remove(member)
        self.dismissed.add((member.spec.role, member.spec.url))


@dataclass
class FakeRegistrar:
    """The orchestrator: a worker whose process is there is ready."""

    fleet: FakeFleet
    busy: dict[str, int] = field(default_factory=dict)  # requests of each
    drained: set[str] = field(default_factory=set)
    known: dict[str, tuple[str, str]] = field(default_factory=dict)  # role and URL by name
    has_listener: bool = True
    is_discovering: bool = False
    is_lost: bool = False
    is_lost_with: FakeMember | None = None  # once this one is stopped
    asked_whether_serving: list[str] = field(default_factory=list)  # URLs of orchestrators

    def __post_init__(self) -> None:
        self.known = {m.spec.name: (m.spec.role, m.spec.url) for m in self.fleet.workers}

    async def rows(self) -> list[Row]:
        if not self.has_listener:
            raise CommandFailed("there is no admin listener")
        if self.is_lost or (self.is_lost_with is not None and not self.is_lost_with.is_ready):
            raise CommandFailed("the orchestrator does not answer")
        ready = {member.spec.url for member in self.fleet.workers if member.is_ready}
        return [
            Row(
                name,
                name.rsplit("/", 2)[0],
                role,
                url,
                "gone" if url not in ready else "draining" if name in self.drained else "ready",
                self.busy.get(name, 0),
                name in self.drained,
                True,
                None,
            )
            for name, (role, url) in self.known.items()
        ]

    async def is_serving(self, url: str) -> bool:
        self.asked_whether_serving.append(url)
        return len(self.asked_whether_serving) > 1

    async def drain(self, name: str) -> None:
        self.drained.add(name)

    async def undrain(self, name: str) -> None:
        await self.rows()
        self.drained.discard(name)

    async def remove(self, name: str) -> None:
        del self.known[name]

    async def add(self, spec: ProcessSpec, model: str, served_model: str | None, zone: str | None) -> str:
        numbers = [
            int(name.rpartition("/")[2]) for name in self.known if name.startswith(f"{model}/{spec.role}/")
        ]
        name = f"{model}/{spec.role}/{max(numbers, default=-1) + 1}"
        self.known[name] = (spec.role, spec.url)
        return name


class FakeFurther:
    """There is room for so many workers more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.pools = {("m", "both"): (None, config(model(both={"engine": "sim"})).models[0].both)}

    def plan(self, model: str, role: str, running: Sequence[ProcessSpec], of_config: object) -> ProcessSpec:
        if self.room == 0:
            raise PlanError("no GPU is free")
        self.room -= 1
        return replace(running[0], ready_url=f"http://further-{self.room}/health")


class FakeCaller:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.is_gone = False

    def say(self, text: str) -> None:
        self.said.append(text)


@dataclass
class Site:
    workers: int = 2
    room: int = 1
    orchestrators: int = 1
    caller: FakeCaller = field(default_factory=FakeCaller)

    def __post_init__(self) -> None:
        pool = {"engine": "sim", "replicas": self.workers}
        several = {"orchestrators": self.orchestrators}
        self.fleet = FakeFleet(plan_of(config(model(both=pool), launch=several)).processes)
        self.registrar = FakeRegistrar(self.fleet)
        self.further = FakeFurther(self.room)
        self.operator = Operator(self.fleet, self.registrar, self.further, "key")  # type: ignore[arg-type]

    async def ask(self, command: str, **more: Any) -> Any:
        request = {"command": command, "timeout_s": 0.05, "is_forced": False, **more}
        return (await self.operator.handle(request, self.caller))["done"]  # type: ignore[arg-type]

    def restart(self, *names: str, **more: Any) -> Any:
        return asyncio.run(self.ask("restart", workers=names, **more))

    def scale(self, count: int, **more: Any) -> Any:
        return asyncio.run(self.ask("scale", model="m", role="both", count=count, **more))

    def starts(self) -> dict[str, int]:
        return {member.spec.name: member.starts for member in self.fleet.workers}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "POLL_S", 0.001)
    monkeypatch.setattr(waits, "PULLED_S", 0.001)
    monkeypatch.setattr(waits, "KNOWN_S", 0.05)
    monkeypatch.setattr(operations, "KNOWN_S", 0.05)


def test_a_machine_that_does_not_tell_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a driver of GPUs that hangs: neither the command nor the end of `up` waits for it."""
    monkeypatch.setattr(operations, "PLAN_S", 0.05)
    may_go_on = threading.Event()
    site = Site()
    monkeypatch.setattr(site.further, "plan", lambda *_: may_go_on.wait(60))
    with pytest.raises(CommandFailed, match="ports and GPUs are free: this machine has not told within"):
        site.scale(3)
    assert not may_go_on.is_set()
    may_go_on.set()


def test_one_that_is_named_twice_is_restarted_once() -> None:
    site = Site()
    assert site.restart("m/both/1", "m/both/0", "m/both/1") == {"restarted": ["m/both/1", "m/both/0"]}


def test_one_whose_place_is_lost_soon_moves_as_in_a_restart() -> None:
    site = Site(workers=3)
    site.fleet.workers[1].is_expiring = site.fleet.workers[2].is_expiring = True
    asyncio.run(site.operator.move_one())
    assert site.starts() == {"m/both/0": 0, "m/both/1": 1, "m/both/2": 0}
    assert site.fleet.progress.said == ["m/both/1 moves, as its place is lost soon"]
    assert (site.registrar.drained, site.fleet.operation) == (set(), None)


def test_one_that_the_load_has_stopped_does_not_move() -> None:
    site = Site(workers=2)
    site.fleet.workers[0].is_expiring = True
    site.fleet.moving.add("m/both/0")
    asyncio.run(site.operator.move_one())
    assert site.starts() == {"m/both/0": 0, "m/both/1": 0}


def test_the_only_one_moves_once_another_one_serves() -> None:
    site = Site(workers=1)
    site.fleet.workers[0].is_expiring = True
    asyncio.run(site.operator.move_one())
    assert site.starts() == {"m/both/0": 1}
    assert "m/both/1 serves in place of m/both/0 meanwhile" in site.fleet.progress.said


def test_one_that_cannot_move_serves_on() -> None:
    site = Site(workers=1, room=0)
    site.fleet.workers[0].is_expiring = True
    with pytest.raises(CommandFailed, match="none can be started in its place"):
        asyncio.run(site.operator.move_one())
    assert site.starts() == {"m/both/0": 0}
    assert (site.registrar.drained, site.fleet.operation) == (set(), None)


def test_nobody_moves_whose_place_stays() -> None:
    site = Site()
    asyncio.run(site.operator.move_one())
    assert site.fleet.progress.said == []


def test_all_are_restarted_in_turn() -> None:
    site = Site(workers=3)
    assert site.restart() == {"restarted": ["m/both/0", "m/both/1", "m/both/2"]}
    assert site.starts() == {"m/both/0": 1, "m/both/1": 1, "m/both/2": 1}
    assert site.registrar.drained == set()
    assert site.fleet.operation is None


def test_the_only_one_is_replaced_meanwhile() -> None:
    site = Site(workers=1)
    site.restart()
    assert site.starts() == {"m/both/0": 1}
    assert "m/both/1 serves in place of m/both/0 meanwhile" in site.caller.said
    assert [*site.registrar.known] == ["m/both/0"]


def test_the_only_one_without_room_for_another() -> None:
    site = Site(workers=1, room=0)
    with pytest.raises(CommandFailed, match="none can be started in its place: no GPU is free; --force"):
        site.restart()
    assert site.starts() == {"m/both/0": 0}
    site.restart(is_forced=True)
    assert site.starts() == {"m/both/0": 1}


def test_the_last_that_serves_counts_as_the_only_one() -> None:
    site = Site(workers=2, room=0)
    site.registrar.drained.add("m/both/0")
    with pytest.raises(CommandFailed, match="m/both/1 is the only one that serves"):
        site.restart("m/both/1")
    site.restart("m/both/0")  # it serves nobody
    assert site.registrar.drained == {"m/both/0"}


def test_requests_that_do_not_end_keep_their_worker() -> None:
    site = Site()
    site.registrar.busy["m/both/0"] = 3
    with pytest.raises(CommandFailed, match=r"m/both/0 still serves 3 requests after 0\.05 s"):
        site.restart()
    assert site.starts() == {"m/both/0": 0, "m/both/1": 0}
    assert site.registrar.drained == set()
    site.restart(is_forced=True)
    assert "m/both/0 is stopped, which cuts 3 requests" in site.caller.said
    assert site.starts() == {"m/both/0": 1, "m/both/1": 1}


def test_a_worker_that_does_not_come_back_ends_the_roll() -> None:
    site = Site(workers=3)
    site.fleet.members[1].fails = True
    with pytest.raises(CommandFailed, match="m/both/1 ended while starting"):
        site.restart()
    assert site.starts() == {"m/both/0": 1, "m/both/1": 1, "m/both/2": 0}
    assert site.registrar.drained == set()


def test_what_stands_in_stays_if_the_other_one_does_not_come_back() -> None:
    site = Site(workers=1)
    site.fleet.members[0].fails = True
    with pytest.raises(CommandFailed, match="m/both/0 ended while starting"):
        site.restart()
    assert "m/both/1 goes on in its place; `baton scale` takes it away" in site.caller.said
    assert "m/both/1" in site.starts()


def test_whoever_gives_up_gets_no_further_restart() -> None:
    site = Site()
    site.registrar.busy["m/both/0"] = 1
    site.caller.is_gone = True
    with pytest.raises(CommandFailed, match="given up"):
        site.restart(timeout_s=60)
    assert site.starts() == {"m/both/0": 0, "m/both/1": 0}
    assert site.registrar.drained == set()


def test_an_orchestrator_that_does_not_answer() -> None:
    site = Site()
    site.registrar.is_lost = True
    with pytest.raises(CommandFailed, match="does not answer"):
        site.restart()
    assert site.fleet.operation is None


def test_an_orchestrator_without_an_admin_listener_is_restarted_all_the_same() -> None:
    site = Site()
    site.registrar.has_listener = False
    assert site.restart("orchestrator", is_forced=True) == {"restarted": ["orchestrator"]}
    assert site.fleet.orchestrator.starts == 1
    assert site.fleet.is_in_step
    with pytest.raises(CommandFailed, match="there is no admin listener"):
        site.restart("m/both/0")
    assert site.starts() == {"m/both/0": 0, "m/both/1": 0}


def test_an_orchestrator_that_dies_while_a_worker_is_stopped() -> None:
    site = Site()
    worker = site.registrar.is_lost_with = site.fleet.members[0]
    with pytest.raises(CommandFailed, match="does not answer"):
        site.restart()
    assert (worker.is_ready, worker.starts) == (True, 1)
    assert not site.fleet.is_in_step
    site.registrar.is_lost_with = None  # it only was slow
    asyncio.run(site.operator.bring_in_step())
    assert site.registrar.drained == set()
    assert site.fleet.is_in_step


def test_more_and_fewer() -> None:
    site = Site(workers=2, room=2)
    assert site.scale(4)["started"] == ["m/both/2", "m/both/3"]
    assert site.scale(1)["stopped"] == ["m/both/3", "m/both/2", "m/both/1"]
    assert [*site.registrar.known] == ["m/both/0"]
    assert site.scale(1) == {
        "model": "m", "role": "both", "before": 1, "count": 1, "started": [], "stopped": []
    }  # fmt: skip


def test_none_is_started_if_there_is_no_room_for_all() -> None:
    site = Site(workers=2, room=1)
    with pytest.raises(CommandFailed, match="m/both cannot have 2 workers more: no GPU is free"):
        site.scale(4)
    assert [*site.registrar.known] == ["m/both/0", "m/both/1"]
    assert len(site.fleet.workers) == 2


def test_those_that_do_not_serve_are_stopped_first() -> None:
    site = Site(workers=3)
    site.fleet.members[0].is_ready = False
    assert site.scale(2)["stopped"] == ["m/both/0"]


def test_one_that_is_busy_is_not_stopped() -> None:
    site = Site()
    site.registrar.busy["m/both/1"] = 1
    with pytest.raises(CommandFailed, match="still serves 1 request after"):
        site.scale(1)
    assert site.registrar.drained == set()
    assert [*site.registrar.known] == ["m/both/0", "m/both/1"]


def test_an_orchestrator_that_was_started_again_learns_what_there_is() -> None:
    site = Site(workers=2, room=1)
    site.scale(3)
    site.scale(2)
    first = site.fleet.find("m/both/0")
    assert first is not None
    site.fleet.dismiss(first)  # as scale does it
    extra = site.fleet.enlist(replace(first.spec, name="m/both/7", ready_url="http://other/health"))
    site.registrar.__post_init__()
    site.registrar.known = {
        "m/both/0": ("both", first.spec.url),
        "m/both/1": ("both", "http://127.0.0.1:8101"),
    }
    asyncio.run(site.operator.bring_in_step())
    assert {url for _, url in site.registrar.known.values()} == {"http://127.0.0.1:8101", "http://other"}
    assert extra.spec.name in site.registrar.known  # it has the name that it was given now
    assert site.fleet.is_in_step


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"command": "stop"}, "there is no command 'stop'"),
        (
            {"command": "restart", "workers": ["x"], "timeout_s": 1, "is_forced": False},
            "x is not of this run",
        ),
        ({"command": "restart"}, "is not as it should be"),
        ({"command": "scale", "timeout_s": "x", "is_forced": 1}, "is not as it should be"),
        (
            {"command": "scale", "timeout_s": 1, "is_forced": 0, "model": "m", "role": "x", "count": 1},
            "no worker",
        ),
        (
            {"command": "scale", "timeout_s": 1, "is_forced": 0, "model": "m", "role": "both", "count": 0},
            "1 to 1000",
        ),
    ],
)
def test_what_is_refused(request_: dict[str, Any], says: str) -> None:
    site = Site()
    with pytest.raises(CommandFailed, match=says):
        asyncio.run(site.operator.handle(request_, site.caller))  # type: ignore[arg-type]
    assert site.fleet.operation is None


def test_the_key_is_given_to_whoever_can_ask() -> None:
    site = Site()
    site.fleet.operation = "a roll"
    assert asyncio.run(site.operator.handle({"command": "key"}, site.caller)) == {"key": "key"}  # type: ignore[arg-type]
    with pytest.raises(CommandFailed, match="something else is under way: a roll"):
        site.restart()


def test_several_orchestrators_are_restarted_in_turn() -> None:
    site = Site(orchestrators=3)
    names = ["orchestrator", "orchestrator-1", "orchestrator-2"]
    assert site.restart() == {"restarted": ["m/both/0", "m/both/1", *names]}
    assert [member.starts for member in site.fleet.orchestrators] == [1, 1, 1]
    urls = [member.spec.url for member in site.fleet.orchestrators]
    assert site.registrar.asked_whether_serving == [urls[0], *urls]  # the first one did not serve at once
