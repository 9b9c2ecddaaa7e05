"""Advice says with how few prefill and decode workers enough requests are good."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import Any, Final

from launch.simulate.errors import OutOfReach
from launch.simulate.experiment import Experiment
from launch.simulate.figures import Figures
from launch.simulate.models import with_workers
from orchestrator.config.options import ModelConfig, RoutingConfig

MOST: Final = 1024  # workers of a role


class Advice:
    """This is the cheapest site, and how it does."""

    __slots__ = ("decode", "figures", "gpus", "prefill")

    def __init__(self, prefill: int, decode: int, gpus: int, figures: Figures) -> None:
        self.prefill = prefill
        self.decode = decode
        self.gpus = gpus
        self.figures = figures

    def as_dict(self) -> dict[str, Any]:
        return {"prefill": self.prefill, "decode": self.decode, "gpus": self.gpus, **self.figures}

    def as_text(self) -> str:
        figures = self.figures
        return (
            f"{self.prefill} prefill and {self.decode} decode workers ({self.gpus} GPUs): "
            f"{figures['good']:.1%} good, TTFT p50 {figures['ttft_p50_s']:.3f} s, p99 "
            f"{figures['ttft_p99_s']:.2f} s, TPOT p99 {figures['tpot_p99_s'] * 1e3:.1f} ms"
        )


def advise(experiment: Experiment, variants: Mapping[str, RoutingConfig], share: float) -> dict[str, Advice]:
    """Return the cheapest site of each variant with which a `share` of the requests is good. Raises
    `OutOfReach` if `MOST` workers of each role do not suffice.
    """
    return {name: _Search(experiment, name, routing, share).best() for name, routing in variants.items()}


class _Search:
    """It takes for granted that more workers do no harm. Each site is simulated once."""

    def __init__(self, experiment: Experiment, name: str, routing: RoutingConfig, share: float) -> None:
        self._experiment = experiment
        self._name = name
        self._routing = routing
        self._share = share
        self._is_whole = routing.disaggregate == "never"
        self._known: dict[tuple[int, int], Figures] = {}
        model = experiment.model
        self._costs = tuple(
            pool.gpus_per_replica if pool is not None else 1
            for pool in (model.prefill or model.both, model.decode or model.both)
        )

    def best(self) -> Advice:
        """Search upwards in cost, from the fewest of each role that do with any number of the other."""
        size = self._enough()
        decode = _least(1, size, lambda count: self._holds(self._beside(size), count))
        if self._is_whole:
            return self._advice(0, decode)
        prefill = _least(1, size, lambda count: self._holds(count, size))
        return self._cheapest(prefill, decode)

    def _beside(self, prefill: int) -> int:
        return 0 if self._is_whole else prefill

    def _enough(self) -> int:
        size = 1
        while not self._holds(self._beside(size), size):
            if size >= MOST:
                good = self._figures(self._beside(size), size)["good"]
                raise OutOfReach(
                    f"{self._name}: with {size} workers of each role {good:.1%} of the requests are good: "
                    "the SLO is out of reach"
                )
            size *= 2
        return size

    def _cheapest(self, prefill: int, decode: int) -> Advice:
        ahead = [(self._gpus(prefill, decode), prefill, decode)]
        seen = {(prefill, decode)}
        while True:
            _, prefill, decode = heapq.heappop(ahead)
            if self._holds(prefill, decode):
                return self._advice(prefill, decode)
            for site in ((prefill + 1, decode), (prefill, decode + 1)):
                if site not in seen:
                    seen.add(site)
                    heapq.heappush(ahead, (self._gpus(*site), *site))

    def _advice(self, prefill: int, decode: int) -> Advice:
        return Advice(prefill, decode, self._gpus(prefill, decode), self._figures(prefill, decode))

    def _gpus(self, prefill: int, decode: int) -> int:
        return prefill * self._costs[0] + decode * self._costs[1]

    def _holds(self, prefill: int, decode: int) -> bool:
        return self._figures(prefill, decode)["good"] >= self._share

    def _figures(self, prefill: int, decode: int) -> Figures:
        site = prefill, decode
        if site not in self._known:
            model: ModelConfig = with_workers(self._experiment.model, prefill, decode)
            self._known[site] = self._experiment.figures(self._routing, model)
        return self._known[site]


def _least(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the least number that holds; `high` does, and so do all above the least one."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
