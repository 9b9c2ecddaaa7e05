"""The catalog declares each metric once: `/metrics`, its documentation and the dashboard are made of it.

A new metric is one entry here and one reader in `control/readings.py`; tests fail while either is missing.
Alerts name the metrics of their expressions by these constants (`launch/monitoring/alerts.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from orchestrator.telemetry.counters import GAP_BOUNDS, LAG_BOUNDS, STAGE_BOUNDS
from orchestrator.telemetry.figures import BOUNDS

UNKNOWN: Final = "unknown"  # in place of an empty label, which PromQL takes for none at all


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"  # a gauge that is always 1, and says it all in its labels


class Group(StrEnum):
    """A chapter of the documentation, and a row of the dashboard."""

    REQUESTS = "Requests"
    LATENCY = "Latency"
    TOKENS = "Tokens"
    QUEUE = "Queue and memory"
    KEYS = "API keys"
    WORKERS = "Workers"
    KV = "KV cache"
    ORCHESTRATOR = "Orchestrator"


@dataclass(frozen=True, slots=True)
class Panel:
    """A metric is drawn on the panel of this title, as a line for each set of values of the labels `by`.

    Counters are drawn as rates, histograms as their median and 99th percentile.
    """

    title: str
    by: tuple[str, ...] = ()
    combine: str = "sum"  # how series become one line: sum, max or min
    only: str = ""  # matchers of labels: series that are drawn


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric is declared so."""

    group: Group
    kind: Kind
    name: str  # as queries have it, a counter's with `_total`
    help: str  # a sentence
    labels: tuple[str, ...] = ()
    unit: str = ""  # what one is, in the plural; "" where it is a number of its own kind
    bounds: tuple[float, ...] = ()  # of a histogram's buckets, inclusive, ascending
    panel: Panel | None = None  # None: it is on no panel


# Those of every series that belongs to one worker.
WORKER_LABELS: Final = ("model", "role", "worker")
_WORKER: Final = ("worker",)
_A = Group.KEYS
_R, _L, _T, _Q = Group.REQUESTS, Group.LATENCY, Group.TOKENS, Group.QUEUE
_W, _K, _O = Group.WORKERS, Group.KV, Group.ORCHESTRATOR
_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

# --- requests -----------------------------------------------------------------------------------

REQUESTS: Final = Metric(
    _R,
    _COUNTER,
    "baton_requests_total",
    "Requests that ended, by HTTP status.",
    ("model", "endpoint", "code"),
    "requests",
    panel=Panel("Requests per second", ("model", "code")),
)
REQUESTS_IN_FLIGHT: Final = Metric(
    _R,
    _GAUGE,
    "baton_requests_in_flight",
    "Requests that have not ended.",
    ("model",),
    "requests",
    panel=Panel("Requests in flight", ("model",)),
)
ERRORS: Final = Metric(
    _R,
    _COUNTER,
    "baton_errors_total",
    "Requests that ended in an error, by its code; also streams that failed after a 200.",
    ("code",),
    "requests",
    panel=Panel("Errors per second", ("code",)),
)
REJECTED: Final = Metric(
    _R,
    _COUNTER,
    "baton_requests_rejected_total",
    "Requests sent away before any work on them.",
    ("reason",),
    "requests",
    panel=Panel("Rejections per second", ("reason",)),
)
KEY_REQUESTS: Final = Metric(
    _A,
    _COUNTER,
    "baton_key_requests_total",
    "Requests that came with an API key. Names beyond 1,000 are `other`.",
    ("key",),
    "requests",
    panel=Panel("Requests per second by key", ("key",)),
)
KEY_TOKENS: Final = Metric(
    _A,
    _COUNTER,
    "baton_key_tokens_total",
    "Tokens of an API key's prompts and answers.",
    ("key",),
    "tokens",
    panel=Panel("Tokens per second by key", ("key",)),
)
KEY_REJECTED: Final = Metric(
    _A,
    _COUNTER,
    "baton_key_requests_rejected_total",
    "Requests of an API key that were sent away before any work on them.",
    ("key", "reason"),
    "requests",
    panel=Panel("Rejections per second by key", ("key", "reason")),
)
KEY_IN_FLIGHT: Final = Metric(
    _A,
    _GAUGE,
    "baton_key_requests_in_flight",
    "Requests of an API key that have not ended.",
    ("key",),
    "requests",
    panel=Panel("Requests in flight by key", ("key",)),
)
KEY_QUEUE: Final = Metric(
    _A,
    _GAUGE,
    "baton_key_queue_requests",
    "Requests of an API key that wait for a seat.",
    ("key",),
    "requests",
    panel=Panel("Waiting requests by key", ("key",)),
)
POISON: Final = Metric(
    _R,
    _COUNTER,
    "baton_poison_requests_total",
    "Requests that were not sent on, as workers were lost with them.",
    (),
    "requests",
    panel=Panel("Retries and poison per second"),
)
RETRIES: Final = Metric(
    _R,
    _COUNTER,
    "baton_upstream_retries_total",
    "Work sent to a worker again after a failure.",
    ("reason",),
    "legs",
    panel=Panel("Retries and poison per second", ("reason",)),
)

