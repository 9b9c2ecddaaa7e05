"""Configs for tests of what is rendered, and the objects that become of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launch.render.cluster import Cluster, make_cluster
from launch.render.objects import objects
from launch.render.tree import plain
from orchestrator.config.options import Config

Object = dict[str, Any]

PD: Mapping[str, Any] = {
    "name": "qwen",
    "path": "Qwen/Qwen3-8B",
    "prefill": {"engine": "vllm", "replicas": 1},
    "decode": {"engine": "vllm", "replicas": 2, "args": ["--max-num-seqs", "256"]},
}
SIM: Mapping[str, Any] = {"name": "sim", "prefill": {"engine": "sim"}, "decode": {"engine": "sim"}}


def config(
    *models: Mapping[str, Any],
    orchestrator: Mapping[str, Any] | None = None,
    launch: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
    **options: Any,
) -> Config:
    """A config with these options of Kubernetes."""
    kubernetes = {"image": "registry.example/baton-worker:1", **options}
    return Config.model_validate(
        {
            "orchestrator": {"insecure_no_auth": True, **(orchestrator or {})},
            "models": [*models] or [PD],
            "launch": {"kubernetes": kubernetes, **(launch or {})},
            **(more or {}),
        }
    )


def cluster(*models: Mapping[str, Any], **given: Any) -> Cluster:
    return make_cluster(config(*models, **given))


def rendered(*models: Mapping[str, Any], **given: Any) -> list[Object]:
    return list(all_of(cluster(*models, **given)))


def all_of(made: Cluster) -> Iterator[Object]:
    """The objects as plain data, as a reader of the files has them."""
    for placed in objects(made).values():
        for one in placed:
            yield plain(one)


def only(found: list[Object], kind: str, name: str | None = None) -> Object:
    """The object of this kind, whose name ends so."""
    (one,) = (o for o in found if o["kind"] == kind and o["metadata"]["name"].endswith(name or ""))
    return one


def kinds(found: list[Object]) -> set[str]:
    return {one["kind"] for one in found}


def pod_of(workload: Object) -> Object:
    """The template of the pods that serve requests."""
    spec = workload["spec"]
    if workload["kind"] == "Deployment":
        return dict(spec["template"])
    group = spec["leaderWorkerTemplate"]
    return dict(group.get("leaderTemplate", group["workerTemplate"]))


def container_of(workload: Object) -> Object:
    (container,) = pod_of(workload)["spec"]["containers"]
    return dict(container)


def env_of(container: Object) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in container["env"]}
