"""A cluster of Ray is connected to, and cleared of what a run has left there."""

from __future__ import annotations

import os
import socket
import time
from typing import Any, Final

# Of a cluster that we start: with its own settings Ray took 17 s until the actors of a lost node were
# elsewhere.
SYSTEM_CONFIG: Final = {
    "health_check_initial_delay_ms": 5000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
REACH_S: Final = 3.0  # for a connection to the head, before Ray tries for a minute
GONE_S: Final = 20.0  # until Ray has ended actors
_POLL_S: Final = 0.1


class Refused(Exception):
    """Ray cannot be used so; the message says why, and what to do."""


def connect(ray: Any, address: str, namespace: str) -> None:
    """Connect to a cluster, or start one if the address is `local`. Raises `Refused`."""
    options: dict[str, Any] = {"namespace": namespace, "log_to_driver": False}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"_system_config": SYSTEM_CONFIG, "include_dashboard": False}
    elif address != "auto":
        _check_reached(address)
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise Refused(_not_there(address, error)) from error
    except (RuntimeError, ValueError) as error:
        raise Refused(_mismatch(error) or _not_there(address, error)) from error


def _check_reached(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, ValueError) as error:
        raise Refused(
            f"no head of Ray answers at {address}: {error}; launch.ray.address is that of the cluster's GCS, "
            "HOST:6379 by default, as `ray start --head` prints it"
        ) from error


def _not_there(address: str, error: Exception) -> str:
    told = " ".join(str(error).split())[:500]
    if address == "local":
        return f"Ray cannot be started here: {told}"
    if address == "auto":
        return (
            "no cluster of Ray runs on this machine: join one by `ray start --address=HOST:6379`, start one "
            f"by `ray start --head`, or set launch.ray.address to local ({told})"
        )
    return (
        f"this machine is no node of the cluster at {address}: join it with `ray start --address={address}`, "
        f"or run `baton up` on one of its nodes ({told})"
    )


def _mismatch(error: Exception) -> str | None:
    """Return what to do where versions differ, in Ray's own words of which; None if it is something else."""
    told = " ".join(str(error).split())
    if "ersion mismatch" not in told:
        return None
    return f"{told[:500]}: have one version of Ray, and of Python, on all nodes and where `baton up` runs"


def end_all(ray: Any, namespace: str) -> None:
    """End all actors of a run, give up its places, and wait until Ray has none any more. Raises `Refused`."""
    deadline = time.monotonic() + GONE_S
    while left := _actors_of(ray, namespace):
        for name in left:
            _end(ray, name, namespace)
        if time.monotonic() > deadline:
            raise Refused(f"these actors of {namespace} do not end: {', '.join(left)}")
        time.sleep(_POLL_S)
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(f"{namespace}:") and group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))


def _actors_of(ray: Any, namespace: str) -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == namespace]


def _end(ray: Any, name: str, namespace: str) -> None:
    try:
        ray.kill(ray.get_actor(name, namespace), no_restart=True)
    except ValueError:  # it has ended meanwhile
        return
