"""Every option, declared once: the CLI, `baton schema` and the docs derive from these models.

Models are frozen, reject unknown keys, and take a value only as the type that it is (`"8000"` is no
number). They hold values only: a file becomes a `Config` in `config/file.py`, what no single value can
tell is checked in `config/checks.py`, which process listens where is worked out by `config/addresses.py`,
what is started by `launch/plan.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from orchestrator.config.base import Model
from orchestrator.config.policies import Policy, policy_named
from orchestrator.wire.info import Role

# vLLM's: 30.3 s passed on 0.32 until the blocks of a prefill that nobody pulled were free.
LEASE_S = 30.0

WILDCARDS = frozenset({"0.0.0.0", "::"})


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` to (host without brackets, port). ValueError says what is wrong."""
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


def _worker_host(value: str) -> str:
    if value in WILDCARDS:
        raise ValueError(f"workers are reached at their host, and {value!r} is no address to reach")
    if not value or "/" in value or (":" in value and (value.count(":") == 1 or "[" in value)):
        raise ValueError(f"expected a host name or an address without port, got {value!r}")
    return value


def _worker_url(value: str) -> str:
    """`http(s)://HOST[:PORT]` with the port written out."""
    parts = urlsplit(value)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        raise ValueError(f"expected http://HOST:PORT or https://HOST:PORT, got {value!r}") from None
    host = parts.hostname or ""
    if not host or "@" in parts.netloc or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"expected only http(s)://HOST:PORT, got {value!r}")
    return f"{parts.scheme}://{join_address(host, port)}"


