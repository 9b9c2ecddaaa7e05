"""Every option is declared once: the CLI, `baton schema` and the docs derive from these models.

Models are frozen, reject unknown keys, and take a value only as the type that it is (`"8000"` is no
number). They hold values only: a file becomes a `Config` in `config/file.py`, what no single value can
tell is checked in `config/checks.py`, which process listens where is worked out by `config/addresses.py`,
what is started by `launch/plan.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from itertools import pairwise
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from orchestrator.config.base import Model, Reloadable
from orchestrator.config.connectors import ConnectorName
from orchestrator.config.kubernetes import KubernetesRenderConfig
from orchestrator.config.policies import Policy, policy_named
from orchestrator.config.printing import masked
from orchestrator.config.replicas import MOST_REPLICAS, ReplicaRange, Replicas
from orchestrator.config.slurm import SlurmConfig
from orchestrator.legs.connectors import NIXL
from orchestrator.wire.info import Role

# vLLM's: 30.3 s passed on 0.32 until the blocks of a prefill that nobody pulled were free.
LEASE_S = 30.0

# Beyond these a number is a slip of the hand; all of them are far above what one orchestrator can look after.
MAX_PROCESSES = 256
MAX_WORKERS = MOST_REPLICAS  # of all models together
MAX_GPUS = 1024  # of one machine
MAX_PORT = 65535
MAX_SECONDS = 1e9  # 31 years, for those who mean for ever
MAX_RATE = 10**12  # of requests, or of tokens, per minute
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0  # of a key beside others

WILDCARDS = frozenset({"0.0.0.0", "::"})
ANY_HOST = "*"
WEB_PORTS = {"http": 80, "https": 443}


def split_address(address: str) -> tuple[str, int]:
    """Return (host without brackets, port) of `host:port` or `[v6]:port`. `ValueError` says what is wrong."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError(f"expected HOST:PORT, got {address!r}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"write an IPv6 address in brackets: [{host}]:{port}")
    if not host:
        raise ValueError(f"expected HOST:PORT, got {address!r}")
    return host, int(port)


def _address(value: str) -> str:
    split_address(value)
    return value


def _port_address(value: str) -> str:
    if split_address(value)[1] == 0:
        raise ValueError(f"expected HOST:PORT with a port above 0, got {value!r}")
    return value


def _dns_label(value: str) -> str:
    if not _is_dns_label(value):
        raise ValueError(f"expected a name of a-z, 0-9 and hyphens, of at most 63 characters, got {value!r}")
    return value


_is_dns_label = re.compile(r"(?=.{1,63}\Z)[a-z0-9]([a-z0-9-]*[a-z0-9])?").fullmatch


def _service_port(value: Any) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_PORT
    if not is_number and not (isinstance(value, str) and _is_port_name(value)):
        raise ValueError(
            f"expected a number from 1 to {MAX_PORT}, or the name of a port, of a-z, 0-9 and hyphens, got "
            f"{value!r}"
        )
    return value


_is_port_name = re.compile(r"(?=.{1,63}\Z)(?=.*[a-z])[a-z0-9]([a-z0-9-]*[a-z0-9])?").fullmatch


def _worker_host(value: str) -> str:
    if value in WILDCARDS:
        raise ValueError(f"workers are reached at their host, and {value!r} is no address to reach")
    if not value or "/" in value or (":" in value and (value.count(":") == 1 or "[" in value)):
        raise ValueError(f"expected a host name or an address without port, got {value!r}")
    return value


_is_name = re.compile(r"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*").fullmatch


def _host_name(value: str) -> str:
    """Return a name as it stands in a Host header: in lower case, without a dot at its end, as IDNA."""
    if value == ANY_HOST:
        return value
    below = "*." if value.startswith("*.") else ""
    try:
        name = value.removeprefix(below).lower().removesuffix(".").encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    if not _is_name(name):
        raise ValueError(f"expected a host name without scheme and port, *.NAME or *, got {value!r}")
    return below + name


def _origin(value: str) -> str:
    """Return an origin as browsers send it: in lower case, without a default port."""
    scheme, separator, rest = value.lower().partition("://")
    if value == ANY_HOST:
        return value
    if not separator or not _is_scheme(scheme) or not _is_authority(rest):
        raise ValueError(f"expected SCHEME://HOST[:PORT] without a path, or *, got {value!r}")
    return f"{scheme}://{rest.removesuffix(_DEFAULT_PORTS.get(scheme, '/'))}"


_is_scheme = re.compile(r"[a-z][a-z0-9+.-]*").fullmatch
_is_authority = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?").fullmatch
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def _token(value: str) -> str:
    if not _is_token(value):
        raise ValueError(f"expected a name of letters, digits and hyphens, or *, got {value!r}")
    return value


def _model_name(value: str) -> str:
    """Return a name that may stand in a path, as those of workers do: `org/model`."""
    if value and any(part in ("", ".", "..") for part in value.split("/")):
        raise ValueError(
            f"expected a name without a part that is empty, `.` or `..` between /, got {value!r}"
        )
    return value


def _worker_pattern(value: str) -> str:
    """Return what `allow_workers` may name: a network, an address, a host name or `*.NAME`."""
    try:
        return str(ip_network(value))
    except ValueError as error:
        if re.fullmatch(r"[0-9.]+(/.*)?|[^/]*:.*", value) and "://" not in value:
            raise ValueError(f"expected a network as ADDRESS/BITS, got {value!r}: {error}") from None
    if value == ANY_HOST:
        raise ValueError("a pattern for every host would protect nothing: name networks or hosts")
    return _host_name(value)


_is_token = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+").fullmatch


