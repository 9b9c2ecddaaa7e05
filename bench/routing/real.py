"""`python -m bench.routing.real --trace FILE` compares routers in real time, on simulated workers.

Prefill and decode workers are processes, the same for all routers; their caches are emptied in between. A
trace's first requests are sent at their moments. Routers take turns, in rounds. vllm-router is run where it
is installed (`make .venv-bench-peers/setup-done`). The table is in `docs/routing.md`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx

from bench.compare.cluster import wait_until_answered
from bench.compare.routers import PEERS, peer_version
from bench.routing.replay import Planned, Replayed, planned, replay
from bench.shared.baton import Process, config, get, metrics, sim_worker, urls
from bench.shared.command import parser, positive, run
from bench.shared.figures import aligned, in_rounds, percentile, spread
from bench.shared.processes import free_port, python, running, wait_for
from launch.simulate.formats import read_trace
from launch.simulate.models import LARGE, LARGE_KV_TOKENS
from worker.sim.latency import Latency

BLOCK: Final = 64  # tokens of the engines' blocks
IDLE_LIMIT_S: Final = 60.0
VLLM_ROUTER: Final = "vllm-router"
OURS: Final[Mapping[str, Mapping[str, Any]]] = {  # by name, the config's section `routing`
    "baton": {},
    "baton prefix": {"prefill": "prefix", "decode": "least_tokens"},
    "baton kv_events": {"prefill": "kv_events", "decode": "least_tokens"},
    "baton prefix auto": {"prefill": "prefix", "decode": "least_tokens", "disaggregate": "auto"},
}
THEIRS: Final = {f"{VLLM_ROUTER} {policy}": policy for policy in ("cache_aware", "power_of_two")}
COLUMNS: Final = {
    "ttft_p50_s": "TTFT p50 s",
    "ttft_p90_s": "p90",
    "ttft_p99_s": "p99",
    "cached": "cached",
    "late_p99_s": "sent late, p99 s",
    "failed": "failed",
}
Sample = dict[str, float]


@dataclass(frozen=True)
class Workers:
    """Simulated workers run on these ports."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        return self.prefill + self.decode


def main() -> None:
    given = arguments()
    trace = read_trace(str(given.trace), "")
    requests = planned(trace, given.requests, given.speed * given.pace, given.shorten, given.seed)
    names = [name for name in given.policies if not _is_missing(name)]
    with simulated(given.workers, paced(LARGE, given.pace)) as workers:
        rows = in_rounds(names, given.rounds, lambda name: sampled(name, workers, requests))
    print("\n".join(table(rows, 1 / given.pace)))


def arguments(given: Sequence[str] | None = None) -> Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add(
        "--trace", type=Path, required=True, help="a file of Mooncake's, or another that baton simulate reads"
    )
    add("--requests", type=positive, default=300, help="the first so many of it; default: 300")
    add("--speed", type=_rate, default=1.0, help="they come so many times as fast; default: 1")
    add("--pace", type=_rate, default=1.0, help="all goes so many times as fast, engines too; default: 1")
    add("--shorten", type=positive, default=8, help="answers are so many times as short; default: 8")
    add("--workers", type=_sizes, default=(8, 8), metavar="P+D", help="default: 8+8")
    add("--rounds", type=positive, default=2, help="default: 2")
    add("--seed", type=int, default=0, help="draws moments that the trace does not tell apart; default: 0")
    names = [*OURS, *THEIRS]
    add("--policies", type=_names, default=names, help=f"with commas between; default: {','.join(names)}")
    return options.parse_args(given)


def _sizes(text: str) -> tuple[int, int]:
    prefill, plus, decode = text.partition("+")
    if not (plus and prefill.isdecimal() and decode.isdecimal()):
        raise ArgumentTypeError(f"{text}: expected numbers of workers, such as 8+8")
    return positive(prefill), positive(decode)


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < float("inf"):
        raise ArgumentTypeError(f"{text} is not positive and finite")
    return rate


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in OURS and name not in THEIRS]:
        raise ArgumentTypeError(f"{', '.join(unknown)}: there is {', '.join([*OURS, *THEIRS])}")
    return names


def _is_missing(name: str) -> bool:
    missing = name in THEIRS and peer_version(VLLM_ROUTER) is None
    if missing:
        print(f"{name} is left out: it is not in {PEERS.name}", file=sys.stderr)
    return missing


# --- workers ------------------------------------------------------------------------------------


@contextmanager
def simulated(sizes: tuple[int, int], latency: Latency) -> Iterator[Workers]:
    """Run so many prefill and decode workers for the block. Raises `Failed` if one does not start."""
    prefill, decode = sizes
    ports = [free_port() for _ in range(prefill + decode)]
    roles = ["prefill"] * prefill + ["decode"] * decode
    commands = [_options(role, free_port(), latency) for role in roles]
    with ExitStack() as stack, ThreadPoolExecutor(len(ports)) as pool:
        list(pool.map(lambda port, options: _start(stack, port, options), ports, commands))
        yield Workers(tuple(ports[:prefill]), tuple(ports[prefill:]))