# --- latency ------------------------------------------------------------------------------------

FIRST_TOKEN: Final = Metric(
    _L,
    _HISTOGRAM,
    "baton_time_to_first_token_seconds",
    "Time from a streamed request's arrival to the first event of its answer.",
    ("model",),
    "seconds",
    STAGE_BOUNDS,
    Panel("Time to first token", ("model",)),
)
INTER_TOKEN: Final = Metric(
    _L,
    _HISTOGRAM,
    "baton_inter_token_latency_seconds",
    "Time between two tokens of a stream, as the mean of each stream; also called time per output token.",
    ("model",),
    "seconds",
    GAP_BOUNDS,
    Panel("Time between tokens", ("model",)),
)
DURATION: Final = Metric(
    _L,
    _HISTOGRAM,
    "baton_request_duration_seconds",
    "Time from a request's arrival to its last byte, whatever became of it.",
    ("model",),
    "seconds",
    STAGE_BOUNDS,
    Panel("Request duration", ("model",)),
)
STAGE: Final = Metric(
    _L,
    _HISTOGRAM,
    "baton_request_stage_seconds",
    "Time that a request spent in a stage: queue, prefill, and decode_first_byte, which is the hand-off of "
    "the KV cache and the first token.",
    ("model", "stage"),
    "seconds",
    STAGE_BOUNDS,
    Panel("Stages", ("model", "stage")),
)

# --- tokens -------------------------------------------------------------------------------------

PROMPT_TOKENS: Final = Metric(
    _T,
    _COUNTER,
    "baton_prompt_tokens_total",
    "Tokens of prompts that were answered, as the workers' usage tells; a stream without usage counts none.",
    ("model",),
    "tokens",
    panel=Panel("Prompt tokens per second", ("model",)),
)
GENERATION_TOKENS: Final = Metric(
    _T,
    _COUNTER,
    "baton_generation_tokens_total",
    "Tokens of answers, as the workers' usage tells; a stream without usage counts its pieces.",
    ("model",),
    "tokens",
    panel=Panel("Generated tokens per second", ("model",)),
)

# --- queue and memory ---------------------------------------------------------------------------

QUEUE_REQUESTS: Final = Metric(
    _Q,
    _GAUGE,
    "baton_queue_requests",
    "What waits for a seat on a decode worker, in requests.",
    ("model",),
    "requests",
    panel=Panel("Requests in the queue", ("model",)),
)
QUEUE_TOKENS: Final = Metric(
    _Q,
    _GAUGE,
    "baton_queue_tokens",
    "What waits for a seat on a decode worker, in tokens of prompts.",
    ("model",),
    "tokens",
    panel=Panel("Tokens in the queue", ("model",)),
)
QUEUE_BYTES: Final = Metric(
    _Q,
    _GAUGE,
    "baton_queue_bytes",
    "What waits for a seat on a decode worker, in bytes.",
    ("model",),
    "bytes",
    panel=Panel("Bytes held", ("model",)),
)
HELD_BYTES: Final = Metric(
    _Q,
    _GAUGE,
    "baton_held_bytes",
    "Bytes of open requests, and of answers that have not been sent yet.",
    (),
    "bytes",
    panel=Panel("Bytes held"),
)

# --- workers ------------------------------------------------------------------------------------

