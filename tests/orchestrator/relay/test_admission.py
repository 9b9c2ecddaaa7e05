"""Permits and the queue, without requests: what `relay/flow.py` does with them is in `test_overload.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.api.view import view_request
from orchestrator.config.options import QueueConfig
from orchestrator.errors import BatonError, Overloaded, TooBusy
from orchestrator.processes.rows import Rows
from orchestrator.relay.admission import Admission, Gate
from orchestrator.relay.forecast import Estimate
from orchestrator.relay.turns import Turn, Turns
from orchestrator.relay.waiting import Demand
from orchestrator.telemetry.counters import Layout, RejectReason, Telemetry
from orchestrator.telemetry.record import RequestRecord
from orchestrator.wire.info import Role
from orchestrator.workers.registry import Registry
from orchestrator.workers.worker import SharedWorker, Worker
from tests.orchestrator.cluster import Clock, address, registry_of, seat
from tests.orchestrator.records import request_record


class Door:
    """A gate whose clock a test moves, and those who came to it."""

    def __init__(self, seats: int = 1, **queue: Any) -> None:
        self.clock = Clock()
        self.telemetry = Telemetry(Layout(["m"], []))
        self.gate = Gate("m", 0, QueueConfig.model_validate(queue), self.telemetry, self.clock)
        self.gate.resize(seats)
        self.held: dict[int, RequestRecord] = {}  # permits, by number
        self.order: list[int] = []  # in which they were given
        self.waited: list[int] = []  # the same of those who had to wait
        self.refused: dict[int, BatonError] = {}

    def come(self, number: int, **demand: Any) -> asyncio.Task[None]:
        return asyncio.create_task(self._enter(number, demand_for(self.clock, **demand)))

    async def _enter(self, number: int, demand: Demand) -> None:
        gate = self.gate
        waits = gate.free <= 0 and gate.seats
        try:
            if gate.free > 0:
                gate.free -= 1
            else:
                await gate.wait(demand)
        except BatonError as error:
            self.refused[number] = error
            return
        assert self.clock.now <= demand.deadline or not gate.seats
        self.order.append(number)
        if waits:
            self.waited.append(number)
        self.held[number] = request_record(admitted=self.clock.now, is_stream=demand.is_stream)

    def leave(self, number: int, first_byte: float = 0.0) -> None:
        record = self.held.pop(number)
        record.first_byte = first_byte
        self.gate.give_back(record)

    def queue(self) -> list[int]:
        """Requests, tokens and bytes, as the metrics have them."""
        cell = self.telemetry.layout.queue_cell(0)
        return list(self.telemetry.row[cell : cell + 3])

    def rejections(self) -> dict[RejectReason, int]:
        row, first = self.telemetry.row, self.telemetry.layout.rejections
        return {reason: row[first + reason] for reason in RejectReason if row[first + reason]}


def demand_for(
    clock: Clock,
    tokens: int = 10,
    size: int = 100,
    within_s: float = 600.0,
    *,
    is_stream: bool = False,
    work: float = 0.0,
    priority: int = 0,
) -> Demand:
    return Demand(tokens, size, clock.now + within_s, is_stream, work, priority)


async def settle() -> None:
    """Until nobody has anything to do."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


# --- permits ------------------------------------------------------------------------------------


def test_seats_are_taken_in_the_order_of_arrival() -> None:
    async def test() -> None:
        door = Door(seats=2)
        for number in range(5):
            door.come(number)
        await settle()
        assert door.order == [0, 1]
        assert door.queue() == [3, 30, 300]
        for number in range(5):
            door.leave(number)
            await settle()
        assert door.order == [0, 1, 2, 3, 4]
        assert door.queue() == [0, 0, 0]
        assert door.gate.free == 2

    run(test)


def test_more_seats_are_taken_at_once_and_fewer_let_nobody_in() -> None:
    async def test() -> None:
        door = Door(seats=1)
        for number in range(6):
            door.come(number)
        door.gate.resize(3)
        await settle()
        assert door.order == [0, 1, 2]
        door.gate.resize(1)
        assert door.gate.free == -2
        for number in range(2):
            door.leave(number)
        await settle()
        assert door.order == [0, 1, 2]
        door.leave(2)
        await settle()
        assert door.order == [0, 1, 2, 3]

    run(test)


