"""A listener answers for the names that are its own."""

from __future__ import annotations

import pytest

from orchestrator.config.options import OrchestratorConfig
from orchestrator.errors import BatonError, Misdirected
from orchestrator.http.head import Head, Judge
from orchestrator.http.hosts import Hosts
from orchestrator.http.limits import ServerLimits
from tests.orchestrator.raw_http import LAX, Everywhere, Main, RawClient, echo, lax, run, serving

__all__ = ["run"]

LOCAL = "127.0.0.1:8000"
OURS = (
    b"localhost",
    b"localhost:8000",
    b"LocalHost:1",
    b"localhost.",
    b"localhost.:8000",
    b"127.0.0.1",
    b"127.0.0.1:8000",
    b"10.1.2.3",
    b"[::1]",
    b"[::1]:8000",
    b"[FE80::1]:80",
    b"[::ffff:127.0.0.1]",
)
NOT_OURS = (
    b"evil.example",
    b"evil.example:8000",
    b"127.0.0.1.evil.example",
    b"localhost.evil.example",
    b"notlocalhost",
    b"a.localhost",
    b"%6cocalhost",
    b"127.0.0.1..",
    b"2130706433",
    b"0x7f000001",
    b"127.1",
    b".",
)


def judged(
    options: OrchestratorConfig, host: bytes | None, url: bytes = b"/", **given: object
) -> BatonError | None:
    limits = ServerLimits.of(options, given.pop("listen", None))  # type: ignore[arg-type]
    fields = [] if host is None else [(b"host", host)]
    facts = {"method": "GET", "http_version": "1.1", "keep_alive": True, **given}
    return Judge(limits).refusal(Head(url=url, headers=fields, **facts), is_small=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("listen", [LOCAL, "127.9.9.9:1", "[::1]:8000", "localhost:8000"])
@pytest.mark.parametrize("host", OURS)
def test_on_loopback_addresses_and_localhost_are_right(listen: str, host: bytes) -> None:
    assert judged(OrchestratorConfig(listen=listen), host) is None


@pytest.mark.parametrize("host", NOT_OURS)
def test_on_loopback_other_names_are_not(host: bytes) -> None:
    error = judged(OrchestratorConfig(listen=LOCAL), host)
    assert isinstance(error, Misdirected)
    assert error.status == 421
    assert "orchestrator.allowed_hosts" in error.message


def test_the_admin_listener_goes_by_its_own_address() -> None:
    options = OrchestratorConfig(listen="0.0.0.0:8000", admin="127.0.0.1:8001", insecure_no_auth=True)
    assert judged(options, b"evil.example") is None
    assert isinstance(judged(options, b"evil.example", listen=options.admin), Misdirected)


def test_beyond_loopback_names_count_once_some_are_given() -> None:
    options = OrchestratorConfig(listen="0.0.0.0:8000", allowed_hosts=["API.example.", "*.in.example"])
    for host in (b"api.example", b"API.EXAMPLE.:8000", b"a.in.example", b"10.0.0.7:8000", b"localhost"):
        assert judged(options, host) is None, host
    for host in (b"evil.example", b"x.api.example", b"in.example", b"in.example.evil.example"):
        assert isinstance(judged(options, host), Misdirected), host


def test_the_name_that_is_listened_at_is_right() -> None:
    options = OrchestratorConfig(listen="Baton.example:80", allowed_hosts=["other.example"])
    assert judged(options, b"baton.example") is None


def test_a_star_takes_every_name() -> None:
    assert Hosts.of(["*"], LOCAL) is None


def test_names_of_other_scripts_are_compared_as_they_are_sent() -> None:
    options = OrchestratorConfig(listen=LOCAL, allowed_hosts=["Bücher.example"])
    assert judged(options, b"xn--bcher-kva.example") is None


@pytest.mark.parametrize("name", ["", "http://a", "a:80", "a/b", "a b", "*.", "*x", "[::1]", "a..b"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a host name"):
        OrchestratorConfig(allowed_hosts=[name])


@pytest.mark.parametrize(
    ("host", "url"),
    [
        (b"localhost", b"http://evil.example/x"),
        (b"localhost", b"http://evil.example:8000/x"),
        (b"evil.example", b"http://localhost/x"),
        (b"localhost", b"http://localhost@evil.example/x"),
        (b"localhost", b"ftp://evil.example/x"),
    ],
)
def test_an_absolute_target_does_not_evade_it(host: bytes, url: bytes) -> None:
    assert isinstance(judged(OrchestratorConfig(listen=LOCAL), host, url), Misdirected)


def test_an_absolute_target_of_ours_is_right() -> None:
    for url in (b"http://localhost:8000/x", b"http://[::1]/x", b"HTTP://127.0.0.1/x"):
        assert judged(OrchestratorConfig(listen=LOCAL), b"localhost", url) is None


def test_old_clients_need_not_say_a_host() -> None:
    assert judged(OrchestratorConfig(listen=LOCAL), None, http_version="1.0") is None
    error = judged(OrchestratorConfig(listen=LOCAL), b"evil.example", http_version="1.0")
    assert isinstance(error, Misdirected)


def test_each_request_of_a_connection_is_judged(run: Main) -> None:
    ok = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def ask(client: RawClient, *lines: bytes) -> int:
        return (await client.ask(b"\r\n".join([b"GET / HTTP/1.1", *lines, b"", b""]))).status

    async def main() -> None:
        limits = lax(hosts=Hosts.of([], LOCAL))
        async with serving(Everywhere(echo), limits) as site, site.client() as client:
            assert (await client.ask(ok)).status == 200
            assert await ask(client, b"Host: evil.example") == 421
            forwarded = (b"Host: evil.example", b"X-Forwarded-Host: localhost", b"Forwarded: host=localhost")
            assert await ask(client, *forwarded) == 421
            assert (
                await client.ask(b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            ).status == 421
            assert (await client.ask(ok)).status == 200

    run(main)  # type: ignore[operator]


def test_without_hosts_every_name_is_right() -> None:
    assert LAX.hosts is None
