from __future__ import annotations

import pytest

from orchestrator.wire.load import LoadReport, load_header, read_metrics, read_report

PAGE = b"""# HELP vllm:num_requests_running Number.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
# HELP vllm:num_requests_waiting Number.
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25"""


def test_metrics_of_vllm_are_read() -> None:
    whole, second = read_metrics(PAGE), read_metrics(PAGE, rank=1)
    assert whole is not None
    assert second is not None
    assert (whole.running, whole.waiting, whole.kv) == (4, 2, 0.5)
    assert (second.running, second.waiting, second.kv) == (1, 2, 0.25)
    assert whole.others is None


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"vllm:num_requests_running",
        b'vllm:num_requests_running{engine="0"} x\nvllm:num_requests_waiting{engine="0"} 1\n',
        b'vllm:num_requests_running{engine="0"} NaN\nvllm:num_requests_waiting{engine="0"} 1\n',
        b'vllm:num_requests_running{engine="0"} -1\nvllm:num_requests_waiting{engine="0"} 1\n',
        b'vllm:num_requests_running{engine="0"} inf\nvllm:num_requests_waiting{engine="0"} 1\n',
        b'vllm:num_requests_running{engine="0"} 1',
        b"\n" * 100_000,
    ],
    ids=["empty", "name", "text", "nan", "negative", "infinite", "one", "lines"],
)
def test_other_pages_are_none(page: bytes) -> None:
    assert read_metrics(page) is None


def test_a_report_comes_with_the_status_that_goes_with_it() -> None:
    content = b'{"state":"serving","running":1,"waiting":0,"prompt_tokens":5,"later":[1]}'
    report = LoadReport(state="serving", running=1, waiting=0, prompt_tokens=5)
    assert read_report(200, content) == report
    assert read_report(503, content) is None
    assert read_report(503, content.replace(b"serving", b"draining")) is not None
    for garbage in (b"", b"[]", b"\xff", b"[" * 100_000, content.replace(b"1,", b"1.5,")):
        assert read_report(200, garbage) is None
    assert load_header(report) == b",1,0,5,0,,"
