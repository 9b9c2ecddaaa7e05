"""EndpointSlices of Kubernetes say which pods a Service has: what they list becomes members.

Only what is needed of them is decoded, and each endpoint by itself, so that what cannot be read in one harms
no other. An endpoint may be in several slices while the cluster moves it, and a pod of two address families
has one in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from orchestrator.config.options import join_address
from orchestrator.discovery.base import PoolKey
from orchestrator.wire.member import Member, MemberSet, Problem

MAX_ENDPOINTS: Final = 4096
_FAMILIES: Final = {"IPv4": 0, "IPv6": 1}  # of a pod that has both, the first is used


class _Meta(msgspec.Struct):
    name: str
    resourceVersion: str = ""  # Kubernetes' own names


class _Port(msgspec.Struct):
    name: str | None = None
    port: int | None = None
    appProtocol: str | None = None


class Slice(msgspec.Struct):
    """Of an EndpointSlice this is read; a list that is empty may be absent or null."""

    metadata: _Meta
    addressType: str = "IPv4"
    endpoints: list[msgspec.Raw] | None = None
    ports: list[_Port] | None = None


class _Conditions(msgspec.Struct):
    """What is absent is as the API has it: ready counts as true, serving as ready, terminating as false."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Target(msgspec.Struct):
    name: str | None = None
    uid: str | None = None


class _Endpoint(msgspec.Struct):
    addresses: list[str]
    conditions: _Conditions | None = None
    targetRef: _Target | None = None
    zone: str | None = None


class SliceError(ValueError):
    """A slice cannot be read; `name` is its name, if that can."""

    def __init__(self, why: str, name: str | None) -> None:
        super().__init__(why)
        self.name = name


class _Named(msgspec.Struct):
    metadata: _Meta


def decode_slice(raw: bytes | msgspec.Raw) -> Slice:
    """Raises `SliceError`."""
    try:
        return msgspec.json.decode(raw, type=Slice)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SliceError(str(error), _name_in(raw)) from error


def _name_in(raw: bytes | msgspec.Raw) -> str | None:
    try:
        return msgspec.json.decode(raw, type=_Named).metadata.name
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


class _Read:
    """The endpoints of a slice are read once, when it comes."""

    __slots__ = ("found", "members", "problems")

    def __init__(self, found: Slice, port: str | int | None) -> None:
        self.found = found
        self.members: list[Member] = []  # without model and role
        self.problems: list[Problem] = []
        try:
            scheme, number = port_of(found, port)
        except ValueError as error:
            if found.endpoints:
                self.problems.append(Problem(f"slice {found.metadata.name}", str(error)))
            return
        for index, raw in enumerate((found.endpoints or ())[:MAX_ENDPOINTS]):
            try:
                self.members.append(_member(raw, scheme, number))
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                place = f"slice {found.metadata.name}, endpoint {index}"
                self.problems.append(Problem(place, str(error)))


