from __future__ import annotations

import pytest

from bench.shared.baton import baton, config, get, metrics, sim_pair, urls, wait_ready
from bench.shared.processes import Failed, free_port
from orchestrator.config.options import Config

pytestmark = pytest.mark.processes

PAGE = """\
# TYPE baton_requests_total counter
baton_requests_total{model="a"} 3
baton_requests_total{model="b"} 4
# TYPE baton_upstream_connections gauge
baton_upstream_connections{state="busy"} 2
baton_upstream_connections{state="idle"} 5
# TYPE baton_seconds summary
baton_seconds_sum 1
"""


def test_metrics_are_sums_of_what_is_busy() -> None:
    assert metrics(PAGE) == {"baton_requests": 7, "baton_upstream_connections": 2}


def test_a_config_is_one_that_baton_understands() -> None:
    document = config(8000, {"prefill": urls(1), "decode": {**urls(2, 3), "seats": 4}}, admin=None)
    understood = Config.model_validate(document)
    assert understood.orchestrator.listen == "127.0.0.1:8000"
    assert [pool.urls for _, pool in understood.models[0].pools()] == [
        ["http://127.0.0.1:1"],
        ["http://127.0.0.1:2", "http://127.0.0.1:3"],
    ]


def test_an_orchestrator_is_ready_between_simulated_workers() -> None:
    port = free_port()
    with sim_pair() as (prefill, decode):
        document = config(port, {"prefill": urls(prefill.port), "decode": urls(decode.port)}, admin=None)
        with baton("orchestrator", document, port) as process:
            wait_ready(port)
            assert process.url == f"http://127.0.0.1:{port}"
    with pytest.raises(Failed, match=f"/health on port {port}"):
        get(port, "/health")
