"""URLs of workers, in the file and over the admin API: one type checks both."""

from __future__ import annotations

import pytest

from orchestrator.config.options import PoolConfig
from orchestrator.control.admin_workers import NewWorker


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://h", "http://h:80"),
        ("https://h/", "https://h:443"),
        ("HTTP://Worker.Example:8100", "http://worker.example:8100"),
        ("http://svc.cluster.local.:1", "http://svc.cluster.local.:1"),
        ("http://my_worker:1", "http://my_worker:1"),
        ("http://[::1]:8100", "http://[::1]:8100"),
        ("http://[FE80::1]:1", "http://[fe80::1]:1"),
        ("http://Bücher.example:1", "http://xn--bcher-kva.example:1"),
        ("  http://h:1\n", "http://h:1"),
    ],
)
def test_urls_that_are_taken(given: str, url: str) -> None:
    assert PoolConfig(urls=[given]).urls == [url]
    assert NewWorker(model="m", role="decode", url=given).url == url


@pytest.mark.parametrize(
    "given",
    [
        "",
        "h:1",
        "gopher://h:1",
        "ftp://h",
        "ws://h:1",
        "file:///x",
        "//h:1",
        "http:h",
        "http://",
        "http://:1",
        "http://h:0",
        "http://h:65536",
        "http://h:-1",
        "http://h:x",
        "http://h:",
        "http://h:+1",
        "http://h: 1",
        "http://a b:1",
        "http://a\tb:1",
        "http://a\nb:1",
        "http://a\x00b:1",
        "http://h:1\x00",
        "http://a\u200bb",
        "http://u@h:1",
        "http://u:p@h:1",
        "http://@h:1",
        "http://h:1/v1",
        "http://h:1//",
        "http://h:1?a",
        "http://h:1?",
        "http://h:1#a",
        "http://h:1#",
        "http://h\\x:1",
        "http://[::1:1",
        "http://[::1]x:1",
        "http://a..b:1",
        "http://0.0.0.0:1",
        "http://[::]:1",
        "http://%41:1",
        "http://a,b:1",
        "http://a;b:1",
    ],
)
def test_urls_that_are_refused(given: str) -> None:
    message = r"expected (only )?http|is no address to reach"
    with pytest.raises(ValueError, match=message):
        PoolConfig(urls=[given])
    with pytest.raises(ValueError, match=message):
        NewWorker(model="m", role="decode", url=given)


def test_the_message_repeats_no_password() -> None:
    with pytest.raises(ValueError, match=r"got 'http://[*]{3}@h:1'"):
        PoolConfig(urls=["http://u:hush@h:1"])
