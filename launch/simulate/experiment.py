"""An experiment is a config and a trace: it runs variants of the routing, each with the same seeds."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from launch.simulate.engine import EngineModel
from launch.simulate.figures import Figures, Slo, measure, summed_up
from launch.simulate.models import engine_models
from launch.simulate.site import Conditions, Plans, Site
from launch.simulate.trace import Trace
from orchestrator.config.options import Config, ModelConfig, RoutingConfig
from orchestrator.routing.planner import Planner
from orchestrator.wire.info import Role
from worker.sim.latency import Latency


class Experiment:
    """The same seed is the same load, and the same noise, for every variant."""

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        trace: Trace,
        *,
        rate: float = 1.0,
        seeds: int = 1,
        first_seed: int = 0,
        slo: Slo | None = None,
        warm_up: float = 0.1,
        latency: Latency | None = None,
        conditions: Conditions | None = None,
        before: Callable[[Planner], Plans] | None = None,
        attend: Callable[[Site], object] | None = None,
    ) -> None:
        """Requests come `rate` times as fast as in the trace. Those are not counted that came in the share
        `warm_up` of the time, at its beginning. `latency` is that of all workers, in place of the config's.
        `before` makes what stands before the planner. `attend` is called with each site before requests come.
        """
        self.config = config
        self.model = model
        self.trace = trace
        self._rate = rate
        self.seeds = range(first_seed, first_seed + seeds)
        self._slo = slo or Slo()
        self._warm_up = warm_up
        self._latency = latency
        self._conditions = conditions or Conditions()
        self._before = before
        self.attend = attend

    @property
    def hours(self) -> float:
        """Return for how long requests come."""
        return max(arrival.at_s for arrival in self.trace.arrivals) / self._rate / 3600

    def figures(self, routing: RoutingConfig, model: ModelConfig | None = None) -> Figures:
        """Run a variant with each seed, on the workers of `model` if it is given."""
        return summed_up([self.figures_of(seed, routing, model) for seed in self.seeds])

    def figures_of(self, seed: int, routing: RoutingConfig, model: ModelConfig | None = None) -> Figures:
        return measure(self.site(seed, routing, model), self._slo, self._warm_up)

    def site(self, seed: int, routing: RoutingConfig, model: ModelConfig | None = None) -> Site:
        """Run a variant with one seed, to its end."""
        model = model or self.model
        engines: dict[Role, EngineModel] = engine_models(model, self._latency)
        block_tokens = self.trace.block_tokens
        site = Site(self.config, model, routing, engines, block_tokens, seed, self._conditions, self._before)
        random = Random(f"arrivals {seed}")  # noqa: S311  # no secret
        if self.attend is not None:
            self.attend(site)
        site.run(self.trace.moments(self._rate, random))
        return site
