"""What a worker's engine tells of its cache corrects what was remembered of it."""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest

from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import (
    CacheEvent,
    Cleared,
    Context,
    End,
    Followed,
    Outcome,
    Removed,
    Stored,
)
from orchestrator.routing.policies.kv_events import KvEvents, _forget_oldest
from orchestrator.routing.policies.prefix_legs import PrefixChoice, Sent
from tests.orchestrator.routing.policies.test_prefix import Server, text
from tests.orchestrator.routing.requests import FakeRequest

SIZE = 16  # tokens to a block
BLOCK = 4 * SIZE  # bytes of prompt


def tokens(prompt: bytes) -> list[int]:
    return [abs(value) for value in array("i", prompt[: len(prompt) // 4 * 4])]


class Engine:
    """A cache of blocks with names of its own, the longest unused of which goes first."""

    def __init__(self, tell: Callable[[CacheEvent], None], blocks: int = 10_000) -> None:
        self.tell = tell
        self.blocks = blocks
        self.held: OrderedDict[int, int] = OrderedDict()
        self._names = itertools.count(1)

    def read(self, ids: Sequence[int], salts: list[str] | None = None) -> int:
        """Compute a prompt; return how many of its tokens were there."""
        paths: list[int] = []
        path = hash(tuple(salts or ()))
        for at in range(0, len(ids) // SIZE * SIZE, SIZE):
            path = hash((path, *ids[at : at + SIZE]))
            paths.append(path)
        found = next((at for at, path in enumerate(paths) if path not in self.held), len(paths))
        parent = self.held[paths[found - 1]] if found else None
        names = [next(self._names) for _ in paths[found:]]
        self.held.update(zip(paths[found:], names, strict=True))
        for path in reversed(paths):
            self.held.move_to_end(path)
        if names:
            data = array("i", ids[found * SIZE : len(paths) * SIZE]).tobytes()
            given = None if salts is None else [*salts, *[""] * len(paths)][found : len(paths)]
            self.tell(Stored([*names], parent, data, SIZE, given))
        while len(self.held) > self.blocks:
            self.tell(Removed([self.held.popitem(last=False)[1]]))
        return found * SIZE

    def clear(self) -> None:
        self.held.clear()
        self.tell(Cleared())


class Answer(Outcome):
    def __init__(self, moment: float, cached: int, ids: Sequence[int]) -> None:
        super().__init__(End.ANSWERED, moment, cached, len(ids))
        self._ids = ids

    def prompt_ids(self) -> Sequence[int] | None:
        return array("i", self._ids)


class Site:
    """Workers whose engines tell what they do, unless a test has them keep silent."""

    def __init__(self, count: int = 3, *, exact: bool = True, share: Any = None, **arguments: Any) -> None:
        self.now = 100.0
        self.workers = tuple(Server(f"w{index}") for index in range(count))
        spec = POLICIES["kv_events"]
        given = {argument.name: argument.default for argument in spec.arguments} | arguments
        made = spec.make(Context("m", "prefill", Random(1), lambda: self.now, share), **given)
        assert isinstance(made, KvEvents)
        self.policy = made
        self.engines = {worker.name: self._engine(worker.name) for worker in self.workers}
        for worker in self.workers:
            self.policy.note_cache(worker.name, Followed(is_exact=exact))

    def _engine(self, name: str) -> Engine:
        return Engine(lambda event: self.policy.note_cache(name, event))

    def send(self, prompt: bytes, **fields: bytes) -> Sent:
        choice = self.policy.choose(FakeRequest(prompt, fields=fields), self.workers)
        assert isinstance(choice, Sent)
        return choice

    def choose(self, prompt: bytes, **fields: bytes) -> PrefixChoice:
        """Send a prompt that has a step."""
        choice = self.send(prompt, **fields)
        assert isinstance(choice, PrefixChoice)
        return choice

    def ask(self, prompt: bytes) -> tuple[str, float]:
        """Where a prompt would go, and how many of its tokens should be there; nothing is sent."""
        choice = self.choose(prompt)
        choice.ended(Outcome(End.CANCELLED, self.now))
        return choice.worker.name, choice.expects

    def serve(self, prompt: bytes, salts: list[str] | None = None, **fields: bytes) -> Sent:
        choice = self.send(prompt, **fields)
        self.now += 1.0
        cached = self.engines[choice.worker.name].read(tokens(prompt), salts)
        choice.ended(Answer(self.now, cached, tokens(prompt)))
        return choice

    def expected(self, name: str, prompt: bytes) -> float:
        """How many tokens of a prompt a worker should have; it is no choice, and changes nothing."""
        from orchestrator.routing.policies.prefix_index import hashed

        load = self.policy._loads[name]
        found = self.policy._index.find(hashed(prompt, 0))
        choice = PrefixChoice(None, self.policy, load, self.now, len(prompt) / 4, 0.0, 0.25, b"")
        return self.policy._search.expected(choice, found) if found.steps else 0.0


def test_removed_blocks_are_not_expected_any_more() -> None:
    site = Site()
    prompt = text(20_000)
    name = site.serve(prompt).worker.name
    assert site.expected(name, prompt) > 4_000
    engine = site.engines[name]
    engine.blocks = 100
    engine.read(tokens(text(64, 9)))  # foreign traffic: all but the first 99 blocks of the prompt go
    assert 1_000 < site.expected(name, prompt) <= 99 * SIZE
    engine.blocks = 0
    engine.read(tokens(text(64, 10)))
    assert site.expected(name, prompt) == 0.0


def test_a_cleared_cache_is_known_to_be_empty() -> None:
    site = Site()
    prompts = [text(20_000, seed) for seed in range(9)]
    for prompt in prompts:
        site.serve(prompt)
    site.engines["w0"].clear()
    for prompt in prompts:
        assert site.expected("w0", prompt) == 0.0
    assert sum(site.expected("w1", prompt) > 0 for prompt in prompts) == 3


def test_what_foreign_traffic_stores_again_is_expected_again() -> None:
    site = Site()
    prompt = text(20_000)
    name = site.serve(prompt).worker.name
    engine = site.engines[name]
    engine.clear()
    assert site.expected(name, prompt) == 0.0
    engine.read(tokens(prompt)[:2_560])
    assert 2_000 < site.expected(name, prompt) <= 2_560


def test_what_another_worker_stores_of_a_known_prompt_is_expected_there() -> None:
    site = Site()
    prompt = text(20_000)
    name = site.serve(prompt).worker.name
    other = next(worker.name for worker in site.workers if worker.name != name)
    site.serve(text(20_000, 2))
    site.engines[other].read(tokens(prompt))
    assert site.expected(other, prompt) > 4_500


def test_blocks_that_went_before_the_answer_came_are_not_expected() -> None:
    site = Site()
    site.serve(text(64))  # so that blocks have a size
    prompt = text(20_000, 2)
    choice = site.choose(prompt)
    engine = site.engines[choice.worker.name]
    engine.read([1] * SIZE)
    engine.read(tokens(prompt))
    engine.blocks = 50
    engine.read(tokens(text(64, 3)))
    choice.ended(Answer(site.now, 0, tokens(prompt)))
    assert site.expected(choice.worker.name, prompt) <= 50 * SIZE


def test_events_may_come_after_the_answer() -> None:
    site = Site()
    held: list[tuple[str, CacheEvent]] = []
    for name, engine in site.engines.items():
        engine.read([1] * SIZE)
        engine.tell = lambda event, name=name: held.append((name, event))  # type: ignore[misc]
    prompt = text(20_000)
    name = site.serve(prompt).worker.name
    site.engines[name].blocks = 50
    site.engines[name].read(tokens(text(64, 3)))
    for each, event in held:
        site.policy.note_cache(each, event)
    assert site.expected(name, prompt) <= 50 * SIZE


def test_a_cache_that_is_larger_than_it_says_is_remembered_whole() -> None:
    def known(exact: bool) -> int:
        site = Site(1, exact=exact)
        site.workers[0].kv_tokens = 5_000
        prompts = [text(20_000, seed) for seed in range(10)]
        for prompt in prompts:
            site.serve(prompt)
        return sum(site.expected("w0", prompt) > 4_000 for prompt in prompts)

    assert known(exact=False) <= 1
    assert known(exact=True) == 10


def test_what_is_too_much_is_forgotten_the_oldest_first_and_some_at_once() -> None:
    known = dict.fromkeys(range(100))
    assert not _forget_oldest(known, 100)
    assert list(known) == [*range(100)]
    known[100] = None
    assert _forget_oldest(known, 100)
    assert list(known) == [*range(1 + 100 // 16, 101)]
    assert _forget_oldest(known, 0)
    assert not known


def test_prompts_whose_tokens_nobody_told_are_forgotten_in_the_end() -> None:
    site = Site(1)
    engine = site.engines["w0"]
    engine.blocks = 400
    for seed in range(50):
        choice = site.choose(text(20_000, seed))
        engine.read(tokens(text(20_000, seed)))
        choice.ended(Outcome(End.ANSWERED, site.now, 0))
        site.now += 1.0
    assert sum(site.expected("w0", text(20_000, seed)) > 0 for seed in range(50)) <= 4


@pytest.mark.parametrize("seed", range(3))
def test_in_the_end_it_expects_what_is_there(seed: int) -> None:
    """Conversations, caches that are too small and are cleared, foreign traffic: no more than a step off."""
    site, random = Site(3), Random(seed)
    for engine in site.engines.values():
        engine.blocks = 1_500
    common = text(4_000, 77)
    texts = [common + text(30_000, each) for each in range(30)]
    wrong = 0.0
    for turn in range(400):
        prompt = random.choice(texts)[: random.randrange(4_100, 30_000)]
        choice = site.choose(prompt)
        engine = site.engines[choice.worker.name]
        cached = engine.read(tokens(prompt))
        choice.ended(Answer(site.now, cached, tokens(prompt)))
        if turn > 100:
            wrong += max(0.0, choice.expects - cached)
        if random.random() < 0.2:
            site.engines[random.choice(["w0", "w1", "w2"])].read(tokens(text(8_000, 10_000 + turn)))
        if random.random() < 0.02:
            site.engines[random.choice(["w0", "w1", "w2"])].clear()
        site.now += 1.0
    assert wrong / 300 < 64  # tokens per leg
    assert all(load.prediction.is_trusted for load in site.policy._loads.values())


def test_processes_tell_each_other_which_blocks_prompts_have() -> None:
    notes: list[bytes] = []
    one = Site(share=notes.append)
    other = Site()
    for worker in other.workers:
        other.serve(text(400))
        worker.epoch = 1
    prompt = text(20_000, 5)
    one.serve(text(64))
    notes.clear()
    name = one.serve(prompt).worker.name
    other.engines[name].read(tokens(prompt))
    for note in notes:
        other.policy.hear(note)
    assert other.expected(name, prompt) > 4_500
    other.engines[name].clear()
    other.engines[name].read(tokens(prompt)[:1_600])
    assert 1_000 < other.expected(name, prompt) <= 1_600
    other.engines[name].blocks = 0
    other.engines[name].read([1] * SIZE)
    assert other.expected(name, prompt) == 0.0


def test_prompts_with_a_salt_are_told_apart() -> None:
    site = Site(1)
    prompt = text(20_000)
    site.serve(prompt, salts=["a"], cache_salt=b'"a"')
    engine = site.engines["w0"]
    engine.read(tokens(prompt), salts=["b"])
    engine.blocks = len(tokens(prompt)) // SIZE
    engine.read([1] * SIZE)  # of the first prompt, which has the longest unused blocks, all go
    assert site.expected("w0", prompt) == 0.0


def test_images_are_no_text() -> None:
    site = Site(1)
    prompt = text(20_000)
    site.serve(prompt)
    engine = site.engines["w0"]
    engine.read(tokens(prompt), salts=["['image', 0]"])
    engine.blocks -= 1
    held = site.expected("w0", prompt)
    assert held > 4_500


def test_its_memory_is_bounded() -> None:
    site = Site(1, memory_mb=1)
    for seed in range(60):
        site.serve(text(60_000, seed))
    engine = site.policy._engines["w0"]
    assert len(engine.names) <= max(site.policy._most_blocks, 1024)
    assert len(site.policy._places) <= site.policy._most_places


def test_whatever_a_worker_tells_nothing_is_raised() -> None:
    site = Site(1)
    site.serve(text(20_000))
    for event in (
        Stored([], None, b"", 0),
        Stored([1, 2], None, b"123", 16),
        Stored([1], b"nobody", b"\0" * 64, 16),
        Removed([b"nobody", 7, 1 << 64]),
        Removed([]),
        CacheEvent(),
    ):
        site.policy.note_cache("w0", event)
        site.policy.note_cache("nobody", event)
    for note in (b"", b"\xff" * 20, b"\xff" * 8 + b"\x03\0\0\0\0\0" + b"1" * 40):
        site.policy.hear(note)
    site.serve(text(20_000))