def _worker_url(value: str) -> str:
    """Return `http(s)://HOST:PORT`: in lower case, with the port written out and the name as IDNA."""
    parts, port = _split_url(value)
    if parts.scheme not in WEB_PORTS or port == 0:
        raise ValueError(f"expected http://HOST:PORT or https://HOST:PORT, got {masked(value)!r}")
    host = _url_host(parts.hostname or "")
    if not host or "@" in parts.netloc or parts.path not in ("", "/") or "?" in value or "#" in value:
        raise ValueError(f"expected only http(s)://HOST:PORT, got {masked(value)!r}")
    if host in WILDCARDS:
        raise ValueError(f"workers are reached at their host, and {host!r} is no address to reach")
    return f"{parts.scheme}://{join_address(host, WEB_PORTS[parts.scheme] if port is None else port)}"


def _collector_url(value: str) -> str:
    parts, port = _split_url(value)
    if parts.scheme not in WEB_PORTS or port == 0 or not _url_host(parts.hostname or ""):
        raise ValueError(f"expected http(s)://HOST:PORT, got {masked(value)!r}")
    if "@" in parts.netloc or "?" in value or "#" in value:
        raise ValueError("name the host, and at most a path: what is secret belongs into the environment")
    return value


def _split_url(value: str) -> tuple[SplitResult, int | None]:
    """Return the parts and the port; 0, which is no port, if the value is no URL."""
    try:
        parts = urlsplit(value)
        # urlsplit itself leaves out tabs and line breaks, and what is between a bracket and the port.
        is_plain = value.isprintable() and " " not in value and _ends_right(parts.netloc)
        return parts, parts.port if is_plain else 0
    except ValueError:
        return SplitResult("", "", "", "", ""), 0


_ends_right = re.compile(r"|([^\[\]]*[^\[\]:]|[^\[\]]*\[[^\[\]]*\])(:[0-9]+)?").fullmatch


def _url_host(host: str) -> str:
    """Return a host as it is connected to; empty if there can be none of that name."""
    try:
        return str(ip_address(host))
    except ValueError:
        pass
    try:
        name = host.encode("idna").decode("ascii")
    except UnicodeError:
        return ""
    return name if _is_name(name.removesuffix(".")) else ""


def join_address(host: str, port: int) -> str:
    """Return `host:port`: the opposite of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _text(value: Any) -> Any:
    """Return numbers as text where only text is possible: `args: [--max-model-len, 4096]`."""
    if isinstance(value, bool) or value is None:
        raise ValueError("write the value in quotes")
    if isinstance(value, str) and "\0" in value:
        raise ValueError("no program can be given a NUL character")
    return str(value) if isinstance(value, int | float) else value


def _variable(value: str) -> str:
    if not value or "=" in value or "\0" in value:
        raise ValueError(f"expected the name of a variable, got {value!r}")
    return value


Address = Annotated[str, AfterValidator(_address)]
PortAddress = Annotated[str, AfterValidator(_port_address)]
DnsLabel = Annotated[str, AfterValidator(_dns_label)]
ServicePort = Annotated[str | int, BeforeValidator(_service_port)]
Host = Annotated[str, AfterValidator(_worker_host)]
Url = Annotated[str, AfterValidator(_worker_url)]
HostName = Annotated[str, AfterValidator(_host_name)]
CollectorUrl = Annotated[str, AfterValidator(_collector_url)]
WorkerPattern = Annotated[str, AfterValidator(_worker_pattern)]
Origin = Annotated[str, AfterValidator(_origin)]
Token = Annotated[str, AfterValidator(_token)]
Text = Annotated[str, BeforeValidator(_text)]
Variable = Annotated[str, AfterValidator(_variable)]
Port = Annotated[int, Field(ge=1, le=65535)]
Gpu = Annotated[int, Field(ge=0, lt=MAX_GPUS)]
ModelName = Annotated[str, AfterValidator(_model_name)]
AdapterName = Annotated[ModelName, Field(min_length=1, max_length=256)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
Zone = Annotated[str, Field(min_length=1, max_length=256)]


class TlsConfig(Model):
    cert: str = Field(description="This PEM file holds the certificate chain of the server.")
    key: str = Field(description="This PEM file holds the private key of the certificate.")


class CorsConfig(Model):
    """Pages of other sites may ask, as browsers' rules of CORS have it."""

    allowed_origins: list[Origin] = Field(
        min_length=1,
        description="Pages of these origins may ask, each written as https://app.example.com; `*` stands for "
        "all.",
    )
    allowed_methods: list[Token] = Field(
        ["*"], description="Pages may use these methods; `*` stands for all."
    )
    allowed_headers: list[Token] = Field(
        ["*"], description="Pages may send these headers beside harmless ones; `*` stands for all."
    )
    allow_credentials: bool = Field(
        False,
        description="Pages may have the browser send cookies and the like; API keys in headers need no such "
        "permission.",
    )
    max_age_s: int = Field(
        600, ge=0, description="A browser remembers what it was allowed for this many seconds."
    )


class LogConfig(Model):
    format: Literal["console", "json"] = Field(
        "console", description="Log lines are text for people (console), or one JSON object each (json)."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Lines below this level are not written. At debug, access lines for people also say why "
        "the workers were chosen.",
    )
    access: bool = Field(
        True,
        description="Each request gets one line in the log, which never holds text of prompts or answers.",
    )
    decisions: str | None = Field(
        None,
        description="This file gets a line per request, for `baton simulate`: when it came, how long it and "
        "its answer were, the salted hashes of what its prompt begins with, where it was sent, how that "
        "went. There is no text in it.",
    )
    slow_request_s: Seconds = Field(
        30.0,
        description="A request that takes longer than this many seconds gets a warning line with the time "
        "that each stage took.",
    )
    stall_s: Seconds = Field(
        0.25,
        description="An event loop that is blocked for longer than this many seconds gets a warning line "
        "that names the code which blocks it.",
    )


