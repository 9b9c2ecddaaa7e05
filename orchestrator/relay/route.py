"""A route says where the requests for one model go."""

from __future__ import annotations

from orchestrator.legs.connectors.base import Connector
from orchestrator.relay.admission import Gate
from orchestrator.routing.planner import Planner
from orchestrator.workers.pools import Pools


class Route:
    """The model of a request chooses all this. There is one per model and process; requests for adapters get
    others, with some of a model's workers.
    """

    __slots__ = ("adapter", "connector", "gate", "index", "planner", "pools")

    def __init__(
        self,
        index: int,
        pools: Pools,
        gate: Gate,
        planner: Planner,
        connector: Connector,
        adapter: str = "",
    ) -> None:
        """`index` is the model's in the config. `connector` hands its KV cache over. `adapter` is what
        workers are to call it in place of their own name for the model.
        """
        self.adapter = adapter
        self.index = index
        self.pools = pools
        self.gate = gate
        self.planner = planner
        self.connector = connector
