from __future__ import annotations

from typing import get_args

from launch.backends import BACKENDS
from orchestrator.config.options import LaunchConfig


def test_the_config_allows_exactly_the_backends_that_there_are() -> None:
    assert set(get_args(LaunchConfig.model_fields["backend"].annotation)) == BACKENDS.keys()