WORKERS: Final = Metric(
    _W,
    _GAUGE,
    "baton_workers",
    "Workers, by state.",
    ("model", "role", "state"),
    "workers",
    panel=Panel("Workers by state", ("model", "role", "state")),
)
WANTED_WORKERS: Final = Metric(
    _W,
    _GAUGE,
    "baton_wanted_workers",
    "Workers that the load wants, where the config has a section `scaling`.",
    ("model", "role"),
    "workers",
    panel=Panel("Workers wanted", ("model", "role"), combine="max"),
)
WORKER_STATE: Final = Metric(
    _W,
    _GAUGE,
    "baton_worker_state",
    "1 for the state that a worker is in, 0 for all others.",
    (*WORKER_LABELS, "state"),
    panel=Panel("Workers that are not ready", (*_WORKER, "state"), "max", 'state!="ready"'),
)
WORKER_STATE_SINCE: Final = Metric(
    _W,
    _GAUGE,
    "baton_worker_state_since_seconds",
    "When a worker came to its state, as seconds since 1970.",
    WORKER_LABELS,
    "seconds",
)
WORKER_IN_FLIGHT: Final = Metric(
    _W,
    _GAUGE,
    "baton_worker_in_flight",
    "Legs that a worker is serving.",
    WORKER_LABELS,
    "legs",
    panel=Panel("Legs per worker", _WORKER),
)
WORKER_SEATS: Final = Metric(
    _W,
    _GAUGE,
    "baton_worker_seats",
    "Requests that a worker serves at once; prefill workers have no such bound, and no series.",
    WORKER_LABELS,
    "requests",
    panel=Panel("Seats per worker", _WORKER),
)
WORKER_SHARE: Final = Metric(
    _W,
    _GAUGE,
    "baton_worker_share",
    "Part of its usual load that a worker takes now: below 1 in slow start.",
    WORKER_LABELS,
    panel=Panel("Share of the load, and outliers", _WORKER, "min"),
)
WORKER_SLOW: Final = Metric(
    _W,
    _GAUGE,
    "baton_worker_slow",
    "1 if a worker is far slower than its peers.",
    WORKER_LABELS,
    panel=Panel("Share of the load, and outliers", _WORKER, "max"),
)
WORKER_REQUESTS: Final = Metric(
    _W,
    _COUNTER,
    "baton_worker_requests_total",
    "Requests in which a worker had its part to the end.",
    WORKER_LABELS,
    "requests",
    panel=Panel("Requests per second and worker", _WORKER),
)
WORKER_ERRORS: Final = Metric(
    _W,
    _COUNTER,
    "baton_worker_errors_total",
    "Requests that a worker failed.",
    WORKER_LABELS,
    "requests",
    panel=Panel("Failures per second and worker", _WORKER),
)
WORKER_RETRIES: Final = Metric(
    _W,
    _COUNTER,
    "baton_worker_retries_total",
    "Requests that a worker failed and another attempt followed.",
    WORKER_LABELS,
    "requests",
)
WORKER_RESTARTS: Final = Metric(
    _W,
    _COUNTER,
    "baton_worker_restarts_total",
    "Times that a worker came back after nobody had listened at its address.",
    WORKER_LABELS,
    "restarts",
    panel=Panel("Restarts and ejections per second", _WORKER),
)
WORKER_EJECTIONS: Final = Metric(
    _W,
    _COUNTER,
    "baton_worker_ejections_total",
    "Times that a worker was taken out on suspicion.",
    WORKER_LABELS,
    "ejections",
    panel=Panel("Restarts and ejections per second", _WORKER),
)
WORKER_TRANSFERS: Final = Metric(
    _W,
    _COUNTER,
    "baton_worker_transfers_total",
    "Hand-offs that a worker gave or took over.",
    WORKER_LABELS,
    "hand-offs",
    panel=Panel("Hand-offs per second and worker", _WORKER),
)
WORKER_RATE: Final = Metric(
    _W,
    _GAUGE,
    "baton_worker_rate",
    "Requests per second that a worker served in the last half minute.",
    WORKER_LABELS,
    "requests per second",
)
WORKER_FIRST_BYTE_P50: Final = Metric(
    _W,
    _GAUGE,
    "baton_worker_first_byte_p50_seconds",
    "Median time to a worker's first byte, of the last half minute.",
    WORKER_LABELS,
    "seconds",
)
WORKER_FIRST_BYTE_P99: Final = Metric(
    _W,
    _GAUGE,
    "baton_worker_first_byte_p99_seconds",
    "99th percentile of the time to a worker's first byte, of the last half minute.",
    WORKER_LABELS,
    "seconds",
)
WORKER_INTER_TOKEN_P50: Final = Metric(
    _W,
    _GAUGE,
    "baton_worker_inter_token_p50_seconds",
    "Median time between two tokens of a worker's streams, of the last half minute.",
    WORKER_LABELS,
    "seconds",
)
WORKER_INTER_TOKEN_P99: Final = Metric(
    _W,
    _GAUGE,
    "baton_worker_inter_token_p99_seconds",
    "99th percentile of the time between two tokens of a worker's streams, of the last half minute.",
    WORKER_LABELS,
    "seconds",
)
WORKER_FIRST_BYTE: Final = Metric(
    _W,
    _HISTOGRAM,
    "baton_worker_first_byte_seconds",
    "Time to a worker's first byte: of a prefill worker to its answer, of others to that of streams, and to "
    "answers without tokens.",
    WORKER_LABELS,
    "seconds",
    BOUNDS,
    Panel("First byte per worker", _WORKER),
)
WORKER_INTER_TOKEN: Final = Metric(
    _W,
    _HISTOGRAM,
    "baton_worker_inter_token_seconds",
    "Time between two tokens of a worker, as the mean of each stream, and of each other answer of 16 tokens "
    "or more.",
    WORKER_LABELS,
    "seconds",
    BOUNDS,
    Panel("Time between tokens per worker", _WORKER),
)

