"""Traced requests become spans, which OpenTelemetry's SDK sends to a collector (OTLP over HTTP).

The SDK is imported where tracing is on, and nowhere else. Spans are made of records after their requests have
ended, in the batches of the access log, so that a request that is not sampled costs the choice alone.

Names of attributes are those of OpenTelemetry's conventions for generative AI, and `gen_ai.latency.*`, which
vLLM's own spans have.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterable, Sequence
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

from orchestrator.config.options import TracingConfig
from orchestrator.errors import StartError
from orchestrator.telemetry.record import ONE_ATTEMPT, Path, RequestRecord
from orchestrator.wire.trace import TraceContext, continued
from orchestrator.wire.usage import Kv

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

PATH: Final = "/v1/traces"  # of OTLP, below the endpoint
CLOSE_S: Final = 3.0  # for the last spans, when the process ends

_EXPORT_S: Final = 5.0  # for one request to the collector

MISSING: Final = "tracing needs OpenTelemetry's SDK: pip install 'baton-serve[otel]'"

# What the conventions call the operations that they know. Others are named by the end of their path.
_OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
}


class Tracing:
    """It gives requests their place in a trace, and makes spans of those that are sampled."""

    def __init__(
        self,
        config: TracingConfig,
        models: Sequence[str],
        rng: random.Random,
        exporter: SpanExporter | None = None,
    ) -> None:
        """`exporter` is that of the config's endpoint unless given. Raises `StartError` if the SDK is
        missing.
        """
        self._models = models
        self._random = rng
        self._share = config.sample
        try:
            self._spans = _Spans(config, exporter)
        except ImportError as error:
            raise StartError(f"orchestrator.tracing: {MISSING}") from error

    def begin(self, fields: Sequence[tuple[bytes, bytes]]) -> TraceContext:
        """Return the span of a request that came with these header fields."""
        return continued(fields, self._random.getrandbits, self._is_sampled)

    def note(self, records: Iterable[RequestRecord], offset: float) -> None:
        """Make spans of the sampled ones. `offset` makes moments seconds since 1970."""
        for record in records:
            trace = record.trace
            if trace is not None and trace.is_sampled:
                self._spans.make(record, trace, self._model(record), offset)

    async def aclose(self) -> None:
        """Send what is left, unless that takes too long: then it is lost."""
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def close() -> None:
            self._spans.close()
            with contextlib.suppress(RuntimeError):  # nobody has waited so long
                loop.call_soon_threadsafe(closed.set)

        Thread(target=close, name="baton-tracing", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(closed.wait(), CLOSE_S)

    def _is_sampled(self) -> bool:
        return self._random.random() < self._share

    def _model(self, record: RequestRecord) -> str | None:
        return self._models[record.model_index] if record.model_index >= 0 else None


class _Spans:
    """The spans of records, and the SDK that sends them from a thread of its own."""

    def __init__(self, config: TracingConfig, exporter: SpanExporter | None) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        self._api: Any = trace
        self._ids = _ids()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # it is asked about sampled ones only
            resource=Resource.create({"service.name": config.service_name}),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _exporter(config)))
        self._tracer: Tracer = self._provider.get_tracer("baton")

    def close(self) -> None:
        self._provider.shutdown()

    def make(self, record: RequestRecord, trace: TraceContext, model: str | None, offset: float) -> None:
        operation = _OPERATIONS.get(record.endpoint) or record.endpoint.rpartition("/")[2]
        self._ids.trace, self._ids.span = trace.trace, trace.span
        span = self._tracer.start_span(
            f"{operation} {model}" if model else operation,
            context=self._parent(trace),
            kind=self._api.SpanKind.SERVER,
            attributes=_attributes(record, operation, model),
            start_time=_ns(record.received, offset),
        )
        self._ids.span = 0
        if record.error_code is not None:
            span.set_attribute("error.type", record.error_code)
        if record.status >= 500 or (record.error_code is not None and record.status == 200):
            span.set_status(self._api.StatusCode.ERROR)
        inside = self._api.set_span_in_context(span)
        for name, start, end, worker in _stages(record):
            self._stage(name, inside, (_ns(start, offset), _ns(end, offset)), worker)
        if record.first_byte:
            span.add_event("first_byte", timestamp=_ns(record.first_byte, offset))
        span.end(_ns(record.finished, offset))

    def _parent(self, trace: TraceContext) -> Context:
        api = self._api
        if not trace.parent:
            return api.set_span_in_context(api.INVALID_SPAN)  # type: ignore[no-any-return]
        flags, text = api.TraceFlags(api.TraceFlags.SAMPLED), trace.state.decode("latin-1")
        state = api.TraceState.from_header([text]) if text else None
        client = api.SpanContext(trace.trace, trace.parent, True, flags, state)
        return api.set_span_in_context(api.NonRecordingSpan(client))  # type: ignore[no-any-return]

    def _stage(self, name: str, inside: Context, ns: tuple[int, int], worker: str | None) -> None:
        attributes = {"baton.worker": worker} if worker else None
        self._tracer.start_span(name, context=inside, attributes=attributes, start_time=ns[0]).end(ns[1])


def _ids() -> Any:
    from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator

    class Ids(IdGenerator):
        """It hands out the ids that the workers were told, and random ones where none is set."""

        trace = 0
        span = 0
        random = RandomIdGenerator()

        def generate_trace_id(self) -> int:
            return self.trace

        def generate_span_id(self) -> int:
            return self.span or self.random.generate_span_id()

    return Ids()


def _exporter(config: TracingConfig) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=config.endpoint.rstrip("/") + PATH, timeout=_EXPORT_S)


def _attributes(record: RequestRecord, operation: str, model: str | None) -> dict[str, Any]:
    """Return what is known of the request; there is nothing of its text in it."""
    queue_s, _, _, total_s = record.stages()
    attempts = record.attempts or ONE_ATTEMPT
    known = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": model,
        "gen_ai.request.stream": record.is_stream,
        "gen_ai.latency.e2e": total_s,
        "gen_ai.latency.time_in_queue": queue_s if queue_s >= 0 else None,
        "gen_ai.latency.time_to_first_token": _first_byte_s(record),
        "http.response.status_code": record.status,
        "url.path": record.endpoint,
        "baton.request_id": record.request_id,
        "baton.key": record.client,
        "baton.path": None if record.path is Path.NONE else record.path.name.lower(),
        "baton.kv": None if record.kv is Kv.NONE else record.kv.name.lower(),
        "baton.prefill_worker": record.prefill_worker,
        "baton.decode_worker": record.decode_worker,
        "baton.attempts": attempts.count if record.admitted else 0,
        "baton.failed_attempts": [str(attempt) for attempt in attempts.failed] or None,
    }
    return {name: value for name, value in known.items() if value is not None}


def _first_byte_s(record: RequestRecord) -> float | None:
    is_answer = record.is_stream and record.first_byte and record.status < 400
    return record.first_byte - record.received if is_answer else None


def _stages(record: RequestRecord) -> Iterable[tuple[str, float, float, str | None]]:
    """Return the stages that a request came to, as name, start, end and worker. The last one it came to lasts
    until its end.
    """
    admitted, prefilled, finished = record.admitted, record.prefill_done, record.finished
    yield "queue", record.received, admitted or finished, None
    if admitted and record.prefill_worker:
        yield "prefill", admitted, prefilled or finished, record.prefill_worker
    if prefilled or (admitted and not record.prefill_worker):
        yield "decode", prefilled or admitted, finished, record.decode_worker


def _ns(moment: float, offset: float) -> int:
    return int((moment + offset) * 1e9)
