"""A config can be rendered for these targets.

A new one is one file beside this one, one entry here, and its name in `options.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from launch.render.cluster import Cluster
from launch.render.helm import helm_files
from launch.render.kubernetes import kubernetes_files

Files = Mapping[str, str]  # by their paths in the folder

TARGETS: Mapping[str, Callable[[Cluster], Files]] = {"kubernetes": kubernetes_files, "helm": helm_files}
