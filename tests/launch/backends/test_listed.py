"""Workers of this machine that several orchestrators find in a folder of members."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.backends.listed import ListedLocal, ListedWorkers
from launch.local import processes
from launch.plan import ProcessSpec
from orchestrator.wire.member import read_members
from tests.launch.planning import around, config, model, plan_of

CONFIG = config(model(decode={"engine": "sim", "replicas": 2, "zone": "a"}, prefill={"engine": "sim"}))


class FakeGroup:
    def __init__(self, spec: ProcessSpec, log: Path, guard: object) -> None:
        """Start nothing."""


def test_each_start_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.backends.local.ProcessGroup", FakeGroup)
    backend = ListedLocal.make(CONFIG, tmp_path, print, processes.Guard())
    assert backend.members == tmp_path / "members"
    assert read_members(backend.members).members == ()
    spec = next(spec for spec in plan_of(CONFIG).workers if spec.name == "m/decode/1")
    backend.start(spec, tmp_path / "log")
    (first,) = read_members(backend.members).members
    assert (first.model, first.role, first.name, first.url, first.zone) == ("m", "decode", "1", spec.url, "a")
    backend.start(spec, tmp_path / "log")
    (second,) = read_members(backend.members).members
    assert second.uid != first.uid
    backend.dismiss(spec.name)
    backend.dismiss(spec.name)
    assert read_members(backend.members).members == ()


def test_further_workers_have_the_next_free_name() -> None:
    workers = ListedWorkers(CONFIG, around(), lambda host, port: True, lambda: 0)
    running = list(plan_of(CONFIG).workers)
    for expected in ("m/decode/2", "m/decode/3"):
        running.append(workers.plan("m", "decode", running, running[:3]))
        assert running[-1].name == expected
    without = [spec for spec in running if spec.name != "m/decode/2"]
    assert workers.plan("m", "decode", without).name == "m/decode/2"
