import asyncio
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.config.addresses import WorkerAddress
from orchestrator.config.options import Config
from orchestrator.control.metrics import (
    BatonCollector,
    Sources,
    process_collector,
    render,
    unknown_label,
)
from orchestrator.control.state import ProcessEnd, ProcessState, ProcessStatus
from orchestrator.telemetry.answers import AnswerWriter
from orchestrator.telemetry.catalog import METRICS, PROCESS_METRICS, Kind
from orchestrator.telemetry.counters import FallbackReason, Layout, RetryReason, Telemetry
from orchestrator.transport.base import UpstreamStats
from orchestrator.wire.info import Role
from orchestrator.wire.shapes import AnswerUsage
from orchestrator.wire.usage import Kv
from orchestrator.workers.snapshot import WorkerStatus
from orchestrator.workers.states import WorkerState
from tests.orchestrator.records import request_record

CHAT = "/v1/chat/completions"
CONFIG = Config.model_validate(
    {
        "models": [
            {"name": "tiny", "path": "p", "prefill": {"replicas": 1}, "decode": {"replicas": 2}},
            {"name": "large", "path": "p", "both": {"replicas": 1}},
        ]
    }
)


def worker(name: str, role: Role, state: WorkerState, in_flight: int = 0) -> WorkerStatus:
    address = WorkerAddress(name, "tiny", "tiny", role, "http://h:1", "h", 1, None, False)
    return WorkerStatus(address, state, in_flight, None, None, None)


WORKERS = [
    worker("tiny/prefill/0", "prefill", WorkerState.READY),
    worker("tiny/decode/0", "decode", WorkerState.READY, in_flight=3),
    worker("tiny/decode/1", "decode", WorkerState.GONE),
]


def scrape(
    telemetry: Telemetry,
    config: Config = CONFIG,
    workers: Sequence[WorkerStatus] = WORKERS,
    processes: Sequence[ProcessStatus] = (),
    events: Mapping[str, int] | None = None,
    not_after: float | None = None,
) -> dict[str, Metric]:
    sources = Sources(
        telemetry.layout,
        lambda: telemetry.row,
        lambda: workers,
        lambda: UpstreamStats(idle=4, busy=2, connects=9, reuses=30, retries=1),
        lambda: processes,
        lambda: {ProcessEnd.DIED: 2},
        lambda: {
            "version": "1",
            "transport": "orjson",
            "event_loop": "uvloop",
            "http_parser": "httptools",
        },
        events=lambda: events or {},
        not_after=lambda: not_after,
    )
    text = asyncio.run(render([BatonCollector(config, sources), process_collector()])).decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def telemetry_of(config: Config = CONFIG) -> Telemetry:
    return Telemetry(Layout([model.name for model in config.models], [CHAT]))


def value(families: dict[str, Metric], family: str, sample: str, **labels: str) -> float:
    [found] = [s.value for s in families[family].samples if s.name == sample and s.labels == labels]
    return found


def series(families: dict[str, Metric]) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in families.values()
        for sample in family.samples
    }


def run_one_request(telemetry: Telemetry) -> None:
    record = request_record(
        "r",
        CHAT,
        1.0,
        admitted=1.25,
        prefill_done=2.0,
        first_byte=2.5,
        finished=4.0,
        model_index=0,
        status=200,
        kv=Kv.TRANSFERRED,
        error_code="worker_cut_short",
    )
    telemetry.begin(record)
    telemetry.finish(record)


def test_every_series_is_there_before_the_first_request() -> None:
    telemetry = telemetry_of()
    before = series(scrape(telemetry))
    run_one_request(telemetry)
    telemetry.finish(request_record("r", "/odd", 0.0, status=418, error_code="odd"))
    telemetry.transport_fallback(FallbackReason.TOO_LARGE)
    telemetry.retry(RetryReason.PREFILL)
    telemetry.loop_lag(3.0)
    assert series(scrape(telemetry)) == before


