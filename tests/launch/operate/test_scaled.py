"""`baton up` has as many workers as the load wants, and no request fails by that."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.operate.cluster import Cluster, loaded, running
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

RANGE = {"min": 1, "max": 2}
SLOW = {"prefill_ms": 80, "decode_ms_per_token": 20}  # a dozen clients are more than one worker has time for
SCALING = {"ttft_p95_s": 60, "itl_p95_ms": 60_000, "up_after_s": 1, "down_after_s": 3}
LIMIT_S = 120.0


def test_workers_come_under_a_load_and_go_after_it(tmp_path: Path) -> None:
    prefill = {"replicas": RANGE, "sim": SLOW}
    decode = {"replicas": RANGE, "sim": SLOW, "seats": 8}
    few = {f"sim/{role}/0" for role in ("prefill", "decode")}
    all_ = few | {f"sim/{role}/1" for role in ("prefill", "decode")}
    with running(Cluster(tmp_path, prefill=prefill, decode=decode, scaling=SCALING)) as cluster:
        assert set(cluster.workers()) == few
        with loaded(cluster, clients=12) as many:
            wait_for(lambda: _serving(cluster) == all_, "a second worker of each role", LIMIT_S)
        with loaded(cluster, clients=2) as two:
            wait_for(lambda: _running(cluster) == few, "the end of the second workers", LIMIT_S)
        assert (many.failures, two.failures) == ([], [])
        shown = cluster.command("scale", str(cluster.config))
        assert shown.stdout.startswith("sim: 1:1 (prefill:decode)\n  prefill: 1 wanted, 1 ready; "), shown
        found = {wish["role"]: wish["wanted"] for wish in cluster.json("scale", str(cluster.config))}
        assert found == {"prefill": 1, "decode": 1}
        by_hand = cluster.command("scale", "sim/decode", "2")
        assert "the load decides how many workers sim/decode has: change `replicas`" in by_hand.stderr
    for role in ("prefill", "decode"):
        assert f"sim/{role}: 1 more: " in cluster.stderr
        assert f"sim/{role}/1 goes: " in cluster.stderr


def _serving(cluster: Cluster) -> set[str]:
    return {name for name, state in cluster.workers().items() if state == "ready"}


def _running(cluster: Cluster) -> set[str]:
    """The workers whose processes run; by then the orchestrator has forgotten the others."""
    return {*cluster.rows()} - {"orchestrator"}
