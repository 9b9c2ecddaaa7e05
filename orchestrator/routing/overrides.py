"""A client's headers may choose otherwise than the config, for one request and where the config allows it.

| header | its value |
|---|---|
| `x-baton-policy-prefill`, `x-baton-policy-decode` | the name of a policy; its arguments are the defaults |
| `x-baton-disaggregate` | a value of `routing.disaggregate` |
| `x-baton-worker-prefill`, `x-baton-worker-decode` | the name of a worker, as `/admin/workers` has it |

What is not allowed, not known, or given twice is refused (`ClientError`); where nothing is allowed, headers
that are not known mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Final, get_args

from orchestrator.config.options import Override, RoutingConfig
from orchestrator.config.policies import PolicyConfig, policy_named
from orchestrator.errors import ClientError, Unavailable
from orchestrator.routing.planner import Planner
from orchestrator.routing.policies import POLICIES
from orchestrator.wire.info import Role
from orchestrator.workers.pools import Pools
from orchestrator.workers.registry import Registry
from orchestrator.workers.worker import Worker

BEGIN: Final = b"x-baton-"  # of all names, and of no other header that is relayed
NAMES: Final[tuple[Override, ...]] = get_args(Override)
HEADERS: Final = frozenset(name.encode() for name in NAMES)

_POLICY: Final = {"x-baton-policy-prefill": "prefill", "x-baton-policy-decode": "decode"}
_WORKER: Final[Mapping[str, tuple[Role, ...]]] = {
    "x-baton-worker-prefill": ("prefill",),
    "x-baton-worker-decode": ("decode", "both"),
}
_WORKER_PREFILL: Final = "x-baton-worker-prefill"
_DISAGGREGATE: Final = "x-baton-disaggregate"
_MOST_SHOWN: Final = 20  # names of workers in a message
_MOST_CHARS: Final = 100  # of a client's value there


class Overrides:
    """It makes planners and pools for requests that choose otherwise."""

    def __init__(self, registry: Registry, routing: RoutingConfig) -> None:
        self._registry = registry
        self.reconfigure(routing)

    def reconfigure(self, routing: RoutingConfig) -> None:
        """Go by this section from now on."""
        self._routing = routing
        self.are_allowed = bool(routing.overrides)  # then names of headers are looked at, also wrong ones
        self._planners: dict[tuple[Planner, tuple[str, ...]], Planner] = {}

    def wanted(self, headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
        """Return what the headers of a request ask for, by their names. Raises `ClientError`."""
        found: dict[str, str] = {}
        for name, value in headers:
            if not name.startswith(BEGIN):
                continue
            text = name.decode("latin-1")
            if name not in HEADERS:
                self._refuse_unknown(text)
                continue
            if text not in self._routing.overrides:
                allowed = ", ".join(self._routing.overrides) or "none"
                raise ClientError(f"the header {text} is not allowed here; allowed: {allowed}")
            if text in found:
                raise ClientError(f"the header {text} is given twice")
            found[text] = value.decode("latin-1").strip()
        return found

    def _refuse_unknown(self, name: str) -> None:
        """Raise `ClientError` for a name that means nothing, where others would choose something."""
        if self.are_allowed:
            nearest = get_close_matches(name, NAMES, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there is: {', '.join(NAMES)}"
            raise ClientError(f"there is no header {name[:_MOST_CHARS]}; {hint}")

    def planner(self, base: Planner, wanted: Mapping[str, str]) -> Planner:
        """Return a planner that goes by what is wanted; it shares what is the same with `base`. Raises
        `ClientError`.
        """
        changes: dict[str, PolicyConfig | str] = {}
        for name, key in _POLICY.items():
            if name in wanted:
                _check(name, wanted[name], sorted(POLICIES))
                if getattr(self._routing, key).policy != wanted[name]:
                    changes[key] = policy_named(wanted[name])
        if _DISAGGREGATE in wanted:
            _check(_DISAGGREGATE, wanted[_DISAGGREGATE], _values("disaggregate"))
            changes["disaggregate"] = wanted[_DISAGGREGATE]
        elif _WORKER_PREFILL in wanted and self._routing.disaggregate != "never":
            changes["disaggregate"] = "strict"  # else a decode worker would serve if this one cannot
        if not changes:
            return base
        key_of_all = (base, tuple(f"{key}: {value}" for key, value in changes.items()))
        made = self._planners.get(key_of_all)
        if made is None:
            made = self._planners[key_of_all] = base.varied(self._routing.model_copy(update=changes))
        return made

    def pools(self, base: Pools, wanted: Mapping[str, str]) -> Pools:
        """Return the pools with no other workers in a role than those that are wanted. Raises
        `ClientError`, and `Unavailable` if such a worker is out of service.
        """
        found = base
        for name, roles in _WORKER.items():
            if name in wanted:
                members = _members(base)
                fitting = [worker for worker in members if worker.address.role in roles]
                _check(name, wanted[name], [worker.name for worker in fitting])
                chosen = next(worker for worker in fitting if worker.name == wanted[name])
                if chosen in base.others:
                    raise Unavailable(f"{chosen.name}, which the header {name} asks for, is out of service")
                found = self._registry.part(found, _without_others(_members(found), chosen, roles))
        return found


def _members(pools: Pools) -> list[Worker]:
    return [*pools.prefill, *pools.decode, *pools.both, *pools.others]


def _without_others(members: Iterable[Worker], chosen: Worker, roles: Sequence[Role]) -> list[Worker]:
    """Leave out those of the roles who were not chosen; who does both is alone."""
    if chosen.address.role == "both":
        return [chosen]
    return [worker for worker in members if worker is chosen or worker.address.role not in roles]


def _values(option: str) -> Sequence[str]:
    """Return what an option of the section can be."""
    annotation = RoutingConfig.model_fields[option].annotation
    return tuple(map(str, get_args(annotation)))


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        shown = ", ".join(islice(allowed, _MOST_SHOWN)) or "none"
        more = f" and {len(allowed) - _MOST_SHOWN} more" if len(allowed) > _MOST_SHOWN else ""
        raise ClientError(f"{name}: {value[:_MOST_CHARS]!r} is not possible; allowed: {shown}{more}")
