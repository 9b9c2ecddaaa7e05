"""Configs and surroundings for tests of plans, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.engines.base import Span, Surroundings
from launch.plan import Plan, ProcessSpec, make_plan, worker_process
from orchestrator.config.addresses import worker_addresses, worker_places
from orchestrator.config.options import Config


def around(
    environ: Mapping[str, str] | None = None,
    plugins: Sequence[str] = (),
    directories: Sequence[str] = (),
    here: Sequence[str] = ("127.0.0.1",),
) -> Surroundings:
    return Surroundings(
        python="python",
        environ=environ or {},
        vllm_plugins=plugins,
        is_directory=directories.__contains__,
        is_here=here.__contains__,
    )


def config(*models: dict[str, Any], **more: Any) -> Config:
    return Config.model_validate({"models": list(models), **more})


def model(**pools: Any) -> dict[str, Any]:
    return {"name": "m", "path": "dir", **pools}


def plan_of(made: Config, surroundings: Surroundings | None = None, overrides: Sequence[str] = ()) -> Plan:
    return make_plan(made, "c.yaml", overrides, surroundings or around())


def only_worker(pool: Mapping[str, Any], surroundings: Surroundings | None = None) -> ProcessSpec:
    (spec,) = plan_of(config(model(both=pool)), surroundings).workers
    return spec


def worker_elsewhere(pool: Mapping[str, Any], span: Span | None = None) -> ProcessSpec:
    """A prefill worker that is reached at 10.0.0.1, and listens at all addresses."""
    made = config(model(prefill={**pool, "workers": [{"host": "10.0.0.1"}]}, decode=pool))
    place, address = worker_places(made)[0], worker_addresses(made)[0]
    return worker_process(made, place, address, (0,), around(), listens_at="0.0.0.0", span=span)


def value_of(option: str, spec: ProcessSpec) -> str:
    return spec.argv[spec.argv.index(option) + 1]


def gpus(*models: dict[str, Any], environ: Mapping[str, str] | None = None) -> list[str]:
    plan = plan_of(config(*models), around(environ, here=["127.0.0.1", "10.0.0.1"]))
    return [spec.env["CUDA_VISIBLE_DEVICES"] for spec in plan.workers]
