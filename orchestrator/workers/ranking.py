"""The workers of a large pool are kept in order of their load, so that nobody has to look at each of them.

For each load that somebody has there is an integer with a bit for each worker: whoever is least loaded, and
next in turn, is found by a few operations on integers of as many bits as there are workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from orchestrator.routing.policies.base import Ranking

MOST_PARTS: Final = 16  # parts of a pool that are known at a time
NOBODY: Final = 0
EVERYBODY: Final = -1  # it has all bits


class LoadRanking(Ranking):
    """It belongs to one tuple of workers, which tell it of each change of their loads."""

    __slots__ = ("_bits", "_levels", "_loads", "_part_bits", "_parts", "_workers")

    def __init__(self, workers: Sequence[Any]) -> None:
        """Nothing is worked out before somebody asks."""
        self._workers = workers
        self._bits: list[int] = []  # of each worker, by its place
        self._loads: list[int] = []  # the same; empty until somebody asks
        self._levels: dict[int, int] = {}  # the bits of all who have a load
        self._parts: list[Sequence[Any]] = []
        self._part_bits: list[int] = []  # of all who are in each of them

    def know(self, part: Sequence[Any]) -> None:
        """Let a part of the workers, in the same order, be asked about, too."""
        if len(self._parts) == MOST_PARTS:
            del self._parts[0], self._part_bits[0]
        self._parts.append(part)
        self._part_bits.append(NOBODY)  # until somebody asks

    def least(self, candidates: Sequence[Any], first: int) -> Any:
        bits = self._bits_of(candidates)
        if bits == NOBODY:
            return None
        if bits == EVERYBODY:
            return self._first(self._levels[min(self._levels)], first)
        for load in sorted(self._levels):
            found = self._levels[load] & bits
            if found:
                return self._first(found, candidates[first].place)
        return None

    def legs(self, candidates: Sequence[Any]) -> int:
        bits = self._bits_of(candidates)
        if bits == NOBODY:
            return -1
        legs = 0
        for load, workers in self._levels.items():
            legs += load * (workers & bits).bit_count()
        return legs

    def moved(self, place: int, load: int) -> None:
        """Note what the worker at this place has to do from now on."""
        if not self._loads:
            return
        before = self._loads[place]
        if load == before:
            return
        bit, levels = self._bits[place], self._levels
        self._loads[place] = load
        left = levels[before] ^ bit
        if left:
            levels[before] = left
        else:
            del levels[before]
        levels[load] = levels.get(load, 0) | bit

    def _begin(self) -> None:
        """Take the loads as they are now."""
        for place in range(len(self._workers)):
            load, bit = self._workers[place].in_flight, 1 << place
            self._bits.append(bit)
            self._loads.append(load)
            self._levels[load] = self._levels.get(load, 0) | bit

    def _bits_of(self, candidates: Sequence[Any]) -> int:
        """Return the bits of these workers."""
        if not self._loads:
            self._begin()
        if candidates is self._workers:
            return EVERYBODY
        for index in range(len(self._parts)):
            if self._parts[index] is candidates:
                if self._part_bits[index] == NOBODY:
                    self._part_bits[index] = self._added_up(candidates)
                return self._part_bits[index]
        return NOBODY

    def _added_up(self, workers: Sequence[Any]) -> int:
        bits = NOBODY
        for worker in workers:
            bits |= self._bits[worker.place]
        return bits

    def _first(self, bits: int, first: int) -> Any:
        """Return the worker of the first bit from this place on, or of the first one of all."""
        later = bits >> first
        if later:
            return self._workers[first + (later & -later).bit_length() - 1]
        return self._workers[(bits & -bits).bit_length() - 1]
