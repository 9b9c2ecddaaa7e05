"""This measures what routing policies cost: time per choice with its end, and the memory of the policy
`prefix`.

    python -m bench.micro.policies [--rounds N]

The smallest of all rounds counts. Prompts are random bytes that were sent once before.
"""

from __future__ import annotations

import timeit
import tracemalloc
from collections.abc import Callable, Sequence
from random import Random
from time import monotonic

from bench.shared.command import parser
from orchestrator.compiled import is_compiled
from orchestrator.config.addresses import WorkerAddress, worker_addresses
from orchestrator.config.options import Config, RoutingConfig
from orchestrator.routing.links import expected_s
from orchestrator.routing.planner import Planner
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import Choice, Context, End, Outcome, Policy, Request
from orchestrator.routing.policies.prefix_index import MOST_BYTES, WIDTH, PrefixIndex, hashed
from orchestrator.workers.registry import Registry

POOLS = (1, 8, 1000)
PAIRS = (2, 4, 16, 32, 100, 1000)  # workers of both roles
SIZES = (200, 2000, 48_000, MOST_BYTES)
NO_BOUND = 1 << 50
CALLS = 20  # in a round


class Prompt(Request):
    """A request is its prompt."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.model = "m"
        self._prompt = Random(size + seed).randbytes(size)

    def body_bytes(self) -> int:
        return len(self._prompt)

    def prompt_tokens(self) -> int:
        return len(self._prompt) // 4

    def prompt(self, most: int) -> bytes:
        return self._prompt[:most]

    def prompt_ids(self) -> Sequence[int] | None:
        return None

    def field(self, name: str) -> memoryview | None:
        return None

    def header(self, name: bytes) -> bytes | None:
        return None


class IdleWorker:
    """A worker has nothing to do."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.in_flight = 0
        self.epoch = 1
        self.kv_tokens: int | None = None


class Pool:
    """A policy has these workers."""

    def __init__(self, name: str, count: int) -> None:
        spec = POLICIES[name]
        arguments = {argument.name: argument.default for argument in spec.arguments}
        self.policy: Policy = spec.make(Context("m", "prefill", Random(1), monotonic), **arguments)
        self.workers = tuple(IdleWorker(f"m/prefill/{index}") for index in range(count))

    def choose(self, request: Request) -> Choice[IdleWorker]:
        return self.policy.choose(request, self.workers)

    def serve(self, request: Request) -> None:
        ended(self.choose(request))


def ended(choice: Choice[IdleWorker]) -> None:
    choice.ended(Outcome(End.ANSWERED, monotonic(), 0))


def least_us(call: Callable[[], object], rounds: int) -> float:
    call()
    return min(timeit.repeat(call, number=CALLS, repeat=rounds)) / CALLS * 1e6


def looked_up(rounds: int) -> float:
    """Return microseconds for hashing the largest prompt and looking it up."""
    prompt = Prompt(MOST_BYTES).prompt(MOST_BYTES)
    index = PrefixIndex(NO_BOUND)
    index.record(index.holder(NO_BOUND), index.find(hashed(prompt, 0)), 0.0)
    return least_us(lambda: index.find(hashed(prompt, 0)), rounds)


def chosen(name: str, count: int, size: int, rounds: int) -> float:
    """Return microseconds of a choice and its end."""
    pool, request = Pool(name, count), Prompt(size)
    return least_us(lambda: pool.serve(request), rounds)


