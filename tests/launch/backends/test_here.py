from __future__ import annotations

from ipaddress import ip_address

import pytest

from launch.backends import here
from launch.backends.here import NoAddress, own_addresses, reachable_address


def test_a_way_over_loopback_is_none_for_others() -> None:
    found = reachable_address(["127.0.0.1", "no-such-host.invalid"])
    assert not ip_address(found).is_loopback or not own_addresses()


def test_the_first_peer_that_is_elsewhere_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"login": "127.0.0.1", "head": "10.1.0.7", "192.0.2.1": "10.9.0.7"}
    monkeypatch.setattr(here, "_towards", ways.get)
    assert reachable_address(["login", "head"]) == "10.1.0.7"
    assert reachable_address(["login"]) == "10.9.0.7"


def test_a_machine_without_a_network_has_its_loopback_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "_towards", lambda peer: None)
    assert reachable_address(["head"]) == "127.0.0.1"


def test_a_network_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "own_addresses", lambda: ["192.168.0.3", "10.1.0.7"])
    assert reachable_address(["head"], "10.1.0.0/16") == "10.1.0.7"
    with pytest.raises(NoAddress, match=r"has no address in 10.2.0.0/16: it has 192.168.0.3, 10.1.0.7"):
        reachable_address([], "10.2.0.0/16")


def test_own_addresses_are_those_that_others_reach() -> None:
    assert own_addresses(lambda: ["127.0.0.1", "10.1.0.7", ""]) == ["10.1.0.7"]
    assert not any(ip_address(address).is_loopback for address in own_addresses())
