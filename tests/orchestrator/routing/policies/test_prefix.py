from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest

from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import Choice, Context, End, Outcome
from orchestrator.routing.policies.prefix import Prefix
from orchestrator.routing.policies.prefix_legs import PrefixChoice, Sent, ShortChoice
from orchestrator.routing.policies.prefix_search import LOOKED_AT
from tests.orchestrator.routing.requests import FakeRequest


class Server:
    """A worker whose legs a test counts."""

    def __init__(self, name: str, kv_tokens: int | None = 1_000_000) -> None:
        self.name, self.in_flight, self.epoch, self.kv_tokens = name, 0, 1, kv_tokens


class Site:
    """A policy, its workers, and a clock that a test sets."""

    def __init__(
        self, count: int = 4, share: Callable[[bytes], None] | None = None, seed: int = 1, **arguments: Any
    ) -> None:
        self.now = 100.0
        self.workers = tuple(Server(f"w{index}") for index in range(count))
        spec = POLICIES["prefix"]
        given = {argument.name: argument.default for argument in spec.arguments} | arguments
        context = Context("m", "prefill", Random(seed), lambda: self.now, share)
        self.policy = spec.make(context, **given)
        assert isinstance(self.policy, Prefix)

    def send(self, prompt: bytes, workers: Sequence[Server] | None = None) -> Sent:
        choice = self.policy.choose(FakeRequest(prompt), workers or self.workers)
        assert isinstance(choice, Sent)
        choice.worker.in_flight += 1
        return choice

    def choose(self, prompt: bytes, workers: Sequence[Server] | None = None) -> PrefixChoice:
        """Send a prompt that has a step."""
        choice = self.send(prompt, workers)
        assert isinstance(choice, PrefixChoice)
        return choice

    def end(self, choice: Choice[Any], seconds: float = 0.0, cached: int | None = None) -> None:
        self.now += seconds
        choice.worker.in_flight -= 1
        choice.ended(Outcome(End.ANSWERED, self.now, cached))

    def serve(self, prompt: bytes, rate: float = 1.0) -> str:
        """Serve a prompt while nothing else is under way, in the expected time at this rate."""
        choice = self.send(prompt)
        self.end(choice, choice.expected_s * rate)
        name: str = choice.worker.name
        return name


def text(size: int, seed: int = 1) -> bytes:
    return Random(seed).randbytes(size)


# --- where prompts go ---------------------------------------------------------------------------


def test_a_conversation_returns_to_its_worker() -> None:
    site = Site()
    for seed in range(20):
        prompt = text(20_000, seed)
        assert len({site.serve(prompt[: 4_000 * turn]) for turn in range(1, 6)}) == 1


def test_paced_requests_are_spread_and_ties_rotate() -> None:
    site = Site()
    names = [site.serve(text(2_000, seed)) for seed in range(400)]
    assert all(names.count(worker.name) > 60 for worker in site.workers)


@pytest.mark.parametrize("size", [0, 10, 255])
def test_prompts_too_short_for_a_step_are_spread(size: int) -> None:
    site = Site()
    names = [site.serve(text(size)) for _ in range(40)]
    assert all(names.count(worker.name) == 10 for worker in site.workers)


def test_who_waits_long_enough_goes_elsewhere() -> None:
    site = Site(2)
    home = site.serve(text(40_000))
    names = [site.choose(text(40_000)).worker.name for _ in range(200)]
    assert names[:3] == [home] * 3
    assert len(set(names)) == 2


def test_legs_under_way_count_by_their_seconds_less_what_has_elapsed() -> None:
    site = Site(2)
    long = site.choose(text(400_000))
    assert site.choose(text(400, 2)).worker is not long.worker
    short = site.choose(text(400, 3))
    assert short.worker is not long.worker
    site.now += long.expected_s
    assert site.choose(text(400, 4)).worker is long.worker


def test_legs_of_other_processes_count() -> None:
    site = Site(2)
    site.serve(text(40_000))
    site.workers[0].in_flight = 3
    assert {site.serve(text(400, seed)) for seed in range(10)} == {"w1"}


