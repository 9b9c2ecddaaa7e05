"""The folder gets a page with the commands that bring what is in it to a cluster."""

from __future__ import annotations

from launch.render.cluster import Cluster
from launch.render.secrets import needed_secrets
from orchestrator.config.printing import one_line


def readme(cluster: Cluster, apply: str) -> str:
    """Return the page; `apply` is the command that applies the folder."""
    return "\n".join([*_lines(cluster, apply), ""])


def _lines(cluster: Cluster, apply: str) -> list[str]:
    space = cluster.options.namespace
    models = ", ".join(one_line(model.name) for model in cluster.config.models)
    return [
        f"# {cluster.name}",
        "",
        f"Orchestrators and workers of: {models}",
        "",
        "```sh",
        *(secret.command for secret in needed_secrets(cluster)),
        apply,
        f"kubectl -n {space} rollout status deployment/{cluster.name}-orchestrator",
        f"kubectl -n {space} port-forward service/{cluster.name} 8000:{cluster.listen_port}",
        "```",
    ]
