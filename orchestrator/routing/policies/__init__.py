"""Routing policies, by the name that the config gives them."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.routing.policies.base import Policy
from orchestrator.routing.policies.least_loaded import LeastLoaded
from orchestrator.routing.policies.round_robin import RoundRobin

POLICIES: dict[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
}