def test_what_many_different_prompts_begin_with_is_worth_having_twice() -> None:
    def used(fan_out: float) -> int:
        site = Site(4, fan_out=fan_out)
        common = text(100_000)
        for seed in range(10, 20):
            site.serve(common + text(8_000, seed))
        return len({site.choose(common + text(8_000, seed)).worker.name for seed in range(2, 6)})

    assert used(0.0) == 1
    assert used(300.0) > 1


def test_a_full_cache_that_was_just_used_is_spared() -> None:
    site = Site(2, kept=1.0)
    for worker in site.workers:
        worker.kv_tokens = 5_000
    full, other = (site.choose(text(20_000, seed)).worker for seed in (1, 2))
    assert full is not other
    other.epoch += 1  # it has come back, so that nothing is evicted there
    full.in_flight = other.in_flight = 0
    site.now += 10.0
    choice = site.choose(text(8_000, 3), [full, other])
    assert choice.worker is other
    assert choice.evict_s == 0.0


# --- what is learned ----------------------------------------------------------------------------


def test_a_slow_worker_gets_fewer_legs() -> None:
    site = Site(2)
    for seed in range(30):
        choice = site.choose(text(4_000, seed))
        site.end(choice, choice.expected_s * (5.0 if choice.worker.name == "w0" else 1.0))
    assert {site.serve(text(4_000, seed)) for seed in range(100, 120)} == {"w1"}


def test_what_all_are_off_by_is_no_difference() -> None:
    site, random = Site(4), Random(1)
    names = [site.serve(text(4_000, seed), 0.01 * random.uniform(0.95, 1.05)) for seed in range(400)]
    assert all(names[-200:].count(worker.name) > 20 for worker in site.workers)
    assert site.choose(text(40_000, 1)).cost < 0.05


def test_tokens_that_were_cached_are_not_taken_for_speed() -> None:
    site = Site(2)
    for _ in range(30):
        choice = site.choose(text(40_000))
        site.end(choice, 0.02 + 90e-6 * 10_000 + 0.6e-9 * 1e8, cached=0)
    assert site.policy._loads["w0"].rate == pytest.approx(1.0)  # type: ignore[attr-defined]


def test_a_worker_that_comes_back_has_nothing() -> None:
    site = Site(2)
    home = next(w for w in site.workers if w.name == site.serve(text(40_000)))
    assert site.choose(text(40_000)).matched > 9_000
    home.epoch += 1
    choice = site.choose(text(40_000))
    assert choice.matched == 0


def test_the_end_of_a_leg_of_an_earlier_life_changes_nothing() -> None:
    site = Site(1)
    before = site.choose(text(40_000))
    site.workers[0].epoch += 1
    site.workers[0].in_flight = 0
    site.choose(text(400))
    load = site.policy._loads["w0"]  # type: ignore[attr-defined]
    legs = list(load.legs)
    before.ended(Outcome(End.FAILED, site.now))
    assert load.legs == legs
    assert legs


def test_nothing_is_left_when_all_legs_have_ended() -> None:
    site = Site(3)
    choices = [site.send(text(size)) for size in range(0, 9_000, 300)]
    Random(1).shuffle(choices)
    for choice in choices:
        site.end(choice)
    loads = site.policy._loads.values()  # type: ignore[attr-defined]
    assert [(load.behind_s, load.legs, load.wait(site.now)) for load in loads] == [(0.0, [], 0.0)] * 3


def test_workers_that_have_gone_are_forgotten() -> None:
    site = Site(1)
    for number in range(500):
        site.serve(text(2_000, number))
        choice = site.choose(text(2_000, number), [Server(f"guest {number}")])
        site.end(choice)
    assert len(site.policy._loads) < 100  # type: ignore[attr-defined]


# --- prompts that are too short to be known -----------------------------------------------------


class Unread(FakeRequest):
    """A request of which nobody may read the prompt."""

    def prompt(self, most: int) -> bytes:
        raise AssertionError

    def field(self, name: str) -> memoryview | None:
        raise AssertionError


@pytest.mark.parametrize("count", [1, 2, 100])
def test_a_short_prompt_is_not_read(count: int) -> None:
    site = Site(count)
    choice = site.policy.choose(Unread(text(255)), site.workers)
    told = site.policy.explain(Unread(text(255)), site.workers)
    assert isinstance(choice, ShortChoice)
    assert told is not None
    assert choice.terms().keys() == told.terms[0].keys()


