"""A certificate is renewed while the orchestrator serves, and one that cannot be used changes nothing."""

from __future__ import annotations

import shutil
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.options import OrchestratorConfig, TlsConfig
from orchestrator.errors import StartError
from orchestrator.http.tls import Certificate, certificate_of, is_renewed
from tests.orchestrator.certificate import CERT, KEY, RENEWED_CERT, RENEWED_KEY
from tests.orchestrator.running import Orchestrator, SimWorker, simulated
from tests.waiting import wait_for


class Files:
    def __init__(self, directory: Path) -> None:
        self.cert, self.key = directory / "cert.pem", directory / "key.pem"
        self.put(CERT, KEY)

    def put(self, cert: Path, key: Path) -> None:
        shutil.copy(cert, self.cert)
        shutil.copy(key, self.key)

    @property
    def options(self) -> dict[str, str]:
        return {"cert": str(self.cert), "key": str(self.key)}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_files_that_are_as_they_were_change_nothing(files: Files) -> None:
    certificate = Certificate(TlsConfig(**files.options))
    before = certificate.context
    assert not certificate.renew()
    assert certificate.context is before


def test_handshakes_that_begin_later_have_the_new_one(files: Files) -> None:
    certificate = Certificate(TlsConfig(**files.options))
    before = certificate.context
    files.put(RENEWED_CERT, RENEWED_KEY)
    assert is_renewed(certificate)
    assert certificate.context is not before
    assert not is_renewed(certificate)


@pytest.mark.parametrize("broken", ["another key", "no certificate", "gone"])
def test_what_cannot_be_used_is_told_and_the_old_one_stays(
    files: Files, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    certificate = Certificate(TlsConfig(**files.options))
    before = certificate.context
    if broken == "another key":
        shutil.copy(RENEWED_KEY, files.key)
    elif broken == "no certificate":
        files.cert.write_text("nothing")
    else:
        files.cert.unlink()
    assert not is_renewed(certificate)
    assert certificate.context is before
    assert "orchestrator.tls: the certificate stays as it was" in caplog.text
    files.put(RENEWED_CERT, RENEWED_KEY)
    assert is_renewed(certificate)


def test_a_start_without_a_usable_one_is_refused(files: Files) -> None:
    files.cert.write_text("nothing")
    with pytest.raises(StartError, match=r"orchestrator\.tls: "):
        certificate_of(OrchestratorConfig(tls=TlsConfig(**files.options)))
    assert certificate_of(OrchestratorConfig()) is None


# --- with real processes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode") as found:
        yield found


def shown(url: str) -> str:
    """The certificate that a new connection is shown."""
    host, _, port = url.removeprefix("https://").partition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=30)


def text_of(certificate: Path) -> str:
    text = certificate.read_text()
    return text[text.index("-----BEGIN") :]


def trust_in_both() -> ssl.SSLContext:
    trust = ssl.create_default_context(cafile=CERT)
    trust.load_verify_locations(RENEWED_CERT)
    return trust


@pytest.mark.processes
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_renews_it_in_all_processes(
    workers: list[SimWorker], files: Files, tmp_path: Path, processes: int
) -> None:
    options: dict[str, Any] = {"tls": files.options, "processes": processes}
    orchestrator = Orchestrator(tmp_path, workers, trust=trust_in_both(), **options)
    urls = [orchestrator.url, orchestrator.admin_url]
    try:
        orchestrator.wait_ready()
        assert [shown(url) for url in urls] == [text_of(CERT)] * 2
        client = orchestrator.client()
        assert client.get("/health").status_code == 200
        files.put(RENEWED_CERT, RENEWED_KEY)
        orchestrator.signal(signal.SIGHUP)
        renewed = text_of(RENEWED_CERT)
        wait_for(lambda: shown(orchestrator.admin_url) == renewed, "the new one")
        wait_for(lambda: all(shown(orchestrator.url) == renewed for _ in range(8)), "the new one in all")
        assert client.get("/health").status_code == 200  # on its connection
        assert "reloaded: orchestrator.tls" in orchestrator.lines
        files.cert.write_text("nothing")
        orchestrator.signal(signal.SIGHUP)
        wait_for(lambda: "not reloaded: " in orchestrator.lines, "a line that says so")
        assert [shown(url) for url in urls] == [renewed] * 2
    finally:
        orchestrator.clean_up()
