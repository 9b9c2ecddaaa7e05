from __future__ import annotations

import pytest

from launch.bench.endpoint import Endpoint, authorization
from launch.bench.errors import WrongUsage


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
