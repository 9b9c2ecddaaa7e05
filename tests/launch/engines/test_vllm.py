from __future__ import annotations

import json
from typing import Any

import pytest

from launch.engines.base import PlanError, Span
from launch.plan import ProcessSpec
from tests.launch.planning import (
    around,
    config,
    gpus,
    model,
    only_worker,
    plan_of,
    value_of,
    worker_elsewhere,
)

PREFILL_ON_CPU = (
    '{"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cpu",'
    '"kv_load_failure_policy":"fail"}'
)


def test_a_prefill_worker_on_a_cpu() -> None:
    pool = {"device": "cpu", "args": ["--max-model-len", "4096"], "env": {"A": "b"}}
    plan = plan_of(config(model(prefill=pool, decode=pool)), around(directories=["dir"]))
    assert plan.workers[0] == ProcessSpec(
        name="m/prefill/0",
        role="prefill",
        argv=(
            *("python", "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", "dir", "--served-model-name", "m"),
            *("--host", "127.0.0.1", "--port", "8100"),
            *("--kv-transfer-config", PREFILL_ON_CPU),
            *("--enable-prompt-tokens-details", "--enable-request-id-headers"),
            *("--allowed-media-domains", "media.invalid"),
            *("--enforce-eager", "--distributed-executor-backend"),
            "vllm.v1.executor.uniproc_executor.UniProcExecutor",
            *("--max-model-len", "4096"),
        ),
        env={
            "BATON_ROLE": "prefill",
            "BATON_MODEL": "m",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": "9100",
            "BATON_NIXL_PROGRESS_DELAY_US": "1000",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "A": "b",
            "VLLM_PLUGINS": "baton",
        },
        ready_url="http://127.0.0.1:8100/health",
        listens=(("127.0.0.1", 8100), ("127.0.0.1", 9100)),
        log_name="m-prefill-0.log",
    )


@pytest.mark.parametrize(
    ("pool", "environ", "expected"),
    [
        ({}, {}, "1000"),
        ({}, {"BATON_NIXL_PROGRESS_DELAY_US": "0"}, "0"),
        (
            {"env": {"BATON_NIXL_PROGRESS_DELAY_US": "5000"}},
            {"BATON_NIXL_PROGRESS_DELAY_US": "0"},
            "5000",
        ),
    ],
    ids=["ours", "the shell's", "the file's"],
)
def test_how_long_the_progress_thread_waits(
    pool: dict[str, Any], environ: dict[str, str], expected: str
) -> None:
    plan = plan_of(config(model(prefill=pool, decode=pool)), around(environ))
    assert [spec.env["BATON_NIXL_PROGRESS_DELAY_US"] for spec in plan.workers] == [expected] * 2


@pytest.mark.parametrize(
    "args",
    [
        ["--allowed-media-domains", "a.org", "b.org"],
        ["--allowed-media-domains=a.org"],
        ["--allowed_media_domains", "a.org"],
    ],
)
def test_media_come_from_where_the_user_says(args: list[str]) -> None:
    pool = {"device": "cpu", "args": args}
    for worker in plan_of(config(model(prefill=pool, decode=pool))).workers:
        assert worker.argv[-len(args) :] == tuple(args)
        assert "media.invalid" not in worker.argv


def test_a_decode_worker_on_a_gpu() -> None:
    _, decode = plan_of(config(model(prefill={}, decode={}))).workers
    assert json.loads(value_of("--kv-transfer-config", decode)) == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_consumer",
        "kv_buffer_device": "cuda",
        "kv_load_failure_policy": "fail",
    }
    assert "--enforce-eager" not in decode.argv
    assert decode.env["CUDA_VISIBLE_DEVICES"] == "1"
    assert decode.gpus == (1,)
    assert not {"OMP_NUM_THREADS", "HF_HUB_OFFLINE"} & decode.env.keys()


def events_of(host: str, *args: str, port: int = 8100) -> ProcessSpec:
    pool = {"workers": [{"host": host, "port": port, "args": list(args)}]}
    made = config(model(prefill=pool, decode=pool | {"workers": [{}]}), routing={"prefill": "kv_events"})
    prefill, decode = plan_of(made, around(here=["127.0.0.1", "10.0.0.1"])).workers
    assert "--kv-events-config" not in decode.argv
    return prefill


def test_workers_publish_their_kv_events_if_routing_goes_by_them() -> None:
    spec = events_of("127.0.0.1")
    assert json.loads(value_of("--kv-events-config", spec)) == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "ipc://@baton-kv-events-8100",
        "replay_endpoint": "ipc://@baton-kv-events-8100-again",
    }
    assert len(spec.listens) == 2
    spec = events_of("10.0.0.1")
    published = json.loads(value_of("--kv-events-config", spec))
    assert (published["endpoint"], published["replay_endpoint"]) == ("tcp://*:10100", "tcp://*:11100")
    assert spec.listens[2:] == (("10.0.0.1", 10100), ("10.0.0.1", 11100))


