"""Plain objects, for `kubectl apply -f DIR`."""

from __future__ import annotations

from collections.abc import Mapping

from launch.render.cluster import Cluster
from launch.render.objects import objects
from launch.render.readme import readme
from launch.render.text import document, scalar


def kubernetes_files(cluster: Cluster) -> Mapping[str, str]:
    files = {f"{name}.yaml": document(made, scalar) for name, made in objects(cluster).items()}
    return {**files, "README.md": readme(cluster, "kubectl apply -f .")}
