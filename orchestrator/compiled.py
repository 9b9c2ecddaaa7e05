"""The compiled form (docs/performance.md): which modules have one, and whether it is what runs."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

_Class = TypeVar("_Class", bound=type)

try:  # only a build needs it
    from mypy_extensions import mypyc_attr as mypyc_attr
except ImportError:

    def mypyc_attr(*attrs: str, **kwattrs: object) -> Callable[[_Class], _Class]:  # type: ignore[misc]
        return lambda decorated: decorated


# What requests and streams spend their time in; `memory_answer` only because it extends `answer`.
MODULES = (
    "orchestrator.telemetry.access_log",
    "orchestrator.relay.admission",
    "orchestrator.legs.dispatch",
    "orchestrator.http.asgi",
    "orchestrator.http.asgi_app",
    "orchestrator.http.backlog",
    "orchestrator.http.body",
    "orchestrator.http.carrier",
    "orchestrator.http.deadlines",
    "orchestrator.http.exchange",
    "orchestrator.relay.flow",
    "orchestrator.workers.worker",
    "orchestrator.wire.headers",
    "orchestrator.http.head",
    "orchestrator.http.http_exchange",
    "orchestrator.http.ids",
    "orchestrator.http.limits",
    "orchestrator.http.reader",
    "orchestrator.http.waiters",
    "orchestrator.relay.job",
    "orchestrator.legs.ledger",
    "orchestrator.telemetry.lines",
    "orchestrator.workers.pools",
    "orchestrator.telemetry.record",
    "orchestrator.relay.scope",
    "orchestrator.legs.releases",
    "orchestrator.routing.least_loaded",
    "orchestrator.routing.planner",
    "orchestrator.routing.round_robin",
    "orchestrator.http.connection",
    "orchestrator.telemetry.counters",
    "orchestrator.transport.answer",
    "orchestrator.transport.base",
    "orchestrator.transport.memory_answer",
    "orchestrator.transport.pool",
    "orchestrator.wire.codec",
    "orchestrator.legs.connectors.nixl",
    "orchestrator.legs.bodies",
    "orchestrator.wire.sse",
    "orchestrator.wire.usage",
    "orchestrator.api.view",
)
ROOT = Path(__file__).parent.parent
SOURCES = tuple(f"{module.replace('.', '/')}.py" for module in MODULES)  # below `ROOT`


def library() -> str:
    """Name of the library that a build of the present sources makes: it has their hash in it."""
    digest = hashlib.sha256(b"".join((ROOT / source).read_bytes() for source in SOURCES))
    return f"baton_{digest.hexdigest()[:16]}"


def is_compiled() -> bool:
    """Whether Python takes the compiled form of the modules."""
    found = find_spec(MODULES[0])
    return found is not None and str(found.origin).endswith(tuple(EXTENSION_SUFFIXES))


def is_stale() -> bool:
    """Whether the compiled modules, once imported, are of other sources than those beside them."""
    return is_compiled() and f"{library()}__mypyc" not in sys.modules
