"""More workers than the config has are planned on what is free."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest

from launch.engines.base import PlanError
from launch.local.further import FurtherWorkers, pool_of
from launch.plan import ProcessSpec, named
from tests.launch.planning import around, config, model, plan_of, value_of


def further(
    pool: dict[str, Any], taken: Collection[int] = (), gpus: int | None = 0, **more: Any
) -> tuple[FurtherWorkers, Sequence[ProcessSpec]]:
    made = config(model(both=pool), base_port=4000, **more)
    plan = plan_of(made, around(here=["127.0.0.1", "10.0.0.1"]))
    planned = FurtherWorkers(made, around(), lambda host, port: port not in taken, lambda: gpus)
    return planned, plan.processes


def test_the_next_ports_that_are_free() -> None:
    planned, running = further({"engine": "sim", "replicas": 2}, taken=[4002, 5003])
    spec = planned.plan("m", "both", running)
    assert spec.listens == (("127.0.0.1", 4003), ("127.0.0.1", 5002))
    assert value_of("--port", spec) == "4003"
    assert spec.url == "http://127.0.0.1:4003"
    again = planned.plan("m", "both", [*running, spec])
    assert again.listens == (("127.0.0.1", 4004), ("127.0.0.1", 5004))


def test_ports_of_the_config_are_kept_though_nobody_has_them() -> None:
    planned, _ = further({"engine": "sim", "replicas": 2})
    assert planned.plan("m", "both", []).listens[0][1] == 4002


def test_it_is_started_as_the_others_of_its_pool() -> None:
    pool = {"engine": "sim", "workers": [{"host": "10.0.0.1"}], "args": ["--x"], "env": {"A": "b"}}
    planned, running = further(pool)
    spec = planned.plan("m", "both", running)
    assert spec.listens[0] == ("10.0.0.1", 4001)
    assert spec.argv[-1] == "--x"
    assert spec.env["A"] == "b"


def test_a_place_of_the_config_that_is_vacant_comes_first() -> None:
    planned, running = further({"engine": "sim", "replicas": 3}, taken=[4001])
    one, _, three, _ = running
    assert planned.plan("m", "both", [one], running) is three  # another process has the port of the second
    assert planned.plan("m", "both", running, running).listens[0][1] == 4003


def test_its_name_is_given_later() -> None:
    planned, running = further({"engine": "sim"})
    spec = named(planned.plan("m", "both", running), "a b/c/both/7")
    assert (spec.name, spec.log_name) == ("a b/c/both/7", "a%20b+c-both-7.log")
    assert pool_of(spec.name) == ("a b/c", "both")


def test_gpus_that_are_free() -> None:
    pool = {"engine": "vllm", "device": "cuda", "replicas": 1, "gpus_per_replica": 2}
    planned, running = further(pool, gpus=5)
    spec = planned.plan("m", "both", running)
    assert spec.gpus == (2, 3)
    with pytest.raises(PlanError, match="takes 2 GPUs, and 1 of 5 are free"):
        planned.plan("m", "both", [*running, spec])


@pytest.mark.parametrize(
    ("pool", "gpus", "says"),
    [
        ({"engine": "vllm", "device": "cuda"}, 1, "takes 1 GPUs, and 0 of 1 are free"),
        ({"engine": "vllm", "device": "cuda"}, None, "nobody knows how many GPUs"),
        ({"urls": ["http://h:1"]}, 0, "which Baton does not start"),
        ({"engine": "sim", "data_parallel_size": 2}, 0, "data-parallel engines"),
    ],
)
def test_where_there_can_be_none(pool: dict[str, Any], gpus: int | None, says: str) -> None:
    planned, running = further(pool, gpus=gpus)
    with pytest.raises(PlanError, match=says):
        planned.plan("m", "both", running)


def test_no_port_is_left() -> None:
    planned, running = further({"engine": "sim"}, taken=range(4000, 70000))
    with pytest.raises(PlanError, match="no port from 4000 up is free"):
        planned.plan("m", "both", running)