def test_the_families_have_the_promised_names() -> None:
    names = set(scrape(telemetry_of()))
    assert names >= {
        "baton_info",
        "baton_requests",
        "baton_requests_in_flight",
        "baton_request_stage_seconds",
        "baton_errors",
        "baton_kv_transfers",
        "baton_transport_fallbacks",
        "baton_upstream_retries",
        "baton_queue_requests",
        "baton_queue_tokens",
        "baton_queue_bytes",
        "baton_held_bytes",
        "baton_requests_rejected",
        "baton_poison_requests",
        "baton_event_loop_lag_seconds",
        "baton_workers",
        "baton_worker_in_flight",
        "baton_upstream_connections",
        "baton_upstream_connects",
    }


def test_a_request_shows_in_counters_and_histograms() -> None:
    telemetry = telemetry_of()
    run_one_request(telemetry)
    families = scrape(telemetry)
    labels = {"model": "tiny", "endpoint": CHAT, "code": "200"}
    assert value(families, "baton_requests", "baton_requests_total", **labels) == 1
    assert value(families, "baton_errors", "baton_errors_total", code="worker_cut_short") == 1
    assert value(families, "baton_kv_transfers", "baton_kv_transfers_total", outcome="transferred") == 1
    assert value(families, "baton_requests_in_flight", "baton_requests_in_flight", model="tiny") == 0
    for stage, seconds in {"queue": 0.25, "prefill": 0.75, "decode_first_byte": 0.5}.items():
        assert_observed(families, "baton_request_stage_seconds", seconds, model="tiny", stage=stage)
    assert_observed(families, "baton_request_duration_seconds", 3.0, model="tiny")


def assert_observed(families: dict[str, Metric], name: str, seconds: float, **labels: str) -> None:
    """Once."""
    assert value(families, name, f"{name}_count", **labels) == 1
    assert value(families, name, f"{name}_sum", **labels) == pytest.approx(seconds)
    assert value(families, name, f"{name}_bucket", **labels, le="+Inf") == 1


def test_the_total_is_no_stage() -> None:
    samples = scrape(telemetry_of())["baton_request_stage_seconds"].samples
    assert {sample.labels["stage"] for sample in samples} == {"queue", "prefill", "decode_first_byte"}


def test_an_answer_shows_as_tokens_and_times() -> None:
    telemetry = telemetry_of()
    record = request_record(
        "r", CHAT, 1.0, admitted=1.25, first_byte=2.5, finished=4.5, model_index=0, status=200, is_stream=True
    )
    record.usage = AnswerUsage(21, 5)
    AnswerWriter(telemetry.layout, telemetry.row).note([record])
    families = scrape(telemetry)
    assert value(families, "baton_prompt_tokens", "baton_prompt_tokens_total", model="tiny") == 21
    assert value(families, "baton_generation_tokens", "baton_generation_tokens_total", model="tiny") == 5
    assert_observed(families, "baton_time_to_first_token_seconds", 1.5, model="tiny")
    assert_observed(families, "baton_inter_token_latency_seconds", 0.5, model="tiny")


def test_what_is_rendered_is_what_the_catalog_declares() -> None:
    families = scrape(telemetry_of())
    for metric in (*METRICS, *PROCESS_METRICS):
        family = families.pop(metric.name.removesuffix("_total"))
        assert family.type == ("gauge" if metric.kind is Kind.INFO else metric.kind), metric.name
        assert family.documentation == metric.help or metric in PROCESS_METRICS
        for sample in () if metric.kind is Kind.INFO else family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), metric.name
        if metric.kind is Kind.HISTOGRAM:
            bounds = {s.labels["le"] for s in family.samples if s.name.endswith("_bucket")}
            assert bounds <= {*map(str, metric.bounds), "+Inf"}
    assert not families


def test_no_label_is_empty() -> None:
    families = scrape(telemetry_of())
    labels = [label for family in families.values() for s in family.samples for label in s.labels.values()]
    assert "unknown" in labels
    assert "" not in labels


def test_a_model_may_be_called_unknown() -> None:
    assert unknown_label(["tiny", ""]) == "unknown"
    assert unknown_label(["unknown", "_unknown", ""]) == "__unknown"


def test_buckets_are_cumulative_and_complete() -> None:
    telemetry = telemetry_of()
    for lag in (0.0005, 0.001, 0.004, 7.0):
        telemetry.loop_lag(lag)
    samples = scrape(telemetry)["baton_event_loop_lag_seconds"].samples
    buckets = {s.labels["le"]: s.value for s in samples if s.name.endswith("_bucket")}
    assert (buckets["0.001"], buckets["0.005"], buckets["1.0"], buckets["+Inf"]) == (2, 3, 3, 4)
    assert list(buckets.values()) == sorted(buckets.values())


