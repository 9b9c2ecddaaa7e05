"""Each fault that workers can have is named: who, what was found, and what to do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bench.shared.processes import free_port
from launch.doctor.asking import Patient
from launch.doctor.findings import Verdict
from launch.doctor.workers import of_info
from launch.exits import Exit
from orchestrator.wire.info import Streams, WorkerInfo
from tests.baton import baton
from tests.launch.doctor.visiting import Doctor, cluster
from tests.orchestrator.cluster import address
from tests.worker.sim.workers import MODEL, Worker, running
from worker.sim.faults import Error, Freeze, KvGarbled, KvLost
from worker.sim.settings import Announced, Defects

PREFILL, DECODE = f"{MODEL}/prefill/0", f"{MODEL}/decode/0"
PAIR = f"{PREFILL} -> {DECODE}"


@contextlib.contextmanager
def pair(
    prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None
) -> Iterator[list[Worker]]:
    with running(role="prefill", **prefill or {}) as first, running(role="decode", **decode or {}) as second:
        yield [first, second]


def test_all_is_well(doctor: Doctor) -> None:
    with pair() as (prefill, decode):
        report = doctor.visit([prefill], [decode])
        assert report.code == Exit.OK, report.out
        assert (report.faults, report.warnings) == ([], [])
        assert f"handoff {PAIR}: the KV cache of" in "\n".join(report.of("ok"))
        assert f"equal {PAIR}: answers 3 prompts as {DECODE} does alone" in report.of("ok")
        assert report.lines[-1].endswith("checks: no faults, no warnings")
        assert prefill.ledger()["pins"] == []


@pytest.mark.parametrize(
    ("prefill", "decode", "fault", "advice"),
    [
        pytest.param(
            {},
            {"announced": Announced(dtype="float32")},
            f"fits {DECODE}: its dtype is 'float32', that of {PREFILL} is 'bfloat16'",
            "give both the same --dtype",
            id="dtype",
        ),
        pytest.param(
            {},
            {"block_size": 32},
            f"fits {DECODE}: its block_size is 32, that of {PREFILL} is 16",
            "give both the same --block-size",
            id="block size",
        ),
        pytest.param(
            {},
            {"announced": Announced(path="org/other")},
            f"fits {DECODE}: its path is 'org/other', that of {PREFILL} is '{MODEL}'",
            "start both with the same model",
            id="model",
        ),
        pytest.param(
            {"announced": Announced(tp=3)},
            {"announced": Announced(tp=2)},
            f"fits {DECODE}: its tp is 2, that of {PREFILL} is 3",
            "--tensor-parallel-size",
            id="tp",
        ),
        pytest.param(
            {},
            {"announced": Announced(connector="none")},
            f"fits {DECODE}: has no KV connector",
            "--kv-transfer-config",
            id="connector",
        ),
        pytest.param(
            {"announced": Announced(revision="new")},
            {"announced": Announced(revision="old")},
            f"revision {PREFILL}: no partner has its revision of the model: 'new' at {PREFILL}; 'old' at ",
            "--revision",
            id="revision",
        ),
        pytest.param(
            {"announced": Announced(engine_version="2.0")},
            {},
            f"version {PREFILL}: no partner has its version of the engine: '2.0' at {PREFILL}",
            "install one version, or let pairs be kept within one",
            id="version",
        ),
        pytest.param(
            {"defects": Defects(advertised_port=1)},
            {},
            f"handoff {PAIR}: the side channel of {PREFILL}, 127.0.0.1:1, cannot be reached: ",
            "VLLM_NIXL_SIDE_CHANNEL_PORT",
            id="side channel",
        ),
        pytest.param(
            {},
            {"faults": (KvLost(leg="decode"),)},
            f"handoff {PAIR}: {DECODE} did not take the KV cache over: 500",
            "log says more",
            id="lost",
        ),
        pytest.param(
            {"faults": (Error(leg="prefill", message="no blocks"),)},
            {},
            f"handoff {PAIR}: {PREFILL} answered its leg with 500 no blocks",
            "log says more",
            id="prefill leg",
        ),
        pytest.param(
            {},
            {"faults": (KvGarbled(leg="decode"),)},
            f"equal {PAIR}: 3 of 3 answers differ from those of {DECODE} alone",
            "the KV cache is spoilt on its way",
            id="garbled",
        ),
        pytest.param(
            {},
            {"defects": Defects(weights="tuned")},
            f"equal {PAIR}: 3 of 3 answers differ from those of {DECODE} alone",
            "do both load the same weights",
            id="other weights",
        ),
        pytest.param(
            {},
            {"defects": Defects(clock_offset_s=-5.0)},
            f"clock {DECODE}: its clock is at least ",
            "timedatectl",
            id="clock behind",
        ),
        pytest.param(
            {"defects": Defects(clock_offset_s=5.0)},
            {},
            f"clock {PREFILL}: its clock is at least ",
            "timedatectl",
            id="clock ahead",
        ),
        pytest.param(
            {},
            {"api_keys": ("secret",)},
            f"key {DECODE}: it refuses the orchestrator's key (401)",
            "BATON_WORKER_API_KEY",
            id="key",
        ),
        pytest.param(
            {},
            {"model_name": "other", "announced": Announced(path=MODEL)},
            f"model {DECODE}: serves 'other', not '{MODEL}'",
            "served_model",
            id="served model",
        ),
        pytest.param(
            {"faults": (Error(leg="health", status=503),)},
            {},
            f"health {PREFILL}: is ill (503) (/health answers 503",
            "log says more",
            id="ill",
        ),
        pytest.param(
            {},
            {"faults": (Error(leg="aggregated", message="EngineDeadError"),)},
            f"answer {DECODE}: answers a small request with 500 EngineDeadError",
            "log says more",
            id="dead engine",
        ),
    ],
)
def test_a_fault_is_named_with_what_to_do(
    doctor: Doctor, prefill: dict[str, Any], decode: dict[str, Any], fault: str, advice: str
) -> None:
    with pair(prefill, decode) as workers:
        report = doctor.visit(workers[:1], workers[1:])
    assert report.code == Exit.FAILED
    assert len(report.faults) == 1, report.out
    assert report.faults[0].startswith(fault)
    assert advice in report.faults[0]


def test_a_frozen_engine_behind_a_server_that_is_well(doctor: Doctor) -> None:
    with pair({}, {"faults": (Freeze(),)}) as (prefill, decode):
        report = doctor(cluster([prefill], [decode]), "--timeout-s", "1.5")
        decode.client.delete("/sim/faults")
    (fault,) = report.faults
    assert fault.startswith(
        f"answer {DECODE}: answers probes, but not a small request within 1.5 s: its engine"
    )


def test_a_worker_that_is_not_there(doctor: Doctor) -> None:
    with running(role="prefill") as prefill:
        config = cluster([prefill], [prefill])
        config["models"][0]["decode"]["urls"] = [f"http://127.0.0.1:{free_port()}"]
        report = doctor(config)
    (fault,) = report.faults
    assert fault.startswith(f"health {DECODE}: refuses connections (")
    assert fault.endswith(": is it started, and is the port right?")


def test_a_worker_that_takes_requests_without_the_key(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_WORKER_API_KEY", "hush-hush")
    with pair({"api_keys": ("hush-hush",)}) as (prefill, decode):
        report = doctor.visit([prefill], [decode])
    (fault,) = report.faults
    assert fault.startswith(
        f"key {DECODE}: takes requests without a key, though BATON_WORKER_API_KEY is set here"
    )
    assert f"key {PREFILL}: takes our key, and nobody without it" in report.of("ok")
    assert "hush-hush" not in report.out


def test_plain_workers_are_warned_of_and_tried_all_the_same(doctor: Doctor) -> None:
    with pair({}, {"announced": Announced(is_plain=True)}) as (prefill, decode):
        report = doctor.visit([prefill], [decode])
    assert report.code == Exit.OK
    (warning,) = report.warnings
    assert warning.startswith(
        f"announces {DECODE}: announces nothing (404 at /baton/info): it is taken for plain"
    )
    assert "VLLM_PLUGINS=baton" in warning
    assert any(line.startswith(f"handoff {PAIR}: the KV cache of") for line in report.of("ok"))


def test_a_rolling_update_is_a_warning(doctor: Doctor) -> None:
    old, new = ({"announced": Announced(revision=name)} for name in ("old", "new"))
    with pair(old, old) as (first, second), pair(new, new) as (third, fourth):
        report = doctor.visit([first, third], [second, fourth])
    assert report.code == Exit.OK
    (warning,) = report.warnings
    assert warning.startswith(
        f"revision {MODEL}: two or more have a revision of the model of their own: 'old' at "
    )


def test_of_several_the_odd_one_is_named(doctor: Doctor) -> None:
    odd = {"announced": Announced(dtype="float32"), "role": "decode"}
    with pair() as (prefill, first), running(**odd) as wrong, running(role="decode") as last:
        report = doctor.visit([prefill], [wrong, first, last])
    (fault,) = report.faults
    assert fault.startswith(f"fits {MODEL}/decode/0: its dtype is 'float32'")
    assert sum(line.startswith("handoff") for line in report.of("ok")) == 2


def test_pools_that_were_exchanged(doctor: Doctor) -> None:
    with pair() as (prefill, decode):
        report = doctor.visit([decode], [prefill])
    assert [fault.partition(":")[0] for fault in report.faults] == [f"role {PREFILL}", f"role {DECODE}"]
    assert (
        "are the URLs of the two pools exchanged? else start it with BATON_ROLE=prefill" in report.faults[0]
    )
    assert not any(line.startswith("handoff") for line in report.lines)


def ranked(prefills: list[Worker], decodes: list[Worker], size: int) -> dict[str, Any]:
    config = cluster(prefills, decodes)
    for pool in (config["models"][0][role] for role in ("prefill", "decode")):
        pool["data_parallel_size"] = size
    return config


@pytest.mark.parametrize("is_said", [True, False])
def test_each_data_parallel_engine_is_tried(doctor: Doctor, is_said: bool) -> None:
    """As many as the config says, or else the workers."""
    two = {"data_parallel_size": 2}
    with pair(two, two) as (prefill, decode):
        report = doctor(ranked([prefill], [decode], 2 if is_said else 1), "--timeout-s", "20")
        assert (report.code, report.faults, report.warnings) == (Exit.OK, [], []), report.out
        tried = [line.partition(":")[0] for line in report.of("ok") if line.startswith("handoff")]
        ranks = [f"{PREFILL}.dp{one} -> {DECODE}.dp{other}" for one in (0, 1) for other in (0, 1)]
        assert tried == [f"handoff {pair}" for pair in ranks]
        assert f"answer {DECODE}.dp1: computes one token" in report.of("ok")
        assert {entry["rank"] for entry in prefill.ledger()["requests"]} == {0, 1}
        assert {entry["rank"] for entry in decode.ledger()["requests"]} == {0, 1}


def test_fewer_engines_than_the_config_says(doctor: Doctor) -> None:
    with pair({"data_parallel_size": 2}, {"data_parallel_size": 2}) as (prefill, decode):
        report = doctor(ranked([prefill], [decode], 3), "--timeout-s", "20")
    assert [fault.partition(";")[0] for fault in report.faults] == [
        f"ranks {name}: has 2 data-parallel engines, and 3 by the config: correct"
        " models.*.ROLE.data_parallel_size"
        for name in (PREFILL, DECODE)
    ]
    assert sum(line.startswith("handoff") for line in report.of("ok")) == 4


def test_a_worker_that_announces_another_model_than_it_lists() -> None:
    patient = Patient(address("decode", 0), models=("m",))
    info = WorkerInfo(role="both", model="other", decodes=["json"], engine="sim", engine_version="1")
    (finding,) = [each for each in of_info(patient, info) if each.verdict is Verdict.FAIL]
    assert (finding.check, finding.found) == ("model", "announces 'other', which it does not list")


def test_a_transport_that_a_worker_does_not_decode(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_TRANSPORT", "msgpack")
    with pair({"transport": "msgpack"}, {"transport": "json"}) as (prefill, decode):
        report = doctor.visit([prefill], [decode])
    assert [w.partition(";")[0].partition(":")[0] for w in report.warnings] == [f"transport {DECODE}"]


@pytest.mark.parametrize(("streams", "warns"), [([], True), (["http", "mux"], False)])
def test_a_worker_that_shares_no_connection(
    monkeypatch: pytest.MonkeyPatch, streams: list[Streams], warns: bool
) -> None:
    patient = Patient(address("decode", 0), models=("m",))
    info = WorkerInfo(
        role="decode", model="m", decodes=["orjson"], engine="sim", engine_version="1", streams=streams
    )

    def warned() -> list[str]:
        return [each.advice for each in of_info(patient, info) if each.check == "transport"]

    assert warned() == []
    monkeypatch.setenv("BATON_STREAMS", "mux")
    assert warned() == (["set BATON_STREAMS the same on both sides"] if warns else [])


def test_decode_workers_that_compute_the_prompt_again(doctor: Doctor) -> None:
    recompute = {"faults": (KvLost(leg="decode"),), "load_failure_policy": "recompute"}
    with pair({}, recompute) as (prefill, decode):
        report = doctor.visit([prefill], [decode])
    (warning,) = report.warnings
    assert warning.startswith(f"handoff {PAIR}: answered, but ")
    assert "kv_load_failure_policy" in warning


def test_lengths_that_differ(doctor: Doctor) -> None:
    with pair({}, {"max_model_len": 5000}) as (prefill, decode):
        report = doctor.visit([prefill], [decode])
    (warning,) = report.warnings
    assert warning.startswith(f"length {DECODE}: takes 5000 tokens, others up to ")


def test_json(doctor: Doctor) -> None:
    with pair({}, {"announced": Announced(dtype="\x1b[31mfloat32")}) as (prefill, decode):
        report = doctor.visit([prefill], [decode], "-o", "json")
    document = json.loads(report.out)
    assert (document["ok"], document["faults"], document["warnings"]) == (False, 1, 0)
    (fault,) = (check for check in document["checks"] if check["verdict"] == "fail")
    assert (fault["check"], fault["subject"]) == ("fits", DECODE)
    assert set(fault) == {"check", "subject", "verdict", "found", "advice"}
    assert fault["advice"] == "give both the same --dtype"


def test_a_hostile_worker_breaks_no_line(doctor: Doctor) -> None:
    hostile = "\x1b[31m\r\nfail  key  nobody: " + "x" * 100
    with pair({"model_name": hostile}, {"announced": Announced(dtype=hostile)}) as (prefill, decode):
        report = doctor.visit([prefill], [decode])
    assert all(line.isprintable() for line in report.out.split("\n"))
    assert not any("nobody" in line.split(":")[0] for line in report.lines)


# --- workers that it starts -------------------------------------------------------------------------


def managed(*, decode_args: list[str] | None = None, **pool: Any) -> dict[str, Any]:
    def workers() -> list[dict[str, int]]:
        return [{"port": free_port(), "side_channel_port": free_port()}]

    prefill = {"engine": "sim", "workers": workers(), **pool}
    decode = {"engine": "sim", "workers": workers(), "args": decode_args or []}
    return {"models": [{"name": MODEL, "prefill": prefill, "decode": decode}]}


@pytest.mark.processes
def test_workers_that_do_not_run_are_started_and_stopped(doctor: Doctor) -> None:
    config = managed(decode_args=["--dtype", "float32"])
    for _ in range(2):  # the second finds the ports free again
        report = doctor(config)
        assert f"start {PREFILL}: was started for this visit" in report.of("ok")
        assert [fault.partition(":")[0] for fault in report.faults] == [f"fits {DECODE}"], report.out
        assert f"starting {DECODE} (log: .baton/run-" in report.err


@pytest.mark.processes
def test_a_cluster_that_runs_is_asked_as_it_is(doctor: Doctor) -> None:
    config = {**managed(), "orchestrator": {"listen": f"127.0.0.1:{free_port()}"}}
    path = doctor.directory / "up.yaml"
    path.write_text(json.dumps(config))
    with baton("up", str(path), cwd=doctor.directory, transport="orjson") as url:
        report = doctor(config)
        assert (report.code, report.faults) == (Exit.OK, []), report.out
        assert f"port {PREFILL}: runs already at " in "\n".join(report.of("ok"))
        assert f"port orchestrator: runs already at {url}" in report.of("ok")
        assert "ready orchestrator: can serve every model" in report.of("ok")
        assert report.err == ""  # nothing was started
        assert httpx.get(f"{url}/ready").status_code == 200


@pytest.mark.processes
def test_a_worker_that_does_not_start_is_named_with_the_likely_cause(doctor: Doctor) -> None:
    report = doctor(managed(decode_args=["--no-such-option"]))
    (fault,) = report.faults
    assert fault.startswith(f"start {DECODE}: ended while starting, with exit code 2: ")
    assert "the engine does not know one of the args (log: .baton/run-" in fault
    assert f"health {PREFILL}: answers at" in "\n".join(report.of("ok"))


@pytest.mark.processes
def test_a_worker_that_is_late(doctor: Doctor) -> None:
    config = managed(args=["--fault", '{"kind": "error", "leg": "health"}'])
    report = doctor({**config, "launch": {"start_timeout_s": 8}})
    (fault,) = report.faults
    assert fault.startswith(f"start {PREFILL}: is not ready after 8 s: ")
    assert "launch.start_timeout_s" in fault


@pytest.mark.processes
def test_a_signal_stops_what_was_started(doctor: Doctor) -> None:
    config = managed(args=["--fault", '{"kind": "error", "leg": "health"}'])
    port = config["models"][0]["decode"]["workers"][0]["port"]
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert doctor(config).code == Exit.INTERRUPTED
    timer.join()
    report = doctor(config, "--static")
    assert f"port {DECODE}: free: {port}," in "\n".join(report.of("ok"))


def test_nothing_is_started_after_a_fault_that_would_keep_it_from_starting(doctor: Doctor) -> None:
    with running(role="both") as stranger:
        config = managed()
        config["models"][0]["decode"]["workers"][0]["side_channel_port"] = int(
            stranger.url.rpartition(":")[2]
        )
        report = doctor(config)
    assert [fault.partition(":")[0] for fault in report.faults] == [f"port {DECODE}"]
    assert report.warnings[0].startswith(f"start {PREFILL}: 2 workers were not started")
    assert report.err == ""
