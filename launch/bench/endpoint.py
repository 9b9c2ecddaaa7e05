"""What is measured: an endpoint's URL, the key for it, and which of its models."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from launch.bench.errors import WrongUsage
from orchestrator.transport.base import Origin

KEY_VARIABLES = ("BATON_API_KEY", "OPENAI_API_KEY")  # the first that is set
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the OpenAI API is: `base` is the path of its version, such as `/v1`."""

    origin: Origin
    base: str
    url: str  # normalised, to be shown

    @classmethod
    def parse(cls, url: str, cacert: str | None = None) -> Endpoint:
        """From a URL with or without `/v1` at its end; `cacert` names a file of certificates that are trusted
        instead of the machine's. Raises `WrongUsage`.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise WrongUsage(f"{url!r} is no URL: {error}") from error
        if not _is_plain(url) or parts.scheme not in _PORTS or not host or parts.query or parts.fragment:
            raise WrongUsage(f"{url!r} is no URL of an endpoint, such as http://127.0.0.1:8000")
        if parts.username is not None or parts.password is not None:
            raise WrongUsage(f"a URL is no place for a key; set {' or '.join(KEY_VARIABLES)}")
        path = parts.path.rstrip("/")
        base = path if path.endswith("/v1") else f"{path}/v1"
        tls = _trusting(cacert) if parts.scheme == "https" else None
        origin = Origin(host, port or _PORTS[parts.scheme], tls)
        return cls(origin, base, f"{parts.scheme}://{parts.netloc}{base}")


def _trusting(cacert: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=cacert)
    except ssl.SSLError as error:
        raise WrongUsage(f"--cacert {cacert}: no certificates in PEM form") from error
    except OSError as error:
        raise WrongUsage(f"--cacert {cacert}: {error.strerror}") from error


def authorization(environ: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """The header that carries the key, if there is one. Raises `WrongUsage` without showing it."""
    name = next((name for name in KEY_VARIABLES if environ.get(name)), None)
    if name is None:
        return []
    key = environ[name].strip()
    if not _is_plain(key):
        raise WrongUsage(f"{name} holds a character that no key has")
    return [(b"authorization", f"Bearer {key}".encode())]


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text
