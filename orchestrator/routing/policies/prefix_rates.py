"""How fast workers are is learned here, from how long their legs took by what they should have taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from orchestrator.routing.policies.prefix_legs import Load

# Rates: the newest leg has this weight, the first legs more; all are compared after so many legs.
NEWEST: Final = 0.1
SURE: Final = 10  # legs
COMPARED: Final = 16
LEAST_RATE: Final = 1e-4
MOST_RATE: Final = 1e4


class Rates:
    """Rates are those of all workers that a policy knows."""

    __slots__ = ("_ends", "_left", "_loads", "lowest", "scale")

    def __init__(self, loads: Mapping[str, Load]) -> None:
        """`loads` are the workers, whoever comes or goes."""
        self._loads = loads
        self._ends = 0
        self._left = 1  # legs until all are compared
        self.scale = 1.0  # the median rate
        self.lowest = 1.0  # no worker is reckoned with at less

    def learn(self, load: Load, ratio: float) -> None:
        """Note how long a leg took, by what was expected at a rate of 1. `Load.settle` is to follow."""
        if not LEAST_RATE < ratio < MOST_RATE:
            ratio = min(max(ratio, LEAST_RATE), MOST_RATE)
        load.seen = seen = load.seen + 1
        load.rate += (ratio - load.rate) * (NEWEST if seen > SURE else 1.0 / seen)
        self._left -= 1
        if self._left <= 0:
            self._compare()
            return
        load.become(self.scale)
        if load.price < self.lowest:
            self.lowest = load.price

    def _compare(self) -> None:
        """Find the median rate, and what is reckoned with for each worker."""
        self._ends += 1
        self._left = 1 if self._ends < COMPARED else max(COMPARED, len(self._loads))
        rates = sorted([load.rate for load in self._loads.values() if load.seen])
        self.scale = self.lowest = scale = rates[len(rates) // 2]
        for load in self._loads.values():
            load.become(scale)
            load.settle()
            if load.price < self.lowest:
                self.lowest = load.price
