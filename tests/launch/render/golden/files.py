"""What is rendered of the two configs, and what it is to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from launch.render.cluster import Cluster, make_cluster
from launch.render.targets import TARGETS
from orchestrator.config.options import Config

FOLDER = Path(__file__).parent
NAMES: Mapping[str, str] = {"small": "kubernetes", "large": "helm"}  # configs, and for what they are rendered


def cluster(name: str) -> Cluster:
    return make_cluster(Config.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())))


def made(name: str, target: str | None = None) -> Mapping[str, str]:
    return TARGETS[target or NAMES[name]](cluster(name))


def expected(name: str) -> Mapping[str, str]:
    folder = FOLDER / name
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in paths}
