from __future__ import annotations

import pytest

from launch.engines.base import PlanError
from launch.plan import worker_specs
from orchestrator.config.addresses import routed_addresses
from tests.launch.planning import around, config, gpus, model, only_worker, plan_of, value_of


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


@pytest.mark.parametrize(
    ("admin", "tls", "url"),
    [
        (None, None, None),
        ("127.0.0.1:8001", None, "http://127.0.0.1:8001"),
        ("0.0.0.0:8001", None, "http://127.0.0.1:8001"),
        ("[::]:8001", None, "http://[::1]:8001"),
        ("127.0.0.1:8001", {"cert": "c", "key": "k"}, "https://127.0.0.1:8001"),
        ("127.0.0.1:0", None, None),  # nobody can be told which port it gets
    ],
)
def test_operators_get_one_too(admin: str | None, tls: dict[str, str] | None, url: str | None) -> None:
    made = config(model(both={}), orchestrator={"admin": admin, "tls": tls, "insecure_no_auth": True})
    assert plan_of(made).admins == (() if url is None else (url,))


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


def test_workers_that_are_discovered_are_started_only_if_it_is_said_how_many() -> None:
    sources = {"prefill": {"dns": "p:1"}, "decode": {"kubernetes": {"service": "d", "namespace": "team"}}}
    pools = {role: {"engine": "sim", "discover": source} for role, source in sources.items()}
    made = config(model(**pools))
    assert [spec.name for spec in plan_of(made).processes] == ["orchestrator"]
    assert plan_of(made).discovered == ("m/prefill by dns p:1", "m/decode by kubernetes team/d")
    made = config(model(**{role: {**pool, "replicas": 2} for role, pool in pools.items()}))
    assert len(plan_of(made).workers) == 4
    assert routed_addresses(made) == ()  # the orchestrator learns of them from the source


def test_arguments_and_environment_of_the_user_come_last() -> None:
    worker = {"args": ["--b"], "env": {"OMP_NUM_THREADS": "3", "X": "worker"}}
    spec = only_worker(
        {"device": "cpu", "args": ["--a"], "env": {"X": "pool", "Y": "1"}, "workers": [worker]}
    )
    assert spec.argv[-2:] == ("--a", "--b")
    assert (spec.env["OMP_NUM_THREADS"], spec.env["X"], spec.env["Y"]) == ("3", "worker", "1")


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


def test_log_names_differ() -> None:
    names = ["a/b", "a+b", "a b", "..a/b"]
    plan = plan_of(config(*({"name": name, "path": "dir", "both": {}} for name in names)))
    logs = [spec.log_name for spec in plan.workers]
    assert logs == ["a+b-both-0.log", "a%2Bb-both-0.log", "a%20b-both-0.log", "..a+b-both-0.log"]


@pytest.mark.parametrize("engine", ["vllm", "sim"])
def test_prefill_workers_go_by_priorities_where_short_prompts_go_first(engine: str) -> None:
    pools = {"prefill": {"engine": engine}, "decode": {"engine": engine}}
    made = config(model(**pools), routing={"prefill_order": "shortest"})
    prefill, decode = plan_of(made).workers
    assert value_of("--scheduling-policy", prefill) == "priority"
    assert "--scheduling-policy" not in decode.argv
    assert all("--scheduling-policy" not in spec.argv for spec in plan_of(config(model(**pools))).workers)


def test_data_parallel_engines_share_a_process_and_its_gpus() -> None:
    pool = {"data_parallel_size": 2, "gpus_per_replica": 4}
    (spec,) = plan_of(config(model(both=pool))).workers
    assert value_of("--data-parallel-size", spec) == "2"
    assert value_of("--tensor-parallel-size", spec) == "2"
    assert spec.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert spec.listens == (("127.0.0.1", 8100), ("127.0.0.1", 9100), ("127.0.0.1", 9101))
    (spec,) = plan_of(config(model(both=pool | {"engine": "sim", "gpus_per_replica": 1}))).workers
    assert value_of("--data-parallel-size", spec) == "2"
    (spec,) = plan_of(config(model(both={"data_parallel_size": 2, "gpus_per_replica": 2}))).workers
    assert "--tensor-parallel-size" not in spec.argv


def test_several_orchestrators_have_ports_of_their_own() -> None:
    made = config(
        model(both={"engine": "sim"}),
        orchestrator={"listen": "0.0.0.0:8000", "admin": "127.0.0.1:8001", "insecure_no_auth": True},
        launch={"orchestrators": 3},
    )
    plan = plan_of(made)
    assert [spec.name for spec in plan.orchestrators] == ["orchestrator", "orchestrator-1", "orchestrator-2"]
    assert [spec.url for spec in plan.orchestrators] == [f"http://127.0.0.1:80{n}0" for n in range(3)]
    assert plan.admins == tuple(f"http://127.0.0.1:80{n}1" for n in range(3))
    assert plan.orchestrators[2].listens == (("0.0.0.0", 8020), ("127.0.0.1", 8021))
    assert plan.orchestrators[2].argv[-6:] == (
        "--set", "orchestrator.listen=0.0.0.0:8020", "--set", "orchestrator.admin=127.0.0.1:8021",
        "--set", "launch.orchestrators=1",
    )  # fmt: skip
    assert "--set" not in plan.orchestrators[0].argv
    assert len({spec.log_name for spec in plan.orchestrators}) == 3


def test_several_orchestrators_need_an_admin_port_that_is_known() -> None:
    orchestrator = {"listen": "127.0.0.1:8000", "admin": "127.0.0.1:0"}
    made = config(model(both={"engine": "sim"}), orchestrator=orchestrator, launch={"orchestrators": 2})
    with pytest.raises(PlanError, match=r"orchestrator\.admin has port 0"):
        plan_of(made)


def test_workers_keep_off_the_ports_of_all_orchestrators() -> None:
    orchestrator = {"listen": "127.0.0.1:8000", "admin": "127.0.0.1:8001"}
    made = config(
        model(both={"engine": "sim", "replicas": 20}),
        orchestrator=orchestrator,
        base_port=8000,
        launch={"orchestrators": 2},
    )
    ports = [port for spec in plan_of(made).processes for _, port in spec.listens]
    assert len(ports) == len(set(ports))