def paired(decode: str, count: int, rounds: int) -> float:
    """Return microseconds of both choices and their ends, half of `count` workers in each pool."""
    pools = Pool(decode, count // 2), Pool("prefix", count // 2)
    request = Prompt(2000)

    def pair() -> None:
        for choice in [pool.choose(request) for pool in pools]:
            ended(choice)

    return least_us(pair, rounds)


def planned(count: int, zones: int, disaggregate: str, rounds: int) -> float:
    """Return microseconds of a plan and its end, half of `count` workers in each pool, in so many zones;
    transfers between two zones take ten times as long.
    """
    registry = Registry(_addresses(count // 2), ["m"], "json", time=monotonic, random=Random(1))
    for worker in registry.workers:
        registry.judge.mark_ready(worker)
    pools = registry.pools["m"]
    routing = {"prefill": "prefix", "decode": "least_tokens", "disaggregate": disaggregate}
    planner = Planner("m", RoutingConfig.model_validate(routing), random=Random(1), time=monotonic)
    for index in range(8 * zones * zones):
        one, other = pools.prefill[index % zones], pools.decode[index // zones % zones]
        for worker, zone in ((one, index % zones), (other, index // zones % zones)):
            worker.zone = str(zone)
        seconds = expected_s(1000.0) * (1 if one.zone == other.zone else 10)
        planner.links.note(one, other, 1000.0, seconds, monotonic())
    for pool in (pools.prefill, pools.decode):
        for index, worker in enumerate(pool):
            worker.zone = str(index % zones)
    request = Prompt(2000)
    return least_us(lambda: planner.plan(request, pools, None).close(monotonic()), rounds)


def served(count: int, decode: str, rounds: int, *, is_busy: bool, rests: bool) -> float:
    """Return microseconds of a plan with the counting of its legs, half of `count` workers in each pool.
    `rests` if one of them has asked not to be sent more.
    """
    registry, random = Registry(_addresses(count // 2), ["m"], "json", random=Random(1)), Random(2)
    for worker in registry.workers:
        registry.judge.mark_ready(worker)
        worker.count_leg(random.randint(3, 9) if is_busy else 0)
    pools, request = registry.pools["m"], Prompt(2000)
    if rests:
        pools.rest(pools.decode[-1], 3600)
    routing = RoutingConfig.model_validate({"prefill": "prefix", "decode": decode})
    planner = Planner("m", routing, random=Random(1), time=monotonic)

    def serve() -> None:
        plan = planner.plan(request, pools, None)
        for change in (1, -1):
            for worker in (plan.decode, plan.prefill or plan.decode):
                worker.count_leg(change)
        plan.close(monotonic())

    return least_us(serve, rounds)


def _addresses(count: int) -> list[WorkerAddress]:
    urls = [f"http://10.0.{index // 250}.{index % 250}:80" for index in range(count)]
    pool = {"urls": urls}
    model = {"name": "m", "prefill": pool, "decode": {"urls": [url.replace("10.0", "10.1") for url in urls]}}
    return [*worker_addresses(Config.model_validate({"models": [model]}))]


def bytes_per_step(size: int, count: int) -> float:
    """Return the bytes of memory that each step of so many different prompts takes."""
    random = Random(1)
    prompts = [hashed(random.randbytes(size), 0) for _ in range(count)]
    index = PrefixIndex(NO_BOUND)
    holder = index.holder(NO_BOUND)
    tracemalloc.start()
    for hashes in prompts:
        own = bytes(bytearray(hashes))  # a copy, so that it is counted
        index.record(holder, index.find(own), monotonic())
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / (sum(map(len, prompts)) / WIDTH)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    rounds = options.parse_args().rounds
    print("compiled" if is_compiled() else "not compiled")
    print(f"hash and look up 1 MiB: {looked_up(rounds):.0f} us")
    for name in POLICIES:
        for count in POOLS:
            figures = (f"{chosen(name, count, size, rounds):.1f} us of {size} bytes" for size in SIZES)
            print(f"{name} among {count}: {', '.join(figures)}")
    for decode in ("least_loaded", "least_tokens"):
        print(f"a pair by prefix and {decode} among 1000: {paired(decode, 1000, rounds):.0f} us")
    for zones in (1, 2, 16):
        for disaggregate in ("always", "auto"):
            spent = planned(1000, zones, disaggregate, rounds)
            print(f"a plan among 1000 in {zones} zones, disaggregate {disaggregate}: {spent:.0f} us")
    for decode in ("least_loaded", "least_tokens", "session"):
        for rests in (False, True):
            told = f"{decode}{', one rests' if rests else ''}"
            for count in PAIRS:
                idle, busy = (served(count, decode, rounds, is_busy=it, rests=rests) for it in (False, True))
                print(f"served by {count}, {told}: {idle:.1f} us idle, {busy:.1f} us busy")
    for size, count in ((300, 45_000), (1_100, 50_000), (4_096, 50_000), (50_000, 10_000)):
        print(f"memory for each step of prompts of {size} bytes: {bytes_per_step(size, count):.0f} bytes")


if __name__ == "__main__":
    main()
