from __future__ import annotations

from tests.launch.planning import around, config, model, only_worker, plan_of, value_of, worker_elsewhere


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


def test_the_workers_key_is_in_no_argument() -> None:
    spec = only_worker({"engine": "sim"}, around({"BATON_WORKER_API_KEY": "hush"}))
    assert value_of("--api-key-env", spec) == "BATON_WORKER_API_KEY"  # a name; the value is inherited
    assert not any("hush" in word for word in spec.argv)


def test_it_leaves_the_gpus_to_others() -> None:
    plan = plan_of(config(model(prefill={"engine": "sim", "replicas": 2}, decode={"engine": "sim"})))
    assert [spec.gpus for spec in plan.workers] == [(), (), ()]


def test_it_publishes_kv_events_if_routing_goes_by_them() -> None:
    pools = {role: {"engine": "sim"} for role in ("prefill", "decode")}
    prefill, decode = plan_of(config(model(**pools), routing={"prefill": "kv_events"})).workers
    assert value_of("--kv-events", prefill) == "ipc://@baton-kv-events-8100"
    assert value_of("--kv-events-replay", prefill) == "ipc://@baton-kv-events-8100-again"
    assert "--kv-events" not in decode.argv


def test_it_may_listen_elsewhere_than_it_is_reached() -> None:
    spec = worker_elsewhere({"engine": "sim"})
    assert value_of("--host", spec) == "0.0.0.0"
    assert value_of("--side-channel-host", spec) == "10.0.0.1"
