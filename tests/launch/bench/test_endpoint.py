from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.bench.endpoint import Endpoint, authorization
from launch.bench.errors import WrongUsage
from launch.cli import main
from launch.exits import Exit
from tests.orchestrator.certificate import CERT, KEY


@pytest.mark.parametrize(
    ("url", "host", "port", "base"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, "/v1"),
        ("http://host", "host", 80, "/v1"),
        ("http://host/v1/", "host", 80, "/v1"),
        ("http://host/openai/v1", "host", 80, "/openai/v1"),
        ("http://host/openai", "host", 80, "/openai/v1"),
        ("http://[::1]:8000", "::1", 8000, "/v1"),
        ("https://host", "host", 443, "/v1"),
    ],
)
def test_urls(url: str, host: str, port: int, base: str) -> None:
    endpoint = Endpoint.parse(url)
    assert endpoint.origin[:2] == (host, port)
    assert endpoint.base == base
    assert (endpoint.origin.tls is not None) is url.startswith("https")
    assert Endpoint.parse(endpoint.url).url == endpoint.url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "localhost",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://host:99999",
        "http://[::1",
        "http://host/a b",
        "http://host/\r\nx: y",
        "http://höst",
        "http://host?key=1",
        "http://host#top",
    ],
)
def test_what_is_no_url_of_an_endpoint(url: str) -> None:
    with pytest.raises(WrongUsage, match="is no URL"):
        Endpoint.parse(url)


def test_a_key_in_the_url_is_refused_and_not_shown() -> None:
    with pytest.raises(WrongUsage, match="BATON_API_KEY") as caught:
        Endpoint.parse("http://user:s3cret@host")
    assert "s3cret" not in str(caught.value)


def test_the_key_comes_from_the_environment() -> None:
    assert authorization({}) == []
    assert authorization({"BATON_API_KEY": "", "OPENAI_API_KEY": "b"}) == [(b"authorization", b"Bearer b")]
    both = {"BATON_API_KEY": "a", "OPENAI_API_KEY": "b"}
    assert authorization(both) == [(b"authorization", b"Bearer a")]


def test_a_key_that_no_header_can_carry_is_not_shown() -> None:
    with pytest.raises(WrongUsage, match="OPENAI_API_KEY") as caught:
        authorization({"OPENAI_API_KEY": "s3\r\ncret"})
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file or directory"), ("no certificate", "no certificates in PEM form")],
)
def test_a_file_of_certificates_that_is_none(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(WrongUsage) as caught:
        Endpoint.parse("https://h", str(file))
    assert str(caught.value) == f"--cacert {file}: {says}"


class _NoModels(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def tls_url() -> Iterator[str]:
    """A server whose certificate nobody has signed but itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERT, KEY)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NoModels)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.pure  # compiled code leaves the cause of an error empty
def test_a_certificate_that_is_not_trusted_is_named(tls_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tls_url]) == Exit.FAILED
    assert capsys.readouterr().err == (
        f"baton bench: {tls_url}/v1: no connection: its certificate is not trusted: self-signed certificate "
        "(--cacert FILE names who signed it)\n"
    )


def test_it_is_trusted_if_its_file_is_given(tls_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tls_url, "--cacert", str(CERT)]) == Exit.FAILED
    assert capsys.readouterr().err.startswith(
        f"baton bench: {tls_url}/v1 is no OpenAI endpoint: it answers 404"
    )
