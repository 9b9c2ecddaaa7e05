from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from launch.plan import Plan, PlanError, ProcessSpec, Surroundings, make_plan, worker_specs
from orchestrator.config import Config

PREFILL_ON_CPU = (
    '{"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cpu",'
    '"kv_load_failure_policy":"fail"}'
)


def around(
    environ: Mapping[str, str] | None = None,
    plugins: Sequence[str] = (),
    directories: Sequence[str] = (),
    here: Sequence[str] = ("127.0.0.1",),
) -> Surroundings:
    return Surroundings(
        python="python",
        environ=environ or {},
        vllm_plugins=plugins,
        is_directory=directories.__contains__,
        is_here=here.__contains__,
    )


def config(*models: dict[str, Any], **more: Any) -> Config:
    return Config.model_validate({"models": list(models), **more})


def model(**pools: Any) -> dict[str, Any]:
    return {"name": "m", "path": "dir", **pools}


def plan_of(made: Config, surroundings: Surroundings | None = None, overrides: Sequence[str] = ()) -> Plan:
    return make_plan(made, "c.yaml", overrides, surroundings or around())


def only_worker(pool: Mapping[str, Any], surroundings: Surroundings | None = None) -> ProcessSpec:
    (spec,) = plan_of(config(model(both=pool)), surroundings).workers
    return spec


def value_of(option: str, spec: ProcessSpec) -> str:
    return spec.argv[spec.argv.index(option) + 1]


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


def test_a_worker_for_both_hands_nothing_over() -> None:
    spec = only_worker({})
    assert "--kv-transfer-config" not in spec.argv
    assert not [name for name in spec.env if "NIXL" in name]


def test_a_simulated_worker() -> None:
    pool = {"engine": "sim", "sim": {"decode_ms_per_token": 2, "block_size": 32}, "args": ["--seed", "1"]}
    spec = only_worker(pool)
    assert spec.argv == (
        *("python", "-m", "worker.sim", "--model-name", "m", "--role", "both"),
        *("--host", "127.0.0.1", "--port", "8100", "--side-channel-port", "9100"),
        *("--decode-ms-per-token", "2.0", "--block-size", "32"),
        *("--seed", "1"),
    )
    assert spec.env == {}


def test_the_orchestrator() -> None:
    made = config(
        model(both={"urls": ["http://h"]}), orchestrator={"listen": "[::1]:80", "admin": "127.0.0.1:81"}
    )
    plan = plan_of(made, overrides=["a.b=1", "c=2"])
    assert plan.processes == (plan.orchestrator,)
    assert plan.orchestrator.argv == (
        *("python", "-m", "launch.cli", "orchestrator", "c.yaml"),
        *("--set", "a.b=1", "--set", "c=2"),
    )
    assert plan.orchestrator.ready_url == "http://[::1]:80/health"
    assert plan.orchestrator.listens == (("::1", 80), ("127.0.0.1", 81))


@pytest.mark.parametrize(
    ("listen", "tls", "url"),
    [
        ("0.0.0.0:80", None, "http://127.0.0.1:80"),
        ("[::]:80", None, "http://[::1]:80"),
        ("10.0.0.1:80", {"cert": "c", "key": "k"}, "https://10.0.0.1:80"),
    ],
)
def test_clients_get_an_address_to_reach(listen: str, tls: dict[str, str] | None, url: str) -> None:
    made = config(model(both={}), orchestrator={"listen": listen, "tls": tls})
    assert plan_of(made).url == url


def test_a_port_must_be_known_beforehand() -> None:
    with pytest.raises(PlanError, match=r"orchestrator\.listen has port 0"):
        plan_of(config(model(both={}), orchestrator={"listen": "127.0.0.1:0"}))


def test_workers_start_before_the_orchestrator() -> None:
    plan = plan_of(config(model(prefill={"replicas": 2}, decode={})))
    names = [spec.name for spec in plan.processes]
    assert names == ["m/prefill/0", "m/prefill/1", "m/decode/0", "orchestrator"]


