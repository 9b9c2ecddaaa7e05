"""Seats are shared among API keys: in virtual time, with requests that hold theirs for as long as they do."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.keys import Key, KeyLimits, KeyRing
from orchestrator.config.options import QueueConfig, TenantsConfig
from orchestrator.errors import BatonError, TooBusy
from orchestrator.relay.admission import Gate
from orchestrator.relay.tenants import Tenants
from orchestrator.relay.waiting import Charge, Demand
from orchestrator.telemetry.counters import Layout, RejectReason, Telemetry
from orchestrator.telemetry.tenants import REJECTED, WAITING, KeyTable
from tests.orchestrator.cluster import Clock
from tests.orchestrator.records import request_record


class Promise:
    """What `Gate.enqueue` takes, without an event loop."""

    def __init__(self, request: Request, over: list[Request]) -> None:
        self.outcome: list[BatonError | None] = []
        self.is_cancelled = False
        self._request = request
        self._over = over

    def done(self) -> bool:
        return bool(self.outcome) or self.is_cancelled

    def cancelled(self) -> bool:
        return self.is_cancelled

    def result(self) -> BatonError | None:
        return self.outcome[0]

    def set_result(self, result: BatonError | None, /) -> None:
        assert not self.done()
        self.outcome.append(result)
        self._over.append(self._request)


class Request:
    def __init__(self, key: str | None, came: float, holds_s: float) -> None:
        self.key = key
        self.came = came
        self.holds_s = holds_s
        self.admitted: float | None = None
        self.error: BatonError | None = None
        self.charge: Charge | None = None


class Site:
    """A gate, and what comes to it. No seat is ever free while somebody waits: it is looked each time."""

    def __init__(self, seats: int, weights: Mapping[str, float], **queue: Any) -> None:
        self.clock = Clock()
        self.telemetry = Telemetry(Layout(["m"], []))
        self.table = KeyTable.alone()
        ring = KeyRing(
            Key(name, name.encode(), limits=KeyLimits(weight=weight)) for name, weight in weights.items()
        )
        self.tenants = Tenants(ring, TenantsConfig(), self.table, self.telemetry, self.clock)
        queue = {"timeout_s": 60, **queue}
        self.gate = Gate(
            "m", 0, QueueConfig.model_validate(queue), self.telemetry, self.clock, is_fair=bool(weights)
        )
        self.gate.resize(seats)
        self.requests: list[Request] = []
        self.order: list[Request] = []  # in which they got seats
        self._events: list[tuple[float, int, Any, Any]] = []
        self._numbers = itertools.count()
        self._waiting: dict[Request, Any] = {}
        self._over: list[Request] = []  # whose waits are

    # --- what happens

    def at(self, moment: float, what: Any, about: Any) -> None:
        heappush(self._events, (moment, next(self._numbers), what, about))

    def run(self, until: float) -> None:
        """Until so many seconds have gone by."""
        end = 1000.0 + until
        while self._events and self._events[0][0] <= end:
            self.clock.now, _, what, about = heappop(self._events)
            what(about)
            self._settle()
            assert not (self.gate.free > 0 and self.gate.waiting), "a seat is free while somebody waits"
        self.clock.now = end

    def flow(self, key: str | None, rate: float, holds_s: float, until: float, **demand: Any) -> None:
        """Have requests come at a steady rate."""
        for number in range(int(until * rate)):
            self.at(1000.0 + number / rate, self.come, (key, holds_s, demand))

    def come(self, arrival: tuple[str | None, float, Mapping[str, Any]]) -> Request:
        key, holds_s, demand = arrival
        request = Request(key, self.clock.now, holds_s)
        self.requests.append(request)
        gate = self.gate
        if gate.free > 0:
            gate.free -= 1
            self._begin(request)
            return request
        tenant = None if key is None else self.tenants.of(key)
        demand = {"tokens": 10, "size": 100, "within_s": 600.0, "work": holds_s, **demand}
        within_s = demand.pop("within_s")
        asked = Demand(deadline=self.clock.now + within_s, is_stream=True, tenant=tenant, **demand)
        promise = Promise(request, self._over)
        try:
            waiter = gate.enqueue(asked, promise)
        except TooBusy as error:
            request.error = error
        else:
            self._waiting[request] = waiter
        self._settle()
        return request

    def _settle(self) -> None:
        """Let those go on whose waits are over."""
        while self._over:
            request = self._over.pop(0)
            waiter = self._waiting.pop(request)
            request.error, request.charge = waiter.seat.result(), waiter.charge
            if request.error is None:
                self._begin(request)

    def _begin(self, request: Request) -> None:
        request.admitted = self.clock.now
        self.order.append(request)
        self.at(self.clock.now + request.holds_s, self._end, request)

    def _end(self, request: Request) -> None:
        record = request_record(admitted=request.admitted, first_byte=request.admitted, is_stream=True)
        self.gate.give_back(record, request.charge)

    def sweep_each_quarter(self, until: float) -> None:
        for number in range(int(until * 4)):
            self.at(1000.0 + number / 4, lambda _: self.gate.sweep(), None)

    # --- what came of it

    def of(self, key: str | None) -> list[Request]:
        return [request for request in self.requests if request.key == key]

    def served(self, key: str | None) -> int:
        return sum(request.admitted is not None for request in self.of(key))

    def seat_seconds(self, key: str, since: float, until: float) -> float:
        """What a key has had of the seats in a time."""
        spans = [(r.admitted, r.admitted + r.holds_s) for r in self.of(key) if r.admitted is not None]
        return sum(max(0.0, min(end, 1000 + until) - max(begin, 1000 + since)) for begin, end in spans)

    def rejections(self, key: str) -> dict[RejectReason, int]:
        cells = dict(self.table.counted())[key]
        return {reason: cells[REJECTED + reason] for reason in RejectReason if cells[REJECTED + reason]}


def names(site: Site) -> str:
    return "".join(request.key or "-" for request in site.order)


# --- shares -------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [{}, {"requests": 32}, {"order": "shortest"}, {"priority_s": 1.0}], ids=str)
def test_a_flood_of_one_key_leaves_a_quiet_one_all_that_it_asks_for(queue: dict[str, Any]) -> None:
    """As it was found: 30 long requests per second beside 2 short ones, 16 seats, 15 answers per second."""
    site = Site(16, {"a": 1.0, "b": 1.0}, timeout_s=10, **queue)
    site.flow("b", rate=30, holds_s=2.0, until=60)
    site.flow("a", rate=2, holds_s=0.4, until=60)
    site.sweep_each_quarter(60)
    site.run(until=75)
    quiet = site.of("a")
    assert site.served("a") == len(quiet) == 120
    assert max((r.admitted or 0) - r.came for r in quiet) < 2.0  # a seat gets free every 1/8 s
    assert site.rejections("a") == {}
    assert sum(site.rejections("b").values()) == len(site.of("b")) - site.served("b")


def test_without_keys_the_quiet_one_is_crowded_out() -> None:
    """The test before says something only if this is so."""
    site = Site(16, {}, timeout_s=10)
    for number, (rate, holds_s) in enumerate([(30, 2.0), (2, 0.4)]):
        site.flow(None, rate=rate, holds_s=holds_s + number * 1e-9, until=60)
    site.sweep_each_quarter(60)
    site.run(until=75)
    short = [request for request in site.of(None) if request.holds_s < 1]
    assert sum(request.admitted is not None for request in short) < 0.7 * len(short)


@pytest.mark.parametrize("holds", [(0.5, 0.5), (0.2, 1.6)], ids=str)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (0.5, 5.0)], ids=str)
def test_floods_have_the_time_of_seats_by_their_weights(
    weights: tuple[float, float], holds: tuple[float, float]
) -> None:
    site = Site(8, dict(zip("ab", weights, strict=True)), requests=200)
    for key, holds_s in zip("ab", holds, strict=True):
        site.flow(key, rate=80, holds_s=holds_s, until=80)
    site.run(until=80)
    a, b = (site.seat_seconds(key, 20, 80) for key in "ab")
    assert a + b == pytest.approx(8 * 60, rel=0.01)
    assert a / (a + b) == pytest.approx(weights[0] / sum(weights), abs=0.04)


def test_who_holds_seats_for_longer_than_expected_pays_for_it_in_the_end() -> None:
    site = Site(8, {"a": 1.0, "b": 1.0})
    site.flow("a", rate=60, holds_s=2.0, until=80, work=1.0)
    site.flow("b", rate=60, holds_s=0.5, until=80, work=1.0)
    site.run(until=80)
    a, b = (site.seat_seconds(key, 20, 80) for key in "ab")
    assert a / (a + b) == pytest.approx(0.5, abs=0.06)


def test_who_holds_seats_for_longer_or_shorter_by_chance_has_its_share() -> None:
    site = Site(8, {"a": 1.0, "b": 1.0}, requests=200)
    random = Random(1)
    for number in range(60 * 120):
        holds_s = random.choice([0.02, 2.0])
        site.at(1000.0 + number / 60, site.come, ("a", holds_s, {"work": 1.0}))
    site.flow("b", rate=60, holds_s=1.0, until=120)
    site.run(until=120)
    a, b = (site.seat_seconds(key, 20, 120) for key in "ab")
    assert a / (a + b) == pytest.approx(0.5, abs=0.05)


def test_who_comes_back_has_saved_nothing_up() -> None:
    site = Site(4, {"a": 1.0, "b": 1.0})
    site.flow("a", rate=40, holds_s=0.5, until=60)
    for number in range(40):
        site.at(1001.0 + number / 40, site.come, ("b", 0.5, {}))
    for number in range(40 * 20):
        site.at(1040.0 + number / 40, site.come, ("b", 0.5, {}))
    site.run(until=60)
    a, b = (site.seat_seconds(key, 41, 60) for key in "ab")
    assert a / (a + b) == pytest.approx(0.5, abs=0.05)


def test_who_says_more_than_it_takes_does_not_wait_for_that() -> None:
    """Most clients name a limit that their answers do not come to."""
    site = Site(8, {"a": 1.0, "b": 1.0}, requests=200)
    site.flow("b", rate=40, holds_s=1.0, until=60)
    site.flow("a", rate=3, holds_s=1.0, until=60, work=20.0)
    site.run(until=70)
    waits = sorted((request.admitted or 1e9) - request.came for request in site.of("a")[30:])
    assert waits[len(waits) * 9 // 10] < 1.0


def test_a_large_debt_does_not_lock_a_key_out() -> None:
    """It has held all seats for minutes, with requests that should have been short."""
    site = Site(4, {"a": 1.0, "b": 1.0}, timeout_s=20)
    for _ in range(30):
        site.at(1000.0, site.come, ("a", 0.1, {}))
    for _ in range(8):
        site.at(1000.01, site.come, ("a", 100.0, {"work": 0.1}))
    site.flow("b", rate=16, holds_s=0.5, until=180)
    site.flow("a", rate=1, holds_s=0.1, until=180)
    site.sweep_each_quarter(180)
    site.run(until=180)
    late = [request for request in site.of("a") if request.came > 1000 + 110]
    assert sum(request.admitted is not None for request in late) > 0.9 * len(late)


def test_the_order_within_a_key_is_what_it_was() -> None:
    site = Site(1, {"a": 1.0, "b": 1.0}, order="shortest")
    for number in range(30):
        site.at(1000.0 + 2 * number, site.come, ("a", 1.0, {}))  # from which the gate learns
    site.run(until=60)
    site.order.clear()
    for key, work in [("a", 1.0), ("a", 4.0), ("a", 1.0), ("b", 1.0)]:
        site.come((key, work, {}))
    site.run(until=80)
    assert [(request.key, request.holds_s) for request in site.order] == [
        ("a", 1.0),
        ("a", 1.0),
        ("b", 1.0),
        ("a", 4.0),
    ]


def test_keys_take_turns_before_anything_is_known() -> None:
    site = Site(1, {"a": 1.0, "b": 1.0})
    for key in "aaaabbb":
        site.come((key, 1.0, {}))
    site.run(until=20)
    assert Counter(names(site)[1:5]) == {"a": 2, "b": 2}


def test_a_reload_changes_weights_of_those_that_wait() -> None:
    site = Site(8, {"a": 1.0, "b": 1.0}, requests=200)
    for key in "ab":
        site.flow(key, rate=80, holds_s=0.5, until=80)
    site.run(until=40)
    site.tenants._keys.exchange(
        [Key("a", b"a", limits=KeyLimits(weight=3.0)), Key("b", b"b"), Key("c", b"c")]
    )
    site.tenants.reconfigure(TenantsConfig())
    site.run(until=80)
    a, b = (site.seat_seconds(key, 45, 80) for key in "ab")
    assert a / (a + b) == pytest.approx(0.75, abs=0.04)


# --- the queue's bounds -------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [{"requests": 4}, {"tokens": 40}, {"bytes": 400}], ids=str)
def test_the_newest_of_who_has_most_makes_room(queue: dict[str, int]) -> None:
    site = Site(1, {"a": 1.0, "b": 1.0}, **queue)
    flood = [site.come(("a", 1.0, {})) for _ in range(5)]
    quiet = site.come(("b", 1.0, {}))
    assert [request.error is None for request in flood] == [True] * 4 + [False]
    assert quiet.error is None
    assert isinstance(flood[4].error, TooBusy)
    assert "this API key has more than its share" in flood[4].error.message
    assert flood[4].error.retry_after_s is not None
    assert site.rejections("a") == {RejectReason.OVER_SHARE: 1}
    newcomer = site.come(("a", 1.0, {}))
    assert newcomer.error is not None
    assert site.rejections("a") == {RejectReason.OVER_SHARE: 1, RejectReason.QUEUE_FULL: 1}


def test_equals_push_nobody_out() -> None:
    site = Site(1, {"a": 1.0, "b": 1.0}, requests=4)
    for key in "aaabb":
        assert site.come((key, 1.0, {})).error is None
    for key in "ab":
        assert site.come((key, 1.0, {})).error is not None
    assert site.gate.waiting == 4


def test_a_share_is_by_weight() -> None:
    site = Site(1, {"a": 3.0, "b": 1.0}, requests=8)
    for key in "a" * 9 + "b" * 2:
        assert site.come((key, 1.0, {})).error is None
    for key in "ba":
        assert site.come((key, 1.0, {})).error is not None
    waiting = {name: cells[WAITING] for name, cells in site.table.counted()}
    assert waiting == {"a": 6, "b": 2, "other": 0}


def test_one_that_is_large_pushes_out_as_many_as_it_needs_or_nobody() -> None:
    site = Site(1, {"a": 1.0, "b": 1.0}, tokens=100)
    for _ in range(11):
        site.come(("a", 1.0, {}))
    assert (
        site.come(("b", 1.0, {"tokens": 70})).error is not None
    )  # more than what would be left to the other
    assert site.gate.waiting == 10
    assert site.come(("b", 1.0, {"tokens": 50})).error is None
    assert site.rejections("a") == {RejectReason.OVER_SHARE: 5}


def test_nobody_waits_where_the_queue_is_off() -> None:
    site = Site(1, {"a": 1.0, "b": 1.0}, requests=0)
    site.come(("a", 1.0, {}))
    assert site.come(("b", 1.0, {})).error is not None


def test_who_was_stopped_makes_room_unharmed() -> None:
    site = Site(1, {"a": 1.0, "b": 1.0}, requests=2)
    for _ in range(3):
        site.come(("a", 1.0, {}))
    for waiter in site._waiting.values():
        waiter.seat.is_cancelled = True
    assert site.come(("b", 1.0, {})).error is None
    assert site.rejections("a") == {}


# --- whatever comes -----------------------------------------------------------------------------

ARRIVALS = st.lists(
    st.tuples(
        st.floats(0, 30),
        st.sampled_from("abc"),
        st.floats(0.05, 3.0),
        st.floats(0.05, 3.0),
    ),
    max_size=120,
)


@given(
    arrivals=ARRIVALS,
    seats=st.integers(1, 4),
    weights=st.tuples(*[st.sampled_from([0.1, 1.0, 2.0, 10.0])] * 3),
    order=st.sampled_from(["fifo", "shortest"]),
    requests=st.integers(0, 20),
)
def test_no_seat_stays_empty_and_nobody_is_forgotten(
    arrivals: Sequence[tuple[float, str, float, float]],
    seats: int,
    weights: tuple[float, float, float],
    order: str,
    requests: int,
) -> None:
    site = Site(seats, dict(zip("abc", weights, strict=True)), order=order, requests=requests)
    for came, key, holds_s, work in arrivals:
        site.at(1000.0 + came, site.come, (key, holds_s, {"work": work}))
    site.sweep_each_quarter(600)
    site.run(until=600)
    assert all(request.admitted is not None or request.error is not None for request in site.requests)
    assert (site.gate.free, site.gate.waiting) == (seats, 0)
    assert all(cells[WAITING] == 0 for _, cells in site.table.counted())


@settings(max_examples=30)
@given(
    weights=st.lists(st.floats(0.2, 5.0), min_size=2, max_size=5),
    holds=st.lists(st.floats(0.1, 2.0), min_size=5, max_size=5),
    seats=st.integers(1, 6),
)
def test_while_all_are_waiting_each_has_its_share(
    weights: list[float], holds: list[float], seats: int
) -> None:
    """What two keys had by their weights differs by what a few of their requests take."""
    keys = "abcde"[: len(weights)]
    site = Site(seats, dict(zip(keys, weights, strict=True)), requests=10_000, timeout_s=1e6)
    for key, holds_s in zip(keys, holds, strict=False):
        for _ in range(int(60 * seats / holds_s)):
            site.at(1000.0, site.come, (key, holds_s, {"within_s": 1e6}))
    span = 40.0
    site.run(until=span)
    had = {key: site.seat_seconds(key, 0, span) / weight for key, weight in zip(keys, weights, strict=True)}
    slack = {
        key: (seats + 4) * holds_s / weight
        for key, holds_s, weight in zip(keys, holds, weights, strict=False)
    }
    for one, other in itertools.combinations(keys, 2):
        if site.gate.waiting and all(_waits(site, key) for key in keys):
            assert abs(had[one] - had[other]) <= slack[one] + slack[other] + seats * max(holds) / min(weights)


def _waits(site: Site, key: str) -> bool:
    return any(request.key == key for request in site._waiting)
