"""The static checks need no worker: they read the config, the environment and this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from launch.doctor import files, machine, network, settings, software
from launch.doctor.case import Case
from launch.doctor.findings import Finding
from launch.doctor.software import Installed

# In the order in which they are shown: a fault that causes others comes before them.
_CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    software.check_python,
    settings.check_transport,
    settings.check_streams,
    settings.check_nixl,
    settings.check_ucx,
    files.check_models,
    machine.check_gpus,
    machine.check_memory,
    machine.check_descriptors,
    settings.check_logs,
    files.check_keys,
    network.check_keys_of_workers,
    files.check_tls,
    network.check_hosts,
    network.check_ports,
)

# With a fault in one of these a worker would not come up.
KEEPS_FROM_STARTING = frozenset({"plan", "engine", "model", "gpu", "port", "transport"})


def static_findings(case: Case, installed: Installed) -> Iterator[Finding]:
    yield from software.check_engine(case, installed)
    for check in _CHECKS:
        yield from check(case)
