"""Autoscalers: workers follow what the orchestrators' planner wants, orchestrators their use of CPU."""

from __future__ import annotations

from collections.abc import Iterator

from launch.render import labels
from launch.render.cluster import Cluster, RolePool
from launch.render.text import quoted
from launch.render.tree import Noted, Object, Tree, Value
from launch.render.workloads import Scalable, file_of, scalable

WANTED = "baton_wanted_workers"
_CPU_PERCENT = 70
_DOWN_EVERY_S = 60


def autoscalers(cluster: Cluster) -> Iterator[tuple[str, Object]]:
    """Yield them, each with the name of its file."""
    if cluster.max_orchestrators > cluster.options.orchestrators:
        yield "orchestrator", _of_orchestrators(cluster)
    for pool in filter(cluster.is_autoscaled, cluster.pools):
        made = _scaled_object if cluster.options.autoscale == "keda" else _external
        yield file_of(pool), made(cluster, pool)


def _of_orchestrators(cluster: Cluster) -> Object:
    target: dict[str, Tree] = {"type": "Utilization", "averageUtilization": _CPU_PERCENT}
    metric: dict[str, Tree] = {"type": "Resource", "resource": {"name": "cpu", "target": target}}
    spec: dict[str, Tree] = {
        "scaleTargetRef": _reference(Scalable("apps/v1", "Deployment", f"{cluster.name}-orchestrator")),
        "minReplicas": Value(cluster.options.orchestrators, ".Values.orchestrators"),
        "maxReplicas": cluster.max_orchestrators,
        "metrics": [metric],
    }
    own = labels.orchestrators(cluster)
    return _autoscaler(cluster, f"{cluster.name}-orchestrator", own, spec)


def _external(cluster: Cluster, pool: RolePool) -> Object:
    metric: dict[str, Tree] = {
        "name": WANTED,
        "selector": {"matchLabels": {"model": pool.model.name, "role": pool.role}},
    }
    each = Noted(
        {"type": "AverageValue", "averageValue": "1"},
        "All orchestrators tell the same: the adapter must take the largest, not the sum.",
    )
    spec: dict[str, Tree] = {
        "scaleTargetRef": _reference(scalable(cluster, pool)),
        "minReplicas": pool.least,
        "maxReplicas": pool.most,
        "metrics": [{"type": "External", "external": {"metric": metric, "target": each}}],
        "behavior": _behavior(),
    }
    return _autoscaler(cluster, pool.name, labels.selector(cluster, pool), spec)


def _scaled_object(cluster: Cluster, pool: RolePool) -> Object:
    query = f"max({WANTED}{{model={quoted(pool.model.name)},role={quoted(pool.role)}}})"
    trigger: dict[str, Tree] = {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": cluster.options.prometheus,
            "query": Noted(query, "All orchestrators tell the same."),
            "threshold": "1",
            "ignoreNullValues": Noted("false", "No answer is no zero: see fallback."),
        },
    }
    hold: dict[str, Tree] = {"failureThreshold": 3, "replicas": pool.least, "behavior": "currentReplicas"}
    spec: dict[str, Tree] = {
        "scaleTargetRef": _reference(scalable(cluster, pool)),
        "minReplicaCount": pool.least,
        "maxReplicaCount": pool.most,
        "pollingInterval": 15,
        "fallback": Noted(hold, "Without data nothing changes."),
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior()}},
        "triggers": [trigger],
    }
    own = labels.selector(cluster, pool)
    return labels.thing(cluster, "keda.sh/v1alpha1", "ScaledObject", pool.name, own, spec=spec)


def _behavior() -> Tree:
    down: dict[str, Tree] = {
        "stabilizationWindowSeconds": 0,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": _DOWN_EVERY_S}],
    }
    return Noted(
        {"scaleUp": {"stabilizationWindowSeconds": 0}, "scaleDown": down},
        "The planner has waited already (`scaling` in the config); one worker is drained at a time.",
    )


def _autoscaler(cluster: Cluster, name: str, own: dict[str, str], spec: Tree) -> Object:
    return labels.thing(cluster, "autoscaling/v2", "HorizontalPodAutoscaler", name, own, spec=spec)


def _reference(target: Scalable) -> Tree:
    return {"apiVersion": target.version, "kind": target.kind, "name": target.name}
