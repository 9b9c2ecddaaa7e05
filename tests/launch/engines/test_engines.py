from __future__ import annotations

from typing import get_args

from launch.engines import ENGINES
from orchestrator.config.options import PoolConfig


def test_the_config_allows_exactly_the_engines_that_there_are() -> None:
    assert set(get_args(PoolConfig.model_fields["engine"].annotation)) == ENGINES.keys()
