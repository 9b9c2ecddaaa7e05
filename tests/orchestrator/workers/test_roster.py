from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.config.addresses import WorkerAddress
from orchestrator.errors import Conflict
from orchestrator.processes.rows import Rows
from orchestrator.telemetry.counters import Layout
from orchestrator.workers.registry import Registry
from orchestrator.workers.roster import Roster
from tests.orchestrator.cluster import address, names, registry_of


def test_workers_are_found_by_name_and_by_what_they_serve_where() -> None:
    roster = Roster([address("prefill", 0), address("decode", 0), address("decode", 1, port=2)], "json", None)
    prefill, first, second = roster.workers
    assert roster.find("m/decode/1") is second
    assert roster.find("m/decode/2") is None
    assert roster.at("m", "decode", "http://127.0.0.1:2") is second
    assert roster.at("m", "prefill", "http://127.0.0.1:2") is None
    assert roster.pool_of(first) == [first, second]
    assert [*roster.of_model("m")] == [prefill, first, second]


def test_names_are_not_given_twice_while_their_worker_is_there() -> None:
    roster = Roster([address("decode", 0), address("decode", 1, port=2)], "json", None)
    assert roster.next_index("m", "decode") == 2
    assert roster.next_index("m", "both") == 0
    roster.drop(roster.workers[0])
    assert roster.next_index("m", "decode") == 2


def test_workers_over_tls_share_what_they_trust() -> None:
    urls = ("https://10.0.0.1:1", "https://10.0.0.2:1", "http://10.0.0.3:1")
    roster = Roster([replace(address("decode", i), url=url) for i, url in enumerate(urls)], "json", None)
    contexts = [worker.origin.tls for worker in roster.workers]
    assert contexts[0] is contexts[1] is not None
    assert contexts[2] is None


@pytest.mark.parametrize("twin", [address("decode", 0, port=2), address("decode", 1, port=1)])
def test_the_same_worker_is_not_added_twice(twin: WorkerAddress) -> None:
    registry = registry_of({"decode": 1})
    with pytest.raises(Conflict, match=r"there is m/decode/0 at http://127.0.0.1:1 already"):
        registry.add(twin)


def test_slots_are_used_again_once_nobody_counts_in_them() -> None:
    rows = Rows.create(Layout(["m"], []), 3, 2)
    registry = Registry([address("decode", 0)], ["m"], "json", rows.loads(0))
    elsewhere = rows.loads(1)
    rows.close()
    one, two = (registry.add(address("decode", index, port=index + 1)) for index in (1, 2))
    assert [one.slot, two.slot] == [1, 2]
    full = "there are 3 workers, and no more can be added"
    with pytest.raises(Conflict, match=full):
        registry.add(address("decode", 3, port=4))
    elsewhere[1].own_legs[0] = 1
    for worker in (one, two):
        registry.remove(worker)
    registry.settle()
    assert names(registry.workers) == ["decode/0", "decode/1"]
    assert registry.add(address("decode", 3, port=4)).slot == 2
    elsewhere[1].own_legs[0] = 0
    registry.settle()
    assert registry.add(address("decode", 4, port=5)).slot == 1