def test_nobody_waits_for_a_model_without_workers() -> None:
    async def test() -> None:
        door = Door(seats=1)
        for number in range(3):
            door.come(number)
        await settle()
        door.gate.resize(0)
        door.come(3)
        await settle()
        assert door.order == [0, 1, 2, 3]
        for number in range(4):
            door.leave(number)
        assert door.gate.free == 0

    run(test)


def test_the_cancelled_leave_the_queue() -> None:
    async def test() -> None:
        door = Door(seats=1)
        tasks = [door.come(number) for number in range(3)]
        await settle()
        tasks[1].cancel()
        await settle()
        assert door.queue() == [1, 10, 100]
        door.leave(0)
        await settle()
        assert door.order == [0, 2]

    run(test)


@pytest.mark.parametrize("is_cancelled_first", [True, False])
def test_a_permit_on_its_way_to_the_cancelled_goes_to_the_next(is_cancelled_first: bool) -> None:
    async def test() -> None:
        door = Door(seats=1)
        tasks = [door.come(number) for number in range(3)]
        await settle()
        steps: list[Callable[[], object]] = [lambda: door.leave(0), tasks[1].cancel]
        for step in reversed(steps) if is_cancelled_first else steps:
            step()
        await settle()
        assert door.order == [0, 2]
        door.leave(2)
        assert door.gate.free == 1

    run(test)


# --- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [{"requests": 2}, {"tokens": 20}, {"bytes": 299}], ids=str)
def test_a_full_queue_sends_away_at_once(queue: dict[str, int]) -> None:
    async def test() -> None:
        door = Door(seats=1, **queue)
        for number in range(4):
            door.come(number)
        await settle()
        assert list(door.refused) == [3]
        error = door.refused[3]
        assert isinstance(error, TooBusy)
        assert (error.status, error.retry_after_s) == (429, 1)
        assert door.queue() == [2, 20, 200]
        assert door.rejections() == {RejectReason.QUEUE_FULL: 1}

    run(test)


def test_who_has_waited_for_too_long_is_sent_away() -> None:
    async def test() -> None:
        door = Door(seats=1, timeout_s=5)
        door.come(0)
        door.come(1)
        await settle()
        door.clock.now += 4
        door.come(2)
        await settle()
        door.clock.now += 1
        door.gate.sweep()
        await settle()
        assert list(door.refused) == [1]
        assert isinstance(door.refused[1], Overloaded)
        assert door.refused[1].status == 503
        assert door.refused[1].retry_after_s is not None
        assert door.rejections() == {RejectReason.WAITED: 1}

    run(test)


def test_other_limits_hold_from_the_next_request_on() -> None:
    async def test() -> None:
        door = Door(seats=1, requests=3)
        for number in range(4):
            door.come(number)
        await settle()
        door.gate.reconfigure(QueueConfig(requests=1, timeout_s=5))
        door.come(4)
        await settle()
        assert list(door.refused) == [4]
        assert door.queue()[0] == 3  # who waits already stays
        door.gate.reconfigure(QueueConfig(requests=4, timeout_s=5))
        door.clock.now += 5
        door.come(5)
        await settle()
        assert door.queue()[0] == 4
        door.gate.sweep()
        await settle()
        assert list(door.refused) == [4, 1, 2, 3]
        assert door.queue()[0] == 1

    run(test)


def test_other_limits_hold_for_all_models() -> None:
    pools = registry_of({"decode": 1}).pools
    telemetry = Telemetry(Layout(["m", "n"], []))
    admission = Admission(
        {"m": pools["m"], "n": pools["m"]},
        QueueConfig(),
        seats={"m": {"decode": 1}, "n": {"decode": 1}},
        processes=1,
        telemetry=telemetry,
        time=Clock(),
    )
    admission.reconfigure(QueueConfig(requests=0))

    async def refused(gate: Gate) -> int | None:
        with pytest.raises(TooBusy) as caught:
            await gate.wait(demand_for(Clock()))
        return caught.value.status

    for gate in admission.gates.values():
        assert asyncio.run(refused(gate)) == 429


# --- deadlines ----------------------------------------------------------------------------------


async def seasoned(door: Door, held_s: float) -> None:
    """Let requests of that length make up the door's experience."""
    for number in range(-40, 0):
        door.come(number)
        await settle()
        door.clock.now += held_s
        door.leave(number, first_byte=door.clock.now)
    door.order.clear()


