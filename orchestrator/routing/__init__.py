"""Routing policies, by the name that the config gives them."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.routing.base import Policy
from orchestrator.routing.least_loaded import LeastLoaded
from orchestrator.routing.round_robin import RoundRobin

POLICIES: dict[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
}
