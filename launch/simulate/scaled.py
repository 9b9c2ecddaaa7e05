"""What scaling does on a trace is compared with the fewest workers that are always there."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from launch.simulate.advice import Advice, advise
from launch.simulate.errors import OutOfReach
from launch.simulate.experiment import Experiment
from launch.simulate.figures import Figures, summed_up
from launch.simulate.scaler import LOOK_S, Change, Scaler
from launch.simulate.site import Site
from orchestrator.config.options import RoutingConfig
from orchestrator.wire.info import Role


class Scaled:
    """Scaling did this with the trace; beside it the cheapest constant number of workers, if any will do."""

    def __init__(
        self, figures: Figures, scalers: Sequence[Scaler], hours: float, best: Advice | None
    ) -> None:
        """`hours` is how long workers were counted; of several seeds the changes of the first one are told,
        and the most reversals.
        """
        self.figures = figures
        self.changes = scalers[0].changes
        self.worker_hours = statistics.fmean(sum(s.looks.values()) * LOOK_S / 3600 for s in scalers)
        self.reversals = {
            role: max(reversals(scaler.changes, role) for scaler in scalers) for role in scalers[0].looks
        }
        self.best = best
        self.best_hours = None if best is None else (best.prefill + best.decode) * hours

    @property
    def ratio(self) -> float | None:
        """Return how many times the hours of the constant number were needed."""
        return self.worker_hours / self.best_hours if self.best_hours else None

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.figures,
            "worker_hours": self.worker_hours,
            "constant": None if self.best is None else self.best.as_dict(),
            "constant_worker_hours": self.best_hours,
            "ratio": self.ratio,
            "reversals": self.reversals,
            "changes": [_described(change) for change in self.changes],
        }

    def as_text(self) -> str:
        turns = ", ".join(f"{count} reversals of {role}" for role, count in self.reversals.items())
        told = f"{self.figures['good']:.1%} good, {self.worker_hours:.2f} worker-hours, {turns}; "
        if self.best is None or self.ratio is None:
            told += "no constant number of workers is enough"
        else:
            told += f"{self.ratio:.2f} times those of the best constant: {self.best.as_text()}"
        lines = (f"  {c.at_s:6.0f} s  {c.role} {c.wanted}: {c.why}" for c in self.changes)
        return "\n".join([told, *lines])


def _described(change: Change) -> dict[str, Any]:
    return {"at_s": change.at_s, "role": change.role, "wanted": change.wanted, "why": change.why}


def scale(
    experiment: Experiment,
    variants: Mapping[str, RoutingConfig],
    start_s: float,
    share: float,
    left_out: float = 0.0,
) -> dict[str, Scaled]:
    """Run each variant with scaling, and look for the fewest workers with which a `share` is good. The hours
    of workers are not counted in the part `left_out` of the time, at its beginning.
    """
    return {
        name: _scaled(experiment, name, routing, start_s, share, left_out)
        for name, routing in variants.items()
    }


def _scaled(
    experiment: Experiment, name: str, routing: RoutingConfig, start_s: float, share: float, left_out: float
) -> Scaled:
    scalers: list[Scaler] = []
    config, model = experiment.config, experiment.model
    options = config.scaling
    assert options is not None  # noqa: S101  # the command has seen to it

    def attend(site: Site) -> None:
        counted_s = left_out * experiment.hours * 3600
        scalers.append(Scaler(site, config, model, options, start_s, counted_s))

    experiment.attend = attend
    figures = summed_up([experiment.figures_of(seed, routing) for seed in experiment.seeds])
    experiment.attend = None
    hours = experiment.hours * (1 - left_out)
    return Scaled(figures, scalers, hours, _best(experiment, name, routing, share))


def _best(experiment: Experiment, name: str, routing: RoutingConfig, share: float) -> Advice | None:
    try:
        return advise(experiment, {name: routing}, share)[name]
    except OutOfReach:
        return None


def reversals(changes: Sequence[Change], role: Role) -> int:
    """Count how often fewer were wanted after more, or more after fewer."""
    wanted = [change.wanted for change in changes if change.role == role]
    turns = [later > earlier for earlier, later in pairwise(wanted)]
    return sum(one != other for one, other in pairwise(turns))
