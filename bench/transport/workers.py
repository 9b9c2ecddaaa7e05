"""The transport study has workers of both engines, and orchestrators in front of simulated ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.shared.baton import Process, baton, config, sim_worker, urls, wait_ready
from bench.shared.cores import Cores
from bench.shared.processes import children, free_port, pin, thread_seconds, threads_seconds
from bench.transport.legs import AGAIN, MODEL, Arm
from bench.transport.model import CONTEXT, write_model
from orchestrator.wire.info import TRANSPORT_ENV

Engine = Literal["sim", "vllm"]

START_LIMIT_S = 300.0
STEP_MS = 20  # between two tokens of the simulated worker; vLLM's engine is as quick as it can

# The simulated engine runs on the worker's event loop; with large blocks that takes next to nothing.
_SIM_OPTIONS = (
    *("--block-size", "65536", "--num-blocks", "4096", "--max-model-len", str(1 << 23)),
    *("--decode-ms-per-token", str(STEP_MS)),
)
_VLLM_ARGS = ["--load-format", "dummy", "--max-model-len", str(CONTEXT)]
_SEATS = 96


@dataclass(frozen=True)
class Server(Process):
    """A worker or an orchestrator is at work; its event loop is the main thread."""

    has_helpers: bool = False  # its children work for it: an engine core does not count, helpers do

    def loop_seconds(self) -> float:
        """Return the CPU time of the event loop's thread."""
        return thread_seconds(Path(f"/proc/{self.pid}/task/{self.pid}"))

    def cpu_seconds(self) -> float:
        """Return the CPU time of all threads, its helpers' too."""
        return sum(map(threads_seconds, [self.pid, *(children(self.pid) if self.has_helpers else [])]))


Servers = Mapping[str, Server]  # by `Arm.server`


@contextmanager
def workers(engine: Engine, arms: list[Arm], cores: Cores) -> Iterator[Servers]:
    """Run a worker for each of the arms' servers, its API server alone on a core while others are idle."""
    names = dict.fromkeys(arm.server for arm in arms)
    with ExitStack() as stack:
        folder = stack.enter_context(_model(engine))
        yield {
            name: stack.enter_context(_START[engine](folder, cores, _transport(name), _SEATS))
            for name in names
        }


@contextmanager
def worker(engine: Engine, cores: Cores, env: Mapping[str, str], seats: int) -> Iterator[Server]:
    """Run one worker in this environment; its engine takes up to `seats` requests at a time."""
    with _model(engine) as folder, _START[engine](folder, cores, env, seats) as server:
        yield server


@contextmanager
def _model(engine: Engine) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if engine == "vllm":
            write_model(folder)
        yield folder


@contextmanager
def _sim(folder: Path, cores: Cores, env: Mapping[str, str], seats: int) -> Iterator[Server]:
    options = (*_SIM_OPTIONS, "--max-num-seqs", str(max(256, seats)))
    with sim_worker(*options, model=MODEL, cores=cores.router, env=env) as process:
        yield Server(process.pid, process.port)


@contextmanager
def _vllm(folder: Path, cores: Cores, env: Mapping[str, str], seats: int) -> Iterator[Server]:
    """Start it as `baton worker` does. The engine core goes to the core of the load."""
    port = free_port()
    args = [*_VLLM_ARGS, "--max-num-seqs", str(seats)]
    pool = {"device": "cpu", "workers": [{"host": "127.0.0.1", "port": port}], "args": args}
    document = {"models": [{"name": MODEL, "path": str(folder), "both": pool}]}
    name = f"{MODEL}/both/0"
    with baton("worker", document, port, name, cores=cores.router, env=env, limit_s=START_LIMIT_S) as process:
        for child in children(process.pid):
            pin(child, cores.other)
        yield Server(process.pid, port)


_START = {"sim": _sim, "vllm": _vllm}


@contextmanager
def orchestrators(arms: list[Arm], cores: Cores) -> Iterator[Mapping[str, Server]]:
    """Run an orchestrator for each arm, by its name, over simulated workers of the arm's transport."""
    with ExitStack() as stack:
        here = Cores(router=cores.other, other=cores.other)
        by_transport = {arm.transport: Arm(arm.transport, arm.transport) for arm in arms}
        pair = [stack.enter_context(workers("sim", list(by_transport.values()), here)) for _ in range(2)]
        yield {arm.name: stack.enter_context(_orchestrator(arm, pair, cores)) for arm in arms}


def _orchestrator(arm: Arm, pair: list[Servers], cores: Cores) -> AbstractContextManager[Server]:
    prefill, decode = (urls(workers[arm.transport].port) for workers in pair)
    routing = {"tokenize_once": arm.ids is not None}
    pools = {"prefill": prefill, "decode": decode}
    return orchestrator(pools, cores.router, _transport(arm.server), routing=routing)


@contextmanager
def orchestrator(
    pools: Mapping[str, Any],
    cores: Set[int],
    env: Mapping[str, str],
    routing: Mapping[str, Any] | None = None,
) -> Iterator[Server]:
    """Run an orchestrator before these pools, and yield it once it is ready."""
    port = free_port()
    document = {**config(port, pools, MODEL), "routing": routing or {}}
    with baton("orchestrator", document, port, cores=cores, env=env) as process:
        wait_ready(port)
        yield Server(process.pid, port, has_helpers=True)


def _transport(server: str) -> dict[str, str]:
    return {TRANSPORT_ENV: server.removesuffix(AGAIN)}