# --- KV cache -----------------------------------------------------------------------------------

KV_TRANSFERS: Final = Metric(
    _K,
    _COUNTER,
    "baton_kv_transfers_total",
    "Answered requests, by what became of the KV cache.",
    ("outcome",),
    "requests",
    panel=Panel("KV caches per second, by outcome", ("outcome",)),
)
KV_LEASES: Final = Metric(
    _K,
    _GAUGE,
    "baton_kv_leases",
    "Finished prefills that pin KV blocks: for a leg to come, or for one that has not answered yet.",
    ("state",),
    "leases",
    panel=Panel("KV leases", ("state",)),
)
KV_LEASES_ENDED: Final = Metric(
    _K,
    _COUNTER,
    "baton_kv_leases_ended_total",
    "Finished prefills by how their KV blocks got free.",
    ("state",),
    "leases",
    panel=Panel("KV leases ended per second", ("state",)),
)
KV_LEASES_LEAKED: Final = Metric(
    _K,
    _COUNTER,
    "baton_kv_leases_leaked_total",
    "Finished prefills that nobody looked after any more. Stays 0.",
    (),
    "leases",
    panel=Panel("Hand-offs given up and leases leaked per second"),
)
HANDOFFS_GIVEN_UP: Final = Metric(
    _K,
    _COUNTER,
    "baton_handoffs_given_up_total",
    "Hand-offs that a decode worker had for too long without an answer; prefill runs again.",
    ("reason",),
    "hand-offs",
    panel=Panel("Hand-offs given up and leases leaked per second", ("reason",)),
)
PREFIX_ERROR: Final = Metric(
    _K,
    _GAUGE,
    "baton_prefix_prediction_error",
    "How far off the predicted number of cached tokens was of late: its mean absolute error, by the prompts' "
    "tokens.",
    WORKER_LABELS,
    panel=Panel("Prediction of prefix caches", _WORKER, "max"),
)
PREFIX_MISSED: Final = Metric(
    _K,
    _GAUGE,
    "baton_prefix_missed_ratio",
    "Share of the tokens predicted to be cached that were not, of late.",
    WORKER_LABELS,
    panel=Panel("Prediction of prefix caches", _WORKER, "max"),
)
PREFIX_TRUSTED: Final = Metric(
    _K,
    _GAUGE,
    "baton_prefix_trusted",
    "1 if routing goes by what the worker should have cached.",
    WORKER_LABELS,
    panel=Panel("Prefix caches that routing goes by", _WORKER, "min"),
)
KV_EVENTS_FOLLOWED: Final = Metric(
    _K,
    _GAUGE,
    "baton_kv_events_followed",
    "1 if all KV events of the worker are known, 0 if routing goes by what was sent to it.",
    WORKER_LABELS,
    panel=Panel("Prefix caches that routing goes by", _WORKER, "min"),
)
KV_EVENTS: Final = Metric(
    _K,
    _COUNTER,
    "baton_kv_events_total",
    "Batches of KV events, and what was wrong with them, over all processes.",
    (*WORKER_LABELS, "what"),
    panel=Panel("KV events per second", (*_WORKER, "what")),
)

# --- the orchestrator itself --------------------------------------------------------------------