class Slices:
    """All slices of a Service are here as they were last heard of; of one that cannot be read, the last that
    could.
    """

    def __init__(self, port: str | int | None, pools: Sequence[PoolKey]) -> None:
        """`port` is the name or the number of the workers' port; None: the only one, or http."""
        self._port = port
        self._pools = pools
        self._slices: dict[str, _Read] = {}
        self._problems: dict[str, str] = {}  # by the name of the slice
        self.is_whole = True  # what could not be read had names, at least

    def replace(self, items: Iterable[msgspec.Raw]) -> None:
        """Take a whole list over: what is not in it is gone."""
        before, self._slices, self._problems = self._slices, {}, {}
        self.is_whole = True
        for item in items:
            try:
                self.put(decode_slice(item))
            except SliceError as error:
                self.note_problem(error, before)

    def put(self, found: Slice) -> None:
        """Take one over that was added or has changed; an older state of it is no news."""
        name = found.metadata.name
        known = self._slices.get(name)
        if known is None or not _is_older(found, known.found):
            self._slices[name] = _Read(found, self._port)
            self._problems.pop(name, None)

    def remove(self, found: Slice) -> None:
        """Forget one that was deleted; one of the same name that came later stays."""
        name = found.metadata.name
        known = self._slices.get(name)
        if known is not None and not _is_older(found, known.found):
            del self._slices[name]
        self._problems.pop(name, None)

    def note_problem(self, error: SliceError, before: dict[str, _Read] | None = None) -> None:
        """Note that a slice could not be read; what was known of it, as in `before`, stays."""
        if error.name is None:
            self.is_whole = False
            self._problems[""] = str(error)
            return
        known = (before or self._slices).get(error.name)
        if known is None:
            self.is_whole = False
        else:
            self._slices[error.name] = known
        self._problems[error.name] = str(error)

    def found(self) -> MemberSet:
        """Return the members of all slices, for each pool."""
        ordered = sorted(self._slices.values(), key=_order)
        seen: dict[str, Member] = {}
        for member in (member for read in ordered for member in read.members):
            seen[member.uid] = _both(seen[member.uid], member) if member.uid in seen else member
        members = [
            msgspec.structs.replace(member, model=model, role=role)
            for model, role in self._pools
            for member in seen.values()
        ]
        unreadable = [Problem(f"slice {name}".rstrip(), why) for name, why in self._problems.items()]
        unusable = [problem for read in ordered for problem in read.problems]
        is_whole = self.is_whole and not unusable
        return MemberSet(tuple(members), (*unreadable, *unusable), is_whole)


def port_of(found: Slice, wanted: str | int | None) -> tuple[str, int]:
    """Return the scheme and the number of the workers' port. Raises `ValueError`, which says what to give."""
    ports = [port for port in found.ports or () if port.port is not None]
    names = ", ".join(port.name or str(port.port) for port in ports) or "none"
    match: _Port | None
    if isinstance(wanted, int):
        match = next((port for port in ports if port.port == wanted), _Port(port=wanted))
    elif wanted is not None:
        match = next((port for port in ports if port.name == wanted), None)
    else:
        match = ports[0] if len(ports) == 1 else next((p for p in ports if p.name == "http"), None)
    if match is None or match.port is None:
        hint = f"there is no port {wanted!r}" if wanted is not None else "give discover.kubernetes.port"
        raise ValueError(f"{hint}; the Service's ports are: {names}")
    return "https" if match.appProtocol == "https" else "http", match.port


def _member(raw: msgspec.Raw, scheme: str, port: int) -> Member:
    """Raises `ValueError`; the model and the role are to be filled in."""
    endpoint = msgspec.json.decode(raw, type=_Endpoint)
    if not endpoint.addresses:
        raise ValueError("it has no address")
    address = join_address(endpoint.addresses[0], port)
    target, conditions = endpoint.targetRef or _Target(), endpoint.conditions or _Conditions()
    is_ready = conditions.ready is not False
    is_serving = is_ready if conditions.serving is None else conditions.serving
    fields = {
        "uid": target.uid or address,
        "name": target.name or address,
        "model": "",
        "role": "both",
        "url": f"{scheme}://{address}",
        "zone": endpoint.zone or None,
        "is_draining": conditions.terminating is True,
        "is_ready": is_serving,
    }
    return msgspec.convert(fields, Member)


def _both(one: Member, other: Member) -> Member:
    """Return what two endpoints of a pod say together: it serves if one of them does."""
    is_draining, is_ready = one.is_draining and other.is_draining, one.is_ready or other.is_ready
    return msgspec.structs.replace(one, is_draining=is_draining, is_ready=is_ready)


def _order(read: _Read) -> tuple[int, str]:
    return _FAMILIES.get(read.found.addressType, len(_FAMILIES)), read.found.metadata.name


def _is_older(found: Slice, known: Slice) -> bool:
    """Return whether a state of a slice is older than another one, where the versions are numbers."""
    version, newest = found.metadata.resourceVersion, known.metadata.resourceVersion
    are_numbers = all(one.isascii() and one.isdigit() for one in (version, newest))
    return are_numbers and (len(version), version) < (len(newest), newest)