class TracingConfig(Model):
    """Requests become spans of OpenTelemetry, and workers get ours as the parent of theirs."""

    endpoint: CollectorUrl = Field(
        description="Spans are sent to this collector with OTLP over HTTP, such as http://127.0.0.1:4318, at "
        "its path /v1/traces. It gets the headers that OTEL_EXPORTER_OTLP_HEADERS holds.",
    )
    sample: float = Field(
        0.01,
        ge=0,
        le=1,
        description="This share of the requests is traced, of those whose client has not begun a trace; of "
        "the others those that the client traces.",
    )
    service_name: str = Field("baton", min_length=1, max_length=256, description="Spans are of this service.")


class LimitsConfig(Model):
    """Limits bound what clients send (408, 413, 414, 431) and how long a request takes (504)."""

    max_body_bytes: Reloadable[int] = Field(
        16 * 1024 * 1024,
        ge=1024,
        description="A request whose body has more than this many bytes is answered 413.",
    )
    max_upload_bytes: Reloadable[int] = Field(
        64 * 1024 * 1024,
        ge=1024,
        description="A form with a file in it, such as speech, may have this many bytes where that is more "
        "than max_body_bytes. One of more than 1 MiB is sent on as it comes: it is not held in memory.",
    )
    max_answer_bytes: Reloadable[int] = Field(
        64 * 1024 * 1024,
        ge=1024,
        description="A worker's answer that is not streamed is buffered. If it has more than this many "
        "bytes, the client is answered 502.",
    )
    max_held_bytes: Reloadable[int] = Field(
        1024 * 1024 * 1024,
        ge=1024,
        description="Requests hold at most this many bytes: what has come of them, and answers that were "
        "received and not yet sent. New requests are answered 503 above it, and so are those that came last "
        "of what is still coming in.",
    )
    header_timeout_s: Reloadable[Seconds] = Field(
        10.0,
        description="A client that has not sent the whole head of a request after this many seconds is "
        "answered 408.",
    )
    body_idle_timeout_s: Reloadable[Seconds] = Field(
        10.0,
        description="A client that sends nothing more of a request's body for this many seconds is answered "
        "408.",
    )
    body_timeout_s: Reloadable[Seconds] = Field(
        60.0,
        description="A client that has not sent the whole body of a request after this many seconds is "
        "answered 408.",
    )
    request_timeout_s: Reloadable[Seconds] = Field(
        600.0,
        description="A request is answered 504 if after this many seconds its stream has not begun, or its "
        "whole answer is not there. A client asks for less with the header x-request-timeout, in seconds. "
        "Deadlines are looked at four times a second: one may be noticed up to 0.25 s late.",
    )
    first_byte_timeout_s: Reloadable[Seconds] = Field(
        300.0,
        description="A request is answered 504 if its prefill leg, or the leg of its stream, sends no byte "
        "for this many seconds. A comment of the worker is a byte, too.",
    )
    stream_idle_timeout_s: Reloadable[Seconds] = Field(
        600.0,
        description="A stream that has begun ends with an error if its worker sends nothing, not even a "
        "comment, for this many seconds; its length is not limited. A worker may be silent for minutes while "
        "it collects the arguments of a tool call.",
    )
    keepalive_s: Reloadable[float] = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="The client of a stream gets a comment whenever it has had nothing for this many "
        "seconds, so that no proxy takes the connection for dead; with 0 only those of the workers. The "
        "first one makes the status 200: an error that follows is an event of the stream.",
    )
    max_kept_bytes: int = Field(
        512 * 1024 * 1024,
        ge=0,
        description="Of what open streams have sent, at most this many bytes are kept, so that another "
        "worker can resume a stream whose worker is lost.",
    )
    client_write_timeout_s: Reloadable[Seconds] = Field(
        60.0,
        description="A client is cut off if it takes less than 16 KiB in this many seconds while more is "
        "pending for it.",
    )
    leg_silence_s: Reloadable[Seconds] = Field(
        3.0,
        description="A leg is lost if it is silent for this many seconds and its worker no longer answers "
        "probes.",
    )
    connect_timeout_s: Seconds = Field(
        5.0,
        description="A connection to a worker that is not established after this many seconds has failed.",
    )


class QueueConfig(Model):
    """Each model has a queue of requests that wait for a seat on a decode worker. More are answered 429."""

    requests: Reloadable[int] = Field(
        1024,
        ge=0,
        description="At most this many requests wait for a seat, for each model; with 0 nobody waits. All "
        "others are answered 429.",
    )
    tokens: Reloadable[int] = Field(
        4_000_000,
        ge=0,
        description="The prompts of the requests that wait have at most this many tokens in all, for each "
        "model. Token ids are counted; four bytes of text count as one token.",
    )
    bytes: Reloadable[int] = Field(
        64 * 1024 * 1024,
        ge=0,
        description="The bodies of the requests that wait have at most this many bytes in all, for each "
        "model.",
    )
    timeout_s: Reloadable[Seconds] = Field(
        30.0,
        description="A request that has waited for this many seconds is answered 503. One that would wait "
        "longer, by the recent rate, is answered 429 at once.",
    )
    order: Reloadable[Literal["fifo", "shortest"]] = Field(
        "fifo",
        description="Those that wait get seats as they came (fifo), or short ones first (shortest). What a "
        "request takes is estimated from its prompt and its limit of tokens. It is overtaken only by those "
        "that come within three times that after it, and within half of timeout_s.",
    )
    priority_s: Reloadable[float] = Field(
        0.0,
        ge=0,
        description="A request whose priority is lower by one goes ahead as if it had come so many seconds "
        "earlier, and at most timeout_s earlier; with 0 nobody has a priority. It is what vLLM takes: the "
        "header x-vllm-priority, or the field `priority`.",
    )


