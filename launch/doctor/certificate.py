"""A certificate is tried as clients would: in a handshake with itself, in memory."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass

_EXPIRED = 10  # OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED
_NOT_YET = 9  # X509_V_ERR_CERT_NOT_YET_VALID
_ROUNDS = 10  # of messages to and fro; a handshake has three


class CertificateProblem(Exception):
    """Clients would refuse it; the message says why, with the certificate as its subject."""

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(why)
        self.advice = advice


@dataclass(frozen=True, slots=True)
class Certificate:
    not_after: float  # seconds since 1970

    @property
    def days_left(self) -> float:
        return (self.not_after - time.time()) / 86400


def try_certificate(cert: str, key: str) -> Certificate:
    """Return what is known of a certificate that clients can accept.

    Raises `CertificateProblem`, or `OSError` if a file cannot be read.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its own word is enough: others judge its issuer
    try:
        server.load_cert_chain(cert, key, password=_no_password)
        client.load_verify_locations(cert)
    except ssl.SSLError as error:
        raise _unusable(error) from error
    return _shaken(server, client)


def _no_password() -> str:
    raise CertificateProblem(
        "has a key that needs a password", "give a key without one: openssl pkey -in KEY"
    )


def _unusable(error: ssl.SSLError) -> CertificateProblem:
    if error.reason == "KEY_VALUES_MISMATCH":
        return CertificateProblem("and key do not belong together", "give the key that it was made with")
    return CertificateProblem(
        f"cannot be used: {error.reason or error}", "give PEM files: the chain, and its key"
    )


def _shaken(server: ssl.SSLContext, client: ssl.SSLContext) -> Certificate:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    try:
        for _ in range(_ROUNDS):
            for end in ends:
                _step(end)
    except ssl.SSLCertVerificationError as error:
        raise _refused(error) from error
    except ssl.SSLError as error:
        raise _unusable(error) from error
    found = (ends[0].getpeercert() or {}).get("notAfter")
    return Certificate(ssl.cert_time_to_seconds(str(found)))


def _step(end: ssl.SSLObject) -> None:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return


def _refused(error: ssl.SSLCertVerificationError) -> CertificateProblem:
    if error.verify_code == _EXPIRED:
        return CertificateProblem("has expired", "get a new one: clients refuse it")
    if error.verify_code == _NOT_YET:
        return CertificateProblem("is not valid yet", "check this machine's clock, or wait")
    return CertificateProblem(f"is refused: {error.verify_message}", "get another one")
