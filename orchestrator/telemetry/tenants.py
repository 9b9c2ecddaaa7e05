"""Each API key is counted by its name: what it asks for, what it has open, why it was refused.

A name has a slot of `CELLS` cells of int64 in a row, and keeps it when its key is gone. Rows of several
processes lie side by side in shared memory: each writes its own, and all may read the sums, by which they
share the limits of a key (`relay/tenants.py`). Names beyond `MAX_KEYS` are counted together.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from orchestrator.telemetry.counters import OTHER, RejectReason, Row, sum_rows

MAX_KEYS: Final = 1000
SLOTS: Final = MAX_KEYS + 1  # the last one is that of all other names

# Gauges, which are over with the process that has them:
OPEN: Final = 0  # requests
WAITING: Final = 1  # of these, in the queue of a model
USED_REQUESTS: Final = 2  # of the limit per minute, as this process last saw it
USED_TOKENS: Final = 3
# Sums; what is charged may be given back:
CHARGED_REQUESTS: Final = 4
CHARGED_TOKENS: Final = 5
REQUESTS: Final = 6
TOKENS: Final = 7  # of prompts and answers, as far as they are known
REJECTED: Final = 8  # a cell for each reason
CELLS: Final = REJECTED + len(RejectReason)
SUMS: Final = range(CHARGED_REQUESTS, CELLS)

KeyCounts: TypeAlias = tuple[str, Sequence[int]]  # a name, and the sums of its cells


class KeyCells:
    """These are the cells of one name: in the row that this process writes, and in all rows."""

    __slots__ = ("_rows", "_start", "is_shared", "row")

    def __init__(self, row: Row, rows: Sequence[Row], slot: int) -> None:
        self.row = row
        self.is_shared = len(rows) > 1
        self._rows = rows
        self._start = slot * CELLS

    def add(self, cell: int, number: int) -> None:
        self.row[self._start + cell] += number

    def note(self, cell: int, number: int) -> None:
        """Write a gauge."""
        self.row[self._start + cell] = number

    def sum(self, cell: int) -> int:
        """Return what all processes have in a cell together."""
        cell += self._start
        return sum([row[cell] for row in self._rows]) if self.is_shared else self.row[cell]

    def most(self, cell: int) -> int:
        """Return the highest that a process has in a cell."""
        cell += self._start
        return max([row[cell] for row in self._rows])


class KeyTable:
    """It knows where each name is counted. All processes have the same `names`, the supervisor's."""

    def __init__(self, rows: Sequence[Row], own: int = 0, names: Iterable[str] = ()) -> None:
        """`rows` have `SLOTS` slots each; that at `own` is this process's."""
        self._rows = rows
        self._own = rows[own]
        self.names: list[str] = []
        self._slots: dict[str, int] = {}
        self.add(names)

    @classmethod
    def alone(cls) -> KeyTable:
        """Return that of the only process, in memory of its own."""
        return cls([array("q", bytes(8 * CELLS * SLOTS))])

    def add(self, names: Iterable[str]) -> None:
        """Give those a slot that have none yet, while there are some left."""
        for name in names:
            if name not in self._slots and len(self.names) < MAX_KEYS:
                self._slots[name] = len(self.names)
                self.names.append(name)

    def cells_of(self, name: str) -> KeyCells | None:
        """Return the cells of a name; None if it has none of its own."""
        slot = self._slots.get(name)
        return None if slot is None else KeyCells(self._own, self._rows, slot)

    @property
    def others(self) -> KeyCells:
        """The cells of all other names."""
        return KeyCells(self._own, self._rows, MAX_KEYS)

    def counted(self) -> list[KeyCounts]:
        """Return what all processes have counted, by name; that of all other names comes last."""
        places = [*enumerate(self.names), (MAX_KEYS, OTHER)]
        return [(name, self._sums(slot)) for slot, name in places]

    def _sums(self, slot: int) -> Sequence[int]:
        return sum_rows([row[slot * CELLS : (slot + 1) * CELLS] for row in self._rows])
