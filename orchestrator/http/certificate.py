"""A file of certificates tells when the first of them expires.

The standard library tells that of a peer's certificate only, so the bytes of DER around the date are read
here.
"""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime
from typing import Final

_pem_blocks: Final = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL).findall
_SEQUENCE: Final = 0x30
_UTC_TIME: Final = 0x17  # two digits of the year; GeneralizedTime has four
_LONG: Final = 0x80  # in the length of a value: the other bits say how many bytes the length has
_PIVOT: Final = 50  # RFC 5280: years from here on are of the last century

Value = tuple[int, bytes]  # tag and content


def not_after(pem: bytes) -> float | None:
    """Return when the first certificate in a PEM file expires, in seconds since 1970; None if it has none.

    Whether it can be served is for the listener to say.
    """
    try:
        blocks = _pem_blocks(pem.decode("ascii", "replace"))
        ends = [_end_of(ssl.PEM_cert_to_DER_cert(block)) for block in blocks]
    except (ValueError, IndexError):
        return None
    return min(ends, default=None)


def _end_of(der: bytes) -> float:
    """Return the end of a certificate's validity. Raises ValueError or IndexError if it has none."""
    _, certificate = _values(der)[0]
    _, signed = _values(certificate)[0]
    # Before the validity are the version (if it is told), the serial number, an algorithm and the issuer.
    sequences = [content for tag, content in _values(signed) if tag == _SEQUENCE]
    return _moment(_values(sequences[2])[1])


def _values(der: bytes) -> list[Value]:
    """Return the values that stand one after the other."""
    values, place = [], 0
    while place < len(der):
        tag, length, place = der[place], der[place + 1], place + 2
        if length & _LONG:
            size = length - _LONG
            length, place = int.from_bytes(der[place : place + size]), place + size
        values.append((tag, der[place : place + length]))
        place += length
    return values


def _moment(value: Value) -> float:
    tag, content = value
    text = content.decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if int(text[:2]) >= _PIVOT else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