INFO: Final = Metric(
    _O,
    Kind.INFO,
    "baton_info",
    "What runs here: its labels are the version, the transport, the event loop, the HTTP parser and the form "
    "of the code.",
)
LOOP_LAG: Final = Metric(
    _O,
    _HISTOGRAM,
    "baton_event_loop_lag_seconds",
    "How late the event loop calls what is due.",
    (),
    "seconds",
    LAG_BOUNDS,
    Panel("Lag of the event loop"),
)
LOG_LOST: Final = Metric(
    _O,
    _COUNTER,
    "baton_log_lines_lost_total",
    "Lines of the log that were not written: the disk was full, or nobody read them.",
    (),
    "lines",
    panel=Panel("Log lines lost per second"),
)
PROCESS_IN_FLIGHT: Final = Metric(
    _O,
    _GAUGE,
    "baton_process_requests_in_flight",
    "Requests that a data-plane process is serving.",
    ("process",),
    "requests",
    panel=Panel("Requests per process", ("process",)),
)
PROCESS_ENDS: Final = Metric(
    _O,
    _COUNTER,
    "baton_process_ends_total",
    "Data-plane processes that another one replaced.",
    ("reason",),
    "processes",
    panel=Panel("Processes replaced per second", ("reason",)),
)
CONNECTIONS: Final = Metric(
    _O,
    _GAUGE,
    "baton_upstream_connections",
    "Open connections to workers.",
    ("state",),
    "connections",
    panel=Panel("Connections to workers", ("state",)),
)
CONNECTS: Final = Metric(
    _O,
    _COUNTER,
    "baton_upstream_connects_total",
    "Connections opened to workers.",
    (),
    "connections",
    panel=Panel("Connections opened and reused per second"),
)
REUSES: Final = Metric(
    _O,
    _COUNTER,
    "baton_upstream_reuses_total",
    "Legs that started on an idle connection.",
    (),
    "legs",
    panel=Panel("Connections opened and reused per second"),
)
RECONNECTS: Final = Metric(
    _O,
    _COUNTER,
    "baton_upstream_reconnects_total",
    "Legs sent again, as a reused connection was closed.",
    (),
    "legs",
    panel=Panel("Connections opened and reused per second"),
)
FALLBACKS: Final = Metric(
    _O,
    _COUNTER,
    "baton_transport_fallbacks_total",
    "Bodies sent as JSON although msgpack was asked for.",
    ("reason",),
    "bodies",
    panel=Panel("Fallbacks to JSON per second", ("reason",)),
)
RELOADS: Final = Metric(
    _O,
    _COUNTER,
    "baton_config_reloads_total",
    "Times that the config was read again, by whether it was applied or refused.",
    ("outcome",),
    "reloads",
    panel=Panel("Reloads of the config per second", ("outcome",)),
)
DISCOVERY_AGE: Final = Metric(
    _O,
    _GAUGE,
    "baton_discovery_age_seconds",
    "For how long a source of workers has not told what there is, by the pool whose workers it finds: well "
    "under a minute unless the source is away.",
    ("model", "role", "source"),
    "seconds",
    panel=Panel("Age of the lists of workers", ("source",), "max"),
)
CERTIFICATE: Final = Metric(
    _O,
    _GAUGE,
    "baton_tls_certificate_not_after_seconds",
    "When the first of the certificates in `orchestrator.tls.cert` expires, as seconds since 1970; absent "
    "without TLS.",
    (),
    "seconds",
)

# --- the process of the admin listener, as prometheus-client tells of it ------------------------

PROCESS_METRICS: Final = (
    Metric(
        _O,
        _GAUGE,
        "process_resident_memory_bytes",
        "Resident memory of the process that serves this page; with several processes, of the supervisor.",
        (),
        "bytes",
        panel=Panel("Resident memory"),
    ),
    Metric(_O, _GAUGE, "process_virtual_memory_bytes", "Virtual memory of that process.", (), "bytes"),
    Metric(
        _O,
        _COUNTER,
        "process_cpu_seconds_total",
        "CPU time of that process.",
        (),
        "seconds",
        panel=Panel("CPU seconds per second"),
    ),
    Metric(
        _O, _GAUGE, "process_start_time_seconds", "When it started, as seconds since 1970.", (), "seconds"
    ),
    Metric(
        _O,
        _GAUGE,
        "process_open_fds",
        "File descriptors that it has open.",
        (),
        "descriptors",
        panel=Panel("File descriptors"),
    ),
    Metric(
        _O,
        _GAUGE,
        "process_max_fds",
        "File descriptors that it may have open.",
        (),
        "descriptors",
        panel=Panel("File descriptors"),
    ),
)

METRICS: Final = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
