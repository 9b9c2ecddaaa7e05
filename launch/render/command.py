"""`baton render TARGET CONFIG -o DIR` writes what brings the config to another place than this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from launch.exits import Exit
from launch.render.cluster import Cluster, is_rendered, make_cluster
from launch.render.errors import RenderError
from launch.render.folder import write
from launch.render.secrets import needed_secrets
from launch.render.targets import TARGETS
from orchestrator.config.options import Config
from orchestrator.config.printing import counted, one_line


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Write the folder and say what else is needed. Raises `RenderError`; then nothing was written."""
    cluster = make_cluster(config)
    files = TARGETS[arguments.target](cluster)
    if not arguments.output:
        raise RenderError("-o names no folder")
    folder = Path(arguments.output)
    try:
        others = write(folder, files, force=arguments.force)
    except OSError as error:
        print(
            one_line(f"cannot write {error.filename or folder}: {error.strerror or error}"), file=sys.stderr
        )
        return Exit.FAILED
    for note in _notes(cluster, others):
        print(one_line(f"note: {note}"), file=sys.stderr)
    print(one_line(f"{folder}: {counted(len(files), 'file')}; README.md has the commands"))
    return Exit.OK


def _notes(cluster: Cluster, others: list[str]) -> Iterator[str]:
    """Yield what the user should know of what was written."""
    secrets = ", ".join(secret.name for secret in needed_secrets(cluster))
    if secrets:
        yield f"these Secrets must be there: {secrets}"
    for model in cluster.config.models:
        for role, pool in model.pools():
            if not is_rendered(pool):
                yield f"the workers of {model.name}/{role} run elsewhere: nothing is rendered for them"
    if cluster.config.orchestrator.log.decisions is not None:
        yield "orchestrator.log.decisions is left out: a pod's disk ends with it"
    if others:
        yield f"these files in the folder are not of baton render, and are left alone: {', '.join(others)}"
