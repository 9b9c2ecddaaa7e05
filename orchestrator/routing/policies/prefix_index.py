"""An index tells which workers have, by what they were sent, the beginning of a prompt in their KV caches.

A prompt is known by the hashes of its beginnings, in steps: each hash stands for all of the prompt up to
there. Hashes that always came together are kept together, as a run: runs are the edges of a radix tree. What
a worker was sent makes it a holder of the runs of that prompt; what it was not sent for the longest time it
holds no more, the end of a prompt before its beginning, as in vLLM's own cache. So whoever holds a run holds
all that is before it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import Final

from xxhash import xxh3_64_intdigest

# A step has so many bytes: short prompts are told apart soon, and a long one has few hashes.
FINE: Final = 256  # up to FINE_END
FINE_END: Final = 2048
MIDDLE: Final = 1024  # up to MIDDLE_END
MIDDLE_END: Final = 8192
COARSE: Final = 2048  # beyond
FINE_STEPS: Final = 8  # FINE_END / FINE
MIDDLE_STEPS: Final = 14  # all that end within MIDDLE_END

MOST_BYTES: Final = 1 << 20  # of a prompt are hashed: 522 steps
WIDTH: Final = 8  # bytes of a hash

# Bytes of memory, measured, with the dictionaries at their emptiest.
RUN_BYTES: Final = 220  # of a run, beside its hashes
HOLDER_BYTES: Final = 150  # of each holder of a run


def hashed(prompt: bytes, seed: int) -> bytes:
    """Return the hashes of the whole steps of a prompt, `WIDTH` bytes each; `seed` makes another prompt."""
    size = min(len(prompt), MOST_BYTES)
    if size < FINE:
        return b""
    found: list[int] = []
    view = memoryview(prompt)
    at = 0
    step = FINE
    while at + step <= size:
        seed = xxh3_64_intdigest(view[at : at + step], seed)
        found.append(seed)
        at += step
        if at == FINE_END:
            step = MIDDLE
        elif at == MIDDLE_END:
            step = COARSE
    return array("Q", found).tobytes()


def bytes_of(steps: int) -> int:
    """Return how many bytes of a prompt its first `steps` steps are."""
    if steps <= FINE_STEPS:
        return steps * FINE
    if steps <= MIDDLE_STEPS:
        return FINE_END + (steps - FINE_STEPS) * MIDDLE
    return MIDDLE_END + (steps - MIDDLE_STEPS) * COARSE


class Run:
    """A run has hashes that follow each other in all prompts that are known."""

    __slots__ = ("begin", "end", "fan_out", "hashes", "holders", "is_end")

    def __init__(self, begin: int, hashes: bytes) -> None:
        """`begin` is the number of steps before it."""
        self.begin = begin
        self.end = begin + len(hashes) // WIDTH
        self.hashes = hashes
        self.holders = 0  # a bit per `Holder`
        self.fan_out = 0  # how many different continuations it has beside the first
        self.is_end = False  # a prompt ended there, and none has gone on

    def size(self) -> int:
        """Return the bytes of prompt that it stands for."""
        return bytes_of(self.end) - bytes_of(self.begin)


class Holder:
    """A holder is a worker as the index has it."""

    __slots__ = ("bit", "capacity", "runs", "size", "slot")

    def __init__(self, slot: int, capacity: int) -> None:
        """`slot` numbers it among all holders that there are; `capacity` is in bytes of prompt."""
        self.slot = slot
        self.bit = 1 << slot
        self.capacity = capacity
        self.size = 0
        self.runs: OrderedDict[Run, float] = OrderedDict()  # when it was sent each; the oldest first

    def tail(self) -> float:
        """Return when it was sent what it will forget next; it holds something."""
        return next(iter(self.runs.values()))


class Found:
    """This much of a prompt is known: whole runs, and perhaps some steps of a further one."""

    __slots__ = ("hashes", "partial", "runs", "steps")

    def __init__(self, hashes: bytes) -> None:
        self.hashes = hashes
        self.runs: list[Run] = []
        self.partial: Run | None = None
        self.steps = 0


class PrefixIndex:
    """Its memory is bounded: each holder has its capacity, and all of it `most_bytes`."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._runs: dict[bytes, Run] = {}  # by the first hash
        self._holders: list[Holder] = []  # by slot, also those that were removed
        self._free: list[int] = []  # slots of those
        self.memory = 0  # bytes that are used, by the constants above

    # --- holders --------------------------------------------------------------------------------

    def holder(self, capacity: int) -> Holder:
        """Make a holder that holds nothing."""
        if self._free:
            made = Holder(self._free.pop(), capacity)
            self._holders[made.slot] = made
        else:
            made = Holder(len(self._holders), capacity)
            self._holders.append(made)
        return made

    def clear(self, holder: Holder) -> None:
        """Have it hold nothing."""
        while holder.runs:
            self._drop(holder, next(iter(holder.runs)))

    def remove(self, holder: Holder) -> None:
        """Forget it; it is not used any more."""
        self.clear(holder)
        self._free.append(holder.slot)

    # --- prompts --------------------------------------------------------------------------------

    def find(self, hashes: bytes) -> Found:
        """Return what is known of a prompt. It is valid until something is recorded."""
        found = Found(hashes)
        at, end = 0, len(hashes)
        while at < end:
            run = self._runs.get(hashes[at : at + WIDTH])
            if run is None:
                break
            if not hashes.startswith(run.hashes, at):
                found.partial = run
                at += _common(run.hashes, hashes, at)
                break
            found.runs.append(run)
            at += len(run.hashes)
        found.steps = at // WIDTH
        return found

    def record(self, holder: Holder, found: Found, now: float) -> None:
        """Note that a worker is sent the prompt that was looked for."""
        if not found.hashes:
            return
        runs = found.runs
        self._note_fan_out(found)
        if found.partial is not None:
            runs.append(self._split(found.partial, found.steps))
        if found.steps * WIDTH < len(found.hashes):
            runs.append(self._grow(found))
        runs[-1].is_end = True
        for run in reversed(runs):  # the beginning of a prompt is kept for longer than its end
            self._touch(holder, run, now)
        while holder.size > holder.capacity:
            self._forget(holder)
        while self.memory > self._most_bytes:
            fullest = holder if holder.runs else self._fullest()
            self._drop(fullest, next(iter(fullest.runs)))

    def _fullest(self) -> Holder:
        fullest = self._holders[0]
        for holder in self._holders:
            if holder.size > fullest.size:
                fullest = holder
        return fullest

    def _note_fan_out(self, found: Found) -> None:
        """Count another continuation of all that is known of the prompt, unless it is the next turn of the
        one that ended there.
        """
        runs, partial = found.runs, found.partial
        if partial is None and runs and runs[-1].is_end:
            runs[-1].is_end = False
            return
        for run in runs:
            run.fan_out += 1

    def _grow(self, found: Found) -> Run:
        """Add what is not known yet of the prompt."""
        run = Run(found.steps, found.hashes[found.steps * WIDTH :])
        self._enter(run)
        return run

    def _split(self, run: Run, steps: int) -> Run:
        """Split a run after so many steps of the prompt; return its first part."""
        cut = (steps - run.begin) * WIDTH
        head = Run(run.begin, run.hashes[:cut])
        head.holders, head.fan_out = run.holders, run.fan_out + 1
        self.memory -= len(run.hashes)
        run.begin, run.hashes = steps, run.hashes[cut:]
        self.memory += len(run.hashes)
        self._runs[run.hashes[:WIDTH]] = run
        self._enter(head)
        self._hold_too(run, head)
        return head

    def _hold_too(self, run: Run, head: Run) -> None:
        """Have all that hold a run hold what was split from it as well, for longer."""
        left = run.holders
        while left:
            bit = left & -left
            left ^= bit
            runs = self._holders[bit.bit_length() - 1].runs
            runs[head] = runs[run]
            self.memory += HOLDER_BYTES

    def _enter(self, run: Run) -> None:
        self._runs[run.hashes[:WIDTH]] = run
        self.memory += RUN_BYTES + len(run.hashes)

    # --- what holders hold ----------------------------------------------------------------------

    def _touch(self, holder: Holder, run: Run, now: float) -> None:
        if run.holders & holder.bit:
            holder.runs.move_to_end(run)
        else:
            run.holders |= holder.bit
            holder.size += run.size()
            self.memory += HOLDER_BYTES
        holder.runs[run] = now

    def _forget(self, holder: Holder) -> None:
        """Take from a holder what it was not sent for the longest time, and no more than is too much.

        A run that nobody else holds has none after it: these would be older.
        """
        run = next(iter(holder.runs))
        kept = run.size() - (holder.size - holder.capacity)
        if run.holders != holder.bit or kept < FINE:
            self._drop(holder, run)
        else:
            self._shorten(holder, run, kept)

    def _shorten(self, holder: Holder, run: Run, kept: int) -> None:
        """Shorten a run to at most so many bytes of prompt; a step is left in any case."""
        before, end, last = run.size(), run.end, run.begin + 1
        while run.end > last and run.size() > kept:
            run.end -= 1
        if run.size() > kept:
            run.end = end  # all of it goes
            self._drop(holder, run)
            return
        holder.size -= before - run.size()
        self.memory -= len(run.hashes) - (run.end - run.begin) * WIDTH
        run.hashes = run.hashes[: (run.end - run.begin) * WIDTH]
        run.is_end = False

    def _drop(self, holder: Holder, run: Run) -> None:
        del holder.runs[run]
        run.holders ^= holder.bit
        holder.size -= run.size()
        self.memory -= HOLDER_BYTES
        if not run.holders:
            del self._runs[run.hashes[:WIDTH]]
            self.memory -= RUN_BYTES + len(run.hashes)


def _common(run: bytes, hashes: bytes, at: int) -> int:
    """Return how many bytes of a run, whose first hash is at `at` of the hashes, are there as well.

    A hash stands for all before it, so the last one that is the same is found by halving.
    """
    low, high = 1, min(len(run), len(hashes) - at) // WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        end = middle * WIDTH
        if run[end - WIDTH : end] == hashes[at + end - WIDTH : at + end]:
            low = middle
        else:
            high = middle - 1
    return low * WIDTH
