"""A trouble is why a worker cannot be used: what everybody may read of it, and what the operator can do.

What everybody may read is made of fixed words and a status: no address, no text of the worker's or of an
exception is in it, for `/ready` needs no key.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import msgspec

from orchestrator.wire.info import WORKER_KEY_ENV


@dataclass(frozen=True, slots=True)
class Trouble:
    what: str  # with the worker as its subject
    advice: str = ""  # what to do; empty if that is not known
    may_pass: bool = False  # a worker that is being started looks so, too


REFUSES = Trouble("refuses connections", "is it started, and is the port right?", may_pass=True)
SILENT = Trouble(
    "does not answer", "is it overloaded, or does a firewall drop what it is sent?", may_pass=True
)
CUT = Trouble(
    "closes connections without an answer", "if it speaks TLS, write https:// in its URL", may_pass=True
)
UNKNOWN_HOST = Trouble("has an unknown host", "is the name in its URL right, and can DNS resolve it?")
UNREACHABLE = Trouble("cannot be reached", "is there a route to its host?", may_pass=True)
NO_TLS = Trouble("does not speak TLS", "write http:// in its URL, or give it a certificate")
UNTRUSTED = Trouble(
    "has a certificate that is not trusted", "is its CA in SSL_CERT_FILE, and its host in the certificate?"
)
NO_HTTP = Trouble(
    "does not answer in HTTP", "if it speaks TLS, write https:// in its URL; is it another service?"
)
WRONG_KEY = "give both sides the same key: {env} here, --api-key or VLLM_API_KEY there"
OTHER_MODEL = Trouble(
    "serves another model", "set models.*.ROLE.served_model to a name that it serves, or correct its URL"
)
FEWER_ENGINES = Trouble(
    "has fewer data-parallel engines than the config says", "correct models.*.ROLE.data_parallel_size"
)
GARBAGE = Trouble("answers what cannot be read", "is there another service at its URL?")
DENIES = Trouble("denies requests", "is there a proxy before it, or another service at its URL?")
STALLS = Trouble("does not get on with what it was handed over", "does its engine stand still?")
ENDED = Trouble("has ended")
FAILS = Trouble("fails its probes")


def answered(status: int) -> Trouble:
    """Return the trouble with a worker that answers a probe so."""
    if status in (401, 403, 407):
        return Trouble(f"refuses the orchestrator's key ({status})", WRONG_KEY.format(env=WORKER_KEY_ENV))
    if status >= 500:
        return Trouble(f"is ill ({status})", "its own log says more", may_pass=True)
    return Trouble(f"is no model server ({status})", GARBAGE.advice)


def trouble_of(error: BaseException) -> Trouble:
    """Return the trouble that an exception tells of; what lies beneath one says the most."""
    causes = list(_causes(error))
    for kind, trouble in _TROUBLES:
        if any(isinstance(cause, kind) for cause in causes):
            return trouble
    return FAILS


# The first that fits counts: what lies above is a case of what lies below it.
_TROUBLES: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], Trouble], ...] = (
    (ConnectionRefusedError, REFUSES),
    ((socket.gaierror, UnicodeEncodeError), UNKNOWN_HOST),
    (ssl.SSLCertVerificationError, UNTRUSTED),
    (ssl.SSLWantReadError, SILENT),
    (ssl.SSLError, NO_TLS),
    ((TimeoutError, httpx.TimeoutException), SILENT),
    ((ConnectionError, httpx.ReadError), CUT),
    (httpx.RemoteProtocolError, NO_HTTP),
    ((OSError, httpx.TransportError), UNREACHABLE),
    ((msgspec.MsgspecError, ValueError, RecursionError, httpx.InvalidURL), GARBAGE),
)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Go down to the first cause: httpx keeps what the socket said some causes deep."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