def test_who_would_not_be_answered_in_time_is_sent_away_at_once() -> None:
    async def test() -> None:
        door = Door(seats=1)
        await seasoned(door, held_s=2.0)
        door.come(0)
        for number, within_s in enumerate([6.0, 6.0, 9.0], start=1):
            door.come(number, within_s=within_s)
        await settle()
        assert list(door.refused) == [2]  # would wait for 4 s, perhaps for 6, and be answered 2 s later
        assert door.refused[2].status == 429
        assert door.refused[2].retry_after_s == 4
        assert door.rejections() == {RejectReason.TOO_LATE: 1}

    run(test)


def test_a_wait_beyond_the_queues_limit_is_refused_at_once() -> None:
    async def test() -> None:
        door = Door(seats=1, timeout_s=3)
        await seasoned(door, held_s=2.0)
        for number in range(3):
            door.come(number)
        await settle()
        assert list(door.refused) == [2]
        assert door.refused[2].retry_after_s == 4

    run(test)


def test_a_seat_never_goes_to_who_can_no_longer_be_answered() -> None:
    async def test() -> None:
        door = Door(seats=1)
        door.come(0)
        door.come(1, within_s=3.0)
        door.come(2, within_s=30.0)
        await settle()
        door.clock.now += 4.0
        door.leave(0)
        await settle()
        assert door.order == [0, 2]
        assert door.refused[1].status == 429

    run(test)


def test_streams_and_whole_answers_are_judged_by_their_like() -> None:
    async def test() -> None:
        door = Door(seats=1)
        for number in range(-40, 0):
            is_stream = bool(number % 2)
            door.come(number, is_stream=is_stream)
            await settle()
            begun = door.clock.now + 0.1
            door.clock.now += 2.0
            door.leave(number, first_byte=begun if is_stream else door.clock.now)
        door.come(0)
        door.come(1, is_stream=True, within_s=4.0)
        door.come(2, within_s=5.0)
        await settle()
        assert list(door.refused) == [2]

    run(test)


def test_those_who_were_given_up_are_a_lesson_too() -> None:
    """Else a model that has become too slow would waste all its seats on requests that it cannot answer."""

    async def test() -> None:
        door = Door(seats=1)
        await seasoned(door, held_s=0.1)
        for number in range(40):
            door.come(number, within_s=5.0)
            await settle()
            door.clock.now += 5.0
            door.leave(number)  # stopped at its deadline
        door.come(100)
        door.come(101, within_s=5.0)
        await settle()
        assert list(door.refused) == [101]

    run(test)


def test_an_estimate_follows_what_it_sees() -> None:
    estimate = Estimate()
    assert estimate.most == 0.0
    for _ in range(100):
        estimate.note(2.0)
    assert estimate.mean == 2.0
    assert estimate.most == pytest.approx(2.0, abs=0.01)
    for value in [1.0, 3.0] * 100:
        estimate.note(value)
    assert estimate.mean == pytest.approx(2.0, abs=0.1)
    assert estimate.likely == pytest.approx(3.0, abs=0.1)
    assert estimate.most > 5.0


# --- whatever happens ---------------------------------------------------------------------------

_LIMITS = {"requests": 4, "tokens": 50, "bytes": 500, "timeout_s": 20.0}
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["come", "come", "leave", "cancel", "resize", "wait", "sweep", "turn"]),
        st.integers(0, 20),
    ),
    max_size=60,
)


