"""Engines, by the name that the config gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from launch.engines.base import Start, Worker
from launch.engines.sim import _sim
from launch.engines.vllm import _vllm

ENGINES: Mapping[str, Callable[[Worker], Start]] = {"vllm": _vllm, "sim": _sim}
