"""Some modules have a compiled form (docs/performance.md): this says which, and whether it is what runs."""

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


ROOT = Path(__file__).parent.parent
# All routing policies have one: a new policy is one file.
_POLICIES = sorted(path.stem for path in (ROOT / "orchestrator/routing/policies").glob("[!_]*.py"))

# What requests and streams spend their time in; `memory_answer` only because it extends `answer`.
MODULES = (
    "orchestrator.api.base",
    "orchestrator.api.holders",
    "orchestrator.api.leg_form",
    "orchestrator.api.messages",
    "orchestrator.api.refusable",
    "orchestrator.api.responses",
    "orchestrator.api.view",
    "orchestrator.http.asgi",
    "orchestrator.http.asgi_app",
    "orchestrator.http.backlog",
    "orchestrator.http.body",
    "orchestrator.http.carrier",
    "orchestrator.http.connection",
    "orchestrator.http.crowd",
    "orchestrator.http.date",
    "orchestrator.http.deadlines",
    "orchestrator.http.exchange",
    "orchestrator.http.head",
    "orchestrator.http.held",
    "orchestrator.http.http_exchange",
    "orchestrator.http.ids",
    "orchestrator.http.limits",
    "orchestrator.http.reader",
    "orchestrator.http.waiters",
    "orchestrator.legs.bodies",
    "orchestrator.legs.connectors.base",
    "orchestrator.legs.connectors.nixl",
    "orchestrator.legs.dispatch",
    "orchestrator.legs.ledger",
    "orchestrator.legs.leg",
    "orchestrator.legs.parallel",
    "orchestrator.legs.releases",
    "orchestrator.relay.admission",
    "orchestrator.relay.flow",
    "orchestrator.relay.admitted",
    "orchestrator.relay.outcomes",
    "orchestrator.relay.respond",
    "orchestrator.relay.route",
    "orchestrator.relay.scope",
    "orchestrator.relay.turns",
    "orchestrator.routing.auto",
    "orchestrator.routing.links",
    "orchestrator.routing.local",
    "orchestrator.routing.marginal",
    "orchestrator.routing.pairs",
    "orchestrator.routing.plan",
    "orchestrator.routing.planner",
    "orchestrator.routing.revisions",
    *(f"orchestrator.routing.policies.{policy}" for policy in _POLICIES),
    "orchestrator.telemetry.access_log",
    "orchestrator.telemetry.counters",
    "orchestrator.telemetry.figures",
    "orchestrator.telemetry.lines",
    "orchestrator.telemetry.record",
    "orchestrator.transport.answer",
    "orchestrator.transport.base",
    "orchestrator.transport.memory_answer",
    "orchestrator.transport.pool",
    "orchestrator.wire.codec",
    "orchestrator.wire.headers",
    "orchestrator.wire.named_events",
    "orchestrator.wire.judge",
    "orchestrator.wire.sse",
    "orchestrator.wire.usage",
    "orchestrator.workers.abilities",
    "orchestrator.workers.handoff_times",
    "orchestrator.workers.pools",
    "orchestrator.workers.worker",
)
SOURCES = tuple(f"{module.replace('.', '/')}.py" for module in MODULES)  # below `ROOT`


def library() -> str:
    """Return the name of the library that a build of the present sources makes: it has their hash in it."""
    digest = hashlib.sha256(b"".join((ROOT / source).read_bytes() for source in SOURCES))
    return f"baton_{digest.hexdigest()[:16]}"


def is_compiled() -> bool:
    """Tell whether Python takes the compiled form of the modules."""
    found = find_spec(MODULES[0])
    return found is not None and str(found.origin).endswith(tuple(EXTENSION_SUFFIXES))


def is_stale() -> bool:
    """Tell whether the compiled modules, once imported, are of other sources than those beside them."""
    return is_compiled() and f"{library()}__mypyc" not in sys.modules
