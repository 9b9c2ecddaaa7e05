"""A simulated worker is started with these settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from orchestrator.wire.info import DEFAULT_STREAMS, DEFAULT_TRANSPORT, Encoding, Role, Streams
from worker.sim.faults import Fault
from worker.sim.latency import Latency

_HEARTBEATS_PER_LEASE = 6

LoadFailurePolicy = Literal["fail", "recompute"]
SchedulingPolicy = Literal["fcfs", "priority"]  # prompts wait as they came, or by their requests' priorities
# Blocks that are pulled when their lease is over cannot be had, or are what vLLM (0.32) gives: whatever is in
# them by then, and nobody is told.
LatePulls = Literal["fail", "stale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """A worker says this of itself, true or not, so that others can tell whether they fit it."""

    is_plain: bool = False  # it announces nothing, like vLLM without our plugin
    path: str | None = None
    revision: str | None = None
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    tp: int = 1
    connector: str = "sim"
    engine_version: str | None = None  # None: the real one
    kv_tokens: int | None = None  # in place of those that fit
    host: str | None = None  # where others reach its side channel; None: where it listens
    streams: Streams = DEFAULT_STREAMS  # and serves: "mux" is true of all that announce it


@dataclass(frozen=True, slots=True, kw_only=True)
class Publishing:
    """The events of the prefix cache are published at ZeroMQ endpoints."""

    endpoint: str | None = None  # None: they are not
    replay: str | None = None  # where missed batches can be asked for
    buffer: int = 10_000  # batches that can be


@dataclass(frozen=True, slots=True, kw_only=True)
class Defects:
    """This is wrong with a worker, beside the faults that it commits."""

    weights: str = ""  # a model with other weights answers with other words
    advertised_port: int | None = None  # of the side channel, in hand-offs; None: the real one
    clock_offset_s: float = 0.0  # of the Date in its answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`side_channel_port` 0 takes a free port; the engine then names the real one in its hand-offs."""

    model_name: str
    adapters: tuple[str, ...] = ()  # that requests can name in place of the model
    role: Role = "both"
    host: str = "127.0.0.1"
    side_channel_port: int = 0
    transport: Encoding = DEFAULT_TRANSPORT
    latency: Latency = field(default_factory=Latency)
    block_size: int = 16
    num_blocks: int = 65536
    max_model_len: int = 1_000_000
    max_num_seqs: int = 256
    lease_s: float = 30.0
    load_failure_policy: LoadFailurePolicy = "fail"
    late_pulls: LatePulls = "fail"
    data_parallel_size: int = 1  # engines behind one server
    scheduling_policy: SchedulingPolicy = "fcfs"
    seed: int = 0
    api_keys: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    stores_responses: bool = False  # as with VLLM_ENABLE_RESPONSES_API_STORE=1
    kv_events: Publishing = field(default_factory=Publishing)
    caches: bool = True  # prompts are found in the prefix cache
    announced: Announced = field(default_factory=Announced)
    defects: Defects = field(default_factory=Defects)
    record: int = 0  # how many request bodies GET /sim/requests keeps

    @property
    def heartbeat_s(self) -> float:
        """A decode worker says so often that it still waits for a KV cache."""
        return self.lease_s / _HEARTBEATS_PER_LEASE

    @property
    def advertised_host(self) -> str:
        """Return the host that hand-offs name."""
        return self.announced.host or self.host

    @property
    def context_tokens(self) -> int:
        """A prompt must fit into the blocks, or it would wait for ever."""
        return min(self.max_model_len, self.block_size * self.num_blocks)