def test_the_users_kv_events_stay_as_they_are() -> None:
    for given in (("--kv-events-config", "{}"), ("--kv-events-config={}",), ("--kv_events_config", "{}")):
        spec = events_of("127.0.0.1", *given)
        assert sum("events" in word for word in spec.argv) == 1


def test_a_port_for_kv_events_must_exist() -> None:
    with pytest.raises(PlanError, match="KV events"):
        events_of("10.0.0.1", port=64_000)


def test_a_worker_for_both_hands_nothing_over() -> None:
    spec = only_worker({})
    assert "--kv-transfer-config" not in spec.argv
    assert not [name for name in spec.env if "NIXL" in name]


def test_what_the_shell_sets_for_the_cpu_stays() -> None:
    spec = only_worker({"device": "cpu"}, around({"VLLM_CPU_KVCACHE_SPACE": "8"}))
    assert "VLLM_CPU_KVCACHE_SPACE" not in spec.env
    assert spec.env["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("pool", "environ", "plugins", "expected"),
    [
        ({}, {}, (), "baton"),
        ({}, {}, ("platform", "general"), "platform,general,baton"),
        ({}, {"VLLM_PLUGINS": "mine"}, ("platform",), "mine,baton"),
        ({}, {"VLLM_PLUGINS": ""}, ("platform",), "baton"),
        ({}, {"VLLM_PLUGINS": "baton,mine"}, (), "baton,mine"),
        ({"env": {"VLLM_PLUGINS": "pool"}}, {"VLLM_PLUGINS": "mine"}, ("platform",), "pool,baton"),
    ],
)
def test_other_plugins_stay_on(
    pool: dict[str, Any], environ: dict[str, str], plugins: tuple[str, ...], expected: str
) -> None:
    assert only_worker(pool, around(environ, plugins)).env["VLLM_PLUGINS"] == expected


def test_the_workers_key_is_in_no_argument() -> None:
    environ = {"BATON_WORKER_API_KEY": "hush"}
    spec = only_worker({}, around(environ))
    assert spec.env["VLLM_API_KEY"] == "hush"
    assert spec.secret_env == {"VLLM_API_KEY"}
    assert not any("hush" in word for word in spec.argv)


def test_gpus_count_among_those_that_are_visible() -> None:
    assert gpus(model(both={"replicas": 2}), environ={"CUDA_VISIBLE_DEVICES": "4, GPU-abc"}) == [
        "4",
        "GPU-abc",
    ]
    with pytest.raises(PlanError, match=r"m/both/1 needs GPU 1, but CUDA_VISIBLE_DEVICES=4 shows only 1"):
        gpus(model(both={"replicas": 2}), environ={"CUDA_VISIBLE_DEVICES": "4"})


@pytest.mark.parametrize("shown", ["", " ", ",", "-1", "-1,0", "NoDevFiles"])
def test_gpus_that_are_hidden_are_not_planned(shown: str) -> None:
    with pytest.raises(PlanError, match=r"m/both/0 needs GPU 0, but CUDA_VISIBLE_DEVICES=.* shows none"):
        gpus(model(both={}), environ={"CUDA_VISIBLE_DEVICES": shown})
    assert only_worker({"device": "cpu"}, around({"CUDA_VISIBLE_DEVICES": shown})).gpus == ()


def test_several_gpus_are_used_as_one_unless_the_user_says_how() -> None:
    assert value_of("--tensor-parallel-size", only_worker({"gpus_per_replica": 2})) == "2"
    theirs = only_worker({"gpus_per_replica": 2, "args": ["-pp=2"]})
    assert "--tensor-parallel-size" not in theirs.argv


def test_the_workers_name_for_the_model() -> None:
    assert value_of("--served-model-name", only_worker({"served_model": "theirs"})) == "theirs"


def test_it_may_listen_elsewhere_than_it_is_reached() -> None:
    spec = worker_elsewhere({})
    assert value_of("--host", spec) == "0.0.0.0"
    assert spec.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.1"
    assert "--nnodes" not in spec.argv


def test_an_engine_that_spans_machines_is_a_process_on_each() -> None:
    first, second = (worker_elsewhere({}, Span(2, rank, "leader")) for rank in ("0", "1"))
    assert (value_of("--nnodes", first), value_of("--node-rank", first)) == ("2", "0")
    assert value_of("--master-addr", second) == "leader"
    assert "--headless" not in first.argv
    assert "--headless" in second.argv
