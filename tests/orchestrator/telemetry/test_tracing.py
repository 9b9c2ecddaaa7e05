"""Spans of requests: where they stand in the client's trace, what they say, that a collector gets them."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path as FilePath
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from bench.shared.processes import free_port
from orchestrator.config import checks
from orchestrator.config.file import ConfigErrors, load_config
from orchestrator.config.options import TracingConfig
from orchestrator.errors import StartError
from orchestrator.telemetry.record import Attempts, FailedAttempt, RequestRecord
from orchestrator.telemetry.tracing import Tracing
from orchestrator.wire.trace import TRACEPARENT, TRACESTATE
from tests.orchestrator.fakes import FakeCluster, FakeExchange
from tests.orchestrator.records import ANSWERED, request_record
from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, simulated
from tests.waiting import wait_for

TRACE, SPAN = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
PARENT = b"00-%032x-%016x-01" % (TRACE, SPAN)
UNSAMPLED = PARENT[:-1] + b"0"


class Traced:
    """A `Tracing` whose spans stay here."""

    def __init__(self, sample: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        config = TracingConfig(endpoint="http://127.0.0.1:4318", sample=sample)
        self.tracing = Tracing(config, [MODEL], random.Random(7), self.exporter)

    def spans(self, record: RequestRecord, *fields: tuple[bytes, bytes]) -> dict[str, ReadableSpan]:
        """Return the spans of this record of a request with these fields, by name."""
        record.trace = self.tracing.begin(fields)
        self.tracing.note([record], 1_000.0)
        asyncio.run(self.tracing.aclose())
        return {span.name: span for span in self.exporter.get_finished_spans()}


def answered(**fields: Any) -> RequestRecord:
    known = {"prefill_worker": "m/prefill/0", "decode_worker": "m/decode/1", "model_index": 0}
    return request_record(**{**ANSWERED, **known, **fields})


# --- the place in a trace -----------------------------------------------------------------------


def test_a_clients_trace_is_continued() -> None:
    spans = Traced(0.0).spans(answered(), (TRACEPARENT, PARENT), (TRACESTATE, b"a=1"), (TRACESTATE, b"b=2"))
    request = spans[f"chat {MODEL}"]
    assert request.context is not None
    assert request.parent is not None
    assert (request.context.trace_id, request.parent.span_id) == (TRACE, SPAN)
    assert request.parent.trace_state.to_header() == "a=1,b=2"
    assert request.kind is SpanKind.SERVER


def test_a_request_without_one_begins_a_trace() -> None:
    request = Traced().spans(answered())[f"chat {MODEL}"]
    assert request.parent is None


def test_what_the_client_does_not_trace_is_not_traced() -> None:
    assert not Traced(1.0).spans(answered(), (TRACEPARENT, UNSAMPLED))


def test_a_broken_trace_is_none() -> None:
    request = Traced().spans(answered(), (TRACEPARENT, PARENT + b"x"), (TRACESTATE, b"a=1"))[f"chat {MODEL}"]
    assert request.parent is None
    assert request.context is not None
    assert request.context.trace_id != TRACE


def test_a_share_of_the_others_is_traced() -> None:
    begin = Traced(0.25).tracing.begin
    assert 200 < sum(begin([]).is_sampled for _ in range(1000)) < 300


# --- what spans say -----------------------------------------------------------------------------


def test_the_stages_are_spans_within_that_of_the_request() -> None:
    spans = Traced().spans(answered())
    request = spans[f"chat {MODEL}"]
    assert request.context is not None
    times = {name: (span.start_time, span.end_time) for name, span in spans.items()}
    at = {name: int((1_000.0 + moment) * 1e9) for name, moment in ANSWERED.items() if type(moment) is float}
    assert times == {
        f"chat {MODEL}": (at["received"], at["finished"]),
        "queue": (at["received"], at["admitted"]),
        "prefill": (at["admitted"], at["prefill_done"]),
        "decode": (at["prefill_done"], at["finished"]),
    }
    for name in ("queue", "prefill", "decode"):
        stage = spans[name]
        assert stage.parent is not None
        assert stage.parent.span_id == request.context.span_id
    workers = [(spans[name].attributes or {}).get("baton.worker") for name in ("queue", "prefill", "decode")]
    assert workers == [None, "m/prefill/0", "m/decode/1"]
    assert [(event.name, event.timestamp) for event in request.events] == [("first_byte", at["first_byte"])]


def test_attributes_have_the_names_of_the_conventions() -> None:
    failed = [FailedAttempt("m/prefill/1", "silent", 3.1)]
    record = answered(is_stream=True, client="alice", attempts=Attempts(failed, 2))
    request = Traced().spans(record)[f"chat {MODEL}"]
    assert dict(request.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.stream": True,
        "gen_ai.latency.e2e": 5.0,
        "gen_ai.latency.time_in_queue": 0.5,
        "gen_ai.latency.time_to_first_token": 1.75,
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "baton.request_id": "req-1",
        "baton.key": "alice",
        "baton.path": "disaggregated",
        "baton.kv": "transferred",
        "baton.prefill_worker": "m/prefill/0",
        "baton.decode_worker": "m/decode/1",
        "baton.attempts": 2,
        "baton.failed_attempts": ("m/prefill/1:silent:3.1s",),
    }
    assert request.status.status_code is StatusCode.UNSET
    assert request.resource.attributes["service.name"] == "baton"


@pytest.mark.parametrize(
    ("fields", "is_error"),
    [
        ({"status": 503, "error_code": "unavailable"}, True),
        ({"status": 200, "error_code": "worker_error"}, True),  # behind the head of a stream
        ({"status": 400, "error_code": "invalid_request"}, False),  # the client's own
    ],
)
def test_an_error_is_named(fields: dict[str, Any], is_error: bool) -> None:
    request = Traced().spans(answered(**fields))[f"chat {MODEL}"]
    assert (request.attributes or {})["error.type"] == fields["error_code"]
    assert (request.status.status_code is StatusCode.ERROR) is is_error


def test_a_request_that_was_never_admitted_has_only_waited() -> None:
    record = request_record(endpoint="/v1/rerank", received=1.0, finished=2.0, status=429, error_code="full")
    assert set(Traced().spans(record)) == {"rerank", "queue"}


def test_the_prefill_that_a_request_ended_in_is_its_last_stage() -> None:
    spans = Traced().spans(answered(prefill_done=0.0, first_byte=0.0, status=499, error_code="client_gone"))
    assert set(spans) == {f"chat {MODEL}", "queue", "prefill"}
    assert spans["prefill"].end_time == spans[f"chat {MODEL}"].end_time


# --- through the relay --------------------------------------------------------------------------

CHAT = json.dumps({"model": "m", "messages": []}).encode()


def legs_of(*fields: tuple[bytes, bytes], tracing: Tracing | None) -> tuple[RequestRecord, list[list[Any]]]:
    """Return the record of a request with these fields, and those of a trace that each leg had."""

    async def ask() -> tuple[RequestRecord, list[list[Any]]]:
        cluster = FakeCluster()
        cluster.plane.begin_trace = tracing and tracing.begin
        await cluster.serve(FakeExchange(CHAT, headers=fields))
        (record,), legs = cluster.telemetry.records, cluster.upstream.requests
        await cluster.aclose()
        names = (TRACEPARENT, TRACESTATE)
        return record, [[field for field in leg.headers if field[0] in names] for leg in legs]

    return asyncio.run(ask())


def test_both_legs_have_our_span_as_parent() -> None:
    state = (TRACESTATE, b"a=1")
    record, legs = legs_of((TRACEPARENT, UNSAMPLED), state, tracing=Traced().tracing)
    assert record.trace is not None
    parent = b"00-%032x-%016x-00" % (TRACE, record.trace.span)
    assert legs == [[(TRACEPARENT, parent), state]] * 2


def test_legs_of_a_new_trace_are_told_of_it() -> None:
    record, legs = legs_of((TRACEPARENT, b"broken"), tracing=Traced().tracing)
    assert record.trace is not None
    assert legs == [[(TRACEPARENT, b"00-%032x-%016x-01" % (record.trace.trace, record.trace.span))]] * 2


def test_without_tracing_the_clients_span_stays_the_parent() -> None:
    record, legs = legs_of((TRACEPARENT, PARENT), tracing=None)
    assert record.trace is None
    assert legs == [[(TRACEPARENT, PARENT)]] * 2


# --- the SDK ------------------------------------------------------------------------------------


def test_a_missing_sdk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartError, match=r"pip install 'baton-serve\[otel\]'"):
        Traced()


@pytest.mark.processes
def test_it_is_imported_only_where_requests_are_traced() -> None:
    code = "import sys, orchestrator.run; assert not [m for m in sys.modules if 'opentelemetry.sdk' in m]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class Collector:
    """A collector that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.is_ill = False
        kept = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                kept.take(self.path, gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(400 if kept.is_ill else 200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        for found in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {item.key: item.value.string_value for item in found.resource.attributes}
            self.services.add(names["service.name"])
            self.spans += [span for scope in found.scope_spans for span in scope.spans]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode") as found:
        yield found


@pytest.mark.processes
def test_a_collector_gets_the_spans_of_all_processes(
    workers: list[SimWorker], collector: Collector, tmp_path: FilePath
) -> None:
    orchestrator = traced_orchestrator(tmp_path, workers, collector.url)
    try:
        orchestrator.wait_ready()
        for client in orchestrator.client_of_each():
            assert ask(client, traceparent=PARENT.decode()) == 200
        wait_for(lambda: len(collector.spans) == 8, "four spans each")
        assert {span.trace_id for span in collector.spans} == {TRACE.to_bytes(16)}
        requests = [span for span in collector.spans if span.parent_span_id == SPAN.to_bytes(8)]
        assert [span.name for span in requests] == [f"text_completion {MODEL}"] * 2
        assert len({span.span_id for span in collector.spans}) == 8
        assert collector.services == {"here"}
    finally:
        orchestrator.clean_up()


@pytest.mark.processes
def test_the_last_spans_are_sent_when_the_process_ends(
    workers: list[SimWorker], collector: Collector, tmp_path: FilePath
) -> None:
    delay = {"OTEL_BSP_SCHEDULE_DELAY": "3600000"}
    orchestrator = traced_orchestrator(tmp_path, workers, collector.url, delay)
    try:
        orchestrator.wait_ready()
        assert ask(orchestrator.client(), traceparent=PARENT.decode()) == 200
        orchestrator.signal(signal.SIGTERM)
        orchestrator.wait_exit()
        assert len(collector.spans) == 4
    finally:
        orchestrator.clean_up()


@pytest.mark.processes
@pytest.mark.parametrize("is_there", [True, False])
def test_a_collector_that_is_ill_or_away_harms_no_request(
    workers: list[SimWorker], collector: Collector, tmp_path: FilePath, is_there: bool
) -> None:
    collector.is_ill = True
    url = collector.url if is_there else f"http://127.0.0.1:{free_port()}"
    orchestrator = traced_orchestrator(tmp_path, workers, url)
    try:
        orchestrator.wait_ready()
        for _ in range(5):
            assert ask(orchestrator.client(), traceparent=PARENT.decode()) == 200
        wait_for(lambda: "opentelemetry" in orchestrator.lines, "a line that says so")
        orchestrator.signal(signal.SIGTERM)
        orchestrator.wait_exit()
        assert "Traceback" not in orchestrator.lines
    finally:
        orchestrator.clean_up()


def traced_orchestrator(
    tmp_path: FilePath, workers: list[SimWorker], url: str, env: Mapping[str, str] | None = None
) -> Orchestrator:
    tracing = {"endpoint": url, "service_name": "here"}
    env = {"OTEL_BSP_SCHEDULE_DELAY": "100", **(env or {})}
    return Orchestrator(tmp_path, workers, tracing=tracing, env=env)


def ask(client: httpx.Client, **headers: str) -> int:
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 3}
    return client.post("/v1/completions", json=body, headers=headers).status_code


# --- the config ---------------------------------------------------------------------------------


def config_with(tmp_path: FilePath, **tracing: Any) -> str:
    path = tmp_path / "config.yaml"
    models = [{"name": "m", "both": {"urls": ["http://127.0.0.1:1"]}}]
    path.write_text(json.dumps({"orchestrator": {"tracing": tracing}, "models": models}))
    return str(path)


@pytest.mark.parametrize("url", ["https://here", "http://[::1]:4318", "http://here:4318/otlp/"])
def test_a_collector_may_be_anywhere(tmp_path: FilePath, url: str) -> None:
    tracing = load_config(config_with(tmp_path, endpoint=url)).orchestrator.tracing
    assert tracing is not None
    assert tracing.endpoint == url


@pytest.mark.parametrize(
    "url", ["", "here:4318", "ftp://here", "http://:4318", "http://a:b@here", "http://h?k=1"]
)
def test_what_is_no_collector_is_refused(tmp_path: FilePath, url: str) -> None:
    with pytest.raises(ConfigErrors, match=r"config\.yaml:1:\d+: endpoint: (expected http|name the host)"):
        load_config(config_with(tmp_path, endpoint=url))


def test_a_config_that_traces_wants_the_sdk(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_TRACING_MODULE", "opentelemetry_is_not.there")
    with pytest.raises(ConfigErrors, match=r"pip install 'baton-serve\[otel\]'"):
        load_config(config_with(tmp_path, endpoint="http://here"))
