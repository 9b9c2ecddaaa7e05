"""A policy that relies on caches notices when it should not, and when it may again."""

from __future__ import annotations

from collections import Counter, OrderedDict
from random import Random
from typing import Any

import pytest

from orchestrator.routing.policies.base import End, Outcome
from orchestrator.routing.policies.prediction import Prediction
from orchestrator.routing.policies.prefix_legs import PrefixChoice, seconds
from tests.orchestrator.routing.policies.test_prefix import Server, Site, text

TURN = 2_000  # bytes
BLOCK = 64  # bytes, 16 tokens


class Cache:
    """A worker's cache of blocks, the longest unused of which goes first; the end of a prompt before its
    beginning."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._held: OrderedDict[tuple[bytes, int], None] = OrderedDict()

    def read(self, prompt: bytes) -> int:
        """Compute a prompt; return how many of its tokens were there."""
        named = [(prompt[:BLOCK], place) for place in range(len(prompt) // BLOCK)]
        found = next((place for place, key in enumerate(named) if key not in self._held), len(named))
        for key in reversed(named):
            self._held[key] = None
            self._held.move_to_end(key)
        while len(self._held) > self.blocks:
            self._held.popitem(last=False)
        return found * BLOCK // 4

    def clear(self) -> None:
        self._held.clear()


class Chats(Site):
    """Conversations with workers that have caches, paced; each leg takes as long as its new tokens do."""

    def __init__(self, count: int = 4, blocks: int = 100_000, seed: int = 1, **arguments: Any) -> None:
        super().__init__(count, seed=seed, **arguments)
        self.caches = {worker.name: Cache(blocks) for worker in self.workers}
        self.switches = 0
        self._random = Random(seed)

    @property
    def trusted(self) -> set[str]:
        loads = self.policy._loads.values()  # type: ignore[attr-defined]
        return {load.name for load in loads if load.prediction.is_trusted}

    def talk(self, prompt: bytes, pause_s: float = 1.0) -> PrefixChoice:
        choice = self.choose(prompt)
        before = self.trusted
        choice.worker.in_flight -= 1
        cached = self.caches[choice.worker.name].read(prompt)
        self.now += seconds(len(prompt) // 4, cached)
        choice.ended(Outcome(End.ANSWERED, self.now, cached, len(prompt) // 4))
        self.now += pause_s
        self.switches += len(before ^ self.trusted)
        return choice

    def run(self, turns: int, chats: int = 24) -> Counter[str]:
        """So many turns of conversations that begin and end; which workers got them."""
        served: Counter[str] = Counter()
        texts = [text(TURN * 12, self._random.randrange(1 << 30)) for _ in range(chats)]
        lengths = [self._random.randrange(1, 10) for _ in range(chats)]
        for _ in range(turns):
            chat = self._random.randrange(chats)
            served[self.talk(texts[chat][: TURN * lengths[chat]]).worker.name] += 1
            lengths[chat] += 1
            if lengths[chat] > 12:
                texts[chat], lengths[chat] = text(TURN * 12, self._random.randrange(1 << 30)), 1
        return served


# --- one worker ---------------------------------------------------------------------------------


def noted(prediction: Prediction, legs: int, cached: float, now: float, step_s: float = 1.0) -> float:
    for _ in range(legs):
        now += step_s
        prediction.note(1_000, 800, cached, now)
    return now


def test_errors_are_shares_of_the_prompts_tokens() -> None:
    prediction = Prediction(0.5, 10)
    assert (prediction.error_ratio(), prediction.missed_ratio()) == (0.0, 0.0)
    noted(prediction, 200, 600, 0)
    assert prediction.error_ratio() == pytest.approx(0.2)
    assert prediction.missed_ratio() == pytest.approx(0.25)
    assert prediction.is_trusted


def test_more_than_was_expected_is_an_error_and_no_reason_for_distrust() -> None:
    prediction = Prediction(0.01, 0)
    for moment in range(200):
        prediction.note(1_000, 0, 900, moment)
        prediction.note(1_000, 100, 900, moment)
    assert prediction.error_ratio() > 0.8
    assert prediction.missed_ratio() == 0.0
    assert prediction.is_trusted


def test_it_takes_both_legs_and_time_for_trust_to_end() -> None:
    burst, few = Prediction(0.5, 10), Prediction(0.5, 10)
    noted(burst, 1_000, 0, 0, step_s=0.001)
    noted(few, 20, 0, 0, step_s=60)
    assert burst.is_trusted
    assert few.is_trusted
    noted(burst, 1, 0, 12)
    noted(few, 20, 0, 2_000)
    assert not burst.is_trusted
    assert not few.is_trusted


def test_trust_returns_when_it_would_have_been_right_for_a_while() -> None:
    prediction = Prediction(0.5, 10)
    now = noted(prediction, 100, 0, 0)
    assert not prediction.is_trusted
    now = noted(prediction, 30, 800, now)
    assert not prediction.is_trusted
    noted(prediction, 100, 800, now)
    assert prediction.is_trusted


def test_between_the_two_marks_nothing_changes() -> None:
    prediction = Prediction(0.5, 10)
    now = noted(prediction, 500, 500, 0)  # 0.375 are missed
    assert prediction.is_trusted
    now = noted(prediction, 200, 0, now)
    noted(prediction, 500, 500, now)
    assert not prediction.is_trusted


def test_a_worker_that_is_right_only_while_nobody_relies_on_it_is_relied_on_ever_less_often() -> None:
    prediction, now, switches = Prediction(0.5, 10), 0.0, 0
    for _ in range(20_000):
        before = prediction.is_trusted
        now = noted(prediction, 1, 0 if before else 800, now)
        switches += prediction.is_trusted is not before
    assert switches <= 14


# --- a pool of workers --------------------------------------------------------------------------


def test_workers_whose_caches_are_as_they_should_be_are_trusted() -> None:
    site = Chats()
    site.run(2_000)
    assert (len(site.trusted), site.switches) == (4, 0)
    for load in site.policy._loads.values():  # type: ignore[attr-defined]
        assert load.prediction.error_ratio() < 0.1


def test_without_caches_the_policy_balances_by_load() -> None:
    site = Chats(blocks=0)
    site.run(1_000)
    assert site.trusted == set()
    served = site.run(800)
    assert min(served.values()) > 150
    assert site.switches == 4
    prompt = text(TURN * 5)
    names = Counter(site.talk(prompt).worker.name for _ in range(40))
    assert max(names.values()) - min(names.values()) <= 2
    assert "does not count" in str(site.talk(prompt))


def test_one_worker_that_evicts_early_loses_its_affinity_and_nobody_else_does() -> None:
    site = Chats()
    site.caches["w2"].blocks = 8
    site.run(2_000)
    assert site.trusted == {"w0", "w1", "w3"}
    assert site.switches == 1


def test_foreign_traffic_that_evicts_all_is_noticed_and_its_end_too() -> None:
    site = Chats()
    site.run(500)
    foreign = site.caches["w1"]
    blocks, foreign.blocks = foreign.blocks, 0
    site.run(1_500)
    assert site.trusted == {"w0", "w2", "w3"}
    foreign.blocks = blocks
    site.run(6_000)
    assert len(site.trusted) == 4
    assert site.switches == 2


@pytest.mark.parametrize("blocks", [0, 60, 300, 600, 1_200, 2_500])
def test_no_capacity_makes_it_go_back_and_forth(blocks: int) -> None:
    site = Chats(blocks=blocks)
    site.run(2_500)
    assert site.switches <= 8  # twice for each worker


def test_a_restart_that_nobody_announces_is_over_soon() -> None:
    site = Chats()
    site.run(500)
    for cache in site.caches.values():
        cache.clear()
    site.run(1_500)
    assert len(site.trusted) == 4


def test_it_goes_the_same_way_each_time() -> None:
    def told() -> list[str]:
        site = Chats(blocks=60, seed=3)
        return [*site.run(1_500).elements(), str(site.switches)]

    assert told() == told()


def test_tokens_are_those_that_the_worker_counts() -> None:
    site = Site(1)
    prompt = text(20_000)
    for _ in range(100):  # three bytes to a token in place of four
        choice = site.choose(prompt)
        site.now += 1.0
        choice.worker.in_flight -= 1
        choice.ended(Outcome(End.ANSWERED, site.now, 6_656, 6_666))
    load = site.policy._loads["w0"]  # type: ignore[attr-defined]
    assert load.prediction.error_ratio() < 0.1
    assert load.prediction.missed_ratio() < 0.05


def test_workers_that_do_not_say_what_was_cached_are_trusted() -> None:
    site = Site(2)
    for _ in range(100):
        site.now += 1.0
        site.serve(text(20_000))
    load = site.policy._loads["w0"]  # type: ignore[attr-defined]
    assert load.prediction.is_trusted
    assert isinstance(site.workers[0], Server)
