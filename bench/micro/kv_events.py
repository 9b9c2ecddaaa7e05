"""This measures what hearing KV events costs: time per batch, from its bytes to the policy `kv_events`, and
the memory of what the policy keeps of blocks and steps.

    python -m bench.micro.kv_events [--rounds N]

The smallest of all rounds counts. Blocks have 16 tokens, prompts are random. A batch is of one prompt that no
other one begins like; removed is a prompt that was answered, so that its steps go from the index, too.
"""

from __future__ import annotations

import time
import tracemalloc
from array import array
from collections.abc import Callable, Sequence
from random import Random
from time import monotonic

from bench.micro.policies import IdleWorker, Prompt
from bench.shared.command import parser
from orchestrator.compiled import is_compiled
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import Context, End, Outcome, Policy
from orchestrator.wire.kv_events import DEVICE, Batch, BlockRemoved, BlockStored, Event, encoded
from orchestrator.workers.kv_events import Numbered

BLOCK = 16  # tokens
BLOCKS = (1, 64, 512)  # in a batch: a decode step, a chunk of 1,024 tokens, a prompt of 8,192
BYTES_PER_TOKEN = 4
PER_ROUND = 20  # batches
PLENTY_MB = 100_000  # of memory: nothing is forgotten for want of it
FULL_MB = 16  # a quarter of it, which blocks may take, is full of some 24,000
ROOM = 1 << 40  # tokens: nothing is forgotten


class Answer(Outcome):
    """A prefill worker has answered with the prompt's token ids, as a packed buffer of them is read."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(End.ANSWERED, monotonic(), 0, len(ids))
        self._ids = array("i", ids)

    def prompt_ids(self) -> Sequence[int]:
        return self._ids


class Worker:
    """It publishes to one policy, in order and without gaps."""

    def __init__(self, memory_mb: int = PLENTY_MB) -> None:
        spec = POLICIES["kv_events"]
        arguments = {argument.name: argument.default for argument in spec.arguments} | {
            "memory_mb": memory_mb
        }
        self.policy: Policy = spec.make(Context("m", "prefill", Random(1), monotonic), **arguments)
        self.idle = IdleWorker("m/prefill/0")
        self.idle.kv_tokens = ROOM
        self._events = Numbered(
            lambda event: self.policy.note_cache(self.idle.name, event), time.time, lambda: ROOM
        )
        self._random = Random(2)
        self._number = 0
        self._hashes = 0

    def hear(self, payload: bytes) -> None:
        self._events.take(self._number, payload)
        self._number += 1

    def stored(self, blocks: int, ids: list[int] | None = None) -> tuple[bytes, list[int | bytes]]:
        """Return a batch that tells of so many blocks, and their names."""
        names: list[int | bytes] = [*range(self._hashes, self._hashes + blocks)]
        self._hashes += blocks
        ids = ids or [self._random.randrange(100_000) for _ in range(blocks * BLOCK)]
        return _batch(BlockStored(names, None, ids, BLOCK, medium=DEVICE, group_idx=0)), names

    def answer(self, prompt: Prompt, ids: list[int]) -> None:
        """Serve a prompt that has these token ids."""
        choice = self.policy.choose(prompt, (self.idle,))
        choice.ended(Answer(ids))

    def answered(self, seed: int, blocks: int) -> list[int | bytes]:
        """Serve a prompt of so many blocks, and tell that they are there; return their names."""
        ids = _ids(seed, blocks)
        payload, names = self.stored(blocks, ids)
        self.hear(payload)
        self.answer(Prompt(blocks * BLOCK * BYTES_PER_TOKEN, seed), ids)
        return names


def _ids(seed: int, blocks: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(100_000) for _ in range(blocks * BLOCK)]


def _batch(event: Event) -> bytes:
    return encoded(Batch(time.time(), [event], 0))


def least_us(makes: Callable[[], list[bytes]], hear: Callable[[bytes], None], rounds: int) -> float:
    """Return the microseconds of one of the batches that `makes` makes for each round."""
    found: list[float] = []
    for _ in range(rounds):
        batches = makes()
        began = time.perf_counter()
        for payload in batches:
            hear(payload)
        found.append((time.perf_counter() - began) / len(batches))
    return min(found) * 1e6


def stored_us(blocks: int, rounds: int, memory_mb: int = PLENTY_MB) -> float:
    """Return microseconds of a batch that tells of so many new blocks, behind 30,000 others."""
    worker = Worker(memory_mb)
    for _ in range(30):
        worker.hear(worker.stored(1000)[0])
    worker.answered(0, 64)
    return least_us(lambda: [worker.stored(blocks)[0] for _ in range(PER_ROUND)], worker.hear, rounds)


def removed_us(blocks: int, rounds: int) -> float:
    """Return microseconds of a batch that tells that so many blocks of an answered prompt are gone."""
    worker = Worker()
    seeds = iter(range(1, 1 << 30))
    worker.answered(0, 64)

    def batches() -> list[bytes]:
        names = [worker.answered(next(seeds), blocks) for _ in range(PER_ROUND)]
        return [_batch(BlockRemoved(each, medium=DEVICE, group_idx=0)) for each in names]

    return least_us(batches, worker.hear, rounds)


def learned_us(blocks: int, rounds: int) -> float:
    """Return microseconds for noting which blocks a prompt of so many has, when it was answered."""
    worker = Worker()
    worker.answered(0, 64)
    prompt, ids = Prompt(blocks * BLOCK * BYTES_PER_TOKEN), _ids(1, blocks)
    found: list[float] = []
    for _ in range(rounds * PER_ROUND):
        choice = worker.policy.choose(prompt, (worker.idle,))
        outcome = Answer(ids)
        began = time.perf_counter()
        choice.ended(outcome)
        found.append(time.perf_counter() - began)
    return min(found) * 1e6


def bytes_per_block(count: int) -> float:
    """Return the bytes of memory that each block of a worker takes of which the policy was told."""
    worker = Worker()
    worker.hear(worker.stored(1)[0])
    batches = [worker.stored(64)[0] for _ in range(count // 64)]
    tracemalloc.start()
    for payload in batches:
        worker.hear(payload)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / (64 * len(batches))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    rounds = options.parse_args().rounds
    print("compiled" if is_compiled() else "not compiled")
    for blocks in BLOCKS:
        each = f"{blocks} blocks of {BLOCK} tokens"
        stored, removed = stored_us(blocks, rounds), removed_us(blocks, rounds)
        print(f"a batch of {each}: stored {stored:.0f} us, removed {removed:.0f} us")
        full = stored_us(blocks, rounds, FULL_MB)
        print(f"the same where as many are known as may be: stored {full:.0f} us")
        print(f"a prompt of {each} was answered: {learned_us(blocks, rounds):.0f} us")
    print(f"memory for each block that a worker has: {bytes_per_block(64 * 2000):.0f} bytes")


if __name__ == "__main__":
    main()