def join_address(host: str, port: int) -> str:
    """The opposite of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _text(value: Any) -> Any:
    """Numbers are welcome where only text is possible: `args: [--max-model-len, 4096]`."""
    if isinstance(value, bool) or value is None:
        raise ValueError("write the value in quotes")
    return str(value) if isinstance(value, int | float) else value


Address = Annotated[str, AfterValidator(_address)]
Host = Annotated[str, AfterValidator(_worker_host)]
Url = Annotated[str, AfterValidator(_worker_url)]
Text = Annotated[str, BeforeValidator(_text)]
Port = Annotated[int, Field(ge=1, le=65535)]
Gpu = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


class TlsConfig(Model):
    cert: str = Field(description="PEM file with the certificate chain.")
    key: str = Field(description="PEM file with the private key.")


class LogConfig(Model):
    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"
    access: bool = Field(True, description="One line per request. Never holds prompt or answer text.")
    slow_request_s: Seconds = Field(
        30.0, description="Slower requests are one warning line with their stages."
    )
    stall_s: Seconds = Field(
        0.25, description="An event loop that is held up for longer is a warning line that says by what."
    )


class LimitsConfig(Model):
    """Deadlines and bounds of the client side (408, 413, 414, 431) and of a request as a whole (504)."""

    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024)
    max_answer_bytes: int = Field(
        64 * 1024 * 1024, ge=1024, description="Bound of a buffered non-streaming answer."
    )
    max_held_bytes: int = Field(
        1024 * 1024 * 1024,
        ge=1024,
        description="Of bodies of open requests, and of answers that have come in and not gone out; while "
        "there is more, new requests are answered 503.",
    )
    header_timeout_s: Seconds = 10.0
    body_idle_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 60.0
    request_timeout_s: Seconds = Field(
        600.0,
        description="To the first event of a stream, or to the end of a non-streaming answer; a client asks "
        "for less with the header x-request-timeout, in seconds.",
    )
    first_byte_timeout_s: Seconds = Field(
        300.0, description="From a prefill leg, or the leg of a stream, to the first byte of its answer."
    )
    stream_idle_timeout_s: Seconds = Field(
        120.0, description="A stream is limited by silence, not by its length."
    )
    max_kept_bytes: int = Field(
        512 * 1024 * 1024,
        ge=0,
        description="Of what open streams have sent, kept so that another worker can go on with them.",
    )
    client_write_timeout_s: Seconds = Field(
        60.0,
        description="A client is cut off that takes less than 16 KiB in so long while more waits for it.",
    )
    leg_silence_s: Seconds = Field(
        3.0,
        description="A leg that is silent for so long, on a worker that no longer answers probes, is lost.",
    )
    connect_timeout_s: Seconds = 5.0


class QueueConfig(Model):
    """Requests that wait for a seat on a decode worker, for each model. More are answered 429 at once."""

    requests: int = Field(1024, ge=0, description="0: nobody waits.")
    tokens: int = Field(
        4_000_000, ge=0, description="Of prompts: token ids are counted, of text there is one per four bytes."
    )
    bytes: int = Field(64 * 1024 * 1024, ge=0, description="Of request bodies.")
    timeout_s: Seconds = Field(
        30.0,
        description="Who has waited for so long is answered 503; who would have to, by the recent rate, 429.",
    )


class OrchestratorConfig(Model):
    listen: Address = Field(
        "127.0.0.1:8000", description="Data plane, and /health, /ready, /version, /v1/models."
    )
    admin: Address | None = Field(None, description="Metrics and admin API; omit to turn off.")
    processes: int = Field(
        1, ge=1, description="How many serve requests. What is limited below is limited in each."
    )
    api_keys_file: str | None = Field(
        None,
        description="Lines `NAME SHA256HEX` (printf %s KEY | sha256sum); clients send KEY as bearer token.",
    )
    insecure_no_auth: bool = Field(False, description="Listen beyond loopback without keys.")
    tls: TlsConfig | None = None
    log: LogConfig = LogConfig()
    limits: LimitsConfig = LimitsConfig()
    queue: QueueConfig = QueueConfig()
    # uvicorn's settings, under uvicorn's names
    backlog: int = Field(2048, ge=1)
    limit_concurrency: int | None = Field(
        None, ge=1, description="Requests in progress; more are answered 503."
    )
    limit_max_requests: int | None = Field(None, ge=1)
    limit_max_requests_jitter: int = Field(0, ge=0)
    timeout_keep_alive: int = Field(75, ge=1)
    timeout_graceful_shutdown: int = Field(
        30, ge=0, description="Seconds from SIGTERM until open requests are ended with an error."
    )
    # what uvicorn has no setting for
    drain_notice_s: float = Field(
        0.0,
        ge=0,
        description="From SIGTERM on /ready is 503; for so long requests are still taken, so that load "
        "balancers can turn away before they are refused.",
    )
    hang_timeout_s: Seconds = Field(
        5.0, description="Of several processes, one whose event loop stands still for so long is replaced."
    )


class SimConfig(Model):
    """Latency model of the simulated engine. All zero: answers at once."""

    prefill_us_per_token: float = Field(0.0, ge=0)
    transfer_us_per_token: float = Field(0.0, ge=0)
    decode_ms_per_token: float = Field(0.0, ge=0, description="One step with one running request.")
    decode_ms_per_running: float = Field(
        0.0, ge=0, description="Added to a step per further running request."
    )
    block_size: int = Field(16, ge=1)
    num_blocks: int = Field(65536, ge=1)
    max_model_len: int = Field(1_000_000, ge=1)


class WorkerConfig(Model):
    """One worker at a place of its own (several machines, or a card shared by hand)."""

    host: Host = "127.0.0.1"
    port: Port | None = None
    side_channel_port: Port | None = Field(None, description="Where NIXL listens, on `host`.")
    gpus: list[Gpu] | None = Field(None, min_length=1, description="Default: the next ones of this host.")
    args: list[Text] = Field([], description="After the pool's, so that these win.")
    env: dict[str, Text] = Field({}, description="Over the pool's.")


DEFAULT_SEATS = 1024  # vLLM's on its large cards


class PoolConfig(Model):
    """Workers of one role: `replicas` here, or `workers` by host, or `urls` that Baton never starts."""

    engine: Literal["vllm", "sim"] = "vllm"
    device: Literal["cuda", "cpu"] = "cuda"
    replicas: int | None = Field(None, ge=1)
    gpus_per_replica: int = Field(1, ge=1)
    workers: list[WorkerConfig] | None = Field(None, min_length=1)
    urls: list[Url] | None = Field(None, min_length=1)
    served_model: str | None = Field(None, description="The workers' own name of the model, if it differs.")
    seats: int = Field(
        DEFAULT_SEATS,
        ge=1,
        description="Requests that each worker serves at once, as vLLM's --max-num-seqs has it; more wait in "
        "the orchestrator's queue. Not for prefill. With several processes each has its share of them.",
    )
    args: list[Text] = Field([], description="Further arguments of the engine, for every worker of the pool.")
    env: dict[str, Text] = Field({}, description="Environment on top of the inherited one.")
    sim: SimConfig = SimConfig()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("replicas", "workers", "urls") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of replicas, workers, urls, not {' and '.join(given)}")
        return self

    @property
    def is_managed(self) -> bool:
        """Whether Baton starts the workers."""
        return self.urls is None


class ModelConfig(Model):
    name: str = Field(min_length=1, description='What clients put in "model".')
    path: str | None = Field(
        None, description="A directory, or a hub name; not needed when all workers are urls."
    )
    prefill: PoolConfig | None = None
    decode: PoolConfig | None = None
    both: PoolConfig | None = Field(None, description="Workers that do both: aggregated serving.")

    def pools(self) -> Iterator[tuple[Role, PoolConfig]]:
        """The pools that the model has: prefill, decode, both."""
        if self.prefill is not None:
            yield "prefill", self.prefill
        if self.decode is not None:
            yield "decode", self.decode
        if self.both is not None:
            yield "both", self.both


class RoutingConfig(Model):
    prefill: Policy = Field(
        policy_named("round_robin"),
        description="The policy that chooses the prefill worker: its name, or a mapping with its arguments.",
    )
    decode: Policy = Field(
        policy_named("least_loaded"),
        description="The policy that chooses the decode worker, or the worker that serves a request alone.",
    )
    disaggregate: Literal["always", "strict", "never"] = Field(
        "always",
        description="always: two legs, but while no prefill worker is left, decode workers prefill, too; "
        "strict: requests are answered 503 then; never: one worker serves each request.",
    )
    tokenize_once: bool = Field(
        True, description="Send the prompt's token ids to decode workers that announce that they take them."
    )
    failover: bool = Field(
        True, description="When a worker is lost in the middle of a stream, another one goes on with it."
    )
    kv_lease_s: Seconds = Field(
        LEASE_S,
        description="How long prefill workers pin KV blocks that nobody pulls; the engine decides that.",
    )
    kv_missing: Literal["warn", "fail", "allow"] = Field(
        "warn",
        description="When a decode worker computes the prompt's KV cache again: a line in the log, and with "
        "fail also 502 for answers that are not streamed.",
    )


class HealthConfig(Model):
    """When a worker is taken out of service, and how it comes back. A refused connection counts at once."""

    interval_s: Seconds = Field(0.75, description="Between two probes of a worker, give or take a fifth.")
    timeout_s: Seconds = Field(1.0, description="For a probe of a worker in service.")
    suspect_s: Seconds = Field(
        0.4,
        description="A worker that lost a leg, or failed a probe, is ejected unless it gives a sign by then.",
    )
    silence_s: Seconds = Field(
        3.0, description="A worker is ejected that answers no probe and sends nothing on any leg for so long."
    )
    consecutive_errors: int = Field(
        5, ge=1, description="A worker is ejected that answers so many legs in a row with a 5xx."
    )
    eject_s: Seconds = Field(
        1.0, description="Until an ejected worker is probed, at most; doubled each time in a row."
    )
    eject_max_s: Seconds = Field(30.0, description="Bound of that.")
    slow_start_s: float = Field(
        10.0, ge=0, description="A worker that comes back gets its full share of requests after so long."
    )


class LaunchConfig(Model):
    """How `baton up` waits for the processes that it starts and stops."""

    start_timeout_s: Seconds = Field(1800.0, description="From its start until a process must be ready.")
    stop_timeout_s: Seconds = Field(15.0, description="From SIGTERM to SIGKILL, for each worker.")


class Config(Model):
    orchestrator: OrchestratorConfig = OrchestratorConfig()
    models: list[ModelConfig] = Field(min_length=1)
    routing: RoutingConfig = RoutingConfig()
    health: HealthConfig = HealthConfig()
    launch: LaunchConfig = LaunchConfig()
    base_port: Port = Field(8100, description="Ports that are not given are allotted upwards from here.")