class TenantsConfig(Model):
    """Each API key has these limits and this weight, unless its line in `api_keys_file` has others."""

    rpm: Reloadable[int] = Field(
        0,
        ge=0,
        le=MAX_RATE,
        description="A key may send this many requests per minute, and as many at once after a quiet minute; "
        "with 0 any number. Others are answered 429. This holds for all processes together.",
    )
    tpm: Reloadable[int] = Field(
        0,
        ge=0,
        le=MAX_RATE,
        description="A key may use this many tokens per minute; with 0 any number. A request that comes "
        "takes a token for each four bytes of its prompt, and its limit of tokens (256 without one); at its "
        "end it has taken the tokens of its usage.",
    )
    concurrency: Reloadable[int] = Field(
        0,
        ge=0,
        le=MAX_RATE,
        description="A key may have this many requests open at a time; with 0 any number.",
    )
    weight: Reloadable[float] = Field(
        1.0,
        ge=MIN_WEIGHT,
        le=MAX_WEIGHT,
        description="While requests wait for seats, keys get the time of seats in proportion to their "
        "weights.",
    )


class OrchestratorConfig(Model):
    listen: Address = Field(
        "127.0.0.1:8000",
        description="The API is served at this address, with /health, /ready, /version and /v1/models.",
    )
    admin: Address | None = Field(
        None, description="The metrics and the admin API are served at this address; without it they are off."
    )
    processes: int = Field(
        1,
        ge=1,
        le=MAX_PROCESSES,
        description="This many processes serve requests. Each of them has the limits below to itself.",
    )
    api_keys_file: Reloadable[str | None] = Field(
        None,
        description="This file lists the API keys, in lines `NAME SHA256HEX [SCOPE,...] [LIMIT=N ...]` "
        "(baton key new writes them). Clients send the key as bearer token. Of the scopes, infer is for "
        "requests, metrics for /metrics and admin for the admin listener; a line without scopes is for "
        "infer only. The limits are rpm, tpm, concurrency and weight, as in `tenants`.",
    )
    tenants: TenantsConfig = Field(
        TenantsConfig(),
        description="This section has the limits and the weight of the API keys whose lines have none.",
    )
    allow_workers: Reloadable[list[WorkerPattern]] = Field(
        [],
        description="A worker that is added at /admin/workers gets BATON_WORKER_API_KEY only if its URL has "
        "one of these hosts: networks as ADDRESS/BITS, addresses, names, or `*.NAME`. Workers of this file "
        "always get it.",
    )
    insecure_no_auth: bool = Field(
        False, description="The API may be served beyond loopback without API keys."
    )
    relay_data_parallel_rank: bool = Field(
        False,
        description="Workers get a client's X-data-parallel-rank, which chooses one of a worker's engines "
        "whatever that one has to do; both workers of a request get the same.",
    )
    tracing: TracingConfig | None = Field(
        None, description="Requests are traced as this section says; without it none is."
    )
    tls: TlsConfig | None = Field(None, description="The API is served over TLS with this certificate.")
    allowed_hosts: list[HostName] = Field(
        [],
        description="Both listeners serve requests for these names (header Host) and for localhost; others "
        "are answered 421. IP addresses are always right, and beyond loopback every name is while this list "
        "is empty. Names may have the form `*.NAME`, for all below NAME, or be `*`, for all.",
    )
    cors: CorsConfig | None = Field(
        None, description="Web pages of these other sites may ask; without this section none may."
    )
    log: LogConfig = Field(LogConfig(), description="This section says what is written to the log, and how.")
    limits: LimitsConfig = Field(
        LimitsConfig(), description="This section bounds how long requests take and how large they are."
    )
    queue: QueueConfig = Field(
        QueueConfig(),
        description="This section says how many requests wait for a seat, for how long, and who is next.",
    )
    # uvicorn's settings, under uvicorn's names
    backlog: int = Field(
        2048,
        ge=1,
        le=2**31 - 1,
        description="At most this many connections wait in the kernel until they are accepted.",
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        description="At most this many client connections are open in each process; for another one a "
        "connection is closed on which no request is in progress, or else it is answered 503, unless it asks "
        "for /health, /ping or /ready. Without it, clients have half of the descriptors that the process may "
        "open, less 64.",
    )
    limit_concurrency: int | None = Field(
        None,
        ge=1,
        description="New requests are answered 503 while this many are in progress, except for /health, "
        "/ping and /ready.",
    )
    limit_max_requests: int | None = Field(
        None,
        ge=1,
        description="A process ends after it has served this many requests. Of several processes, each is "
        "replaced.",
    )
    limit_max_requests_jitter: int = Field(
        0,
        ge=0,
        description="A random number up to this one is added to limit_max_requests, so that processes do not "
        "end together.",
    )
    timeout_keep_alive: int = Field(
        75, ge=1, description="A client's connection is closed after it was idle for this many seconds."
    )
    timeout_graceful_shutdown: int = Field(
        30,
        ge=0,
        description="Requests that are still open this many seconds after SIGTERM are ended with an error.",
    )
    # what uvicorn has no setting for
    drain_notice_s: float = Field(
        0.0,
        ge=0,
        description="For this many seconds after SIGTERM requests are still served while /ready is 503, so "
        "that load balancers turn away before requests are refused.",
    )
    hang_timeout_s: Seconds = Field(
        5.0,
        description="Of several processes, one whose event loop stands still for this many seconds is "
        "replaced.",
    )


