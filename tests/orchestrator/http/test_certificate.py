"""What ends first of a certificate file is what OpenSSL says it is."""

from __future__ import annotations

import ssl
from pathlib import Path

import certifi
import pytest

from orchestrator.http.certificate import not_after
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


def test_the_end_of_each_certificate_is_found(tmp_path: Path) -> None:
    found = authorities()
    assert len(found) > 50
    for pem in found:
        file = tmp_path / "one.pem"
        file.write_text(pem)
        assert not_after(str(file)) == end_of(pem)


def test_of_a_chain_the_first_end_counts(tmp_path: Path) -> None:
    found = authorities()[:7]
    file = tmp_path / "chain.pem"
    file.write_text("Bag Attributes\n" + "\n".join(found))
    assert not_after(str(file)) == min(map(end_of, found))


def test_a_certificate_and_its_key_may_be_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "both.pem"
    file.write_bytes(KEY.read_bytes() + CERT.read_bytes())
    assert not_after(str(file)) == not_after(str(CERT)) == end_of(CERT.read_text())


BROKEN = "-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(
    "content", ["", "none", *(BROKEN % word for word in ("MII", "????", "MIIBAA==", "MAA=", "é"))]
)
def test_what_is_no_certificate_has_no_end(content: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.pem"
    file.write_text(content)
    assert not_after(str(file)) is None
    assert not_after(str(tmp_path / "missing.pem")) is None
