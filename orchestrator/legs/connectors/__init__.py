"""This is the table of KV connectors, by the name that the config gives them."""

from __future__ import annotations

from orchestrator.legs.connectors.base import Connector
from orchestrator.legs.connectors.nixl import Nixl

NIXL = Nixl()
CONNECTORS: dict[str, Connector] = {NIXL.name: NIXL}
