"""A case is a load on a site: a trace, a rate, workers, and what is not as it should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bench.routing import rules
from bench.routing.agentic import agentic
from launch.simulate.experiment import Experiment
from launch.simulate.figures import Figures, Slo, summed_up
from launch.simulate.formats import read_trace
from launch.simulate.models import LARGE, with_workers
from launch.simulate.site import Conditions
from launch.simulate.trace import Trace
from launch.simulate.variants import routing_of
from orchestrator.config.options import Config
from worker.sim.latency import Latency

MODEL = "m"
TraceOf = Callable[[int], Trace]  # by seed


class Case:
    """The figures of a variant are those of `baton simulate`, with a trace for each seed."""

    def __init__(
        self,
        name: str,
        trace: TraceOf,
        rate: float,
        prefill: int,
        decode: int,
        *,
        routing: Mapping[str, Any] | None = None,
        processes: int = 1,
        conditions: Conditions | None = None,
        slowness: float = 1.0,
    ) -> None:
        """`routing` is that section of the config, where it is not as by default here. Engines take
        `slowness` times as long as policies take them to; the load is as much less, and times are told as
        parts of it, so that only what policies expect is changed.
        """
        self.name = name
        self.prefill = prefill
        self.decode = decode
        self.rate = rate
        self._trace = trace
        self._slowness = slowness
        self._conditions = conditions or Conditions()
        self._config = Config.model_validate(
            {
                "models": [{"name": MODEL, "prefill": {"engine": "sim"}, "decode": {"engine": "sim"}}],
                "routing": {"decode": "least_tokens", **(routing or {})},
                "orchestrator": {
                    "processes": processes,
                    # Nothing is refused: what is compared is routing.
                    "queue": {"requests": 10**6, "tokens": 10**12, "bytes": 10**15, "timeout_s": 1e6},
                    "limits": {"request_timeout_s": 1e6},
                },
            }
        )

    def at(self, rate: float) -> Case:
        """Return the same at another rate."""
        other = Case.__new__(Case)
        other.__dict__.update(self.__dict__, rate=rate)
        return other

    def figures(self, variant: str, seeds: range) -> Figures:
        """Return the mean over the seeds; `VARIANT/RULE` has a fixed rule stand before the planner."""
        return summed_up([self._figures_of(variant, seed) for seed in seeds])

    def _figures_of(self, variant: str, seed: int) -> Figures:
        variant, _, rule = variant.partition("/")
        is_whole = variant.endswith("@never")
        workers = (0, self.prefill + self.decode) if is_whole else (self.prefill, self.decode)
        slow = self._slowness
        experiment = Experiment(
            self._config,
            with_workers(self._config.models[0], *workers),
            _slowed(self._trace(seed), slow),
            rate=self.rate / slow,
            slo=Slo(5.0 * slow, 0.1 * slow),
            latency=_slower(LARGE, slow),
            conditions=self._conditions,
            before=rules.before(rule) if rule else None,
        )
        figures = experiment.figures_of(seed, routing_of(variant, self._config.routing))
        return {name: value / slow if name.endswith("_s") else value for name, value in figures.items()}


def _slower(latency: Latency, slowness: float) -> Latency:
    return Latency(**{name: getattr(latency, name) * slowness for name in Latency.__slots__})


def _slowed(trace: Trace, slowness: float) -> Trace:
    """Let pauses between turns take as many times as long; arrivals are slowed down by the rate."""
    if slowness != 1.0:
        for arrival in trace.arrivals:
            turn = arrival
            while turn.after is not None:
                turn.pause_s *= slowness
                turn = turn.after
    return trace


# --- loads --------------------------------------------------------------------------------------


def of_file(folder: Path, pattern: str) -> TraceOf | None:
    """Return the trace of the first file of this name; None if there is none."""
    found = sorted(folder.glob(pattern))
    if not found:
        return None
    trace = cache(lambda: read_trace(str(found[0]), MODEL))
    return lambda seed: trace()


def of_agents(sessions: int, rate: float) -> TraceOf:
    return lambda seed: agentic(sessions, rate, seed)
