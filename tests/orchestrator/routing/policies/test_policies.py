from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.compiled import MODULES
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import Choice, Context, End, Outcome, Policy
from tests.orchestrator.cluster import Clock
from tests.orchestrator.routing.requests import FakeRequest


@dataclass(frozen=True)
class Seen:
    name: str
    in_flight: int = 0
    epoch: int = 1
    kv_tokens: int | None = None


ASKED = FakeRequest()


def made(name: str, seed: int = 1, **arguments: Any) -> Policy:
    spec = POLICIES[name]
    given = {argument.name: argument.default for argument in spec.arguments} | arguments
    return spec.make(Context("m", "prefill", Random(seed), Clock()), **given)


def chosen(policy: Policy, workers: Sequence[Seen], count: int) -> list[str]:
    return [policy.choose(ASKED, workers).worker.name for _ in range(count)]


def test_round_robin_takes_workers_in_turn() -> None:
    workers = [Seen("a"), Seen("b"), Seen("c")]
    assert chosen(made("round_robin"), workers, 6) == list("abcabc")


def test_round_robin_goes_on_when_the_pool_shrinks() -> None:
    policy, workers = made("round_robin"), [Seen("a"), Seen("b"), Seen("c")]
    chosen(policy, workers, 3)
    assert set(chosen(policy, workers[:1], 3)) == {"a"}


def test_least_loaded_takes_the_quietest() -> None:
    workers = [Seen("a", 3), Seen("b", 1), Seen("c", 2)]
    assert chosen(made("least_loaded"), workers, 3) == ["b", "b", "b"]


def test_least_loaded_spreads_over_equals() -> None:
    workers = [Seen("a", 1), Seen("b", 1), Seen("c", 5)]
    assert set(chosen(made("least_loaded"), workers, 6)) == {"a", "b"}


def test_random_draws_all_of_them() -> None:
    names = chosen(made("random"), [Seen("a", 9), Seen("b"), Seen("c")], 300)
    assert all(70 < names.count(name) < 130 for name in "abc")


def test_power_of_two_takes_the_quieter_of_two_different_ones() -> None:
    names = chosen(made("power_of_two"), [Seen("a", 3), Seen("b", 1), Seen("c", 2)], 300)
    assert names.count("a") == 0  # it is never the quieter one
    assert 150 < names.count("b") < 250
    assert names.count("b") + names.count("c") == 300


class Busy:
    """Its legs are what a test has chosen."""

    def __init__(self, name: str) -> None:
        self.name, self.in_flight, self.epoch = name, 0, 1
        self.kv_tokens = None


def test_least_tokens_counts_tokens_not_legs() -> None:
    policy, workers = made("least_tokens", leg_tokens=0), [Busy("a"), Busy("b")]
    long = policy.choose(FakeRequest(bytes(40_000)), workers)
    short = [policy.choose(FakeRequest(bytes(4_000)), workers).worker.name for _ in range(5)]
    assert long.worker.name not in short


def test_least_tokens_forgets_what_has_ended() -> None:
    policy, workers = made("least_tokens"), [Busy("a"), Busy("b")]
    first = policy.choose(FakeRequest(bytes(400)), workers)
    second = policy.choose(FakeRequest(bytes(400)), workers)
    assert first.worker is not second.worker
    assert str(second) == "It has the fewest tokens under way: 0, and 5100 of this request."
    second.ended(Outcome(End.ANSWERED, 1.0))
    assert policy.choose(FakeRequest(bytes(400)), workers).worker is second.worker


def test_least_tokens_counts_legs_of_other_processes_with_the_mean() -> None:
    policy, workers = made("least_tokens"), [Seen("a", 2), Seen("b")]
    choices = [policy.choose(FakeRequest(bytes(4_000)), workers) for _ in range(2)]
    assert [choice.worker.name for choice in choices] == ["a", "b"]  # nothing is known of prompts at first
    choices[1].ended(Outcome(End.ANSWERED, 0.0))
    assert {policy.choose(FakeRequest(bytes(400)), workers).worker.name for _ in range(2)} == {"b"}


def asked_by(session: str) -> FakeRequest:
    return FakeRequest(headers={b"x-session-id": session.encode()})


@pytest.mark.parametrize(
    "request_of",
    [asked_by, lambda name: FakeRequest(fields={"user": f'"{name}"'.encode()})],
    ids=["header", "field"],
)
def test_a_session_has_one_home_and_sessions_have_many(request_of: Any) -> None:
    policy, workers = made("session"), [Seen(name) for name in "abcdefgh"]
    homes = {name: {policy.choose(request_of(name), workers).worker.name for _ in range(3)} for name in NAMES}
    assert all(len(found) == 1 for found in homes.values())
    assert set().union(*homes.values()) == set("abcdefgh")


NAMES = [f"session {number}" for number in range(100)]


def test_only_the_sessions_of_a_worker_that_leaves_move() -> None:
    policy, workers = made("session"), [Seen(name) for name in "abcdefgh"]
    before = {name: policy.choose(asked_by(name), workers).worker.name for name in NAMES}
    after = {name: policy.choose(asked_by(name), workers[1:]).worker.name for name in NAMES}
    assert {name for name in NAMES if after[name] != before[name]} == {
        name for name in NAMES if before[name] == "a"
    }


def test_a_home_with_too_much_to_do_is_passed_over_and_says_so() -> None:
    policy, workers = made("session"), [Seen(name) for name in "abcd"]
    home = policy.choose(asked_by("s"), workers).worker.name
    busy = [Seen(name, 2 if name == home else 0) for name in "abcd"]
    choice = policy.choose(asked_by("s"), busy)
    assert choice.worker.name != home
    assert "more than 2.0 legs under way" in str(choice)
    assert "at home" in str(policy.choose(asked_by("s"), workers))


