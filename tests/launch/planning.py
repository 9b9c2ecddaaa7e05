"""Configs and surroundings for tests of plans, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.engines.base import Surroundings
from launch.plan import Plan, ProcessSpec, make_plan
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


def value_of(option: str, spec: ProcessSpec) -> str:
    return spec.argv[spec.argv.index(option) + 1]


def gpus(*models: dict[str, Any], environ: Mapping[str, str] | None = None) -> list[str]:
    plan = plan_of(config(*models), around(environ, here=["127.0.0.1", "10.0.0.1"]))
    return [spec.env["CUDA_VISIBLE_DEVICES"] for spec in plan.workers]
