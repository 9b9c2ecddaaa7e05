"""The processes of the transport study: workers of both engines, orchestrators in front of simulated ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.compare.cluster import Cores
from bench.embeddings.__main__ import wait_until_ready
from bench.shared.processes import free_port, pin, python, running
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
_VLLM_CONFIG = """\
models:
  - name: {model}
    path: {folder}
    both:
      device: cpu
      workers: [{{host: 127.0.0.1, port: {port}}}]
      args: [--load-format, dummy, --max-model-len, "{context}", --max-num-seqs, "96"]
"""
_ORCHESTRATOR_CONFIG = """\
orchestrator: {{listen: "127.0.0.1:{port}"}}
models:
  - name: {model}
    prefill: {{urls: ["http://127.0.0.1:{prefill}"]}}
    decode: {{urls: ["http://127.0.0.1:{decode}"]}}
routing: {{tokenize_once: {tokenizes_once}}}
"""


@dataclass(frozen=True)
class Server:
    """A worker or an orchestrator at work, whose event loop is the main thread."""

    pid: int
    port: int
    has_helpers: bool = False  # its children work for it: an engine core does not count, helpers do

    def loop_seconds(self) -> float:
        """CPU of the event loop's thread."""
        return _ran_s(Path(f"/proc/{self.pid}/task/{self.pid}"))

    def cpu_seconds(self) -> float:
        """CPU of all threads, its helpers' too."""
        members = [self.pid, *(_children(self.pid) if self.has_helpers else [])]
        return sum(_ran_s(task) for member in members for task in Path(f"/proc/{member}/task").iterdir())


def _ran_s(task: Path) -> float:
    """In nanoseconds where /proc/PID/stat has ticks of 10 ms. 0 for a thread that has just ended."""
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:
        return 0.0


Servers = Mapping[str, Server]  # by `Arm.server`


@contextmanager
def workers(engine: Engine, arms: list[Arm], cores: Cores) -> Iterator[Servers]:
    """A worker for each of the arms' servers, its API server alone on a core while others are idle."""
    start = {"sim": _sim, "vllm": _vllm}[engine]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if engine == "vllm":
            write_model(folder)
        names = dict.fromkeys(arm.server for arm in arms)
        yield {name: stack.enter_context(start(name, folder, cores)) for name in names}


@contextmanager
def _sim(server: str, folder: Path, cores: Cores) -> Iterator[Server]:
    port = free_port()
    argv = python("-m", "worker.sim", "--model-name", MODEL, "--port", str(port), *_SIM_OPTIONS)
    with running(argv, port, cores=cores.router, env=_transport(server)) as pid:
        yield Server(pid, port)


@contextmanager
def _vllm(server: str, folder: Path, cores: Cores) -> Iterator[Server]:
    """As `baton worker` starts it. The engine core goes to the core of the load."""
    port = free_port()
    config = folder / f"{port}.yaml"
    config.write_text(_VLLM_CONFIG.format(model=MODEL, folder=folder, port=port, context=CONTEXT))
    argv = python("-m", "launch.cli", "worker", str(config), f"{MODEL}/both/0")
    with running(argv, port, cores=cores.router, env=_transport(server), limit_s=START_LIMIT_S) as pid:
        for child in _children(pid):
            pin(child, cores.other)
        yield Server(pid, port)


@contextmanager
def orchestrators(arms: list[Arm], cores: Cores) -> Iterator[Mapping[str, Server]]:
    """An orchestrator for each arm, by its name, over simulated workers of the arm's transport."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        here = Cores(router=cores.other, other=cores.other)
        by_transport = {arm.transport: Arm(arm.transport, arm.transport) for arm in arms}
        pair = [stack.enter_context(workers("sim", list(by_transport.values()), here)) for _ in range(2)]
        yield {arm.name: stack.enter_context(_orchestrator(arm, pair, folder, cores)) for arm in arms}


@contextmanager
def _orchestrator(arm: Arm, pair: list[Servers], folder: Path, cores: Cores) -> Iterator[Server]:
    port = free_port()
    prefill, decode = (workers[arm.transport].port for workers in pair)
    config = folder / f"{port}.yaml"
    config.write_text(
        _ORCHESTRATOR_CONFIG.format(
            port=port,
            model=MODEL,
            prefill=prefill,
            decode=decode,
            tokenizes_once=str(arm.ids is not None).lower(),
        )
    )
    argv = python("-m", "launch.cli", "orchestrator", str(config))
    with running(argv, port, cores=cores.router, env=_transport(arm.server)) as pid:
        wait_until_ready(port)
        yield Server(pid, port, has_helpers=True)


def _transport(server: str) -> dict[str, str]:
    return {"BATON_TRANSPORT": server.removesuffix(AGAIN)}


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
