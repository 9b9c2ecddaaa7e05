"""A changed config file: what is applied, and what is refused as a whole."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.addresses import routed_addresses, unmanaged
from orchestrator.config.file import load_config
from orchestrator.config.keys import KeyRing
from orchestrator.config.options import Config
from orchestrator.control import reload
from orchestrator.control.reload import ConfigRefused, ConfigSource, Reloader
from orchestrator.http.tls import certificate_of
from orchestrator.processes.rows import Rows
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import Argument, PolicySpec
from orchestrator.routing.policies.round_robin import RoundRobin
from orchestrator.telemetry.counters import Layout
from orchestrator.telemetry.events import Events
from orchestrator.workers.registry import Registry
from tests.orchestrator.cluster import seat

OLD: dict[str, Any] = {
    "orchestrator": {"listen": "127.0.0.1:1", "limits": {"request_timeout_s": 600}},
    "models": [
        {
            "name": "m",
            "path": "p/q",
            "prefill": {"urls": ["http://10.0.0.1:1"]},
            "decode": {"urls": ["http://10.0.0.2:1", "http://10.0.0.2:2"]},
        },
        {"name": "started", "path": "p/q", "both": {"replicas": 1}},
    ],
}


class FakeTarget:
    """Something that runs by the file at `path`, and notes by what."""

    def __init__(self, path: Path, room: int | None = None, old: dict[str, Any] | None = None) -> None:
        self.path = path
        self.write(old or OLD)
        self.config = load_config(str(path))
        file = self.config.orchestrator.api_keys_file
        self.keys = KeyRing.load(file) if file else None
        loads = None if room is None else Rows.create(Layout(["m"], []), 4 + room, 1).loads(0)
        addresses = routed_addresses(self.config)
        self.registry = Registry(addresses, ["m", "started"], "json", loads)
        self.events = Events()
        self.certificate = certificate_of(self.config.orchestrator)
        self.reconfigured: list[Config] = []

    def write(self, config: dict[str, Any]) -> None:
        self.path.write_text(json.dumps(config))

    def reconfigure(self, config: Config) -> None:
        self.config = config
        self.reconfigured.append(config)

    def reload(self) -> tuple[str, ...]:
        async def main() -> tuple[str, ...]:
            return await Reloader(ConfigSource(str(self.path)), self).reload()

        return asyncio.run(main())

    def workers(self) -> dict[str, str]:
        """URLs by name, of those that are to stay."""
        return {w.name: w.address.url for w in self.registry.workers if not w.is_leaving}


@pytest.fixture
def target(tmp_path: Path) -> FakeTarget:
    return FakeTarget(tmp_path / "config.yaml")


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    new: dict[str, Any] = json.loads(json.dumps(OLD))
    change(new)
    return new


# --- what is applied ----------------------------------------------------------------------------


def test_nothing_has_changed(target: FakeTarget) -> None:
    before = target.workers()
    assert target.reload() == ()
    assert target.workers() == before


def test_all_data_parallel_engines_of_a_url_come_and_go(tmp_path: Path) -> None:
    old = changed(lambda config: config["models"][0]["decode"].update(data_parallel_size=2))
    target = FakeTarget(tmp_path / "config.yaml", old=old)
    decode = [name for name in target.workers() if "/decode/" in name]
    assert decode == ["m/decode/0.dp0", "m/decode/0.dp1", "m/decode/1.dp0", "m/decode/1.dp1"]
    old["models"][0]["decode"]["urls"] = [f"http://10.0.0.2:{port}" for port in (2, 3, 4)]
    target.write(old)
    assert target.reload() == ("models.0.decode.urls",)
    assert {name: url for name, url in target.workers().items() if "/decode/" in name} == {
        **{f"m/decode/1.dp{rank}": "http://10.0.0.2:2" for rank in range(2)},
        **{f"m/decode/2.dp{rank}": "http://10.0.0.2:3" for rank in range(2)},
        **{f"m/decode/3.dp{rank}": "http://10.0.0.2:4" for rank in range(2)},
    }


def test_options_are_exchanged_together(target: FakeTarget) -> None:
    target.write(
        OLD
        | {
            "orchestrator": {
                "listen": "127.0.0.1:1",
                "limits": {"request_timeout_s": 5, "body_timeout_s": 6},
            },
            "routing": {"decode": "round_robin"},
            "health": {"interval_s": 2},
        }
    )
    assert set(target.reload()) == {
        "orchestrator.limits.body_timeout_s",
        "orchestrator.limits.request_timeout_s",
        "routing.decode",
        "health.interval_s",
    }
    (config,) = target.reconfigured
    assert config.orchestrator.limits.request_timeout_s == 5
    assert config.routing.decode.policy == "round_robin"


@pytest.mark.parametrize("section", [{"requests": 1, "timeout_s": 2}, {"bytes": 3, "tokens": 4}])
def test_the_queue_is_bounded_anew(section: dict[str, int], target: FakeTarget) -> None:
    target.write(changed(lambda config: config["orchestrator"].update(queue=section)))
    assert set(target.reload()) == {f"orchestrator.queue.{key}" for key in section}


def test_what_is_inside_a_policy_is_changed_with_it(
    target: FakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [Argument("first", 1, "It counts."), Argument("second", 2, "It counts too.")]
    monkeypatch.setitem(POLICIES, "counted", PolicySpec("counted", RoundRobin, "It counts.", arguments))
    target.write(OLD | {"routing": {"prefill": {"policy": "counted", "first": 3}}})
    assert target.reload() == ("routing.prefill",)
    target.write(OLD | {"routing": {"prefill": {"policy": "counted", "first": 4}}})
    assert target.reload() == ("routing.prefill.first",)
    assert target.config.routing.prefill.arguments == {"first": 4, "second": 2}


def test_workers_come_and_go_and_those_that_stay_keep_their_names(target: FakeTarget) -> None:
    urls = ["http://10.0.0.3:1", "http://10.0.0.2:2", "http://10.0.0.3:2"]
    target.write(changed(lambda config: config["models"][0]["decode"].update(urls=urls)))
    assert target.reload() == ("models.0.decode.urls",)
    assert target.workers() == {
        "m/prefill/0": "http://10.0.0.1:1",
        "m/decode/1": "http://10.0.0.2:2",
        "started/both/0": "http://127.0.0.1:8100",
        "m/decode/2": "http://10.0.0.3:1",
        "m/decode/3": "http://10.0.0.3:2",
    }
    assert target.reload() == ()


def test_what_the_operator_did_stays(target: FakeTarget) -> None:
    target.registry.add(unmanaged("m", "decode", 2, "http://10.0.0.9:1", None))
    target.registry.add(unmanaged("m", "decode", 3, "http://10.0.0.9:2", None))
    target.registry.workers[0].is_drained = True
    urls = [*OLD["models"][0]["decode"]["urls"], "http://10.0.0.9:2"]
    target.write(changed(lambda config: config["models"][0]["decode"].update(urls=urls)))
    before = target.workers()
    target.reload()
    assert target.workers() == before
    assert target.registry.workers[0].is_drained


def test_keys_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {sha256(b'old').hexdigest()}\n")
    monkeypatch.setitem(OLD, "orchestrator", {"listen": "127.0.0.1:1", "api_keys_file": str(file)})
    target = FakeTarget(tmp_path / "config.yaml")
    file.write_text(f"bob {sha256(b'new').hexdigest()}\n")
    assert target.reload() == ("orchestrator.api_keys_file",)
    assert target.keys is not None
    assert target.keys.check(b"Bearer new") == "bob"


# --- what is refused ----------------------------------------------------------------------------

FIXED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an address": (lambda c: c["orchestrator"].update(listen="127.0.0.1:2"), "orchestrator.listen"),
    "turned on": (lambda c: c["orchestrator"].update(admin="127.0.0.1:3"), "orchestrator.admin"),
    "processes": (lambda c: c["orchestrator"].update(processes=2), "orchestrator.processes"),
    "another model": (lambda c: c["models"].pop(), "models"),
    "a name": (lambda c: c["models"][0].update(name="n"), "models.0.name"),
    "another pool": (
        lambda c: c["models"][0].update(both={"urls": ["http://10.0.0.4:1"]}),
        "models.0.both",
    ),
    "what Baton starts": (lambda c: c["models"][1]["both"].update(replicas=2), "models.1.both.replicas"),
    "who starts them": (
        lambda c: c["models"][1].update(both={"urls": ["http://10.0.0.4:1"]}),
        "models.1.both.replicas, models.1.both.urls",
    ),
    "several": (
        lambda c: c.update(base_port=9000, routing={"decode": "round_robin", "kv_lease_s": 9}),
        "routing.kv_lease_s, base_port",
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_needs_a_restart_is_refused_with_all_else(name: str, target: FakeTarget) -> None:
    change, keys = FIXED[name]
    new = changed(change)
    new["health"] = {"interval_s": 2}
    target.write(new)
    before = target.workers()
    with pytest.raises(ConfigRefused, match=f"config.yaml: only a restart can change {keys}$"):
        target.reload()
    assert target.reconfigured == []
    assert target.workers() == before


def test_all_mistakes_of_a_file_are_told(target: FakeTarget) -> None:
    target.path.write_text("orchestrator: {listen: nowhere}\nmodels: []\nrouting: {prefil: x}\n")
    with pytest.raises(ConfigRefused) as refused:
        target.reload()
    lines = refused.value.message.splitlines()
    assert [line.removeprefix(f"{target.path}:")[:2] for line in lines] == ["1:", "2:", "3:"]
    assert "did you mean 'prefill'?" in lines[2]
    assert target.reconfigured == []


def test_a_file_that_is_gone(target: FakeTarget) -> None:
    target.path.unlink()
    with pytest.raises(ConfigRefused, match="No such file"):
        target.reload()


def test_a_file_system_that_does_not_answer_holds_up_neither_others_nor_the_end(
    target: FakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "READ_S", 0.05)
    may_answer, is_read = threading.Event(), threading.Event()

    def hang(path: str, overrides: object) -> Config:
        may_answer.wait(60)
        is_read.set()
        return target.config

    monkeypatch.setattr(reload, "load_config", hang)
    with pytest.raises(ConfigRefused, match=r"it was not read within .* its file system answer"):
        target.reload()
    assert not is_read.is_set()
    may_answer.set()


def test_a_worker_that_is_still_being_removed_does_not_come_back(target: FakeTarget) -> None:
    fewer = changed(lambda config: config["models"][0]["decode"]["urls"].pop())
    target.write(fewer)
    with seat(target.registry.workers[2]):
        target.reload()
        target.write(OLD)
        with pytest.raises(ConfigRefused, match=r"m/decode/1 .* is still being removed"):
            target.reload()
    target.registry.settle()
    target.reload()
    assert target.workers()["m/decode/1"] == "http://10.0.0.2:2"


def test_more_workers_than_there_is_room_for(tmp_path: Path) -> None:
    target = FakeTarget(tmp_path / "config.yaml", room=1)
    urls = [*OLD["models"][0]["decode"]["urls"], "http://10.0.0.5:1", "http://10.0.0.5:2"]
    target.write(changed(lambda config: config["models"][0]["decode"].update(urls=urls)))
    with pytest.raises(ConfigRefused, match="there is no room for 2 workers more: restart"):
        target.reload()
    assert len(target.workers()) == 4


# --- workers that are discovered ----------------------------------------------------------------


def discovered(**sources: Any) -> dict[str, Any]:
    """The config with a pool that finds its workers by this source."""
    return changed(lambda config: config["models"][0].update(decode={"discover": sources}))


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ({"file": "a"}, {"file": "b"}, "models.0.decode.discover"),
        ({"file": "a"}, {"dns": "h:1"}, "models.0.decode.discover"),
        (
            {"kubernetes": {"service": "a"}},
            {"kubernetes": {"service": "a", "port": 1}},
            "models.0.decode.discover",
        ),
    ],
)
def test_a_source_may_become_another_one(old: Any, new: Any, key: str, tmp_path: Path) -> None:
    target = FakeTarget(tmp_path / "config.yaml", old=discovered(**old))
    target.write(discovered(**new))
    told: list[Config] = []

    async def main() -> tuple[str, ...]:
        return await Reloader(ConfigSource(str(target.path)), target, told.append).reload()

    assert asyncio.run(main()) == (key,)
    assert told == target.reconfigured == [target.config]


def test_a_pool_does_not_begin_or_cease_to_be_discovered(tmp_path: Path) -> None:
    target = FakeTarget(tmp_path / "config.yaml", old=discovered(file="a"))
    target.write(OLD)
    with pytest.raises(ConfigRefused, match="only a restart can change"):
        target.reload()
    target = FakeTarget(tmp_path / "config.yaml")
    target.write(discovered(file="a"))
    with pytest.raises(ConfigRefused, match="only a restart can change"):
        target.reload()
