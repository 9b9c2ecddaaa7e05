from __future__ import annotations

import pytest

from orchestrator.config import checks
from orchestrator.config.options import Config


def config(prefill: str) -> Config:
    pools = {"prefill": {"engine": "sim"}, "decode": {"engine": "sim"}}
    return Config.model_validate({"models": [{"name": "m", **pools}], "routing": {"prefill": prefill}})


def test_without_pyzmq_the_policy_that_needs_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [*checks.findings(config("kv_events"))]
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    (finding,) = checks.findings(config("kv_events"))
    assert finding.path == ("routing", "prefill")
    assert "pip install 'baton-serve[kv-events]'" in finding.message
    assert not [*checks.findings(config("prefix"))]
