"""This is the table of routing policies, by the name that the config gives them.

The config's allowed names and arguments, its JSON Schema and the table in `docs/structure.md` follow from it.
"""

from __future__ import annotations

from orchestrator.routing.policies import least_loaded, round_robin
from orchestrator.routing.policies.base import PolicySpec

POLICIES: dict[str, PolicySpec] = {spec.name: spec for spec in (round_robin.SPEC, least_loaded.SPEC)}
