"""Backends are listed here by the name that the config gives them."""

from __future__ import annotations

from collections.abc import Mapping

from launch.backends.base import Backend
from launch.backends.local import Local
from launch.backends.ray.backend import RayBackend

BACKENDS: Mapping[str, type[Backend]] = {"local": Local, "ray": RayBackend}
