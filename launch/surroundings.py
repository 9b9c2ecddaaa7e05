"""A plan needs to know this of its machine; it is looked up once, at the edge."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, distributions

from launch.engines.base import PlanError, Surroundings
from launch.engines.vllm import OUR_PLUGIN
from launch.plan import ProcessSpec
from orchestrator.config.addresses import is_loopback
from orchestrator.config.checks import environment_fault
from orchestrator.config.keys import worker_key
from orchestrator.config.printing import one_line
from orchestrator.errors import SettingError
from orchestrator.interpreter import import_variables
from orchestrator.wire.info import WORKER_KEY_ENV

# vLLM loads these groups as a whole when VLLM_PLUGINS is not set; endpoint plugins only when named.
_UNNAMED_GROUP = "vllm.endpoint_plugins"


def look_around(environ: Mapping[str, str] = os.environ) -> Surroundings:
    """Look up what a plan asks for, with this environment. Raises `PlanError`."""
    return Surroundings(
        python=sys.executable,
        environ=_environ(environ),
        vllm_plugins=tuple(sorted(set(_vllm_plugins()))),
        is_directory=os.path.isdir,
        is_here=is_here,
        imports=import_variables(os.environ),
    )


def _environ(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return the environment, the workers' key as it is sent. Raises `PlanError` if that can be no key, or a
    variable of ours says what it cannot.
    """
    check_environment(environ)
    try:
        key = worker_key(environ)
    except SettingError as error:
        raise PlanError(str(error)) from error
    return environ if key is None else {**environ, WORKER_KEY_ENV: key}


def check_environment(environ: Mapping[str, str]) -> None:
    """Raise `PlanError` if a variable of ours says what it cannot."""
    fault = environment_fault(environ)
    if fault is not None:
        raise PlanError(one_line(" ".join(fault)))


def _vllm_plugins() -> Iterator[str]:
    for distribution in distributions():
        for entry in distribution.entry_points:
            if _is_loaded_unnamed(entry):
                yield entry.name


def _is_loaded_unnamed(entry: EntryPoint) -> bool:
    """Return whether vLLM loads a plugin that VLLM_PLUGINS does not name. Ours wants to be named."""
    return entry.group.startswith("vllm.") and entry.group != _UNNAMED_GROUP and entry.name != OUR_PLUGIN


def is_here(host: str) -> bool:
    """Return whether one can listen at `host` on this machine. A name that nobody knows is elsewhere."""
    if is_loopback(host):
        return True
    try:
        with _bound(host, 0):
            return True
    except OSError:
        return False


def taken_ports(specs: Iterable[ProcessSpec]) -> Iterator[str]:
    """Return a sentence for each address that a process of the plan would listen at and another one holds."""
    for spec in specs:
        for host, port in spec.listens:
            problem = port_problem(host, port)
            if problem == _TAKEN:
                yield one_line(f"{spec.name}: port {port} of {host} {problem}: {port_hint(spec)}")


def port_problem(host: str, port: int) -> str | None:
    """Return why nothing that is started here can listen there, with the port as subject; None if it can."""
    try:
        with _bound(host, port):
            return None
    except OSError as error:
        return _TAKEN if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror or error}"


_TAKEN = "is taken by another process"


def port_hint(spec: ProcessSpec) -> str:
    if spec.role == "orchestrator":
        return "give another one (orchestrator.listen, orchestrator.admin)"
    return "give another one (base_port, or workers: [{port: ..., side_channel_port: ...}])"


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        yield sock
