"""A planner says how many workers of each role a model wants: reports in, numbers and reasons out.

It has no clock and asks nobody: the same reports give the same answers. What it cannot tell stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from orchestrator.config.options import MAX_WORKERS, Config, ModelConfig, PoolConfig, ScalingConfig
from orchestrator.scaling.budget import Price, within
from orchestrator.scaling.reports import Report, Stage
from orchestrator.scaling.roles import RolePlanner, Wish, role_planner
from orchestrator.scaling.track import Pool
from orchestrator.scaling.window import Window
from orchestrator.wire.info import Role

EVERY_S: Final = 5.0  # a decision is made so often


class ModelPlanner:
    """It hears the reports of one model."""

    def __init__(self, model: ModelConfig) -> None:
        self._name = model.name
        self._pools: Mapping[Role, PoolConfig] = dict(model.pools())
        self._window = Window()
        self._due: float | None = None  # the moment of the next decision
        self._roles: Mapping[Role, RolePlanner] = {
            role: role_planner(role, pool) for role, pool in model.pools()
        }

    def note(self, report: Report, options: ScalingConfig) -> bool:
        """Hear a report; tell whether a decision was made. One that cannot be true is not heard."""
        if not self._window.note(report):
            return False
        if self._due is None or self._window.is_new:
            self._begin(report.moment)
        for role, planned in self._roles.items():
            planned.look(_pool(self._pools[role], role, report), report.moment)
        if self._due is None or report.moment < self._due:
            return False
        self._due = report.moment + EVERY_S
        for planned in self._roles.values():
            planned.decide(self._window, options)
        return True

    def wishes(self) -> list[Wish]:
        """Return what is wanted of each role, as far as anything was heard."""
        found = (planned.wish(self._name, role) for role, planned in self._roles.items())
        return [wish for wish in found if wish is not None]

    def _begin(self, moment: float) -> None:
        """Begin anew: nothing is known of the time before."""
        self._due = moment + EVERY_S
        for planned in self._roles.values():
            planned.forget(moment)


class ScalingPlanner:
    """It has a planner for each model, and shares GPUs among them."""

    def __init__(self, config: Config, options: ScalingConfig) -> None:
        self._options = options
        self._models = {model.name: ModelPlanner(model) for model in config.models}
        self._prices: Mapping[tuple[str, Role], Price] = {
            (model.name, role): Price(pool.gpus_per_replica, pool.range.min if pool.range else 1)
            for model in config.models
            for role, pool in model.pools()
        }

    def reconfigure(self, options: ScalingConfig) -> None:
        """Go by this section from the next report on."""
        self._options = options

    def note(self, model: str, report: Report) -> bool:
        """Hear a report of a model; tell whether decisions were made of it."""
        return self._models[model].note(report, self._options)

    def wishes(self) -> list[Wish]:
        """Return what is wanted of each role of each model that was heard of, within `max_gpus`."""
        wishes = [wish for planner in self._models.values() for wish in planner.wishes()]
        prices = [self._prices[wish.model, wish.role] for wish in wishes]
        return within(wishes, prices, self._options.max_gpus)


def _pool(config: PoolConfig, role: Role, report: Report) -> Pool:
    stages = [worker.stage for worker in report.workers if worker.role == role]
    ready, starting, draining = (stages.count(stage) for stage in Stage)
    least, most = (1, MAX_WORKERS) if config.range is None else (config.range.min, config.range.max)
    return Pool(ready, starting, draining, least, most)
