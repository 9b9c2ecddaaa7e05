from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from launch.backends.placed import DiscoveringRegistrar, PlacedWorkers, with_members
from launch.engines.base import PlanError
from launch.listing import plan_text
from launch.local.control import CommandFailed
from launch.plan import placed_spec
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
    further = PlacedWorkers(made)
    assert further.plan("m", "decode", running).name == "m/decode/1"
    assert further.plan("m", "prefill", running).name == "m/prefill/1"


def test_urls_have_no_further_worker() -> None:
    made = config(model(both={"urls": ["http://10.0.0.1:8000"]}), **RAY)
    with pytest.raises(PlanError, match="not started by Baton"):
        PlacedWorkers(made).plan("m", "both", [])


class Orchestrator:
    """An admin listener that answers everything with this status."""

    def __init__(self, status: int = 200) -> None:
        self._status = status
        self.asked: list[str] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(f"{request.method} {request.url.path}")
        return httpx.Response(self._status, json={"error": {"message": "refused"}})

    async def undrain(self, name: str) -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(self.answer)) as client:
            await DiscoveringRegistrar(client, ["http://admin"], "key").undrain(name)


@pytest.mark.parametrize("status", [200, 404, 409])
def test_a_worker_that_goes_or_is_gone_needs_no_undrain(status: int) -> None:
    """The orchestrator refuses as long as it removes the worker; another start of it was not drained."""
    listener = Orchestrator(status)
    asyncio.run(listener.undrain("m/both/0"))
    assert listener.asked == ["POST /admin/workers/m/both/0/undrain"]


def test_any_other_refusal_is_an_error() -> None:
    with pytest.raises(CommandFailed, match=r"refuses POST .*undrain: refused"):
        asyncio.run(Orchestrator(403).undrain("m/both/0"))


def test_workers_come_and_go_without_a_word_to_the_orchestrator() -> None:
    listener = Orchestrator()

    async def change() -> str:
        async with httpx.AsyncClient(transport=httpx.MockTransport(listener.answer)) as client:
            registrar = DiscoveringRegistrar(client, ["http://admin"], "key")
            await registrar.remove("m/both/0")
            return await registrar.add(placed_spec("m/both/1", "both"), "m", None, None)

    assert asyncio.run(change()) == "m/both/1"
    assert listener.asked == []
