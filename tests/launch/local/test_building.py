"""When `baton up --compile` builds; what it does meanwhile is in `test_supervise.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.local import building
from launch.local.building import NAME, build_spec
from launch.surroundings import look_around
from tests.launch.planning import config, model, plan_of

PLAN = plan_of(config(model(both={"engine": "sim"})), look_around())


def test_what_is_not_there_is_built(tmp_path: Path) -> None:
    spec = build_spec(PLAN, {"BATON_BUILDS": str(tmp_path)})
    assert spec is not None
    assert spec.argv[1:] == ("-m", "launch.compile", "--while", str(os.getpid()))
    assert (spec.name, spec.env, spec.listens) == (NAME, PLAN.orchestrator.env, ())


def test_who_runs_the_sources_builds_nothing(tmp_path: Path) -> None:
    assert build_spec(PLAN, {"BATON_FORM": "pure", "BATON_BUILDS": str(tmp_path)}) is None


def test_what_is_there_is_not_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(building, "build_folder", lambda environ: tmp_path)
    assert build_spec(PLAN, {}) is not None  # it is damaged
    monkeypatch.setattr(building, "built", lambda folder: {"orchestrator.relay.flow": folder / "flow.so"})
    assert build_spec(PLAN, {}) is None


def test_an_installed_package_was_built_when_it_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "is_checkout", lambda: False)
    assert build_spec(PLAN, {}) is None
