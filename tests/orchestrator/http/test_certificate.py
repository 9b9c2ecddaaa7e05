"""What ends first of a certificate file is what OpenSSL says it is."""

from __future__ import annotations

import ssl
from pathlib import Path

import certifi
import pytest

from orchestrator.config.options import TlsConfig
from orchestrator.http.certificate import not_after
from orchestrator.http.tls import Certificate
from tests.orchestrator.certificate import CERT, KEY


def authorities() -> list[str]:
    """Certificates of all the world, in all the spellings that there are."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certifi.where())
    return [ssl.DER_cert_to_PEM_cert(der) for der in context.get_ca_certs(binary_form=True)]


def end_of(pem: str) -> float:
    """As OpenSSL tells it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=pem)
    [certificate] = context.get_ca_certs()
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))


def test_the_end_of_each_certificate_is_found() -> None:
    found = authorities()
    assert len(found) > 50
    for pem in found:
        assert not_after(pem.encode()) == end_of(pem)


def test_of_a_chain_the_first_end_counts() -> None:
    found = authorities()[:7]
    assert not_after(("Bag Attributes\n" + "\n".join(found)).encode()) == min(map(end_of, found))


def test_a_certificate_and_its_key_may_be_in_one_file() -> None:
    assert not_after(KEY.read_bytes() + CERT.read_bytes()) == end_of(CERT.read_text())


BROKEN = "-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(
    "content", ["", "none", *(BROKEN % word for word in ("MII", "????", "MIIBAA==", "MAA=", "é"))]
)
def test_what_is_no_certificate_has_no_end(content: str) -> None:
    assert not_after(content.encode()) is None


def test_a_renewed_certificate_has_another_end(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(CERT.read_bytes())
    key.write_bytes(KEY.read_bytes())
    certificate = Certificate(TlsConfig(cert=str(cert), key=str(key)))
    assert certificate.not_after == end_of(CERT.read_text())
    with cert.open("a") as file:
        file.write(authorities()[0])
    assert certificate.renew()
    assert certificate.not_after == min(end_of(CERT.read_text()), end_of(authorities()[0]))