def test_short_prompts_go_where_they_wait_the_least() -> None:
    site = Site(3)
    long = site.choose(text(400_000))
    assert site.choose(text(200_000, 2)).worker is not long.worker
    idle = site.send(text(100)).worker
    assert [site.send(text(100)).worker for _ in range(20)] == [idle] * 20
    choice = site.send(text(100))
    assert choice.terms()["wait_s"] == pytest.approx(21 * choice.expected_s)
    assert str(choice) == (
        "It costs the least: 0.467 s for legs under way. The prompt is too short to be looked for in caches."
    )


def test_a_slow_worker_gets_fewer_short_prompts() -> None:
    site, random = Site(4), Random(1)
    under_way: list[tuple[float, Sent]] = []
    free_at, served = dict.fromkeys(site.workers, 0.0), Counter[str]()
    for number in range(2_000):
        site.now += 0.025 / 4 / 0.7 * random.uniform(0.5, 1.5)
        for leg in sorted([one for one in under_way if one[0] <= site.now], key=lambda one: one[0]):
            under_way.remove(leg)
            leg[1].worker.in_flight -= 1
            leg[1].ended(Outcome(End.ANSWERED, leg[0]))
        choice = site.send(text(100))
        took = choice.expected_s * (5.0 if choice.worker is site.workers[0] else 1.0)
        free_at[choice.worker] = max(free_at[choice.worker], site.now) + took
        under_way.append((free_at[choice.worker], choice))
        served[choice.worker.name] += number >= 200
    others = [served[worker.name] for worker in site.workers[1:]]
    assert served["w0"] < 0.3 * min(others)
    assert max(others) < 1.2 * min(others)


def test_short_legs_of_other_processes_count_and_teach_no_rate() -> None:
    site = Site(2)
    site.workers[0].in_flight = 3
    choices = [site.send(text(100)) for _ in range(3)]
    assert {choice.worker.name for choice in choices} == {"w1"}
    alone, beside = Site(1), Site(1)
    beside.workers[0].in_flight = 3
    for one in (alone, beside):
        one.end(one.send(text(100)), 10.0)
    assert [one.policy._loads["w0"].seen for one in (alone, beside)] == [1, 0]  # type: ignore[attr-defined]


def test_the_end_of_a_short_leg_of_an_earlier_life_changes_nothing() -> None:
    site = Site(1)
    before = site.send(text(100))
    site.workers[0].epoch += 1
    site.workers[0].in_flight = 0
    after = site.send(text(100))
    load = site.policy._loads["w0"]  # type: ignore[attr-defined]
    before.ended(Outcome(End.ANSWERED, site.now + 1.0))
    assert (load.legs, load.seen) == ([after], 0)


def test_short_prompts_do_not_judge_what_is_expected_in_caches() -> None:
    site = Site(1)
    site.end(site.send(text(100)), 0.1, cached=16)
    prediction = site.policy.prediction("w0")
    assert prediction is not None
    assert prediction.prompts == 0.0


def test_processes_hear_of_short_legs() -> None:
    notes: list[bytes] = []
    one, other = Site(1, share=notes.append), Site(1)
    other.end(other.send(b""))
    one.send(text(100))
    other.policy.hear(notes[0])
    assert other.policy._loads["w0"].heard == [pytest.approx(0.022, abs=0.001)]  # type: ignore[attr-defined]


# --- one worker alone ----------------------------------------------------------------------------


def test_what_a_worker_was_sent_while_it_was_alone_is_known_when_another_joins() -> None:
    site = Site(2)
    (home, other), prompt = site.workers, text(40_000)
    for size in (4_000, 20_000, 40_000):
        site.end(site.choose(prompt[:size], (home,)), 1.0, cached=0)
    for _ in range(5):
        site.end(site.send(text(100), (home,)), 0.05)
    choice = site.choose(prompt)
    assert (choice.worker, choice.matched > 9_000) == (home, True)
    assert site.choose(text(40_000, 2)).worker is other
    prediction = site.policy.prediction("w0")
    assert prediction is not None
    assert prediction.expected > 0.0