def test_only_what_is_here_is_started() -> None:
    hosts = [{"host": "10.0.0.1"}, {"host": "10.0.0.2"}]
    made = config(model(both={"workers": hosts}))
    plan = plan_of(made, around(here=["10.0.0.2"]))
    assert [spec.name for spec in plan.workers] == ["m/both/1"]
    assert plan.elsewhere == ("m/both/0",)
    assert list(worker_specs(made, around())) == ["m/both/0", "m/both/1"]


def test_arguments_and_environment_of_the_user_come_last() -> None:
    worker = {"args": ["--b"], "env": {"OMP_NUM_THREADS": "3", "X": "worker"}}
    spec = only_worker(
        {"device": "cpu", "args": ["--a"], "env": {"X": "pool", "Y": "1"}, "workers": [worker]}
    )
    assert spec.argv[-2:] == ("--a", "--b")
    assert (spec.env["OMP_NUM_THREADS"], spec.env["X"], spec.env["Y"]) == ("3", "worker", "1")


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
    simulated = only_worker({"engine": "sim"}, around(environ))
    assert value_of("--api-key-env", simulated) == "BATON_WORKER_API_KEY"  # a name; the value is inherited
    assert not any("hush" in word for word in (*spec.argv, *simulated.argv))


def gpus(*models: dict[str, Any], environ: Mapping[str, str] | None = None) -> list[str]:
    plan = plan_of(config(*models), around(environ, here=["127.0.0.1", "10.0.0.1"]))
    return [spec.env["CUDA_VISIBLE_DEVICES"] for spec in plan.workers]


def test_replicas_get_the_next_gpus() -> None:
    first = model(prefill={"replicas": 2, "gpus_per_replica": 2}, decode={})
    second = {"name": "n", "path": "dir", "both": {}}
    assert gpus(first, second) == ["0,1", "2,3", "4", "5"]


def test_given_gpus_are_left_alone_by_others() -> None:
    workers = [{"gpus": [1]}, {}, {"gpus": [1, 3]}, {}, {"host": "10.0.0.1"}]
    assert gpus(model(both={"workers": workers})) == ["1", "0", "1,3", "2", "0"]


def test_cpu_and_simulated_workers_take_no_gpus() -> None:
    cpu = model(prefill={"device": "cpu"}, decode={})
    assert plan_of(config(cpu)).workers[1].gpus == (0,)


def test_gpus_count_among_those_that_are_visible() -> None:
    assert gpus(model(both={"replicas": 2}), environ={"CUDA_VISIBLE_DEVICES": "4, GPU-abc"}) == [
        "4",
        "GPU-abc",
    ]
    with pytest.raises(PlanError, match=r"m/both/1 needs GPU 1, but CUDA_VISIBLE_DEVICES=4 shows only 1"):
        gpus(model(both={"replicas": 2}), environ={"CUDA_VISIBLE_DEVICES": "4"})


def test_several_gpus_are_used_as_one_unless_the_user_says_how() -> None:
    assert value_of("--tensor-parallel-size", only_worker({"gpus_per_replica": 2})) == "2"
    theirs = only_worker({"gpus_per_replica": 2, "args": ["-pp=2"]})
    assert "--tensor-parallel-size" not in theirs.argv


def test_log_names_differ() -> None:
    names = ["a/b", "a+b", "a b", "../a"]
    plan = plan_of(config(*({"name": name, "path": "dir", "both": {}} for name in names)))
    logs = [spec.log_name for spec in plan.workers]
    assert logs == ["a+b-both-0.log", "a%2Bb-both-0.log", "a%20b-both-0.log", "..+a-both-0.log"]


def test_the_workers_name_for_the_model() -> None:
    assert value_of("--served-model-name", only_worker({"served_model": "theirs"})) == "theirs"