class Story:
    """Steps as hypothesis has them, done to a door."""

    def __init__(self, **queue: Any) -> None:
        self.door = Door(seats=2, **(_LIMITS | queue))
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def do(self, step: str, value: int) -> None:
        door = self.door
        if step == "come":
            number, demand = len(self.tasks), {"tokens": value, "within_s": 1 + 3 * value}
            self.tasks[number] = door.come(number, **demand, work=1.0 + value, priority=value % 3 - 1)
        elif step == "leave" and door.held:
            numbers = sorted(door.held)
            door.leave(numbers[value % len(numbers)], first_byte=door.clock.now if value % 2 else 0.0)
        elif step == "cancel" and self.tasks:
            self.tasks[value % len(self.tasks)].cancel()
        elif step == "resize":
            door.gate.resize(value % 4)
        elif step == "wait":
            await settle()
            door.clock.now += value
        elif step == "sweep":
            door.gate.sweep()
        elif step == "turn":
            await asyncio.sleep(0)

    def check(self) -> None:
        door, gate = self.door, self.door.gate
        assert len(door.held) == gate.seats - gate.free
        assert sum(not task.done() for task in self.tasks.values()) == gate.waiting
        assert not (gate.waiting and (gate.free > 0 or not gate.seats))
        requests, tokens, size = door.queue()
        assert requests == gate.waiting <= _LIMITS["requests"]
        assert tokens <= _LIMITS["tokens"]
        assert size == 100 * requests <= _LIMITS["bytes"]

    async def end(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await settle()
        for number in list(self.door.held):
            self.door.leave(number)
        self.check()
        assert self.door.gate.free == self.door.gate.seats
        assert self.door.queue() == [0, 0, 0]

    async def go_through(self, steps: list[tuple[str, int]]) -> None:
        for step, value in steps:
            await self.do(step, value)
            if step == "turn":
                await settle()
                self.check()
        await self.end()


@given(_STEPS)
def test_no_permit_is_lost_or_doubled_whatever_happens(steps: list[tuple[str, int]]) -> None:
    async def test() -> None:
        story = Story()
        await story.go_through(steps)
        assert story.door.waited == sorted(story.door.waited)

    run(test)


@given(_STEPS)
def test_the_same_holds_where_short_ones_go_first(steps: list[tuple[str, int]]) -> None:
    async def test() -> None:
        await Story(order="shortest", priority_s=2.0).go_through(steps)

    run(test)


# --- who is next --------------------------------------------------------------------------------

SHORTEST: dict[str, Any] = {"order": "shortest"}


async def served_in_turn(door: Door, first: int) -> list[int]:
    """Who got a seat after `first` ended, one after the other."""
    door.leave(first)
    await settle()
    while door.held:
        door.leave(next(iter(door.held)))
        await settle()
    return door.order[1:]


def test_short_ones_go_first_once_it_is_known_how_long_seats_are_held() -> None:
    async def test() -> None:
        door = Door(**SHORTEST)
        door.come(0)
        for number, work in enumerate([3.0, 1.0, 2.0, 1.0], start=1):
            door.come(number, work=work)
        await settle()
        assert await served_in_turn(door, 0) == [1, 2, 3, 4]  # nothing has been learned: as they came

        door = Door(**SHORTEST)
        await seasoned(door, held_s=2.0)
        door.come(0)
        for number, work in enumerate([3.0, 1.0, 2.0, 1.0], start=1):
            door.come(number, work=work)
        await settle()
        assert await served_in_turn(door, 0) == [2, 4, 3, 1]

    run(test)


def test_who_waits_is_not_overtaken_for_ever() -> None:
    """A long one waits among short ones that never end to come."""

    async def test() -> None:
        door = Door(**SHORTEST, timeout_s=40)
        await seasoned(door, held_s=2.0)
        door.come(0)
        for number in range(1, 5):
            door.come(number, work=1.0)
        door.come(1000, work=50.0)
        await settle()
        began, holder = door.clock.now, 0
        for number in range(5, 60):
            door.clock.now += 2.0
            door.come(number, work=1.0)
            await settle()
            door.leave(holder)
            await settle()
            (holder,) = door.held
            if holder == 1000:
                break
        waited_s = door.clock.now - began
        assert 20.0 < waited_s < 36.0  # half of `timeout_s`, and the turns of those before it

    run(test)


_COMERS = st.lists(
    st.tuples(st.floats(0.0, 10.0), st.floats(0.001, 100.0), st.integers(-3, 3)), min_size=2, max_size=30
)


@example(comers=[(0.0, 1.0, 0)] * 30, priority_s=0.0, held_s=19.0)
@given(comers=_COMERS, priority_s=st.sampled_from([0.0, 0.5, 20.0]), held_s=st.floats(0.1, 20.0))
def test_nobody_is_overtaken_by_those_who_come_much_later(
    comers: list[tuple[float, float, int]], priority_s: float, held_s: float
) -> None:
    """The bound of `relay/turns.py`: three times what it takes itself, half of the timeout at most; and what
    its priority is worth.
    """

    async def test() -> None:
        door = Door(**SHORTEST, priority_s=priority_s, timeout_s=1000.0)
        await seasoned(door, held_s=held_s)
        door.come(0)
        await settle()
        came, works, patience = {}, [], {}
        for number, (pause_s, work, priority) in enumerate(comers, start=1):
            door.clock.now += pause_s
            came[number] = door.clock.now
            works.append(work)
            door.come(number, work=work, priority=priority, within_s=1e6)  # nobody is late
            await settle()
            own_s = door.gate._forecast.held_s.mean * work / door.gate._work
            patience[number] = min(3 * own_s, 500.0)
        order = await served_in_turn(door, 0)
        assert sorted(order) == list(came)
        place = {number: index for index, number in enumerate(order)}
        for early in came:
            for late in range(early + 1, len(comers) + 1):
                head_start_s = priority_s * (comers[early - 1][2] - comers[late - 1][2])
                if place[late] < place[early]:
                    assert came[late] - came[early] < patience[early] + head_start_s + 1e-6

    run(test)


def test_equals_are_served_as_they_came() -> None:
    async def test() -> None:
        door = Door(**SHORTEST, priority_s=5.0)
        await seasoned(door, held_s=1.0)
        door.come(0)
        for number in range(1, 9):
            door.come(number, work=2.0, priority=1)
        await settle()
        assert await served_in_turn(door, 0) == list(range(1, 9))

    run(test)


def test_a_priority_is_a_head_start_and_nothing_where_the_config_gives_it_no_worth() -> None:
    async def order_with(priority_s: float) -> list[int]:
        door = Door(priority_s=priority_s)
        door.come(0)
        for number, priority in enumerate([0, 5, -2, 10**30, -(10**30)], start=1):
            door.come(number, priority=priority)
            await settle()
            door.clock.now += 3.0
        return await served_in_turn(door, 0)

    async def test() -> None:
        assert await order_with(0.0) == [1, 2, 3, 4, 5]
        assert await order_with(1.0) == [5, 1, 3, 2, 4]
        assert await order_with(4.0) == [5, 3, 1, 2, 4]

    run(test)


def test_a_short_one_is_not_sent_away_for_those_that_it_overtakes() -> None:
    async def test() -> None:
        door = Door(**SHORTEST)
        await seasoned(door, held_s=2.0)
        door.come(0)
        for number in range(1, 4):
            door.come(number, work=10.0)
        await settle()
        door.come(4, work=0.1, within_s=6.0)
        door.come(5, work=30.0, within_s=6.0)
        await settle()
        assert list(door.refused) == [5]
        assert (await served_in_turn(door, 0))[0] == 4

    run(test)


def test_who_has_waited_for_too_long_is_the_oldest_whoever_is_next() -> None:
    async def test() -> None:
        door = Door(**SHORTEST, timeout_s=5)
        await seasoned(door, held_s=0.1)
        door.come(0)
        door.come(1, work=50.0)
        await settle()
        door.clock.now += 1.0
        door.come(2, work=1.0)
        await settle()
        door.clock.now += 4.0
        door.gate.sweep()
        await settle()
        assert list(door.refused) == [1]
        assert door.refused[1].status == 503

    run(test)


def test_another_order_holds_for_those_who_come_later() -> None:
    async def test() -> None:
        door = Door()
        await seasoned(door, held_s=2.0)
        door.come(0)
        door.come(1, work=9.0)
        door.come(2, work=1.0)
        await settle()
        door.gate.reconfigure(QueueConfig(order="shortest"))
        door.come(3, work=9.0)
        door.come(4, work=1.0)
        await settle()
        door.gate.reconfigure(QueueConfig(order="shortest", timeout_s=60))  # they keep their turns
        assert await served_in_turn(door, 0) == [1, 2, 4, 3]
        door.come(5)
        door.come(6, work=9.0)
        door.come(7, work=1.0)
        await settle()
        door.gate.reconfigure(QueueConfig())
        door.order.clear()
        assert await served_in_turn(door, 5) == [7]

    run(test)


def test_turns_of_those_who_left_are_forgotten() -> None:
    turns: Turns[Turn] = Turns()
    last = Turn(0.0)
    turns.add(last)
    for at in range(1000):
        turn = Turn(float(at))
        turns.add(turn)
        turn.is_over = True
        turns.tidy(1)
    assert len(turns._heap) < 100
    assert turns.first() is last
    assert turns.ahead_of(0.0) == 1


# --- seats --------------------------------------------------------------------------------------


def admission_over(
    counts: dict[Role, int],
    *,
    processes: int = 1,
    ready: bool = True,
    clock: Clock | None = None,
    slow_start_s: float = 0,
) -> tuple[Admission, Any]:
    registry = registry_of(counts, ready=ready, clock=clock, slow_start_s=slow_start_s)
    admission = Admission(
        registry.pools,
        QueueConfig(),
        seats={"m": {"decode": 4, "both": 3}},
        processes=processes,
        telemetry=Telemetry(Layout(["m"], [])),
        time=Clock(),
    )
    return admission, registry


def test_seats_follow_the_workers() -> None:
    admission, registry = admission_over({"prefill": 2, "decode": 2, "both": 1}, ready=False)
    gate = admission.gates["m"]
    seen = [gate.seats]
    for worker in registry.workers:
        registry.judge.mark_ready(worker)
        seen.append(gate.seats)
    assert seen == [0, 0, 0, 4, 8, 11]
    registry.judge.mark_gone(registry.workers[2], "refused")
    assert gate.seats == gate.free == 7
    registry.drain(registry.workers[3])
    assert gate.seats == 3


def test_a_worker_on_trial_has_one_seat() -> None:
    admission, registry = admission_over({"decode": 2})
    worker = registry.workers[1]
    registry.judge.note_lost(worker, worker.epoch, "reset")
    assert admission.gates["m"].seats == 4
    registry.judge.note_failed(worker, "500")
    registry.judge.mark_ready(worker)
    assert admission.gates["m"].seats == 5
    registry.settle()
    worker.failures = 0
    registry.settle()
    assert admission.gates["m"].seats == 8


def test_a_worker_in_slow_start_has_all_of_its_seats() -> None:
    """It is asked less often while others have room; nobody waits while it has."""
    clock = Clock()
    admission, registry = admission_over({"decode": 2}, clock=clock, slow_start_s=8)
    registry.judge.mark_gone(registry.workers[1], "refused")
    registry.judge.mark_ready(registry.workers[1])
    seen = []
    for _ in range(4):
        admission.sweep()
        seen.append(admission.gates["m"].seats)
        clock.now += 4
    assert seen == [8, 8, 8, 8]


@pytest.mark.parametrize("role", ["decode", "both"])
def test_the_only_worker_has_all_of_its_seats_as_soon_as_it_is_back(role: Role) -> None:
    clock = Clock()
    admission, registry = admission_over({role: 1}, clock=clock, slow_start_s=8)
    gate, before = admission.gates["m"], admission.gates["m"].seats
    registry.judge.mark_gone(registry.workers[0], "refused")
    assert gate.seats == 0
    registry.judge.mark_ready(registry.workers[0])
    assert gate.seats == before


def test_who_is_the_last_suspect_keeps_its_seats() -> None:
    admission, registry = admission_over({"decode": 1})
    worker = registry.workers[0]
    registry.judge.note_lost(worker, worker.epoch, "reset")
    assert admission.gates["m"].seats == 4


def test_legs_on_a_draining_worker_hold_no_seat_of_the_others() -> None:
    admission, registry = admission_over({"decode": 2})
    gate, worker = admission.gates["m"], registry.workers[0]
    gate.free -= 3
    with seat(worker), seat(worker), seat(worker):
        registry.drain(worker)
        assert gate.free == 4
    admission.sweep()
    assert gate.free == 1  # those that still hold a permit have moved to the other worker
    assert admission.admitted == 3


@pytest.mark.parametrize(("processes", "share"), [(2, 4), (3, 2), (100, 1)])
def test_each_process_has_its_share(processes: int, share: int) -> None:
    admission, _ = admission_over({"decode": 2}, processes=processes)
    assert admission.gates["m"].seats == share


class Site:
    """Processes of some orchestrators, and clients that stick to one of them; a request has one decode leg.

    Processes of an orchestrator share memory; what others have there each orchestrator hears with a report.
    """

    def __init__(self, seats: int, processes: int = 1, orchestrators: int = 1) -> None:
        self.seats = seats
        self.members: list[tuple[Admission, Worker]] = []
        self.orchestrators: list[list[SharedWorker]] = []
        for _ in range(orchestrators):
            rows = Rows.create(Layout(["m"], []), 1, processes + 1)
            made: list[SharedWorker] = []
            for row in range(1, processes + 1):
                registry = Registry([address("decode", 0)], ["m"], "json", rows.loads(row), time=Clock())
                (worker,) = registry.workers
                assert isinstance(worker, SharedWorker)
                registry.judge.mark_ready(worker)
                made.append(worker)
                self.members.append((self._admission(registry, processes), worker))
            self.orchestrators.append(made)

    def _admission(self, registry: Registry, processes: int) -> Admission:
        return Admission(
            registry.pools,
            QueueConfig(),
            seats={"m": {"decode": self.seats}},
            processes=processes,
            telemetry=Telemetry(Layout(["m"], [])),
            time=Clock(),
        )

    @property
    def legs(self) -> int:
        return sum(workers[0].legs for workers in self.orchestrators)

    def report(self) -> None:
        """The worker tells every orchestrator what the others have there."""
        for workers in self.orchestrators:
            for worker in workers:
                worker.note_others(self.legs - worker.legs)
                worker.reported.senders = len(self.orchestrators)

    def sweep(self) -> None:
        for admission, _ in self.members:
            admission.sweep()

    async def come(self, member: int) -> asyncio.Task[None]:
        """A request comes, which begins as soon as it may; the task ends then."""
        task = asyncio.create_task(self._begin(member))
        await settle()
        return task

    async def _begin(self, member: int) -> None:
        admission, worker = self.members[member]
        gate = admission.gates["m"]
        if gate.free > 0:
            gate.free -= 1
        else:
            await gate.wait(demand_for(Clock()))
        worker.count_leg(1)

    def end(self, member: int) -> None:
        admission, worker = self.members[member]
        worker.count_leg(-1)
        admission.gates["m"].give_back(request_record(admitted=Clock().now, is_stream=True))


@pytest.mark.parametrize(("processes", "orchestrators"), [(4, 1), (1, 4), (2, 2)])
def test_one_may_take_all_seats_that_the_others_leave(processes: int, orchestrators: int) -> None:
    async def test() -> None:
        site = Site(8, processes, orchestrators)
        site.report()
        begun = [await site.come(0) for _ in range(9)]
        assert [task.done() for task in begun] == [True] * 8 + [False]
        site.end(0)
        await settle()
        assert begun[-1].done()

    run(test)


@pytest.mark.parametrize(("processes", "orchestrators"), [(4, 1), (1, 4), (2, 2)])
def test_who_took_all_seats_makes_room_for_the_share_of_others(processes: int, orchestrators: int) -> None:
    async def test() -> None:
        site = Site(8, processes, orchestrators)
        site.report()
        waiting = [await site.come(0) for _ in range(16)]
        site.report()
        site.sweep()
        late = [await site.come(1) for _ in range(4)]
        assert sum(task.done() for task in late) == 2  # its share
        site.report()
        site.sweep()
        for _ in range(2):  # those that end are followed by nobody: there are more than seats
            site.end(0)
            await settle()
            site.report()
        assert site.legs == 8
        site.end(1)
        site.report()
        await settle()
        assert sum(task.done() for task in late) == 3
        assert sum(task.done() for task in waiting) == 8
        for task in (*waiting, *late):
            task.cancel()
        await asyncio.gather(*waiting, *late, return_exceptions=True)

    run(test)


def test_seats_that_processes_leave_are_noticed_by_those_that_wait() -> None:
    async def test() -> None:
        site = Site(4, processes=2)
        begun = [await site.come(0) for _ in range(4)]
        assert all(task.done() for task in begun)
        late = [await site.come(1) for _ in range(3)]
        assert [task.done() for task in late] == [True, True, False]
        assert site.members[1][0].awaits_others
        for _ in range(3):
            site.end(0)
        site.sweep()
        await settle()
        assert late[-1].done()
        assert not site.members[1][0].awaits_others

    run(test)


def test_processes_that_look_at_once_take_each_seat_once() -> None:
    async def test() -> None:
        site = Site(16, processes=4)
        tasks = [await site.come(number % 4) for number in range(64)]
        assert site.legs == 16
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(test)


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "tokens"),
    [
        ({"prompt": [1, 22, 333]}, 3),
        ({"prompt": [[1, 2], [3]]}, 3),
        ({"prompt": "x" * 400}, 103),
        ({"prompt": ["1, 2, 3", "4"]}, 6),
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, 1010),
    ],
)
def test_tokens_are_counted_or_estimated(field: dict[str, Any], tokens: int) -> None:
    body = msgspec.json.encode({"model": "m", **field})
    assert view_request(body).prompt_tokens() == tokens
