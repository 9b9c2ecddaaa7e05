"""A request's head says what the request is, and may be reason enough to refuse it.

Nothing here knows of connections: a head goes in, a refusal or none comes out, and what else the head says is
written into it.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import unquote

import httptools

from orchestrator.errors import (
    BatonError,
    BodyTooLarge,
    ClientError,
    HeadersTooLarge,
    MethodNotAllowed,
    Misdirected,
    RequestTimeout,
    UnsupportedEncoding,
    UriTooLong,
)
from orchestrator.http.hosts import OPTION
from orchestrator.http.limits import ServerLimits
from orchestrator.wire.headers import Fields

HTTP_VERSIONS: Final[tuple[str, ...]] = ("1.1", "1.0")
OTHER_PROTOCOL: Final = "another protocol"  # in place of a version
# Times max_header_bytes: a larger head is not read to its end, so 414 and 431 close the connection.
HEAD_DRAIN: Final = 4
MAX_SHOWN: Final = 200  # characters of what a client sent, in an error


# Fields that somebody on the way may understand in another way than we do if they come more than once.
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
_SINGLE: Final = _FRAMING | {
    b"authorization",
    b"content-type",
    b"expect",
    b"host",
    b"origin",
    b"proxy-authorization",
    b"x-api-key",
    b"x-request-id",
    b"x-request-timeout",
}


class Target(NamedTuple):
    """A request target has these parts."""

    url: bytes
    raw_path: bytes
    path: str  # percent-decoded
    query: bytes  # without "?"

    @classmethod
    def of(cls, url: bytes, raw_path: bytes, query: bytes) -> Target:
        path = raw_path.decode("ascii")  # the parser lets nothing else through
        return cls(url, raw_path, unquote(path) if "%" in path else path, query)


NO_TARGET: Final = Target(b"", b"/", "/", b"")


class Head:
    """A head is what the parser gives; `Judge.refusal()` adds what it says."""

    __slots__ = (
        "awaits_continue",
        "content_length",
        "ends_reading",
        "fields",
        "has_body",
        "headers",
        "http_version",
        "is_upgrade",
        "keep_alive",
        "method",
        "target",
        "url",
    )

    def __init__(
        self,
        method: str,
        url: bytes,
        http_version: str,
        headers: list[tuple[bytes, bytes]],
        keep_alive: bool,
        is_upgrade: bool = False,
    ) -> None:
        """Header names are in lower case. `keep_alive`: the client may send another request behind this one.
        `is_upgrade`: it offers another protocol, so that the parser stops behind the head."""
        self.method = method
        self.url = url
        self.http_version = http_version
        self.headers = headers
        self.fields = dict(headers)
        self.keep_alive = keep_alive
        self.is_upgrade = is_upgrade
        self.target = NO_TARGET
        self.content_length: int | None = None  # None: chunked, or no body
        self.has_body = False  # it may turn out to be empty
        self.awaits_continue = False  # the client waits for "100 Continue" before it sends the body
        self.ends_reading = False  # nothing behind this request can be understood, or is worth to be read

    def count(self, name: bytes) -> int:
        """Return how many fields have this name, in lower case."""
        return sum(given == name for given, _ in self.headers)


class Judge:
    """A judge judges the heads of one connection, and remembers what the next is likely to repeat."""

    def __init__(self, limits: ServerLimits) -> None:
        self.small = min(limits.max_request_line, limits.max_header_bytes)  # bytes that need no counting
        self._limits = limits
        self._target = NO_TARGET  # the last one
        self._host: bytes | None = None  # the last one found to be valid

    def refusal(self, head: Head, is_small: bool) -> BatonError | None:
        """Return why a request is refused by its head alone. `is_small`: the head has `small` bytes at most.

        This sets what else the head says, as far as it was looked at.
        """
        error: BatonError | None = None
        if not is_small or len(head.headers) > self._limits.max_headers:
            error = _size_error(head, self._limits)
        is_clear = len(head.fields) == len(head.headers)  # no field came twice
        return (
            error
            or _framing_error(head)
            or (None if is_clear else _repetition_error(head))
            or self._content_error(head)
        )

    def _content_error(self, head: Head) -> BatonError | None:
        fields = head.fields
        host = fields.get(b"host")
        if host is None or host != self._host:
            error = self._host_error(head, host)
            if error is not None:
                return error
        if head.url == self._target.url:
            head.target = self._target
        else:
            error = self._target_error(head)
            if error is not None:
                return error
        return _body_error(head, self._limits) if head.has_body else None

    def _target_error(self, head: Head) -> BatonError | None:
        """Return why the URL is refused; else it becomes the target."""
        target = _target_of(head.method, head.url)
        if target is None:
            return ClientError("invalid request target")
        host = _host_of(head.url)
        if host is not None and not self._is_ours(host):
            return _misdirected(host)
        head.target = target
        if head.url != b"*":  # what is said of that is said of one method only
            self._target = target
        return None

    def _host_error(self, head: Head, host: bytes | None) -> BatonError | None:
        if host is None:
            # HTTP/1.0 knows no Host, and some load balancers probe with it.
            return None if head.http_version == "1.0" else ClientError("the Host header is missing")
        name = host.rstrip(b" \t")
        if not _is_valid_host(name):
            return ClientError("the Host header is invalid")
        if not self._is_ours(name):
            return _misdirected(name)
        self._host = host
        return None

    def _is_ours(self, host: bytes) -> bool:
        return self._limits.hosts is None or self._limits.hosts.takes(host)


# --- size -----------------------------------------------------------------------------------------


def _size_error(head: Head, limits: ServerLimits) -> BatonError | None:
    size = _size_of(head.headers)
    error: BatonError | None = None
    if len(head.method) + len(head.url) + len("  HTTP/1.1") > limits.max_request_line:
        error = _uri_too_long(limits)
    elif size > limits.max_header_bytes or len(head.headers) > limits.max_headers:
        error = _headers_too_large(limits)
    if error is not None and size + len(head.url) > max_head_bytes(limits):
        return _end_with(head, error)
    return error


def max_head_bytes(limits: ServerLimits) -> int:
    """Return how many bytes of a head are read to find its end."""
    return HEAD_DRAIN * limits.max_header_bytes


def unfinished_error(url: bytes, head_bytes: int, limits: ServerLimits) -> BatonError:
    """Return why a head is refused whose end is not among its first `head_bytes`."""
    if len(url) > limits.max_request_line:
        return _uri_too_long(limits)
    if head_bytes > limits.max_header_bytes:
        return _headers_too_large(limits)
    return RequestTimeout(f"the request's head took over {limits.header_timeout_s:g} s")


def _uri_too_long(limits: ServerLimits) -> BatonError:
    return UriTooLong(f"the request line is over {limits.max_request_line} bytes")


def _headers_too_large(limits: ServerLimits) -> BatonError:
    return HeadersTooLarge(
        f"the headers are over {limits.max_header_bytes} bytes or {limits.max_headers} fields"
    )


def _size_of(headers: Fields) -> int:
    """Return the size of the fields as sent, with one space behind each colon."""
    return sum(len(name) + len(value) + len(": \r\n") for name, value in headers)


# --- framing --------------------------------------------------------------------------------------


def _framing_error(head: Head) -> BatonError | None:
    """Return what leaves in doubt where the request ends, so that nothing behind it can be understood."""
    fields = head.fields
    if head.http_version not in HTTP_VERSIONS:
        return _end_with(head, ClientError("only HTTP/1.1 and HTTP/1.0 are served"))
    coding = fields.get(b"transfer-encoding")
    length = fields.get(b"content-length")
    if coding is not None:
        is_one = head.count(b"transfer-encoding") == 1
        is_chunked = is_one and coding.strip().lower() == b"chunked"
        if not is_chunked or head.http_version == "1.0" or length is not None:
            return _end_with(head, ClientError("unacceptable transfer-encoding"))
        head.has_body = True
    elif length is not None:
        head.content_length = int(length)  # digits only: the parser has seen to that
        head.has_body = head.content_length > 0
    if b"expect" in fields and head.has_body and head.http_version == "1.1":
        head.awaits_continue = fields[b"expect"].strip().lower() == b"100-continue"
    if head.is_upgrade and head.method == "CONNECT":
        return _end_with(head, MethodNotAllowed("this is not a proxy"))
    return None


def _repetition_error(head: Head) -> BatonError | None:
    """Return which field came more than once though it has one value: which one counts is a guess."""
    seen: set[bytes] = set()
    for name, _ in head.headers:
        if name in seen:
            error = ClientError(f"there is more than one {name.decode('latin-1')} header")
            return _end_with(head, error) if name in _FRAMING else error
        if name in _SINGLE:
            seen.add(name)
    return None


def _end_with(head: Head, error: BatonError) -> BatonError:
    """Return `error`, and let nothing behind this request be read."""
    head.keep_alive = False
    head.ends_reading = True
    return error


# --- content --------------------------------------------------------------------------------------


def _body_error(head: Head, limits: ServerLimits) -> BatonError | None:
    size = head.content_length or 0
    if size > limits.max_body_bytes and size > limits.most_of(head.target.path):
        error = BodyTooLarge(f"the body is over {limits.most_of(head.target.path)} bytes")
        return _end_with(head, error) if size > limits.drain_bytes else error
    if b"content-encoding" in head.fields and _is_encoded(head.headers):
        return UnsupportedEncoding("send the body without content-encoding")
    return None


def _is_encoded(headers: Fields) -> bool:
    return any(value.strip().lower() != b"identity" for name, value in headers if name == b"content-encoding")


# RFC 3986: an IP literal in brackets, or a name or IPv4 address; then perhaps a port.
_match_host: Final = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(?::[0-9]{0,5})?"
).fullmatch


def _is_valid_host(host: bytes) -> bool:
    return _match_host(host) is not None


def _misdirected(host: bytes) -> BatonError:
    name = host[:MAX_SHOWN].decode("ascii")  # it was found to be valid
    return Misdirected(f"this server is not known as {name!r}: see the option {OPTION}")


def _host_of(url: bytes) -> bytes | None:
    """Return the host, without port, of a target in absolute form: it counts more than Host (RFC 9112)."""
    if url.startswith((b"/", b"*")):
        return None
    host: bytes = httptools.parse_url(url).host
    return b"[%b]" % host if b":" in host else host


def _target_of(method: str, url: bytes) -> Target | None:
    """Return the target; None if there is no path to be had from `url`."""
    if url.startswith(b"/"):
        path, _, query = url.partition(b"#")[0].partition(b"?")
        return Target.of(url, path, query)
    if url == b"*":
        return Target.of(url, url, b"") if method == "OPTIONS" else None
    try:
        parsed = httptools.parse_url(url)  # the absolute form that is sent to proxies
    except httptools.HttpParserInvalidURLError:
        return None
    return Target.of(url, parsed.path or b"/", parsed.query or b"")
