from __future__ import annotations

from pathlib import Path

import pytest

from launch.doctor.certificate import CertificateProblem, try_certificate
from tests.orchestrator.certificate import CERT
from tests.orchestrator.certificate import KEY as OTHER_KEY

HERE = Path(__file__).parent
KEY = str(HERE / "key.pem")


@pytest.mark.parametrize(
    ("cert", "key", "why"),
    [
        ("expired.pem", KEY, "has expired"),
        ("not_yet.pem", KEY, "is not valid yet"),
        ("valid.pem", str(OTHER_KEY), "and key do not belong together"),
        ("valid.pem", str(HERE / "locked_key.pem"), "has a key that needs a password"),
        ("key.pem", KEY, "cannot be used: "),
        ("test_certificate.py", KEY, "cannot be used: "),
    ],
)
def test_what_clients_would_refuse_is_said(cert: str, key: str, why: str) -> None:
    with pytest.raises(CertificateProblem, match=why) as caught:
        try_certificate(str(HERE / cert), key)
    assert caught.value.advice


def test_what_clients_can_accept() -> None:
    assert try_certificate(str(HERE / "valid.pem"), KEY).days_left > 30_000
    assert try_certificate(str(CERT), str(OTHER_KEY)).days_left > 30_000


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(OSError, match="No such file"):
        try_certificate("no-such.pem", KEY)