class SimConfig(Model):
    """The simulated engine has this latency model; if all is zero, it answers at once."""

    prefill_ms: float = Field(
        0.0, ge=0, description="Every prefill takes this many milliseconds beside those of its tokens."
    )
    prefill_us_per_token: float = Field(
        0.0, ge=0, description="The prefill takes this many microseconds per prompt token that is not cached."
    )
    prefill_ns_per_token_squared: float = Field(
        0.0,
        ge=0,
        description="The prefill takes this many nanoseconds times the square of all tokens of the prompt "
        "less that of the cached ones: attention reads all that is before a token.",
    )
    transfer_ms: float = Field(
        0.0, ge=0, description="Every KV transfer takes this many milliseconds beside those of its tokens."
    )
    transfer_us_per_token: float = Field(
        0.0, ge=0, description="The KV transfer takes this many microseconds per prompt token."
    )
    decode_ms_per_token: float = Field(
        0.0, ge=0, description="A decode step takes this many milliseconds while one request is running."
    )
    decode_ms_per_running: float = Field(
        0.0,
        ge=0,
        description="Each further running request makes a decode step this many milliseconds longer.",
    )
    decode_ns_per_kv_token: float = Field(
        0.0,
        ge=0,
        description="Each token of KV cache of the running requests makes a decode step this many "
        "nanoseconds longer.",
    )
    block_size: int = Field(16, ge=1, description="A KV block holds this many tokens.")
    num_blocks: int = Field(65536, ge=1, description="The KV cache of a worker has this many blocks.")
    max_model_len: int = Field(
        1_000_000, ge=1, description="A prompt and its answer have at most this many tokens together."
    )


class WorkerConfig(Model):
    """This describes one worker that has a host of its own, or a card shared by hand."""

    host: Host = Field(
        "127.0.0.1", description="The worker runs on this machine and is reached by this name."
    )
    port: Port | None = Field(
        None, description="The worker's HTTP server listens on this port; without it one is allotted."
    )
    side_channel_port: Port | None = Field(
        None, description="NIXL listens on this port of `host`; without it one is allotted."
    )
    gpus: list[Gpu] | None = Field(
        None,
        min_length=1,
        description="The worker runs on the GPUs with these numbers; without it on the next ones of its "
        "host.",
    )
    zone: Zone | None = Field(
        None, description="The worker is in this zone of the network; without it in that of the pool."
    )
    args: list[Text] = Field(
        [], description="The engine gets these arguments after those of the pool, so that these win."
    )
    env: dict[Variable, Text] = Field(
        {}, description="The worker gets these environment variables on top of those of the pool."
    )


DEFAULT_SEATS = 1024  # vLLM's on its large cards


def _max_num_seqs(args: list[str]) -> int | None:
    """Return the last `--max-num-seqs` of an engine's arguments; None if there is none that is a number."""
    words = [word for arg in args for word in arg.split("=", 1)]
    found = [after for word, after in pairwise(words) if word.replace("_", "-") == "--max-num-seqs"]
    is_number = bool(found) and found[-1].isascii() and found[-1].isdigit() and len(found[-1]) < 10
    return int(found[-1]) or None if is_number else None


class KubernetesConfig(Model):
    """The workers are the pods of a Service, as its EndpointSlices list them."""

    service: Reloadable[DnsLabel] = Field(
        description="The workers are the pods of this Service, a headless one."
    )
    namespace: Reloadable[DnsLabel | None] = Field(
        None, description="The Service is in this namespace; without it in the orchestrator's own."
    )
    port: Reloadable[ServicePort | None] = Field(
        None,
        description="Workers listen at this port of the Service, by name, or at this number; without it at "
        "its only port, or at the one named http.",
    )
    url: Reloadable[CollectorUrl | None] = Field(
        None,
        description="The API server is asked here, without a token, for instance through kubectl proxy; "
        "without it the one of the cluster that the orchestrator runs in, with the token of its pod.",
    )


