from __future__ import annotations

from pathlib import Path

import pytest

from launch.backends.placed import PlacedWorkers, with_members
from launch.engines.base import PlanError
from launch.listing import plan_text
from orchestrator.config.file import load_config
from tests.launch.planning import config, model, plan_of

SIM = {"engine": "sim"}
RAY = {"launch": {"backend": "ray"}}


def test_what_a_backend_places_is_planned_by_name_alone() -> None:
    plan = plan_of(config(model(prefill=SIM, decode={**SIM, "replicas": 2}), **RAY))
    assert [spec.name for spec in plan.workers] == ["m/prefill/0", "m/decode/0", "m/decode/1"]
    assert {(spec.argv, spec.listens) for spec in plan.workers} == {((), ())}
    assert plan.here == (plan.orchestrator,)
    assert "# m/decode/1\n#   ray finds the node that it runs on" in plan_text(plan)


def test_hosts_and_a_backend_that_chooses_them_do_not_go_together() -> None:
    pool = {**SIM, "workers": [{"host": "10.0.0.1"}]}
    with pytest.raises(PlanError, match="m/both names hosts of its workers, but ray chooses where they run"):
        plan_of(config(model(both=pool), **RAY))


def test_workers_that_baton_does_not_start_are_not_placed() -> None:
    plan = plan_of(config(model(both={"urls": ["http://10.0.0.1:8000"]}), **RAY))
    assert plan.workers == ()


def test_the_orchestrator_finds_the_members_in_their_folder(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("models: [{name: m, prefill: {engine: sim}, decode: {engine: sim, replicas: 2}}]\n")
    made = load_config(str(file))
    plan = with_members(made, plan_of(made), tmp_path / "members")
    overrides = [word for word in plan.orchestrator.argv if word.startswith("models.")]
    seen = load_config(str(file), overrides)
    for _, pool in seen.models[0].pools():
        assert pool.discover is not None
        assert pool.discover.file == str(tmp_path / "members")
    assert seen.models[0].decode is not None
    assert seen.models[0].decode.replicas == 2


def test_a_further_worker_gets_the_next_free_name() -> None:
    made = config(model(prefill=SIM, decode={**SIM, "replicas": 3}), **RAY)
    running = [spec for spec in plan_of(made).workers if spec.name != "m/decode/1"]
    placed = PlacedWorkers(made)
    assert placed.plan("m", "decode", running).name == "m/decode/1"
    assert placed.plan("m", "prefill", running).name == "m/prefill/1"


def test_urls_have_no_further_worker() -> None:
    made = config(model(both={"urls": ["http://10.0.0.1:8000"]}), **RAY)
    with pytest.raises(PlanError, match="not started by Baton"):
        PlacedWorkers(made).plan("m", "both", [])
