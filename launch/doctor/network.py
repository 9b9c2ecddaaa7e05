"""These checks look at ports and host names, before anything is started."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from functools import partial

import httpx

from launch.doctor.case import Case
from launch.doctor.findings import Finding, fail, ok, warn
from launch.plan import Plan, ProcessSpec
from launch.surroundings import port_hint, port_problem
from orchestrator.config.addresses import is_loopback
from orchestrator.wire.info import WORKER_KEY_ENV

ASK_S = 2.0
RESOLVE_S = 5.0
_AT_ONCE = 32


def running(plan: Plan | None) -> frozenset[str]:
    """Return the names of the plan's processes that answer where it would start them."""
    if plan is None:
        return frozenset()
    with (
        httpx.Client(timeout=ASK_S, trust_env=False, verify=False) as client,  # noqa: S501  # only whether it answers
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        answers = pool.map(partial(_answers, client), plan.here)
        return frozenset(spec.name for spec, answer in zip(plan.here, answers, strict=True) if answer)


def _answers(client: httpx.Client, spec: ProcessSpec) -> bool:
    try:
        return client.get(spec.ready_url).status_code == 200
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def check_ports(case: Case) -> Iterator[Finding]:
    for spec in case.specs:
        if spec.name in case.running:
            yield ok("port", spec.name, f"runs already at {spec.ready_url.removesuffix('/health')}")
            continue
        problems = [*_problems(spec)]
        yield from problems
        if not problems:
            yield ok("port", spec.name, f"free: {', '.join(str(port) for _, port in spec.listens)}")


def _problems(spec: ProcessSpec) -> Iterator[Finding]:
    for host, port in spec.listens:
        problem = port_problem(host, port)
        if problem is not None:
            yield fail("port", spec.name, f"port {port} of {host} {problem}", port_hint(spec))


def check_hosts(case: Case) -> Iterator[Finding]:
    """Check that the names of workers' hosts are known here."""
    names: dict[str, str] = {}
    for _, address in case.workers():
        names.setdefault(address.host, address.name)
    unknown = _unknown(names)
    for host in unknown:
        advice = "is the name right, and can DNS resolve it?"
        yield fail("host", names[host], f"the host {host!r} is not known here", advice)
    if len(unknown) < len(names):
        yield ok(
            "host", "this machine", f"knows {len(names) - len(unknown)} of {len(names)} hosts of workers"
        )


def _unknown(hosts: Iterable[str]) -> list[str]:
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        lookups = {host: pool.submit(_is_known, host) for host in hosts}
        return [host for host, lookup in lookups.items() if not _outcome(lookup.result)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _outcome(result: object) -> bool:
    try:
        return bool(result(RESOLVE_S))  # type: ignore[operator]
    except TooLate:
        return False


def _is_known(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return True


def check_keys_of_workers(case: Case) -> Iterator[Finding]:
    """Check that workers which others can reach ask for a key."""
    beyond = [address for _, address in case.workers() if not is_loopback(address.host)]
    if case.around.environ.get(WORKER_KEY_ENV):
        yield ok("key", WORKER_KEY_ENV, "is set: workers are asked with it")
    elif beyond:
        yield warn(
            "key",
            beyond[0].name,
            f"{WORKER_KEY_ENV} is not set, and {len(beyond)} workers can be reached from other machines",
            f"set {WORKER_KEY_ENV} for orchestrator and workers, or keep others from their ports",
        )
