"""A stand-in for Ray's client: actors answer when a test says so, and groups are where it puts them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class ActorUnavailableError(RayError):
    pass


class ActorDiedError(RayError):
    pass


class FakeActor:
    """`answers` is what reports will say, in order; an exception is raised. Without one a call stays open."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.asked: list[tuple[Any, ...]] = []
        self.report = SimpleNamespace(remote=self._ask)

    def _ask(self, *arguments: Any) -> FakeActor:
        self.asked.append(arguments)
        return self


class FakeRay:
    """As much of the module as is needed; `places` has the node of each group's bundles, by its name."""

    exceptions = SimpleNamespace(RayError=RayError, ActorUnavailableError=ActorUnavailableError)

    def __init__(self, nodes: dict[str, dict[str, float]] | None = None) -> None:
        self._nodes = nodes or {}
        self.places: dict[str, list[str]] = {}
        self.states: dict[str, str] = {}
        self.options: dict[str, dict[str, Any]] = {}
        self.removed: list[str] = []
        self.util = SimpleNamespace(
            get_placement_group=self._get,
            placement_group=self._make,
            placement_group_table=self._table,
            remove_placement_group=self.removed.append,
        )

    def wait(self, refs: list[FakeActor], timeout: float) -> tuple[list[FakeActor], list[FakeActor]]:
        return [ref for ref in refs if ref.answers], [ref for ref in refs if not ref.answers]

    def get(self, ref: FakeActor) -> Any:
        answer = ref.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": True, "Resources": has} for name, has in self._nodes.items()]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 0.5}

    def _get(self, name: str) -> str:
        if name not in self.options:
            raise ValueError(name)
        return name

    def _make(self, bundles: list[dict[str, float]], name: str, **options: Any) -> str:
        self.options[name] = {"bundles": bundles, **options}
        self.places.setdefault(name, [""] * len(bundles))
        return name

    def _table(self, group: str) -> dict[str, Any]:
        nodes = dict(enumerate(self.places[group]))
        return {"bundles_to_node_id": nodes, "state": self.states.get(group, "CREATED")}