def test_headers_come_before_fields_and_the_config_names_both() -> None:
    policy = made("session", headers=["X-One", "x-two"], fields=["first"])
    workers = [Seen("a")]
    one = FakeRequest(headers={b"x-one": b"1", b"x-two": b"2"}, fields={"first": b'"3"'})
    assert "'x-one'" in str(policy.choose(one, workers))
    assert "'first'" in str(policy.choose(FakeRequest(fields={"first": b'"3"'}), workers))
    assert "names no session" in str(policy.choose(FakeRequest(fields={"first": b"null"}), workers))


def test_who_names_no_session_goes_to_the_least_loaded_in_turn() -> None:
    workers = [Seen("a", 1), Seen("b", 1), Seen("c", 5)]
    assert set(chosen(made("session"), workers, 6)) == {"a", "b"}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_copes_with_one_worker(name: str) -> None:
    choice = made(name).choose(ASKED, [Seen("only", 9)])
    assert choice.worker.name == "only"
    choice.ended(Outcome(End.ANSWERED, 0.0))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_says_why_in_a_sentence(name: str) -> None:
    reason = str(made(name).choose(ASKED, [Seen("only")]))
    assert reason[0].isupper()
    assert reason.endswith(".")


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_takes_the_arguments_that_it_declares(name: str) -> None:
    spec = POLICIES[name]
    assert spec.name == name
    assert made(name, **{argument.name: argument.default for argument in spec.arguments})


def test_every_policy_has_a_compiled_form() -> None:
    assert {f"orchestrator.routing.policies.{name}" for name in ("base", *POLICIES)} <= set(MODULES)


class Listening(Policy):
    """Chooses the first one, and notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, End]] = []

    def choose(self, request: Any, candidates: Any) -> Any:
        return Choice(candidates[0], "It is the first.", self)

    def ended(self, choice: Any, outcome: Outcome) -> None:
        self.heard.append((choice.worker.name, outcome.end))


def test_the_end_of_a_leg_is_told_once() -> None:
    policy = Listening()
    choice = policy.choose(ASKED, [Seen("a")])
    assert choice.policy is policy
    choice.ended(Outcome(End.FAILED, 1.0))
    choice.ended(Outcome(End.ANSWERED, 2.0))
    assert policy.heard == [("a", End.FAILED)]
    assert choice.policy is None


def test_nobody_waits_for_the_end_of_a_leg_whose_policy_does_not_care() -> None:
    choice = made("round_robin").choose(ASKED, [Seen("a")])
    assert choice.policy is None
    choice.ended(Outcome(End.ANSWERED, 1.0))


# --- whatever comes -----------------------------------------------------------------------------


class Anything(FakeRequest):
    """What it says of itself need not fit."""

    def __init__(self, prompt: bytes, tokens: int, session: bytes) -> None:
        super().__init__(prompt, headers={b"x-session-id": session}, fields={"user": session})
        self._tokens = tokens

    def prompt_tokens(self) -> int:
        return self._tokens


class Candidate:
    """Its state changes as it likes."""

    def __init__(self, name: str) -> None:
        self.name, self.in_flight, self.epoch, self.kv_tokens = name, 0, 0, None

    def become(self, in_flight: int, epoch: int, kv_tokens: int | None) -> None:
        self.in_flight, self.epoch, self.kv_tokens = in_flight, epoch, kv_tokens  # type: ignore[assignment]


# What a request is made of; the compiled form's classes are not for hypothesis to keep.
REQUESTS = st.tuples(
    st.integers(0, 40).map(lambda size: b"ab"[size % 2 : size % 2 + 1] * (size * 211)),
    st.integers(0, 10**7),
    st.binary(max_size=4),
)
BECOMES = st.tuples(st.integers(0, 999), st.integers(0, 5), st.none() | st.integers(0, 10**4))
STEPS = st.tuples(
    REQUESTS,
    st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True),
    st.integers(0, 7),
    BECOMES,
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(End), st.none() | st.integers(0, 10**6))),
    st.floats(0, 1e6),
    st.booleans(),
)


@pytest.mark.parametrize("name", POLICIES)
@given(steps=st.lists(STEPS, max_size=12), seed=st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_no_policy_ever_raises_and_a_seed_decides_all(name: str, steps: list[Any], seed: int) -> None:
    assert lived(name, steps, seed) == lived(name, steps, seed)


def lived(name: str, steps: list[Any], seed: int) -> list[tuple[str, str]]:
    """Lead a policy through all this; return what it chose, and why."""
    clock = Clock()
    notes: list[bytes] = []
    spec = POLICIES[name]
    arguments = {argument.name: argument.default for argument in spec.arguments}
    policy = spec.make(Context("m", "prefill", Random(seed), clock, notes.append), **arguments)
    workers = [Candidate(f"w{index}") for index in range(8)]
    choices: list[Choice[Any]] = []
    for request, present, changed, life, ends, passed, is_tuple in steps:
        workers[changed].become(*life)
        candidates = [workers[index] for index in present]
        asked = Anything(*request)
        choices.append(policy.choose(asked, tuple(candidates) if is_tuple else candidates))
        assert choices[-1].worker in candidates
        for index, end, cached in ends:
            choices[index % len(choices)].ended(Outcome(end, clock(), cached))
        clock.now += passed
        for note in notes[-2:]:
            policy.hear(note)
    return [(choice.worker.name, str(choice)) for choice in choices]