class DiscoverConfig(Model):
    """The workers of a pool are found by one of these sources."""

    file: Reloadable[Annotated[str, Field(min_length=1)] | None] = Field(
        None,
        description="The workers are listed in this file, or in this folder with a file for each of them.",
    )
    dns: Reloadable[PortAddress | None] = Field(
        None, description="The workers are at all addresses of this name, HOST:PORT."
    )
    kubernetes: KubernetesConfig | None = Field(
        None, description="The workers are the pods of a Service of Kubernetes."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = f", not {' and '.join(given)}" if given else ""
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}{found}")
        return self

    @property
    def kind(self) -> str:
        """Return the kind of the source: the one option that is given."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def name(self) -> str:
        """Name the source: `file PATH`, `dns HOST:PORT` or `kubernetes NAMESPACE/SERVICE`."""
        if self.kubernetes is None:
            return f"{self.kind} {self.file or self.dns}"
        parts = (self.kubernetes.namespace, self.kubernetes.service)
        return f"{self.kind} {'/'.join(part for part in parts if part is not None)}"


class PoolConfig(Model):
    """A pool has the workers of a role: `replicas` here, `workers` by host, `urls` not started by Baton, or
    those that `discover` finds.
    """

    engine: Literal["vllm", "sim"] = Field(
        "vllm", description="The workers run this engine: vLLM, or the simulated one (sim)."
    )
    device: Literal["cuda", "cpu"] = Field(
        "cuda", description="The workers of vLLM run on GPUs (cuda) or on CPUs (cpu)."
    )
    replicas: Replicas | None = Field(
        None,
        description="This many workers are started on this machine; it is one if neither this, nor workers, "
        "nor urls are given. With {min: N, max: M} there are N at first, then as many as `scaling` wants.",
    )
    gpus_per_replica: int = Field(1, ge=1, le=MAX_GPUS, description="Each worker gets this many GPUs.")
    workers: list[WorkerConfig] | None = Field(
        None, min_length=1, description="These workers are started, each on its own host."
    )
    urls: Reloadable[list[Url] | None] = Field(
        None,
        min_length=1,
        description="The workers already run at these URLs; Baton neither starts nor stops them.",
    )
    discover: DiscoverConfig | None = Field(
        None,
        description="The workers are found by this source while the orchestrator runs, as they come and go. "
        "Replicas beside it are what a launcher starts, and the orchestrator knows them by the source alone.",
    )
    zone: Zone | None = Field(
        None,
        description="The workers are in this zone of the network; without it in the one that they announce. "
        "Hand-offs between two zones are expected to take the same time.",
    )
    zones: dict[Zone, list[Url]] = Field(
        {}, description="Of the workers at urls, these are in these zones: a list of URLs for each zone."
    )
    served_model: str | None = Field(
        None, description="The workers know the model by this name, if it differs from the model's name here."
    )
    seats: int = Field(
        DEFAULT_SEATS,
        ge=1,
        description="Each worker serves this many requests at once; more wait in the orchestrator's queue. "
        "Without it this is the --max-num-seqs of its args, if they have one. It is not for prefill workers. "
        "Several processes and orchestrators take what others leave, and each has its share at least.",
    )
    data_parallel_size: int = Field(
        1,
        ge=1,
        le=1024,
        description="Each worker has this many data-parallel engines (vLLM's --data-parallel-size), each "
        "with a cache of its own; above 1 Baton chooses among them as among workers.",
    )
    args: list[Text] = Field([], description="The engine of every worker in the pool gets these arguments.")
    env: dict[Variable, Text] = Field(
        {}, description="The workers get these environment variables on top of those that they inherit."
    )
    sim: SimConfig = Field(SimConfig(), description="This section says how fast the simulated engine is.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("replicas", "workers", "urls") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of replicas, workers, urls, not {' and '.join(given)}")
        if self.discover is not None and given not in ([], ["replicas"]):
            raise ValueError(f"give {given[0]} or discover, not both: discover finds all workers of the pool")
        return self

    @model_validator(mode="after")
    def _seats_of_the_engine(self) -> Self:
        """Take the seats that the engine's arguments name, if none are given. They count as not given."""
        if "seats" not in self.model_fields_set:
            pools_own = _max_num_seqs(self.args)
            each = [_max_num_seqs(worker.args) or pools_own for worker in self.workers or [WorkerConfig()]]
            known = [seats for seats in each if seats is not None]
            self.__dict__["seats"] = min(known, default=DEFAULT_SEATS)
        return self

    @model_validator(mode="after")
    def _known_urls(self) -> Self:
        placed = [url for urls in self.zones.values() for url in urls]
        if unknown := [url for url in placed if url not in (self.urls or ())]:
            raise ValueError(f"zones: {unknown[0]} is none of the urls")
        if twice := [url for url in placed if placed.count(url) > 1]:
            raise ValueError(f"zones: {twice[0]} is in several")
        return self

    def zone_of(self, url: str) -> str | None:
        """Return the zone of a worker at this URL; None if the config does not say."""
        found = (zone for zone, urls in self.zones.items() if url in urls)
        return next(found, self.zone)

    @property
    def is_managed(self) -> bool:
        """Say whether Baton starts the workers."""
        return self.urls is None and (self.discover is None or self.replicas is not None)

    @property
    def count(self) -> int:
        """Return how many workers there are at first."""
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas.min
        return len(self.urls or self.workers or ()) or self.replicas or 1

    @property
    def range(self) -> ReplicaRange | None:
        """Return from and up to how many workers there may be; None if their number is not for `scaling`."""
        return self.replicas if isinstance(self.replicas, ReplicaRange) else None


class ModelConfig(Model):
    name: ModelName = Field(min_length=1, description="Clients put this name into the field `model`.")
    path: str | None = Field(
        None,
        description="The engine loads the model from this directory or hub name; it is not needed when all "
        "workers are urls.",
    )
    prefill: PoolConfig | None = Field(
        None, description="These workers read prompts and fill KV caches; they come with decode workers."
    )
    decode: PoolConfig | None = Field(
        None,
        description="These workers take KV caches over and make the answers; they come with prefill workers.",
    )
    both: PoolConfig | None = Field(
        None, description="Each of these workers serves whole requests alone (aggregated serving)."
    )
    adapters: list[AdapterName] = Field(
        [],
        description="Clients may name these LoRA adapters in place of the model, whether or not a worker "
        "lists them. Those that workers list at /v1/models are known without it.",
    )
    connector: ConnectorName = Field(
        NIXL.name,
        description="This connector is what the engines hand KV caches over with.",
    )

    def pools(self) -> Iterator[tuple[Role, PoolConfig]]:
        """Return the pools that the model has, of prefill, decode and both."""
        if self.prefill is not None:
            yield "prefill", self.prefill
        if self.decode is not None:
            yield "decode", self.decode
        if self.both is not None:
            yield "both", self.both


# Headers with which a client may choose for one request (`routing/overrides.py`).
Override = Literal[
    "x-baton-policy-prefill",
    "x-baton-policy-decode",
    "x-baton-disaggregate",
    "x-baton-worker-prefill",
    "x-baton-worker-decode",
]


