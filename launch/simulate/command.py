"""The command `baton simulate`: from its options to a report and an exit code."""

from __future__ import annotations

import argparse
from typing import Any, Final

from launch.exits import Exit
from launch.simulate import report
from launch.simulate.advice import advise
from launch.simulate.calibration import Calibration, calibrate
from launch.simulate.errors import SimulationError
from launch.simulate.experiment import Experiment
from launch.simulate.figures import Figures, Slo
from launch.simulate.formats import read_trace
from launch.simulate.models import model_named, with_workers
from launch.simulate.network import Network
from launch.simulate.scaled import scale
from launch.simulate.site import Conditions
from launch.simulate.variants import own_name, routing_of
from orchestrator.config.addresses import worker_places, zone_of
from orchestrator.config.options import Config, ModelConfig, RoutingConfig

ENOUGH: Final = 0.9  # of the requests are to be good
ENOUGH_SCALED: Final = 0.95  # what the bounds of `scaling` are said of


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Return the exit code; the report goes to stdout. Raises `SimulationError`."""
    model = with_workers(model_named(config, arguments.model), arguments.prefill, arguments.decode)
    if not (arguments.trace or arguments.calibrate):
        raise SimulationError("--trace FILE is needed, or --calibrate FILE")
    if arguments.advise and (arguments.prefill is not None or arguments.decode is not None):
        raise SimulationError("--advise looks for the numbers of workers itself: without --prefill, --decode")
    _check_scale(arguments, config)
    _check_slow(arguments, model)
    _check_zones(arguments, config, model)
    variants = _variants(arguments, config.routing)
    found: dict[str, Any] = {}
    texts: list[str] = []
    calibration = None
    if arguments.calibrate:
        calibration = calibrate(arguments.calibrate, config, model)
        found["calibration"] = calibration.as_dict()
        texts.append(calibration.as_text())
    if arguments.trace:
        experiment = _experiment(arguments, config, model, calibration)
        _simulate(arguments, experiment, variants, found, texts)
    print(report.as_json(found) if arguments.form == "json" else "\n\n".join(texts))
    return Exit.OK


def _check_scale(arguments: argparse.Namespace, config: Config) -> None:
    if not arguments.scale:
        return
    if config.scaling is None:
        raise SimulationError("--scale goes by the section `scaling`, which the config has not")
    if arguments.advise:
        raise SimulationError("--scale looks for the fewest workers by itself: without --advise")
    if not arguments.trace:
        raise SimulationError("--scale needs --trace FILE")


def _slo(arguments: argparse.Namespace, config: Config) -> Slo:
    """Return the bounds of the command line; of others those of `scaling` if that is simulated."""
    scaling = config.scaling if arguments.scale else None
    usual = (5.0, 0.1) if scaling is None else (scaling.ttft_p95_s, scaling.itl_p95_ms / 1e3)
    return Slo(arguments.slo_ttft or usual[0], arguments.slo_tpot or usual[1])


def _variants(arguments: argparse.Namespace, routing: RoutingConfig) -> dict[str, RoutingConfig]:
    if arguments.policies is None:
        return {own_name(routing): routing}
    return {name: routing_of(name, routing) for name in arguments.policies}


def _check_slow(arguments: argparse.Namespace, model: ModelConfig) -> None:
    """Refuse names of workers that there are not."""
    names = [f"{model.name}/{role}/{index}" for role, pool in model.pools() for index in range(pool.count)]
    for name, _ in arguments.slow:
        if name not in names:
            raise SimulationError(f"--slow: there is no worker {name!r}; there is: {', '.join(names[:8])}")


def _check_zones(arguments: argparse.Namespace, config: Config, model: ModelConfig) -> None:
    """Refuse names of zones that there are not."""
    places = worker_places(config.model_copy(update={"models": [model]}))
    zones = arguments.zones or [*dict.fromkeys(zone for place in places if (zone := zone_of(place)))]
    if "" in zones:
        raise SimulationError("--zones: a zone has no name")
    for names, _ in arguments.link:
        for name in sorted(names.difference(zones)):
            known = ", ".join(zones) or "none: see --zones"
            raise SimulationError(f"--link: there is no zone {name!r}; there is: {known}")


def _network(arguments: argparse.Namespace) -> Network:
    return Network(arguments.zones, arguments.between_zones, dict(arguments.link))


def _experiment(
    arguments: argparse.Namespace, config: Config, model: ModelConfig, calibration: Calibration | None
) -> Experiment:
    return Experiment(
        config,
        model,
        read_trace(arguments.trace, model.name),
        rate=arguments.rate,
        seeds=arguments.seeds,
        slo=_slo(arguments, config),
        warm_up=arguments.warm_up,
        latency=None if calibration is None else calibration.latency,
        conditions=Conditions(noise=arguments.noise, slow=dict(arguments.slow), network=_network(arguments)),
    )


def _simulate(
    arguments: argparse.Namespace,
    experiment: Experiment,
    variants: dict[str, RoutingConfig],
    found: dict[str, Any],
    texts: list[str],
) -> None:
    if arguments.scale:
        results = scale(experiment, variants, arguments.start_s, arguments.slo_share or ENOUGH_SCALED)
        found |= {name: result.as_dict() for name, result in results.items()}
        texts.append("\n".join(f"{name}: {result.as_text()}" for name, result in results.items()))
        return
    if arguments.advise:
        advice = advise(experiment, variants, arguments.slo_share or ENOUGH)
        found |= {name: best.as_dict() for name, best in advice.items()}
        texts.append("\n".join(f"{name}: {best.as_text()}" for name, best in advice.items()))
        return
    figures: dict[str, Figures] = {name: experiment.figures(routing) for name, routing in variants.items()}
    found |= figures
    texts.append(report.as_table(figures))
