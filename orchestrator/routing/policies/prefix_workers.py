"""The workers that the policy `prefix` knows, and those of them that it may choose now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from orchestrator.routing.policies.prediction import Prediction
from orchestrator.routing.policies.prefix_index import PrefixIndex
from orchestrator.routing.policies.prefix_legs import BYTES_PER_TOKEN, Load, Rates

SPARE: Final = 64  # workers that are not there any more and may stay in memory
WANING: Final = 0.999  # of how many candidates there were at most, with each time that there are fewer
MOST_KNOWN: Final = 8  # tuples of candidates that need not be looked up again


class Workers:
    """Workers are known by name, and by the index's numbers; those that may be chosen by their place among
    the candidates.
    """

    __slots__ = (
        "_drift",
        "_drift_s",
        "_index",
        "_kept",
        "_known",
        "_kv_tokens",
        "_learns",
        "_most",
        "_most_stamp",
        "_rates",
        "by_slot",
        "candidates",
        "loads",
        "only",
        "present",
        "stamp",
    )

    def __init__(
        self,
        loads: dict[str, Load],
        index: PrefixIndex,
        rates: Rates,
        kept: float,
        kv_tokens: int,
        drift: float,
        drift_s: float,
        *,
        learns: bool,
    ) -> None:
        """`loads` is filled here. `learns` if `rates` is to learn of legs. The others are arguments of the
        policy.
        """
        self._learns = learns
        self._index = index
        self._rates = rates
        self._kept = kept
        self._kv_tokens = kv_tokens
        self._drift = drift
        self._drift_s = drift_s
        self.loads = loads
        self.by_slot: dict[int, Load] = {}
        self.candidates: Sequence[Any] | None = None  # those of the last choice, if they cannot change
        self.present: list[Load] = []  # by index among the candidates
        self.only: Load | None = None  # of these, if there is no other
        self.stamp = 0  # of `present`
        self._most = 0.0  # candidates, of late
        self._most_stamp = 0  # when there were so many
        self._known: list[tuple[Sequence[Any], list[Load]]] = []  # candidates of late that cannot change

    def note(self, candidates: Sequence[Any]) -> bool:
        """Note who may be chosen now. What cannot change need not be looked at again. True if workers were
        forgotten that are not there any more.
        """
        self.candidates = candidates if isinstance(candidates, tuple) else None
        self.stamp += 1
        if self._is_known(candidates):
            return False
        self.present = []
        for index in range(len(candidates)):
            candidate = candidates[index]
            load = self.loads.get(candidate.name)
            if load is None:
                load = self._new_load(candidate.name)
            if load.epoch != candidate.epoch:
                self.note_return(load, candidate.epoch)
            load.stamp = self.stamp
            load.index = index
            load.announced = self._capacity(candidate.kv_tokens or self._kv_tokens)
            load.holder.capacity = load.holder.full_at = load.announced
            self.present.append(load)
        self.only = self.present[0] if len(candidates) == 1 else None
        self._note_count(len(candidates))
        has_too_many = len(self.loads) > 2 * self._most + SPARE
        if has_too_many:
            self._forget_absent()
            self._known = []
        if self.candidates is not None:
            if len(self._known) == MOST_KNOWN:
                del self._known[0]
            self._known.append((candidates, self.present))
        return has_too_many

    def _note_count(self, count: int) -> None:
        """Note how many candidates there are: a request may have few, where many are there."""
        self._most *= WANING
        if count >= self._most:
            self._most, self._most_stamp = float(count), self.stamp

    def _is_known(self, candidates: Sequence[Any]) -> bool:
        """Take these candidates for present if they were so of late, and nobody has come back since."""
        for known, present in self._known:
            if known is candidates:
                for index in range(len(present)):
                    load = present[index]
                    load.stamp = self.stamp
                    load.index = index
                self.present = present
                self.only = present[0] if len(present) == 1 else None
                return True
        return False

    def _new_load(self, name: str) -> Load:
        holder = self._index.holder(self._capacity(self._kv_tokens))
        prediction = Prediction(self._drift, self._drift_s)
        load = Load(name, holder, prediction, self._rates.scale, self._rates if self._learns else None)
        self.loads[name] = self.by_slot[holder.slot] = load
        return load

    def _capacity(self, kv_tokens: int) -> int:
        """Return how many bytes of prompt are remembered of a worker with so large a KV cache."""
        return int(self._kept * kv_tokens * BYTES_PER_TOKEN)

    def note_return(self, load: Load, epoch: int) -> None:
        """Note that a worker has come back: its cache may be empty, and its legs have been lost."""
        load.epoch = epoch
        load.legs = []
        load.behind_s = 0.0
        self._index.clear(load.holder)

    def _forget_absent(self) -> None:
        for name, load in list(self.loads.items()):
            if load.stamp < self._most_stamp and not load.legs:
                self._index.remove(load.holder)
                del self.loads[name]
                del self.by_slot[load.holder.slot]
