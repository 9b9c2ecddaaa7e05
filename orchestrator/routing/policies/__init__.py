"""This is the table of routing policies, by the name that the config gives them.

The config's allowed names and arguments, its JSON Schema and the table in `docs/structure.md` follow from it.
"""

from __future__ import annotations

from orchestrator.routing.policies import (
    kv_events,
    least_loaded,
    least_tokens,
    power_of_two,
    prefix,
    random,
    round_robin,
    session,
)
from orchestrator.routing.policies.base import PolicySpec

_MODULES = (round_robin, random, power_of_two, least_loaded, least_tokens, prefix, kv_events, session)
POLICIES: dict[str, PolicySpec] = {module.SPEC.name: module.SPEC for module in _MODULES}
