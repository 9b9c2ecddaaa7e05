"""A variant is a way to route, by name: `prefix`, `prefix+least_tokens`, `prefix@never`."""

from __future__ import annotations

import re
from typing import Any, Final

from pydantic import ValidationError

from launch.simulate.errors import SimulationError
from orchestrator.config.options import RoutingConfig
from orchestrator.config.policies import PolicyConfig, policy_named
from orchestrator.routing.policies import POLICIES

_FORM: Final = re.compile(r"(?P<prefill>[^+@]+)?(\+(?P<decode>[^+@]+))?(@(?P<mode>[^+@]+))?")


def own_name(routing: RoutingConfig) -> str:
    """Return the name of what the config says."""
    return f"{routing.prefill.policy}+{routing.decode.policy}@{routing.disaggregate}"


def routing_of(name: str, routing: RoutingConfig) -> RoutingConfig:
    """Return the config's section as a variant has it; what that does not name stays, and arguments of a
    policy that is the same. Raises `SimulationError`.
    """
    found = _FORM.fullmatch(name)
    if not name or found is None:
        raise SimulationError(f"{name!r} is not PREFILL, PREFILL+DECODE, or one of these with @MODE")
    changes: dict[str, Any] = {}
    if found["prefill"] is not None:
        changes["prefill"] = _policy(found["prefill"], routing.prefill)
    if found["decode"] is not None:
        changes["decode"] = _policy(found["decode"], routing.decode)
    if found["mode"] is not None:
        changes["disaggregate"] = found["mode"]
    try:
        return RoutingConfig.model_validate({**dict(routing), **changes})
    except ValidationError as error:
        raise SimulationError(f"{name!r}: {_mode_message(error)}") from error


def _policy(name: str, current: PolicyConfig) -> PolicyConfig:
    if name not in POLICIES:
        raise SimulationError(f"there is no policy {name!r}; there is: {', '.join(POLICIES)}")
    return current if name == current.policy else policy_named(name)


def _mode_message(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"the mode {first['input']!r} is wrong: {first['msg']}"
