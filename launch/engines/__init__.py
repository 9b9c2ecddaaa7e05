"""Engines are listed here by the name that the config gives them."""

from __future__ import annotations

from collections.abc import Mapping

from launch.engines.base import Engine
from launch.engines.sim import Sim
from launch.engines.vllm import VLLM

ENGINES: Mapping[str, Engine] = {"vllm": VLLM(), "sim": Sim()}
