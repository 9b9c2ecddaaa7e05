"""All objects of a cluster, by the file that they stand in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from launch.render.access import access
from launch.render.autoscaling import autoscalers
from launch.render.cluster import Cluster
from launch.render.config_map import config_map
from launch.render.disruption import budgets
from launch.render.errors import RenderError
from launch.render.http_route import http_routes
from launch.render.network_policy import network_policies
from launch.render.orchestrator import orchestrators
from launch.render.pod_monitor import pod_monitors
from launch.render.services import services
from launch.render.tree import Object
from launch.render.workloads import workloads

Placed = tuple[str, Object]  # the name of a file without its ending, and an object in it

# In the order in which they stand in a file.
_KINDS: Sequence[Callable[[Cluster], Iterable[Placed]]] = (
    access,
    lambda cluster: [("config", config_map(cluster))],
    lambda cluster: [("orchestrator", orchestrators(cluster))],
    workloads,
    services,
    budgets,
    autoscalers,
    network_policies,
    pod_monitors,
    http_routes,
)


def objects(cluster: Cluster) -> Mapping[str, Sequence[Object]]:
    """Return all objects by file. Raises `RenderError` if two have one name."""
    files: dict[str, list[Object]] = defaultdict(list)
    seen: set[tuple[object, object]] = set()
    for make in _KINDS:
        for file, made in make(cluster):
            name = _name(made)
            if name in seen:
                raise RenderError(f"two objects would be {name[0]} {name[1]}: rename one of the models")
            seen.add(name)
            files[file].append(made)
    return files


def _name(made: Object) -> tuple[object, object]:
    metadata = made["metadata"]
    return made["kind"], metadata["name"] if isinstance(metadata, Mapping) else None