def test_the_rate_of_a_lonely_worker_is_that_of_all() -> None:
    site = Site(2)
    for _ in range(30):
        choice = site.send(text(100), site.workers[:1])
        site.end(choice, 3.0 * choice.expected_s)
    assert isinstance(site.policy, Prefix)
    assert site.policy.scale == pytest.approx(3.0)
    choices = [site.send(text(100)) for _ in range(4)]
    assert [choice.own_s() for choice in choices] == pytest.approx([3.0 * choices[0].expected_s] * 4)
    assert {choice.worker.name for choice in choices} == {"w0", "w1"}


# --- pools of any size --------------------------------------------------------------------------


def test_in_a_large_pool_who_knows_the_prompt_is_found() -> None:
    site = Site(10 * LOOKED_AT)
    homes = [site.serve(text(20_000, seed)) for seed in range(30)]
    assert len(set(homes)) > 20
    assert [site.serve(text(20_000, seed)) for seed in range(30)] == homes


def test_a_prompt_that_everybody_knows_does_not_need_everybody_looked_at() -> None:
    notes: list[bytes] = []
    site, other = Site(5 * LOOKED_AT, fan_out=0.0), Site(share=notes.append)
    site.serve(b"")
    for worker in site.workers:
        other.choose(text(20_000), [Server(worker.name)])
        site.policy.hear(notes[-1])
    names = {site.serve(text(20_000)) for _ in range(50)}
    assert all(site.choose(text(20_000)).matched > 4_000 for _ in range(50))
    assert len(names) > 30


# --- several processes --------------------------------------------------------------------------


def test_other_processes_hear_of_choices() -> None:
    notes: list[bytes] = []
    one, other = Site(share=notes.append), Site(seed=2)
    for worker in other.workers:
        other.end(other.send(b"", [worker]))
    home = one.choose(text(40_000)).worker.name
    (note,) = notes
    assert len(note) < 400
    other.policy.hear(note)
    choice = other.choose(text(40_000))
    assert (choice.worker.name, choice.matched > 9_000) == (home, True)


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_note_that_is_no_note_is_not_heard(cut: int) -> None:
    notes: list[bytes] = []
    site = Site(share=notes.append)
    site.choose(text(4_000))
    site.policy.hear(notes[0][:cut])
    site.policy.hear(bytes(cut))
    site.policy.hear(b"\xff" * cut)
    assert site.choose(text(400)).matched == 0


# --- reasons ------------------------------------------------------------------------------------


def test_the_reason_has_the_numbers() -> None:
    site = Site(1)
    first = site.choose(text(40_000))
    site.end(first, first.expected_s)
    site.choose(text(4_000, 2))
    assert str(site.choose(text(40_000))) == (
        "It costs the least, 0.206 s: 0.111 for legs under way, 0.095 for 272 of 10000 tokens that are new "
        "there, 0.000 for what they evict."
    )


# --- what the order of the queue goes by ---------------------------------------------------------


def test_new_tokens_are_those_that_no_worker_has_and_asking_changes_nothing() -> None:
    site, prompt = Site(), text(40_000)
    ask = site.policy.new_tokens
    assert ask(FakeRequest(prompt)) == ask(FakeRequest(prompt)) == 10_000
    assert ask(FakeRequest(b"short")) == 1
    site.serve(prompt[:20_480])
    assert ask(FakeRequest(prompt)) == pytest.approx(10_000 - 5120, rel=0.01)
    assert ask(FakeRequest(prompt[:20_480])) == pytest.approx(1, abs=10)
    plain = POLICIES["round_robin"].make(Context("m", "prefill", Random(1), lambda: 0.0))
    assert plain.new_tokens(FakeRequest(prompt)) == 10_000


def test_a_choice_tells_what_its_own_leg_should_take_at_the_pace_of_its_worker() -> None:
    site = Site(count=1)
    for seed in range(30):
        site.serve(text(40_000, seed), rate=3.0)
    choice = site.choose(text(40_000, 99))
    assert choice.own_s() == pytest.approx(3.0 * choice.expected_s, rel=0.1)
    assert Choice(site.workers[0], "It is there.").own_s() == -1.0
