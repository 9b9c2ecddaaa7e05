from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from launch.backends.ray.places import PENDING_S, Places, Pool
from launch.backends.ray.watch import Watched
from tests.launch.backends.ray.fakes import FakeActor, FakeRay

NODES = {"head": {"memory": 1.0}, "n1": {"CPU": 2.0}, "n2": {"CPU": 2.0}, "n3": {"CPU": 1.0, "GPU": 4.0}}
NAMES = ["m/both/0", "m/both/1", "m/both/2"]


@pytest.fixture(autouse=True)
def _strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own are named tuples in all but name."""
    for name in ("ray", "ray.util", "ray.util.scheduling_strategies"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    strategies: Any = sys.modules["ray.util.scheduling_strategies"]
    strategies.PlacementGroupSchedulingStrategy = lambda group, placement_group_bundle_index: SimpleNamespace(
        group=group, index=placement_group_bundle_index
    )
    return  # the patch ends by itself


def pool(bundle: dict[str, float] | None = None, *, is_spread: bool = False) -> Pool:
    return Pool("m/both", NAMES, bundle or {"CPU": 1.0}, is_spread)


def placed(ray: FakeRay, places: Places, *names: str) -> list[tuple[str, int]]:
    made = [places.options(name)["scheduling_strategy"] for name in names]
    return [(strategy.group, strategy.index) for strategy in made]


def test_each_worker_has_a_group_that_prefers_an_empty_node() -> None:
    ray = FakeRay(NODES)
    places = Places(ray, "ns", [pool()])
    assert placed(ray, places, *NAMES) == [(f"ns:{name}", 0) for name in NAMES]
    assert [ray.options[f"ns:{name}"]["_soft_target_node_id"] for name in NAMES] == ["n1", "n2", "n3"]


def test_a_place_is_kept_through_a_restart_and_given_up_with_its_worker() -> None:
    ray = FakeRay(NODES)
    places = Places(ray, "ns", [pool()])
    assert placed(ray, places, "m/both/0") == placed(ray, places, "m/both/0")
    places.release("m/both/0")
    assert ray.removed == ["ns:m/both/0"]
    places.release("m/both/0")
    assert ray.removed == ["ns:m/both/0"]


def test_a_pool_that_must_be_spread_has_one_group() -> None:
    ray = FakeRay(NODES)
    places = Places(ray, "ns", [pool(is_spread=True)])
    assert placed(ray, places, *NAMES) == [("ns:m/both", index) for index in range(3)]
    assert ray.options["ns:m/both"]["strategy"] == "STRICT_SPREAD"


def test_beyond_its_group_a_worker_keeps_off_the_nodes_of_the_others() -> None:
    ray = FakeRay(NODES)
    places = Places(ray, "ns", [pool(is_spread=True)])
    placed(ray, places, *NAMES)
    ray.places["ns:m/both"] = ["n1", "n2", "n3"]
    assert placed(ray, places, "m/both/3") == [("ns:m/both/3", 0)]
    assert ray.options["ns:m/both/3"]["bundle_label_selector"] == [{"ray.io/node-id": "!in(n1,n2,n3)"}]


def test_a_place_in_a_group_that_is_free_again_is_taken() -> None:
    ray = FakeRay(NODES)
    places = Places(ray, "ns", [pool(is_spread=True)])
    placed(ray, places, *NAMES)
    places.release("m/both/1")
    assert ray.removed == []
    assert placed(ray, places, "m/both/7") == [("ns:m/both", 1)]


def test_what_a_worker_needs_is_what_its_actor_takes() -> None:
    places = Places(FakeRay(NODES), "ns", [pool({"CPU": 0.5, "GPU": 2, "H200": 1})])
    options = places.options("m/both/0")
    assert (options["num_cpus"], options["num_gpus"], options["resources"]) == (0.5, 2, {"H200": 1})


def trouble(made: Pool) -> list[tuple[str, str | None]]:
    ray = FakeRay(NODES)
    places = Places(ray, "ns", [made])
    places.options("m/both/0")
    ray.states = dict.fromkeys(ray.options, "PENDING")
    watched = Watched(ray, "m/both/0", "m/both/0#1", FakeActor())
    at_once = [*places.look(watched.lost_at + 1.1, [watched])]
    assert at_once == []
    return [*places.look(watched.lost_at + PENDING_S + 1.1, [watched])]


@pytest.mark.parametrize(
    ("made", "missing"),
    [
        (
            pool({"CPU": 1, "GPU": 8}),
            "a worker of m/both needs 1 CPU, 8 GPU on one node, and no node has more than 2 CPU, 4 GPU",
        ),
        (
            pool({"CPU": 2}, is_spread=True),
            "m/both needs 3 nodes with 2 CPU each (launch.ray.spread: node), and there are 2",
        ),
        (pool({"CPU": 1}), "a worker of m/both needs 1 CPU, and all that the cluster has free is 0.5 CPU"),
    ],
)
def test_what_is_missing_is_named(made: Pool, missing: str) -> None:
    assert trouble(made) == [("m/both/0", f"no place for it: {missing}")]