def _start(stack: ExitStack, port: int, options: list[str]) -> None:
    stack.enter_context(sim_worker(*options, port=port))


def _options(role: str, events: int, latency: Latency) -> list[str]:
    """Return the options of a worker that publishes events of its cache on the port `events`."""
    size = ("--block-size", str(BLOCK), "--num-blocks", str(LARGE_KV_TOKENS // BLOCK))
    times = {f"--{name.replace('_', '-')}": getattr(latency, name) for name in Latency.__slots__}
    return [
        *("--role", role, "--kv-events", f"tcp://127.0.0.1:{events}", *size),
        *(part for name, time in times.items() for part in (name, str(time))),
    ]


def paced(latency: Latency, pace: float) -> Latency:
    """Return engines that are `pace` times as fast."""
    return Latency(**{name: getattr(latency, name) / pace for name in Latency.__slots__})


def _empty(workers: Workers) -> None:
    """Empty all caches. Raises `Failed` if prompts are under way for long."""
    for port in workers.all:
        wait_for(partial(_is_emptied, port), "a worker to be idle", IDLE_LIMIT_S)


def _is_emptied(port: int) -> bool:
    answer = httpx.post(f"http://127.0.0.1:{port}/sim/reset_prefix_cache", timeout=30, trust_env=False)
    return bool(answer.json()["success"])


def _tokens(workers: Workers) -> tuple[float, float]:
    """Return how many prompt tokens the workers looked up in their caches, and found there, until now."""
    pages = [metrics(get(port, "/metrics").text) for port in workers.all]
    names = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
    asked, found = (sum(page[name] for page in pages) for name in names)
    return asked, found


# --- routers ------------------------------------------------------------------------------------


def sampled(name: str, workers: Workers, requests: Sequence[Planned]) -> Sample:
    """Return the figures of a router that is started for them. Raises `Failed` if it does not serve."""
    print(f"{name}: {len(requests)} requests in {requests[-1].at_s:.0f} s", file=sys.stderr)
    _empty(workers)
    with _at_work(name, workers) as router:
        asked, found = _tokens(workers)
        seen = replay(router.url, requests)
        asked_after, found_after = _tokens(workers)
    return figures(seen, (found_after - found) / max(1.0, asked_after - asked))


@contextmanager
def _at_work(name: str, workers: Workers) -> Iterator[Process]:
    port = free_port()
    make = _vllm_router if name in THEIRS else _baton
    with tempfile.TemporaryDirectory() as folder, running(make(name, port, workers, folder), port) as pid:
        router = Process(pid, port)
        wait_until_answered(router)
        yield router


def _baton(name: str, port: int, workers: Workers, folder: str) -> list[str]:
    pools = {"prefill": urls(*workers.prefill), "decode": {**urls(*workers.decode), "seats": 4096}}
    path = Path(folder, "baton.yaml")
    path.write_text(json.dumps(config(port, pools) | {"routing": OURS[name]}))
    return python("-m", "launch.cli", "orchestrator", str(path))


def _vllm_router(name: str, port: int, workers: Workers, folder: str) -> list[str]:
    pools = {"--prefill": workers.prefill, "--decode": workers.decode}
    return [
        *(str(PEERS / "bin/vllm-router"), "--vllm-pd-disaggregation", "--policy", THEIRS[name]),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())),
        *("--max-concurrent-requests", "4096"),
        *(part for role, ports in pools.items() for one in ports for part in (role, _url(one))),
    ]


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


# --- figures ------------------------------------------------------------------------------------


def figures(seen: Replayed, cached: float) -> Sample:
    """Return the figures of a replay, in seconds; `cached` is the share of prompt tokens found in a cache."""
    ttft = {f"ttft_p{share}_s": percentile(seen.ttft_s, share / 100) for share in (50, 90, 99)}
    late = percentile(seen.late_s, 0.99)
    return {**ttft, "cached": cached, "late_p99_s": late, "failed": float(seen.failed)}


def table(rows: Mapping[str, Sequence[Sample]], second: float = 1.0) -> list[str]:
    """Return a line per router: medians over the rounds, and from the lowest to the highest. The engines'
    second takes `second` seconds.
    """
    lines = [["", *COLUMNS.values()]]
    for name, samples in rows.items():
        cells = [_cell([_value(sample, key, second) for sample in samples], key) for key in COLUMNS]
        lines.append([name, *cells])
    return aligned(lines)


def _value(sample: Sample, key: str, second: float) -> float:
    return sample[key] / second if key.endswith("_s") else sample[key]


def _cell(values: Sequence[float], key: str) -> str:
    digits = 0 if key == "failed" else 3
    return f"{statistics.median(values):.{digits}f} ({spread(values, digits)})"


if __name__ == "__main__":
    run("bench.routing.real", main)
