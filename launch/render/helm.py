"""A Helm chart of the same objects; what differs from cluster to cluster is in its values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from launch.render.cluster import Cluster
from launch.render.objects import objects
from launch.render.readme import readme
from launch.render.text import document, scalar
from launch.render.tree import Noted, Object, Scalar, Tree, Value
from orchestrator import __version__

_place = re.compile("\0([0-9]+)\0")  # of a value: no text in YAML has this character


def helm_files(cluster: Cluster) -> Mapping[str, str]:
    files = {f"templates/{name}.yaml": template(made) for name, made in objects(cluster).items()}
    install = f"helm upgrade --install -n {cluster.options.namespace} {cluster.name} ."
    return {
        "Chart.yaml": document([_chart(cluster)], scalar),
        "values.yaml": document([values(cluster)], scalar),
        **files,
        "README.md": readme(cluster, install),
    }


def template(made: Sequence[Object]) -> str:
    """Return a template: whatever looks like one in the objects stands for itself."""
    found: list[Value] = []

    def written(value: Scalar | Value) -> str:
        if not isinstance(value, Value):
            return scalar(value)
        found.append(value)
        return f"\0{len(found) - 1}\0"

    text = document(made, written).replace("{{", '{{ "{{" }}')
    return _place.sub(lambda match: _template(found[int(match[1])]), text)


def _template(value: Value) -> str:
    function = "quote" if isinstance(value.default, str) else "int"
    return f"{{{{ {value.template} | {function} }}}}"


def _chart(cluster: Cluster) -> Object:
    return {
        "apiVersion": "v2",
        "name": cluster.name,
        "description": "Baton: orchestrators, prefill and decode workers",
        "type": "application",
        "version": __version__,
        "appVersion": __version__,
    }


def values(cluster: Cluster) -> Object:
    """Return the values that the chart takes, with their defaults."""
    given = {pool.name: cluster.replicas_of(pool) for pool in cluster.pools}
    replicas: dict[str, Tree] = {name: value.default for name, value in given.items() if value is not None}
    return {
        "image": Noted(cluster.image.default, "of the workers"),
        "orchestratorImage": cluster.orchestrator_image.default,
        "orchestrators": Noted(cluster.options.orchestrators, "at least"),
        "replicas": Noted(replicas, "of pools that are not autoscaled"),
    }
