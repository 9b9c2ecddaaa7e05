"""The numbers of several processes are in one piece of memory: a row of int64 per writer.

The supervisor makes it, data-plane processes inherit its file descriptor, and it is gone with the last of
them. There is no lock: a cell has one writer, and is eight aligned bytes, which are read and written whole.

A row holds what `Telemetry` counts, then the figures of the connections to workers, then how often the
writer's event loop has beaten, then for each worker the legs under way, then for each the moment at which it
was last heard, then for each its figures, then for each what is known of its caches, then what is counted of
API keys. Row 0 is the base: what processes that have ended had counted.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import Sequence

from orchestrator.config.options import Config
from orchestrator.telemetry.counters import Layout, sum_rows
from orchestrator.telemetry.figures import CELLS
from orchestrator.telemetry.tenants import CELLS as KEY_CELLS
from orchestrator.telemetry.tenants import SUMS as KEY_SUMS
from orchestrator.transport.base import UpstreamStats
from orchestrator.workers.figures import COUNTERS, CacheFigures
from orchestrator.workers.worker import SharedLoad

BASE = 0
CELL_BYTES = 8
CACHE_LINE = 64  # bytes: rows do not share one
# How many more than the config names can be there at a time, where several processes serve.
SPARE_WORKERS = 64
# The same where a source finds workers: nobody knows how many. A slot has less than a kilobyte per process.
DISCOVERED_WORKERS = 1024

_UPSTREAM = UpstreamStats._fields
_UPSTREAM_GAUGES = frozenset({"idle", "busy"})
_CACHE_CELLS = len(CacheFigures._fields)


class Rows:
    """All rows are here. Whoever writes to one knows its index from the supervisor; only that one folds."""

    def __init__(self, fd: int, layout: Layout, workers: int, count: int, keys: int = 0) -> None:
        """Map the memory behind `fd`, which `create` made for the same arguments.

        `workers` and `keys` are how many slots there are for these.
        """
        self.fd = fd
        self.count = count
        self._layout = layout
        self._workers = workers
        self._upstream = layout.size
        self._beats = self._upstream + len(_UPSTREAM)
        self._legs = self._beats + 1
        self._heard = self._legs + workers
        self._figures = self._heard + workers
        self._caches = self._figures + workers * CELLS
        self._keys = self._caches + workers * _CACHE_CELLS
        self._key_slots = keys
        self.row_size = row_size(layout, workers, keys)
        self._cells = memoryview(mmap.mmap(fd, count * self.row_size * CELL_BYTES)).cast("q")
        self._counters = [
            *layout.counters,
            *range(self._figures, self._figures + workers * CELLS),
            *(self._upstream + place for place, name in enumerate(_UPSTREAM) if name not in _UPSTREAM_GAUGES),
            *(self._caches + slot * _CACHE_CELLS + place for slot in range(workers) for place in COUNTERS),
            *(self._keys + slot * KEY_CELLS + place for slot in range(keys) for place in KEY_SUMS),
        ]

    @classmethod
    def create(cls, layout: Layout, workers: int, count: int, keys: int = 0) -> Rows:
        """Return `count` rows of zeros, the base among them."""
        fd = _anonymous_file()
        os.ftruncate(fd, count * row_size(layout, workers, keys) * CELL_BYTES)
        return cls(fd, layout, workers, count, keys)

    def close(self) -> None:
        """Close the descriptor, so that nobody inherits it any more; the rows stay."""
        os.close(self.fd)

    # --- one row --------------------------------------------------------------------------------

    def telemetry(self, row: int) -> memoryview:
        """Return the cells of `row` that `Telemetry` counts into."""
        return self._row(row)[: self._upstream]

    def note_upstream(self, row: int, stats: UpstreamStats) -> None:
        for cell, value in enumerate(stats, row * self.row_size + self._upstream):
            self._cells[cell] = value

    def beat(self, row: int) -> None:
        """Note that the event loop of the writer of `row` moves."""
        self._cells[row * self.row_size + self._beats] += 1

    def beats(self, row: int) -> int:
        """Return how often it has moved; this differs from an earlier value if it has moved since."""
        return self._cells[row * self.row_size + self._beats]

    def loads(self, row: int) -> list[SharedLoad]:
        """Return the load of each worker's slot, as the writer of `row` needs it."""
        return [
            SharedLoad(
                *self._cell(row, self._legs + slot),
                *self._cell(row, self._heard + slot),
                [self._cache_cells(each, slot) for each in range(self.count)],
                self._cache_cells(row, slot),
            )
            for slot in range(self._workers)
        ]

    def _cache_cells(self, row: int, slot: int) -> memoryview:
        first = row * self.row_size + self._caches + slot * _CACHE_CELLS
        return self._cells[first : first + _CACHE_CELLS]

    def figures(self, row: int) -> memoryview:
        """Return the cells in which the writer of `row` counts what workers have done, slot after slot."""
        return self._row(row)[self._figures : self._figures + self._workers * CELLS]

    def keys(self) -> list[memoryview]:
        """Return the cells of API keys in each row."""
        size = self._key_slots * KEY_CELLS
        return [self._row(row)[self._keys : self._keys + size] for row in range(self.count)]

    def figures_of(self, slot: int) -> Sequence[int]:
        """Return what all processes have counted for the worker of a slot."""
        start = self._figures + slot * CELLS
        return sum_rows(self._row(row)[start : start + CELLS] for row in range(self.count))

    def in_flight(self, row: int) -> int:
        """Return how many requests the writer of `row` is serving."""
        return sum(self._row(row)[: self._layout.queues])

    def _row(self, row: int) -> memoryview:
        return self._cells[row * self.row_size : (row + 1) * self.row_size]

    def _cell(self, row: int, cell: int) -> tuple[memoryview, memoryview]:
        """Return a cell in all rows, and in one."""
        own = row * self.row_size + cell
        return self._cells[cell :: self.row_size], self._cells[own : own + 1]

    # --- all rows -------------------------------------------------------------------------------

    def counts(self) -> Sequence[int]:
        """Return what all processes have counted, as one row of `Telemetry`."""
        return sum_rows(self.telemetry(row) for row in range(self.count))

    def upstream(self) -> UpstreamStats:
        parts = (self._row(row)[self._upstream : self._beats] for row in range(self.count))
        return UpstreamStats(*sum_rows(parts))

    def fold(self, row: int) -> None:
        """Add what an ended process has counted to the base, and clear its row for the next one.

        What it had in flight is over. Call this once nobody writes to the row any more; readers of the
        same event loop see the sums as before or as after.
        """
        base, ended = self._row(BASE), self._row(row)
        for cell in self._counters:
            base[cell] += ended[cell]
        ended[:] = array("q", bytes(self.row_size * CELL_BYTES))


def spare_workers(config: Config) -> int:
    """Return how many workers more than those that the config names there can be."""
    discovers = any(pool.discover is not None for model in config.models for _, pool in model.pools())
    return DISCOVERED_WORKERS if discovers else SPARE_WORKERS


def row_size(layout: Layout, workers: int, keys: int = 0) -> int:
    """Return the size of a row in cells."""
    cells = layout.size + len(_UPSTREAM) + 1 + (2 + CELLS + _CACHE_CELLS) * workers + KEY_CELLS * keys
    per_line = CACHE_LINE // CELL_BYTES
    return -(-cells // per_line) * per_line


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("baton-rows")
    fd, path = tempfile.mkstemp(prefix="baton-rows")
    os.unlink(path)
    return fd
