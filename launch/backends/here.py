"""A worker on a node of a cluster is reached by others at an address of the node, which is found here."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final

# Nothing is sent there: the kernel says which of our addresses a packet would have.
_ELSEWHERE: Final = ("192.0.2.1", "2001:db8::1")
LOOPBACK: Final = "127.0.0.1"


class NoAddress(OSError):
    """The node has no such address; the message says what it has."""


def reachable_address(peers: Iterable[str], network: str | None = None) -> str:
    """Return the address of this machine at which others reach it.

    It is the one within `network`, such as 10.1.0.0/16, if that is given; else the one that is used towards
    the first of the `peers` for which that is no loopback address; else towards anywhere; else 127.0.0.1.
    Raises `NoAddress` if no address is within the network.
    """
    if network is not None:
        return _within(ip_network(network), own_addresses())
    found = filter(None, map(_towards, (*peers, *_ELSEWHERE)))
    return next((address for address in found if not ip_address(address).is_loopback), LOOPBACK)


def _within(network: IPv4Network | IPv6Network, addresses: Iterable[str]) -> str:
    there = list(addresses)
    found = next((address for address in there if ip_address(address) in network), None)
    if found is None:
        raise NoAddress(
            f"{socket.gethostname()} has no address in {network}: it has {', '.join(there) or 'none'}"
        )
    return found


def own_addresses(names: Callable[[], Iterable[str]] | None = None) -> list[str]:
    """Return the addresses of this machine, without those of the loopback interface."""
    found = (_address_of(name) for _, name in socket.if_nameindex()) if names is None else names()
    return [address for address in found if address and not ip_address(address).is_loopback]


def _address_of(interface: str) -> str | None:
    """Return the IPv4 address of a network interface."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[20:24])


_SIOCGIFADDR: Final = 0x8915


def _towards(peer: str) -> str | None:
    """Return the address that this machine has for whoever is at `peer`; None if nobody knows the way."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as asking:
            asking.connect(place)
            return str(asking.getsockname()[0])
    except OSError:
        return None
