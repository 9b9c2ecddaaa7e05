from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config.addresses import is_loopback, worker_addresses, worker_places
from orchestrator.config.options import Config


def config(*models: dict[str, Any], **more: Any) -> Config:
    return Config.model_validate({"models": list(models), **more})


def model(name: str = "m", **pools: Any) -> dict[str, Any]:
    return {"name": name, "path": "p", **pools}


def test_models_first_then_roles_then_indexes() -> None:
    both_roles = model("a/b", decode={"replicas": 2}, prefill={})
    found = worker_addresses(config(both_roles, model("c", both={})))
    assert [address.name for address in found] == [
        "a/b/prefill/0",
        "a/b/decode/0",
        "a/b/decode/1",
        "c/both/0",
    ]
    assert [address.role for address in found] == ["prefill", "decode", "decode", "both"]
    assert [address.url for address in found] == [f"http://127.0.0.1:{port}" for port in range(8100, 8104)]
    assert [address.side_channel_port for address in found] == [9100, 9101, 9102, 9103]
    assert all(address.is_managed for address in found)


def test_places_are_the_same_workers() -> None:
    both_roles = config(model(decode={"workers": [{"gpus": [3]}, {}]}, prefill={"urls": ["http://h:1"]}))
    places, addresses = worker_places(both_roles), worker_addresses(both_roles)
    assert [place.name for place in places] == [address.name for address in addresses]
    assert [place.worker.gpus for place in places] == [None, [3], None]


def test_ports_go_around_what_is_taken() -> None:
    workers = [{"port": 8101}, {"side_channel_port": 8100}, {"host": "localhost", "port": 8104}, {}, {}]
    found = worker_addresses(
        config(
            model(both={"workers": workers}),
            model("u", both={"urls": ["http://127.0.0.1:8105"]}),
            orchestrator={"listen": "0.0.0.0:8102", "admin": "127.0.0.1:8106", "insecure_no_auth": True},
        )
    )
    assert [address.port for address in found[:-1]] == [8101, 8103, 8104, 8107, 8108]
    assert [address.side_channel_port for address in found[:-1]] == [9100, 8100, 9101, 9102, 9103]


def test_each_machine_has_ports_of_its_own() -> None:
    workers = [{"host": "10.0.0.1"}, {"host": "10.0.0.2"}, {"host": "10.0.0.1"}]
    found = worker_addresses(config(model(both={"workers": workers})))
    assert [address.port for address in found] == [8100, 8100, 8101]


def test_no_port_is_given_twice_on_a_machine() -> None:
    found = worker_addresses(config(model(both={"replicas": 1500}), base_port=8100))
    ports = [port for address in found for port in (address.port, address.side_channel_port)]
    assert len(set(ports)) == 3000


def test_ports_can_run_out() -> None:
    with pytest.raises(ValueError, match=r"no port from 66530 up is left on 127\.0\.0\.1"):
        worker_addresses(config(model(both={"replicas": 10}), base_port=65530))


def test_urls_are_not_managed() -> None:
    urls = ["http://h", "https://[::1]", "http://h:8100/"]
    found = worker_addresses(config(model(both={"urls": urls, "served_model": "theirs"})))
    assert [address.url for address in found] == ["http://h:80", "https://[::1]:443", "http://h:8100"]
    assert [(address.host, address.port) for address in found] == [("h", 80), ("::1", 443), ("h", 8100)]
    assert {address.served_model for address in found} == {"theirs"}
    assert {address.model for address in found} == {"m"}
    assert not any(address.is_managed or address.side_channel_port for address in found)


def test_ipv6_hosts_are_bracketed_in_urls() -> None:
    (address,) = worker_addresses(config(model(both={"workers": [{"host": "::1", "port": 9}]})))
    assert (address.url, address.host) == ("http://[::1]:9", "::1")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# --- zones --------------------------------------------------------------------------------------


def zones_of(pool: dict[str, Any]) -> list[str | None]:
    config = Config.model_validate({"models": [{"name": "m", "path": "p", "both": pool}]})
    return [address.zone for address in worker_addresses(config)]


def test_a_worker_is_in_its_own_zone_or_that_of_its_pool() -> None:
    assert zones_of({"replicas": 2}) == [None, None]
    assert zones_of({"replicas": 2, "zone": "a"}) == ["a", "a"]
    assert zones_of({"workers": [{"zone": "b"}, {}], "zone": "a"}) == ["b", "a"]


def test_workers_that_are_not_ours_are_in_zones_by_their_urls() -> None:
    urls = ["http://h:1", "http://h:2", "http://h:3"]
    assert zones_of({"urls": urls, "zones": {"a": ["http://H:1"], "b": ["http://h:3/"]}}) == ["a", None, "b"]
    assert zones_of({"urls": urls, "zones": {"a": ["http://h:1"]}, "zone": "c"}) == ["a", "c", "c"]