def test_workers_are_counted_by_state_and_named() -> None:
    families = scrape(telemetry_of())
    states = {
        (role, state): value(families, "baton_workers", "baton_workers", model=model, role=role, state=state)
        for model, role in (("tiny", "prefill"), ("tiny", "decode"), ("large", "both"))
        for state in ("starting", "ready", "gone")
    }
    assert {key: count for key, count in states.items() if count} == {
        ("prefill", "ready"): 1,
        ("decode", "ready"): 1,
        ("decode", "gone"): 1,
    }
    labels = {"model": "tiny", "role": "decode", "worker": "tiny/decode/0"}
    assert value(families, "baton_worker_in_flight", "baton_worker_in_flight", **labels) == 3
    labels = {"model": "tiny", "role": "decode", "worker": "tiny/decode/1"}
    states = [s for s in families["baton_worker_state"].samples if labels.items() <= s.labels.items()]
    assert [s.labels["state"] for s in states if s.value] == ["gone"]
    assert len(states) == len(WorkerState)


def test_reloads_and_the_end_of_the_certificate_are_told() -> None:
    telemetry = telemetry_of()
    events = {"admin.reload": 3, "worker.gone": 9}
    families = scrape(telemetry, events=events, not_after=1.9e9)
    name = "baton_config_reloads"
    assert value(families, name, f"{name}_total", outcome="applied") == 3
    assert value(families, name, f"{name}_total", outcome="refused") == 0
    name = "baton_tls_certificate_not_after_seconds"
    assert value(families, name, name) == 1.9e9
    assert scrape(telemetry)[name].samples == []


def test_a_place_has_what_both_its_processes_serve() -> None:
    config = CONFIG.model_copy(
        update={"orchestrator": CONFIG.orchestrator.model_copy(update={"processes": 3})}
    )
    processes = [
        ProcessStatus(0, 71, ProcessState.RETIRING, 5),
        ProcessStatus(0, 73, ProcessState.SERVING, 2),
        ProcessStatus(1, 72, ProcessState.SERVING, 3),
    ]
    families = scrape(telemetry_of(), config, processes=processes)
    name = "baton_process_requests_in_flight"
    assert [value(families, name, name, process=str(index)) for index in range(3)] == [7, 3, 0]


def test_ends_of_processes_are_counted_by_reason() -> None:
    families = scrape(telemetry_of())
    name = "baton_process_ends"
    ends = {reason: value(families, name, f"{name}_total", reason=reason) for reason in ("recycled", "died")}
    assert ends == {"recycled": 0, "died": 2}


def test_connections_and_build_are_told() -> None:
    families = scrape(telemetry_of())
    name = "baton_upstream_connections"
    assert [value(families, name, name, state=state) for state in ("idle", "busy")] == [4, 2]
    assert value(families, "baton_upstream_reuses", "baton_upstream_reuses_total") == 30
    [info] = families["baton_info"].samples
    assert info.labels == {
        "version": "1",
        "transport": "orjson",
        "event_loop": "uvloop",
        "http_parser": "httptools",
    }


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1, max_size=20))
def test_any_model_name_survives_as_a_label(name: str) -> None:
    config = Config.model_validate({"models": [{"name": "x", "path": "p", "both": {}}]})
    config = config.model_copy(update={"models": [config.models[0].model_copy(update={"name": name})]})
    families = scrape(telemetry_of(config), config)
    labels = {sample.labels["model"] for sample in families["baton_requests_in_flight"].samples}
    assert labels == {name, unknown_label([name])}


def test_other_tasks_run_while_metrics_are_rendered() -> None:
    async def turns() -> int:
        count = 0

        async def tick() -> None:
            nonlocal count
            while True:
                count += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        telemetry = telemetry_of()
        sources = Sources(
            telemetry.layout,
            lambda: telemetry.row,
            lambda: WORKERS,
            lambda: UpstreamStats(0, 0, 0, 0, 0),
            tuple,
            dict,
            dict,
        )
        await render([BatonCollector(CONFIG, sources)])
        ticking.cancel()
        return count

    assert asyncio.run(turns()) > 10
