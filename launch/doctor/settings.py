"""These checks read the environment that processes would get: flags of Baton, NIXL and UCX."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch.doctor.case import Case
from launch.doctor.findings import Finding, fail, ok, warn
from launch.plan import ProcessSpec
from orchestrator.wire.info import (
    DEFAULT_NIXL_DELAY_US,
    DEFAULT_STREAMS,
    DEFAULT_TRANSPORT,
    NIXL_DELAY_ENV,
    STREAMS_ENV,
    TRANSPORT_ENV,
)

LONG_DELAY_US = 10_000
NETWORKS = Path("/sys/class/net")
ADAPTERS = Path("/sys/class/infiniband")


def check_transport(case: Case) -> Iterator[Finding]:
    """Show what the orchestrator and the workers read as `BATON_TRANSPORT`: what is wrong is told before."""
    found = {_environment(case, spec).get(TRANSPORT_ENV) or DEFAULT_TRANSPORT for spec in case.specs}
    if found:
        yield ok("transport", TRANSPORT_ENV, ", ".join(sorted(found)))


def check_streams(case: Case) -> Iterator[Finding]:
    """Check that the orchestrator and the workers agree on `BATON_STREAMS`."""
    found = {_environment(case, spec).get(STREAMS_ENV) or DEFAULT_STREAMS for spec in case.specs}
    if len(found) > 1:
        differ = "the orchestrator and the workers differ: requests share a connection where both say mux"
        advice = "set it where `baton up` is started, which hands it on, and not in `env` of a pool"
        yield warn("transport", STREAMS_ENV, differ, advice)
    elif found - {DEFAULT_STREAMS}:
        yield ok("transport", STREAMS_ENV, ", ".join(found))


def check_nixl(case: Case) -> Iterator[Finding]:
    """Check how long NIXL's thread sleeps in the workers that hand over."""
    specs = _handing_over(case)
    for delay in dict.fromkeys(_environment(case, spec).get(NIXL_DELAY_ENV, "") for spec in specs):
        yield judged_delay(NIXL_DELAY_ENV, int(delay.strip() or DEFAULT_NIXL_DELAY_US))


def _handing_over(case: Case) -> list[ProcessSpec]:
    names = {place.name for place in case.here("vllm") if place.role != "both"}
    return [spec for spec in case.specs if spec.name in names]


def judged_delay(subject: str, delay_us: int) -> Finding:
    """Judge for how long NIXL's progress thread sleeps, in microseconds."""
    if delay_us == 0:
        return warn(
            "nixl",
            subject,
            "NIXL's progress thread never sleeps: each idle worker burns a core",
            f"set {NIXL_DELAY_ENV}={DEFAULT_NIXL_DELAY_US}, unless every microsecond of a transfer counts",
        )
    found = f"NIXL's progress thread sleeps for up to {delay_us} us"
    if delay_us > LONG_DELAY_US:
        return warn(
            "nixl", subject, found, f"transfers may wait so long; {DEFAULT_NIXL_DELAY_US} is the default"
        )
    return ok("nixl", subject, found)


def check_ucx(case: Case) -> Iterator[Finding]:
    """Check that the network devices which UCX is told to use are there."""
    for spec in _handing_over(case):
        env = _environment(case, spec)
        yield from _devices(spec.name, env.get("UCX_NET_DEVICES", ""))
        yield from _transports(spec.name, env.get("UCX_TLS", ""))


def _devices(worker: str, given: str) -> Iterator[Finding]:
    there = {path.name for folder in (NETWORKS, ADAPTERS) if folder.is_dir() for path in folder.iterdir()}
    names = [word.strip().partition(":")[0] for word in given.split(",") if word.strip()]
    for name in names:
        if name != "all" and not name.startswith("^") and name not in there:
            advice = f"this machine has {', '.join(sorted(there)) or 'none'}"
            yield fail("ucx", worker, f"UCX_NET_DEVICES names {name!r}, which is not there", advice)


def _transports(worker: str, given: str) -> Iterator[Finding]:
    names = {word.strip() for word in given.split(",") if word.strip()}
    if not names or given.startswith("^") or names & _BEYOND_THE_MACHINE:
        return
    found = f"UCX_TLS={given} has no transport to another process's memory over a network"
    yield warn("ucx", worker, found, "add tcp, or rc for InfiniBand; or leave UCX_TLS out")


_BEYOND_THE_MACHINE = frozenset(
    {
        "all",
        "tcp",
        "rc",
        "rc_x",
        "rc_v",
        "rc_mlx5",
        "rc_verbs",
        "dc",
        "dc_x",
        "dc_mlx5",
        "ud",
        "ud_x",
        "ud_v",
        "ib",
    }
)


def _environment(case: Case, spec: ProcessSpec) -> Mapping[str, str]:
    return {**case.around.environ, **spec.env}


def check_logs(case: Case) -> Iterator[Finding]:
    """Check that there is room for logs where this command was started."""
    try:
        found = os.statvfs(".")
    except OSError as error:
        yield fail("disk", ".", f"cannot be read: {error.strerror}", "start Baton in another directory")
        return
    free_mb = found.f_bavail * found.f_frsize // 2**20
    if free_mb < _LEAST_MB:
        yield warn("disk", ".", f"{free_mb} MB are free", "make room: logs and models need some")
    else:
        yield ok("disk", ".", f"{free_mb} MB are free")


_LEAST_MB = 512
