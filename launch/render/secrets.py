"""Secrets are never rendered: it is said which there must be, and how they are made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from launch.render.cluster import Cluster


@dataclass(frozen=True, slots=True)
class NeededSecret:
    """Pods do not start without this Secret."""

    name: str
    command: str  # makes it


def needed_secrets(cluster: Cluster) -> Iterator[NeededSecret]:
    """Yield the Secrets that pods refer to, each once."""
    seen: set[str] = set()
    for secret in _all(cluster):
        if secret.name not in seen:
            seen.add(secret.name)
            yield secret


def _all(cluster: Cluster) -> Iterator[NeededSecret]:
    given, orchestrator = cluster.options.secrets, cluster.config.orchestrator
    if given.worker_key is not None:
        yield _generic(cluster, given.worker_key, '--from-literal=key="$(openssl rand -hex 32)"')
    if cluster.api_keys_secret is not None:
        file = shlex.quote(orchestrator.api_keys_file or "KEYS")
        yield _generic(cluster, cluster.api_keys_secret, f"--from-file=keys={file}")
        if cluster.options.monitoring:
            yield _generic(cluster, given.metrics_key, '--from-literal=key="$METRICS_KEY"')
    if orchestrator.tls is not None:
        pair = f"--cert={shlex.quote(orchestrator.tls.cert)} --key={shlex.quote(orchestrator.tls.key)}"
        yield NeededSecret(given.tls, f"{_create(cluster)} tls {given.tls} {pair}")
    if given.hf_token is not None:
        yield _generic(cluster, given.hf_token, '--from-literal=token="$HF_TOKEN"')
    for pod in (cluster.options.worker_pod, cluster.options.orchestrator_pod):
        for variable, place in pod.secret_env.items():
            name, _, key = place.partition("/")
            yield _generic(cluster, name, f'--from-literal={key}="${variable}"')
    for name in cluster.options.pull.secrets:
        yield NeededSecret(
            name, f"{_create(cluster)} docker-registry {name} --from-file=$HOME/.docker/config.json"
        )


def _create(cluster: Cluster) -> str:
    return f"kubectl -n {cluster.options.namespace} create secret"


def _generic(cluster: Cluster, name: str, content: str) -> NeededSecret:
    return NeededSecret(name, f"{_create(cluster)} generic {name} {content}")