class RoutingConfig(Model):
    prefill: Reloadable[Policy] = Field(
        policy_named("prefix"),
        description="This policy chooses the prefill worker: its name, or a mapping with its arguments.",
    )
    decode: Reloadable[Policy] = Field(
        policy_named("least_loaded"),
        description="This policy chooses the decode worker, or the worker that serves a request alone: its "
        "name, or a mapping with its arguments.",
    )
    pair: Reloadable[Literal["same_if_known", "same_revision", "any"]] = Field(
        "same_if_known",
        description="The workers of a request must not have announced different revisions of the model, "
        "versions of the engine or deployments, and one that announces nothing goes with any "
        "(same_if_known); or must have announced the same ones, and those that announce nothing go together "
        "(same_revision); or may be any two that are ready (any), though a KV cache of another revision "
        "makes a wrong answer.",
    )
    load: Reloadable[Literal["reported", "own"]] = Field(
        "reported",
        description="Policies count the requests of all orchestrators that send to a worker, as far as it "
        "reports them (reported), or only those of this one (own). With one orchestrator both are the same.",
    )
    disaggregate: Reloadable[Literal["always", "auto", "strict", "never"]] = Field(
        "always",
        description="A request goes to two workers (always, strict), to one (never), or to whatever costs "
        "all users together less time (auto). While no prefill worker is left, always and auto let decode "
        "workers prefill, and strict answers 503.",
    )
    misfits: Reloadable[Literal["refuse", "allow"]] = Field(
        "refuse",
        description="Prefill and decode workers of a model whose announcements say that they cannot hand KV "
        "caches over to each other, for instance for another dtype or block size, are kept out of service "
        "(refuse) or taken all the same (allow).",
    )
    tokenize_once: Reloadable[bool] = Field(
        True,
        description="Decode workers that announce it get the prompt's token ids, so that they need not "
        "tokenize it again.",
    )
    failover: bool = Field(
        True, description="When a worker is lost in the middle of a stream, another one resumes it."
    )
    kv_lease_s: Seconds = Field(
        LEASE_S,
        description="Prefill workers pin KV blocks that nobody pulls for this many seconds. The engine "
        "decides that; workers with Baton's plugin announce it, for others the orchestrator is told here.",
    )
    handoff_stall_s: Reloadable[Seconds | None] = Field(
        None,
        description="A decode leg without its first byte for this many seconds is tried elsewhere, if its "
        "worker says nothing on any leg or has begun later ones. If null, the limit is three times the "
        "slowest recent first byte of that worker, and at least 2 s.",
    )
    kv_missing: Reloadable[Literal["warn", "fail", "allow"]] = Field(
        "warn",
        description="When a decode worker computes the prompt's KV cache again, this follows: a line in the "
        "log (warn), and also a 502 for an answer that is not streamed (fail), or nothing (allow).",
    )
    prefill_order: Literal["fifo", "shortest"] = Field(
        "fifo",
        description="Prefill workers take prompts as they come (fifo), or short ones first (shortest). Each "
        "prefill leg has a priority then, for which vLLM runs with --scheduling-policy priority, as `baton "
        "up` starts it; the priorities of clients are not relayed.",
    )
    overrides: Reloadable[list[Override]] = Field(
        [],
        description="Clients may choose with these headers for one request: a policy, whether two workers "
        "serve it, or a worker by its name. A request with one that is not in this list is answered 400.",
    )

    def hears_caches(self, role: Role) -> bool:
        """Tell whether workers of a role are to publish their KV events."""
        return (self.prefill if role == "prefill" else self.decode).hears_caches

    @property
    def hears_loads(self) -> bool:
        """Say whether legs of other orchestrators count."""
        return self.load == "reported"

    @property
    def keeps_revisions(self) -> bool:
        """Say whether the workers of a pair must be of one revision, as far as that is known."""
        return self.pair != "any"

    @property
    def pairs_unknown(self) -> bool:
        """Say whether a worker that announces no revision goes with one of any."""
        return self.pair == "same_if_known"


class HealthConfig(Model):
    """Health says when a worker is taken out of service, and how it comes back."""

    interval_s: Reloadable[Seconds] = Field(
        0.75,
        description="Two probes of a worker are this many seconds apart, give or take a fifth. They come "
        "more often while hardly any seats are left that other orchestrators take as well.",
    )
    timeout_s: Reloadable[Seconds] = Field(
        1.0,
        description="A probe of a worker in service has failed after this many seconds without an answer.",
    )
    suspect_s: Reloadable[Seconds] = Field(
        0.4,
        description="A worker that lost a leg or failed a probe is ejected if it gives no sign of life "
        "within this many seconds.",
    )
    silence_s: Reloadable[Seconds] = Field(
        3.0,
        description="A worker is ejected if it answers no probe and sends nothing on any leg for this many "
        "seconds.",
    )
    consecutive_errors: Reloadable[int] = Field(
        5, ge=1, description="A worker is ejected if it answers this many legs in a row with a 5xx."
    )
    eject_s: Reloadable[Seconds] = Field(
        1.0,
        description="An ejected worker is probed again after at most this many seconds; the pause doubles "
        "each time that it fails in a row.",
    )
    eject_max_s: Reloadable[Seconds] = Field(
        30.0,
        description="The pause until an ejected worker is probed again does not grow beyond this many "
        "seconds.",
    )
    slow_outlier: Reloadable[Literal["warn", "eject", "off"]] = Field(
        "warn",
        description="A worker whose median of first bytes, or of times between tokens, is several times that "
        "of its peers is told as an event and in the log (warn), and also ejected unless half of its pool is "
        "out (eject), or nothing is done (off).",
    )
    slow_start_s: Reloadable[float] = Field(
        10.0,
        ge=0,
        description="A worker that comes back gets a growing share of the requests, and its full share after "
        "this many seconds. That shifts load to workers that are warm and have room; where there are none it "
        "gets all at once.",
    )


