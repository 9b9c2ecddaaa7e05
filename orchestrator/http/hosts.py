"""A listener is asked for under names that it knows.

A page of another site can have its own name resolve to our address (DNS rebinding). To the browser we are
then that page's own server, so it sends anything and shows the page every answer; only the Host header tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final

from orchestrator.config.addresses import is_loopback
from orchestrator.config.options import ANY_HOST, split_address

OPTION: Final = "orchestrator.allowed_hosts"


class Hosts:
    """A listener takes requests for these names, and for every IP address, as those are not looked up."""

    def __init__(self, names: Iterable[str]) -> None:
        """`names` are in lower case, without a dot at the end; `*.NAME` stands for all below NAME."""
        known = [name.encode() for name in names]
        self._names = frozenset(name for name in known if not name.startswith(b"*."))
        self._suffixes = tuple(name[1:] for name in known if name.startswith(b"*."))

    @classmethod
    def of(cls, allowed: Iterable[str], listen: str) -> Hosts | None:
        """Return what a listener at `listen` takes; None if that is everything.

        On loopback these are localhost and what is allowed; elsewhere everything unless something is allowed.
        """
        names = frozenset(allowed)
        host = split_address(listen)[0]
        if ANY_HOST in names or not (names or is_loopback(host)):
            return None
        return cls(names | {"localhost", host.lower()})

    def takes(self, host: bytes) -> bool:
        """Return whether requests for `host`, the value of a valid Host header with its port, are ours."""
        name = _without_port(host.lower())
        return name in self._names or name.endswith(self._suffixes) or _is_address(name)


def _without_port(host: bytes) -> bytes:
    if host.startswith(b"["):
        return host[1:].partition(b"]")[0]
    name = host.partition(b":")[0]
    return name[:-1] if name.endswith(b".") else name


def _is_address(name: bytes) -> bool:
    try:
        ip_address(name.decode("ascii"))
    except ValueError:
        return False
    return True
