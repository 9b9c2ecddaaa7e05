"""An orchestrator and simulated workers as processes of their own, with fault proxies on their links."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from tests.faults.asking import NO_TLS, ask
from tests.faults.proxy import Address, FaultProxy
from tests.orchestrator.running import PATIENCE_S, Orchestrator, SimWorker
from tests.waiting import wait_for
from worker.sim.questions import Outcome, completion

Link = Literal["client", "prefill", "decode"]
LINKS: tuple[Link, ...] = ("client", "prefill", "decode")

KV_LEASE_S = 2.0  # for the engines and the orchestrator: after that nothing may be pinned

# What a request takes and must give back. Pinned blocks are in use, too.
_GAUGES = (
    "baton_requests_in_flight",
    "baton_worker_in_flight",
    'baton_upstream_connections{state="busy"}',
    "baton_kv_leases{",
    "baton_kv_leases_leaked_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)


@dataclass(frozen=True)
class _Detour:
    """A worker as the orchestrator sees it: behind a proxy."""

    role: str
    url: str


class Cluster:
    def __init__(
        self,
        workers: list[SimWorker],
        orchestrator: Orchestrator,
        proxies: dict[str, FaultProxy],
        client: httpx.Client,
    ) -> None:
        """`client` is for a look at the gauges, without proxies in between."""
        self._workers = workers
        self._orchestrator = orchestrator
        self._client = client
        self.proxies = proxies
        self.url = proxies["client"].url

    def wait_well(self) -> None:
        """Until a question through all proxies is answered right, and nothing is held any more."""
        wait_for(self._answers, "a right answer")
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.held(), "all gauges at 0")
        assert self.held() == {}

    def _answers(self) -> bool:
        assert self._orchestrator.process.poll() is None, self._orchestrator.lines
        question = completion("Are you well?", 2, is_stream=False)
        return ask(self.url, question, PATIENCE_S) is Outcome.RIGHT

    def held(self) -> dict[str, float]:
        """Every gauge above 0 that counts what requests take and give back, by where it is."""
        gauges = {
            f"{where}: {series}": value for where, page in self._pages() for series, value in _gauges(page)
        }
        assert all(any(name in series for series in gauges) for name in _GAUGES), gauges
        return {series: value for series, value in gauges.items() if value}

    def _pages(self) -> Iterator[tuple[str, str]]:
        yield "orchestrator", self._get(f"{self._orchestrator.admin_url}/metrics")
        for worker in self._workers:
            yield f"{worker.role} {worker.url}", self._get(f"{worker.url}/metrics")

    def _get(self, url: str) -> str:
        return self._client.get(url).raise_for_status().text


def _gauges(page: str) -> Iterator[tuple[str, float]]:
    for line in page.splitlines():
        if line.startswith(_GAUGES):
            series, _, value = line.rpartition(" ")
            yield series, float(value)


@contextlib.contextmanager
def orchestrating(directory: Path, workers: list[SimWorker], limits: dict[str, float]) -> Iterator[Cluster]:
    """Ready, with these limits of the config. The first worker of each role is behind a proxy."""
    with contextlib.ExitStack() as stack:

        def proxied(url: str) -> FaultProxy:
            return stack.enter_context(FaultProxy(_address(url)))

        firsts = {worker.role: worker for worker in reversed(workers)}
        proxies = {role: proxied(worker.url) for role, worker in firsts.items()}
        detours: list[Any] = [_Detour(role, proxy.url) for role, proxy in proxies.items()]
        others = [worker for worker in workers if worker not in firsts.values()]
        orchestrator = Orchestrator(
            directory, [*detours, *others], processes=1, limits=limits, routing={"kv_lease_s": KV_LEASE_S}
        )
        stack.callback(orchestrator.clean_up)
        proxies["client"] = proxied(orchestrator.url)
        client = stack.enter_context(httpx.Client(timeout=PATIENCE_S, trust_env=False, verify=NO_TLS))
        cluster = Cluster(workers, orchestrator, proxies, client)
        cluster.wait_well()
        yield cluster


def _address(url: str) -> Address:
    parts = httpx.URL(url)
    return parts.host, parts.port or 80
