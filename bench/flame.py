"""py-spy shows where the orchestrator's microseconds go: flame graphs, and a table by stage.

    make profile                                    # or: .venv/bin/python -m bench.flame [--seconds N]

Baton relays between two mock workers, on a core of its own, first small chats, then streams of 64 events. For
each load py-spy samples it twice: bench/results/flame-LOAD.svg is the graph; from the second sampling comes
the table. What C code and the kernel take counts for the Python function that called them, so a write to a
socket is in the stage that writes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from bench.compare.cluster import Target, at_work, mock_workers
from bench.compare.routers import ROUTERS
from bench.shared.bodies import small_chat
from bench.shared.command import parser
from bench.shared.cores import share_cores
from bench.shared.load import Result, run_load
from bench.shared.processes import ROOT, cpu_seconds
from bench.shared.record import RESULTS

PY_SPY = Path(sys.executable).with_name("py-spy")
RATE = 500  # samples per second
EVENTS = 64
LOADS: dict[str, bytes] = {"small": small_chat(), "sse": small_chat(stream=True)}
CONNECTIONS = 64
BATCH = 20 * CONNECTIONS  # requests, between two looks at whether py-spy is done

# By the innermost frame of ours in a sample: part of its path, and the stage it belongs to.
STAGES = {
    "orchestrator/http/": "HTTP server",
    "orchestrator/transport/": "HTTP client",
    "orchestrator/wire/": "view, splice, hand-off, events",
    "orchestrator/api/": "view, splice, hand-off, events",
    "orchestrator/legs/bodies.py": "view, splice, hand-off, events",
    "orchestrator/legs/connectors/": "view, splice, hand-off, events",
    "orchestrator/routing/": "routing and leases",
    "orchestrator/workers/": "routing and leases",
    "orchestrator/relay/": "flow and relay",
    "orchestrator/legs/": "flow and relay",
    "orchestrator/telemetry/": "counters and access log",
}
LOOP = "event loop, reads, timers"


def stage_of(stack: str) -> str:
    """Tell the stage of a sample: frames from the outermost to the innermost, separated by semicolons."""
    for frame in reversed(stack.split(";")):
        for part, stage in STAGES.items():
            if part in frame:
                return stage
    return LOOP


def shares(lines: Iterable[str]) -> dict[str, float]:
    """Return each stage's share of the samples in py-spy's raw format, the largest first."""
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rstrip().rpartition(" ")
        counts[stage_of(stack)] += int(count)
    total = counts.total()
    return {stage: count / total for stage, count in counts.most_common()}


@contextmanager
def loaded(target: Target, body: bytes) -> Iterator[Callable[[], int]]:
    """Load until the block ends; yield what tells how many requests were answered so far."""
    is_over, answered = threading.Event(), [0]

    def drive() -> None:
        while not is_over.is_set():
            result: Result = uvloop.run(run_load(target.port, body, requests=BATCH, connections=CONNECTIONS))
            answered[0] += result.requests - result.failed

    thread = threading.Thread(target=drive)
    thread.start()
    try:
        yield lambda: answered[0]
    finally:
        is_over.set()
        thread.join()


def sample(pid: int, seconds: int, output: Path, kind: str) -> None:
    """Raises CalledProcessError with py-spy's reason, for instance that it may not look into processes."""
    options = ["--pid", str(pid), "--duration", str(seconds), "--rate", str(RATE), "--full-filenames"]
    subprocess.run(
        [PY_SPY, "record", *options, "--format", kind, "--output", output, "--nonblocking"],
        check=True,
        capture_output=True,
        text=True,
    )


def profile(target: Target, name: str, seconds: int) -> None:
    graph = RESULTS / f"flame-{name}.svg"
    with tempfile.TemporaryDirectory() as folder, loaded(target, LOADS[name]) as answered:
        raw = Path(folder, "stacks.txt")
        sample(target.pid, seconds, graph, "flamegraph")
        sample(target.pid, seconds, raw, "raw")
        cpu, count = cpu_seconds(target.pid), answered()
        threading.Event().wait(seconds)  # the figure itself is taken without py-spy
        microseconds = (cpu_seconds(target.pid) - cpu) / (answered() - count) * 1e6
        report(name, microseconds, shares(raw.read_text().splitlines()))
    print(f"{graph.relative_to(ROOT)}\n")


def report(name: str, microseconds: float, by_stage: dict[str, float]) -> None:
    unit = "per event, of streams of 64" if name == "sse" else "per request"
    per = EVENTS if name == "sse" else 1
    print(f"{name}: {microseconds / per:.1f} us of CPU {unit}")
    for stage, share in by_stage.items():
        print(f"  {stage:<36}{share:>7.1%}{microseconds / per * share:>9.1f} us")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seconds", type=int, default=10, help="of each sampling")
    seconds = options.parse_args().seconds
    RESULTS.mkdir(exist_ok=True)
    cores = share_cores()
    baton = next(router for router in ROUTERS if router.name == "baton")
    for name in LOADS:
        with (
            mock_workers(cores.other, ("--gap-ms", "5")) as workers,
            at_work(baton, workers, cores.router) as target,
        ):
            profile(target, name, seconds)


if __name__ == "__main__":
    main()
