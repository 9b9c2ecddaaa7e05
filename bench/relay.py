"""What the relay costs: CPU of the router's process tree per small chat request, beside a plain proxy.

    python bench/relay.py [--requests N] [--rounds N]

Two mock workers; Baton and a FastAPI + aiohttp two-leg proxy in turn, on one core, the load and the workers
on the other. Rounds are interleaved; the figure is the median of the ratios of neighbouring rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import uvloop
from load import Result, run_load
from processes import cpu_seconds, free_port, python, running

GOAL = 0.35  # Baton's CPU per request over the proxy's
BODY = json.dumps(
    {
        "model": "mock",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant who answers in one sentence."},
            {"role": "user", "content": "What is the difference between prefill and decode?"},
        ],
        "max_tokens": 64,
        "temperature": 0,
    },
    separators=(",", ":"),
).encode()

CONFIG = """
orchestrator: {{listen: "127.0.0.1:{port}", log: {{access: {access}}}}}
models:
  - name: mock
    prefill: {{urls: ["http://127.0.0.1:{prefill}"]}}
    decode: {{urls: ["http://127.0.0.1:{decode}"]}}
"""


@contextmanager
def baton(core: int, prefill: int, decode: int, transport: str = "json") -> Iterator[tuple[int, int]]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "bench.yaml")
        config.write_text(CONFIG.format(port=port, prefill=prefill, decode=decode, access="true"))
        argv = python("-m", "launch.cli", "orchestrator", str(config))
        with running(argv, port, core=core, env={"BATON_TRANSPORT": transport}) as pid:
            _wait_until_ready(port)
            yield pid, port


def _wait_until_ready(port: int) -> None:
    for _ in range(100):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:
            continue
    raise RuntimeError("the orchestrator does not get ready")


@contextmanager
def aiohttp_proxy(core: int, prefill: int, decode: int) -> Iterator[tuple[int, int]]:
    port = free_port()
    urls = ["--prefill", f"http://127.0.0.1:{prefill}", "--decode", f"http://127.0.0.1:{decode}"]
    with running(python("bench/aiohttp_proxy.py", "--port", str(port), *urls), port, core=core) as pid:
        yield pid, port


def measure(pid: int, port: int, requests: int, connections: int) -> tuple[float, Result]:
    """CPU microseconds per request, and what the load saw."""
    before = cpu_seconds(pid)
    result = uvloop.run(run_load(port, BODY, requests=requests, connections=connections))
    if result.failed:
        raise RuntimeError(f"{result.failed} of {result.requests} requests failed")
    return (cpu_seconds(pid) - before) / result.requests * 1e6, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=32)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    router_core, other_core = cores[0], cores[-1]
    os.sched_setaffinity(0, {other_core})
    with ExitStack() as stack:
        prefill, decode = (free_port() for _ in range(2))
        for port in (prefill, decode):
            stack.enter_context(
                running(python("bench/mock_worker.py", "--port", str(port)), port, core=other_core)
            )
        routers = {
            "baton": stack.enter_context(baton(router_core, prefill, decode)),
            "aiohttp proxy": stack.enter_context(aiohttp_proxy(router_core, prefill, decode)),
        }
        report(rounds_of(routers, arguments.rounds, arguments.requests, arguments.connections))


def rounds_of(
    routers: dict[str, tuple[int, int]], rounds: int, requests: int, connections: int
) -> dict[str, list[tuple[float, Result]]]:
    figures: dict[str, list[tuple[float, Result]]] = {name: [] for name in routers}
    for pid, port in routers.values():
        measure(pid, port, requests // 10, connections)  # warm-up
    for _ in range(rounds):
        for name, (pid, port) in routers.items():
            figures[name].append(measure(pid, port, requests, connections))
    return figures


def report(figures: dict[str, list[tuple[float, Result]]]) -> None:
    print(f"{'router':<16}{'CPU us/request':>16}{'min-max':>16}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}")
    for name, rounds in figures.items():
        cpu = [microseconds for microseconds, _ in rounds]
        last = rounds[-1][1]
        spread = f"{min(cpu):.0f}-{max(cpu):.0f}"
        print(
            f"{name:<16}{statistics.median(cpu):>16.1f}{spread:>16}{last.requests / last.seconds:>12.0f}"
            f"{last.percentile_ms(0.5):>9.2f}{last.percentile_ms(0.99):>9.2f}"
        )
    ours, theirs = figures.values()
    ratio = statistics.median(our[0] / their[0] for our, their in zip(ours, theirs, strict=True))
    print(f"\nratio baton / aiohttp proxy: {ratio:.3f} (goal: at most {GOAL})")


if __name__ == "__main__":
    main()
