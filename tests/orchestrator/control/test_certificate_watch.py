"""The end of the certificate is told two weeks before, and when it has come; each once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.config.options import TlsConfig
from orchestrator.control.certificate_watch import NOTICE_S, CertificateWatch
from orchestrator.http.tls import Certificate
from orchestrator.telemetry.events import Events
from tests.orchestrator.certificate import CERT, EXPIRED_CERT, KEY, RENEWED_CERT, RENEWED_KEY


class Watched:
    def __init__(self, directory: Path, cert: Path, key: Path) -> None:
        self.directory = directory
        self.put(cert, key)
        files = TlsConfig(cert=os.fspath(directory / "cert"), key=os.fspath(directory / "key"))
        self.certificate = Certificate(files)
        self.now = 0.0
        self.events = Events()
        self.watch = CertificateWatch(self.certificate, self.events, lambda: self.now)

    def put(self, cert: Path, key: Path) -> None:
        (self.directory / "cert").write_bytes(cert.read_bytes())
        (self.directory / "key").write_bytes(key.read_bytes())

    def kinds(self) -> list[str]:
        """All that was told, after another look."""
        self.watch.look()
        return [event.kind for event in self.events.after()]


def test_its_end_is_told_before_and_when_it_comes_each_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(tmp_path, CERT, KEY)
    end = watched.certificate.not_after
    assert end is not None
    watched.now = end - NOTICE_S - 1
    assert watched.kinds() == []
    for _ in range(2):
        watched.now = end - NOTICE_S
        assert watched.kinds() == ["certificate.expires"]
    for _ in range(2):
        watched.now = end
        assert watched.kinds() == ["certificate.expires", "certificate.expired"]
    assert "the certificate of orchestrator.tls has expired at 2" in caplog.text


def test_a_new_one_is_looked_at_anew(tmp_path: Path) -> None:
    watched = Watched(tmp_path, EXPIRED_CERT, RENEWED_KEY)
    watched.now = 1.7e9
    assert watched.kinds() == ["certificate.expired"]
    watched.put(RENEWED_CERT, RENEWED_KEY)
    assert watched.certificate.renew()
    assert watched.kinds() == ["certificate.expired"]
    watched.put(EXPIRED_CERT, RENEWED_KEY)
    assert watched.certificate.renew()
    watched.now = 1.7e9
    assert watched.kinds() == ["certificate.expired"]  # it was told of this one


def test_without_one_nothing_is_told() -> None:
    events = Events()
    CertificateWatch(None, events).look()
    assert events.after() == []
