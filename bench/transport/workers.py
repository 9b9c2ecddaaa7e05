"""The transport study has workers of both engines, and orchestrators in front of simulated ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.shared.baton import Process, baton, config, sim_worker, urls, wait_ready
from bench.shared.cores import Cores
from bench.shared.processes import children, free_port, pin, thread_seconds, threads_seconds
from bench.transport.legs import AGAIN, MODEL, Arm
from bench.transport.model import CONTEXT, write_model

Engine = Literal["sim", "vllm"]

START_LIMIT_S = 300.0
STEP_MS = 20  # between two tokens of the simulated worker; vLLM's engine is as quick as it can

# The simulated engine runs on the worker's event loop; with large blocks that takes next to nothing.
_SIM_OPTIONS = (
    *("--block-size", "65536", "--num-blocks", "4096", "--max-model-len", str(1 << 23)),
    *("--decode-ms-per-token", str(STEP_MS)),
)
_VLLM_ARGS = ["--load-format", "dummy", "--max-model-len", str(CONTEXT), "--max-num-seqs", "96"]


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
    start = {"sim": _sim, "vllm": _vllm}[engine]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if engine == "vllm":
            write_model(folder)
        names = dict.fromkeys(arm.server for arm in arms)
        yield {name: stack.enter_context(start(name, folder, cores)) for name in names}


@contextmanager
def _sim(server: str, folder: Path, cores: Cores) -> Iterator[Server]:
    with sim_worker(*_SIM_OPTIONS, model=MODEL, cores=cores.router, env=_transport(server)) as process:
        yield Server(process.pid, process.port)


@contextmanager
def _vllm(server: str, folder: Path, cores: Cores) -> Iterator[Server]:
    """Start it as `baton worker` does. The engine core goes to the core of the load."""
    port = free_port()
    pool = {"device": "cpu", "workers": [{"host": "127.0.0.1", "port": port}], "args": _VLLM_ARGS}
    document = {"models": [{"name": MODEL, "path": str(folder), "both": pool}]}
    name, env = f"{MODEL}/both/0", _transport(server)
    with baton("worker", document, port, name, cores=cores.router, env=env, limit_s=START_LIMIT_S) as process:
        for child in children(process.pid):
            pin(child, cores.other)
        yield Server(process.pid, port)


@contextmanager
def orchestrators(arms: list[Arm], cores: Cores) -> Iterator[Mapping[str, Server]]:
    """Run an orchestrator for each arm, by its name, over simulated workers of the arm's transport."""
    with ExitStack() as stack:
        here = Cores(router=cores.other, other=cores.other)
        by_transport = {arm.transport: Arm(arm.transport, arm.transport) for arm in arms}
        pair = [stack.enter_context(workers("sim", list(by_transport.values()), here)) for _ in range(2)]
        yield {arm.name: stack.enter_context(_orchestrator(arm, pair, cores)) for arm in arms}


@contextmanager
def _orchestrator(arm: Arm, pair: list[Servers], cores: Cores) -> Iterator[Server]:
    port = free_port()
    prefill, decode = (urls(workers[arm.transport].port) for workers in pair)
    document = config(port, {"prefill": prefill, "decode": decode}, MODEL)
    document["routing"] = {"tokenize_once": arm.ids is not None}
    env = _transport(arm.server)
    with baton("orchestrator", document, port, cores=cores.router, env=env) as process:
        wait_ready(port)
        yield Server(process.pid, port, has_helpers=True)


def _transport(server: str) -> dict[str, str]:
    return {"BATON_TRANSPORT": server.removesuffix(AGAIN)}
