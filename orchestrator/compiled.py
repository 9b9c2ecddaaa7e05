"""Some modules have a compiled form (docs/performance.md): this says which, and whether it is what runs.

Which form a process imports is decided in `form.py`.
"""

from __future__ import annotations

import hashlib
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
    "orchestrator.http.ending",
    "orchestrator.http.exchange",
    "orchestrator.http.head",
    "orchestrator.http.held",
    "orchestrator.http.http_exchange",
    "orchestrator.http.ids",
    "orchestrator.http.intake",
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
    "orchestrator.legs.upload_leg",
    "orchestrator.relay.admission",
    "orchestrator.relay.fairness",
    "orchestrator.relay.flow",
    "orchestrator.relay.forecast",
    "orchestrator.relay.admitted",
    "orchestrator.relay.outcomes",
    "orchestrator.relay.rate",
    "orchestrator.relay.respond",
    "orchestrator.relay.route",
    "orchestrator.relay.scope",
    "orchestrator.relay.tenants",
    "orchestrator.relay.turns",
    "orchestrator.relay.waiting",
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
    "orchestrator.telemetry.answers",
    "orchestrator.telemetry.counters",
    "orchestrator.telemetry.figures",
    "orchestrator.telemetry.history",
    "orchestrator.telemetry.lines",
    "orchestrator.telemetry.record",
    "orchestrator.telemetry.tenants",
    "orchestrator.transport.answer",
    "orchestrator.transport.base",
    "orchestrator.transport.memory_answer",
    "orchestrator.transport.mux",
    "orchestrator.transport.pool",
    "orchestrator.transport.upgrade",
    "orchestrator.wire.codec",
    "orchestrator.wire.headers",
    "orchestrator.wire.named_events",
    "orchestrator.wire.judge",
    "orchestrator.wire.sse",
    "orchestrator.wire.usage",
    "orchestrator.workers.abilities",
    "orchestrator.workers.handoff_times",
    "orchestrator.workers.pools",
    "orchestrator.workers.ranking",
    "orchestrator.workers.reported",
    "orchestrator.workers.worker",
)
SOURCES = tuple(f"{module.replace('.', '/')}.py" for module in MODULES)  # below `ROOT`
MYPYC = "2.4.1"  # the version of mypy that it is built with, as in requirements/constraints.txt
# Nothing that is compiled imports these rooms, so an edit there leaves a build as it is.
ABOVE = ("run.py", "app.py", "control", "processes")


def digest(root: Path) -> str:
    """Return a digest of what the compiled form of the checkout at `root` depends on.

    These are not only its own modules: constants and types of those that they import are compiled in.
    """
    found = hashlib.sha256()
    for path in sorted((root / "orchestrator").rglob("*.py")):
        name = path.relative_to(root / "orchestrator")
        if name.parts[0] not in ABOVE:
            content = path.read_bytes()
            found.update(b"%s %d\n%s" % (str(name).encode(), len(content), content))
    return found.hexdigest()


def library() -> str:
    """Return the name of the library that a build of the present sources makes: it has their digest in it."""
    return f"baton_{digest(ROOT)[:16]}"


def is_compiled() -> bool:
    """Tell whether Python takes the compiled form of the modules."""
    found = find_spec(MODULES[0])
    return found is not None and str(found.origin).endswith(tuple(EXTENSION_SUFFIXES))
