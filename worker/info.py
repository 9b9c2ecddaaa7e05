"""A worker's environment tells it how it is served; this says what follows for its announcement."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeVar, get_args

from orchestrator.wire.info import (
    DEFAULT_TRANSPORT,
    DEPLOYMENT_ENV,
    TRANSPORT_ENV,
    ZONE_ENV,
    Encoding,
    Role,
    Streams,
    TokenIdsForm,
)

ROLE_ENV = "BATON_ROLE"

_Choice = TypeVar("_Choice", bound=str)

_DECODES: dict[Encoding, list[Encoding]] = {
    "json": ["json"],
    "orjson": ["json", "orjson"],
    "msgpack": ["json", "msgpack"],  # without the flag the standard library parses, as in a stock worker
}
_TOKEN_IDS: dict[Encoding, list[TokenIdsForm]] = {
    "json": ["list"],
    "orjson": ["list", "base64"],
    "msgpack": ["list", "base64", "bin"],
}


def transport_from_env(environ: Mapping[str, str] = os.environ) -> Encoding:
    """Return `BATON_TRANSPORT`, by default `DEFAULT_TRANSPORT`. Raises `ValueError` if it is unknown."""
    return _choice(environ, TRANSPORT_ENV, get_args(Encoding), default=DEFAULT_TRANSPORT)


def role_from_env(environ: Mapping[str, str] = os.environ) -> Role:
    """Return `BATON_ROLE`; unset or empty means `both`. Raises `ValueError` if it is unknown."""
    return _choice(environ, ROLE_ENV, get_args(Role), default="both")


def zone_from_env(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return `BATON_ZONE`; None if it is unset or empty."""
    return environ.get(ZONE_ENV) or None


def deployment_from_env(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return `BATON_DEPLOYMENT`; None if it is unset or empty."""
    return environ.get(DEPLOYMENT_ENV) or None


def decodes(transport: Encoding) -> list[Encoding]:
    """Return the request encodings that a worker with this transport takes."""
    return list(_DECODES[transport])


def token_ids(transport: Encoding) -> list[TokenIdsForm]:
    """Return the forms of a prompt's token ids that a worker with this transport gives and takes."""
    return list(_TOKEN_IDS[transport])


def announced_streams(streams: Streams) -> list[Streams]:
    """Return the ways in which legs can come to a worker: nothing is said of a connection for each."""
    return ["http", "mux"] if streams == "mux" else []


def _choice(environ: Mapping[str, str], name: str, allowed: tuple[_Choice, ...], default: _Choice) -> _Choice:
    given = environ.get(name) or default
    for value in allowed:
        if given == value:
            return value
    raise ValueError(f"{name}={given!r} is none of {', '.join(allowed)}")
