from __future__ import annotations

from pathlib import Path
from random import Random

from orchestrator.config.options import LimitsConfig, OrchestratorConfig
from orchestrator.http.limits import ServerLimits
from orchestrator.http.listeners import uvicorn_config
from tests.orchestrator.raw_http import (
    app_of,
    echo,
    logs_errors,
    no_errors_logged,
    run,
)

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures


def test_what_uvicorn_is_told(tmp_path: Path) -> None:
    limits = LimitsConfig(header_timeout_s=1, body_idle_timeout_s=2, body_timeout_s=3, max_body_bytes=4096)
    options = OrchestratorConfig(
        listen="[::1]:8000",
        limits=limits,
        backlog=5,
        limit_concurrency=6,
        limit_max_requests=7,
        limit_max_requests_jitter=8,
        timeout_keep_alive=9,
        timeout_graceful_shutdown=10,
    )
    config = uvicorn_config(app_of(echo), options, random=Random(1), listen="127.0.0.1:1")
    assert (config.host, config.port) == ("127.0.0.1", 1)
    assert 7 <= (config.limit_max_requests or 0) <= 15
    assert config.backlog == 5
    assert config.timeout_keep_alive == 9
    assert config.timeout_graceful_shutdown == 10
    bounds = ServerLimits.of(options)
    assert (bounds.header_timeout_s, bounds.body_idle_timeout_s, bounds.body_timeout_s) == (1, 2, 3)
    assert (bounds.max_body_bytes, bounds.limit_concurrency) == (4096, 6)