class ScalingConfig(Model):
    """Scaling says how many workers are wanted, from what the workers and their queues look like.

    Pools with `replicas: {min, max}` get them from `baton up`; for all others it is only said.
    """

    ttft_p95_s: Reloadable[Seconds] = Field(
        2.0,
        description="Of 100 answers 95 are to begin within this many seconds. If more begin later because "
        "prompts wait, one prefill worker more is wanted.",
    )
    itl_p95_ms: Reloadable[Annotated[float, Field(gt=0, le=MAX_SECONDS)]] = Field(
        50.0,
        description="Of 100 answers 95 are to have at most this many milliseconds between two tokens, on "
        "average. If more are slower, one decode worker more is wanted.",
    )
    prefill_busy: Reloadable[float] = Field(
        0.65,
        gt=0,
        lt=1,
        description="Prefill workers are to compute prompts for this share of the time; the rest is for the "
        "moments in which more comes.",
    )
    decode_seats: Reloadable[float] = Field(
        0.8, gt=0, le=1, description="This share of the seats of decode workers is to be taken."
    )
    up_after_s: Reloadable[Seconds] = Field(
        30.0,
        description="As many workers are wanted as the load of these last seconds needed at its highest.",
    )
    down_after_s: Reloadable[Seconds] = Field(
        300.0,
        description="One worker less is wanted if the load of these last seconds needed fewer at all times, "
        "and no worker of the pool is being drained.",
    )
    max_gpus: Reloadable[Annotated[int, Field(ge=1)] | None] = Field(
        None,
        description="All workers together have at most this many GPUs. If more are wanted, the role that "
        "has the smallest part of what it wants comes first.",
    )


def _ray_address(value: str) -> str:
    """Return where a cluster of Ray is. Ray's client protocol is none: it leads to a cluster from outside."""
    if value.startswith("ray://"):
        raise ValueError(
            "run `baton up` on a node of the cluster, and write auto or HOST:PORT in place of ray://"
        )
    if value not in ("auto", "local"):
        split_address(value)
    return value


def _resource(value: str) -> str:
    if value in ("CPU", "GPU", ""):
        raise ValueError("give CPUs as cpus, and GPUs as gpus_per_replica of the pool")
    return value


class RayConfig(Model):
    """Each worker is an actor of Ray, on a node that has what it needs."""

    address: Annotated[str, AfterValidator(_ray_address)] = Field(
        "auto",
        description="This is the cluster: the one that this machine is a node of (auto), the one whose head "
        "is at HOST:PORT, or one that is started here for the run (local).",
    )
    cpus: float = Field(
        0.1,
        gt=0,
        le=MAX_GPUS,
        description="Each worker takes so many of a node's CPUs for Ray's account; nodes that offer none get "
        "no workers.",
    )
    resources: dict[Annotated[str, AfterValidator(_resource)], Annotated[float, Field(gt=0)]] = Field(
        {}, description="Each worker takes so much of these resources, by their names in Ray."
    )
    spread: Literal["any", "node"] = Field(
        "any",
        description="The workers of a pool go to different nodes if there is room (any), or always (node), "
        "even if some have no place then.",
    )


class LaunchConfig(Model):
    """`baton up` starts workers there, and waits so long for the processes that it starts and stops."""

    backend: Literal["local", "ray", "slurm"] = Field(
        "local",
        description="Workers run there: on this machine (local), on the nodes of a cluster of Ray (ray), or "
        "where Slurm has a place (slurm).",
    )
    ray: RayConfig = Field(
        RayConfig(), description="This section says what workers on Ray need, if launch.backend is ray."
    )
    slurm: SlurmConfig = Field(
        SlurmConfig(), description="This section says how workers get their places, if it is slurm."
    )
    orchestrators: int = Field(
        1,
        ge=1,
        le=100,
        description="This many orchestrators are started, which know nothing of each other, for a balancer "
        "in front of them: each listens 10 ports above the one before.",
    )
    start_timeout_s: Seconds = Field(
        1800.0, description="A process that is not ready this many seconds after its start has failed."
    )
    stop_timeout_s: Seconds = Field(
        15.0, description="A worker that has not ended this many seconds after SIGTERM is killed."
    )
    log_max_mb: float = Field(
        64.0,
        ge=0,
        le=1e6,
        description="A process's log that has grown to this many MiB becomes LOG.1, and a new one begins; "
        "with 0 it grows on.",
    )
    log_files: int = Field(
        4, ge=0, le=1000, description="This many earlier logs of each process are kept: LOG.1 is the latest."
    )
    keep_runs: int = Field(
        10,
        ge=1,
        description="The logs of this many runs are kept below `.baton`, with the run that begins.",
    )
    keep_mb: float = Field(
        4096.0,
        ge=0,
        le=1e9,
        description="The logs of earlier runs have at most this many MiB together; the oldest are removed.",
    )
    kubernetes: KubernetesRenderConfig | None = Field(
        None, description="This section says what `baton render` makes of the file for Kubernetes."
    )


class Config(Model):
    orchestrator: OrchestratorConfig = Field(
        OrchestratorConfig(), description="This section describes the orchestrator, which clients talk to."
    )
    models: list[ModelConfig] = Field(
        min_length=1, description="These models are served, each by workers of its own."
    )
    routing: RoutingConfig = Field(
        RoutingConfig(), description="This section says which workers serve a request."
    )
    health: HealthConfig = Field(
        HealthConfig(), description="This section says when workers are taken out of service and come back."
    )
    scaling: ScalingConfig | None = Field(
        None,
        description="This section says how many workers are wanted; without it nobody counts that.",
    )
    launch: LaunchConfig = Field(
        LaunchConfig(), description="This section says how `baton up` waits for the processes that it starts."
    )
    aliases: Reloadable[dict[AdapterName, str]] = Field(
        {},
        description="Clients may call a model or an adapter by these names, too: `aliases: {gpt-4: qwen}`. "
        "An answer has the name that its worker gives.",
    )
    base_port: Port = Field(8100, description="Ports that are not given are allotted from this one upwards.")
