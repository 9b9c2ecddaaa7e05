"""What is rendered fits together, is valid, and has in it what keeps requests from failing."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.render.cluster import make_cluster
from launch.render.errors import RenderError
from launch.render.objects import objects
from launch.render.secrets import needed_secrets
from launch.render.targets import TARGETS
from orchestrator.config.options import Config
from tests.launch.render.clusters import (
    PD,
    SIM,
    all_of,
    cluster,
    config,
    container_of,
    env_of,
    kinds,
    only,
    pod_of,
    rendered,
)
from tests.launch.render.structure import faults

BIG = {**PD, "decode": {**PD["decode"], "gpus_per_replica": 16}}


def fits(made: Config) -> list[str]:
    found = make_cluster(made)
    return faults(list(all_of(found)), {secret.name for secret in needed_secrets(found)})


# --- all together -----------------------------------------------------------------------------------

names = st.one_of(
    st.sampled_from(
        ["qwen", "Qwen/Qwen3-8B", "a/b", "a-b", "A.B", "1.5b", "orchestrator", "config", "模型", "x" * 200]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
).filter(lambda name: all(part not in ("", ".", "..") for part in name.strip().split("/")))
engines = st.sampled_from(["vllm", "cpu", "sim"])
small = st.integers(1, 3)


def _model(name: str, kind: str, pd: bool, both: bool, replicas: int, gpus: int, data: int) -> dict[str, Any]:
    engine = {"vllm": {"gpus_per_replica": gpus * data}, "cpu": {"device": "cpu"}, "sim": {"engine": "sim"}}[
        kind
    ]
    pool = {**engine, "replicas": replicas, "data_parallel_size": data, "args": ["$(POD_IP)", "a$$b {{x}}"]}
    roles = (["prefill", "decode"] if pd else []) + (["both"] if both or not pd else [])
    return {"name": name, "path": "org/model", **dict.fromkeys(roles, pool)}


models = st.builds(
    _model,
    names,
    engines,
    st.booleans(),
    st.booleans(),
    small,
    st.sampled_from([1, 2, 8, 16, 64]),
    st.sampled_from([1, 2]),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["a", "baton", "twelve-chars"]),
        "namespace": st.sampled_from(["default", "llm-serving"]),
        "orchestrator_image": st.sampled_from(["o:1", "r.example:5000/o@sha256:" + "0" * 64]),
        "pull": st.just({"policy": "Always", "secrets": ["regcred"]}),
        "plugin": st.booleans(),
        "orchestrators": st.sampled_from([1, 2, 8]),
        "max_orchestrators": st.sampled_from([1, 8]),
        "workload": st.sampled_from(["deployment", "lws", "disaggregatedset"]),
        "gpu_resource": st.sampled_from(["nvidia.com/gpu", "amd.com/gpu"]),
        "gpus_per_pod": st.sampled_from([1, 8, 128]),
        "spare_gpus": st.booleans(),
        "monitoring": st.booleans(),
        "network_policy": st.booleans(),
        "service_type": st.sampled_from(["ClusterIP", "LoadBalancer"]),
        "gateway": st.sampled_from(["main", "infra/main"]),
        "hostnames": st.just(["api.example.com", "*.example.org"]),
        "volumes": st.sampled_from([{"claim": "models"}, {"host_path": "/var/models"}, {"size": "1Ti"}]),
        "secrets": st.sampled_from([{"worker_key": None}, {"api_keys": "keys", "hf_token": "hub"}]),
        "worker_pod": st.just(
            {
                "secret_env": {"VLLM_API_KEY": "s/k", "HF_TOKEN": "s/t", "USER": "s/u"},
                "cpu": 8,
                "memory": "64Gi",
                "resources": {"rdma/hca": 1},
                "node_selector": {"gpu": "h200"},
            }
        ),
        "orchestrator_pod": st.just(
            {"env": {"A": "$(B) $$"}, "secret_env": {"OTEL_EXPORTER_OTLP_HEADERS": "otel/headers"}}
        ),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(models, min_size=1, max_size=3, unique_by=lambda one: one["name"].strip()), options)
def test_whatever_is_rendered_fits_together(given_models: list[Any], given_options: dict[str, Any]) -> None:
    assert fits(config(*given_models, **given_options)) == []


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(models, min_size=1, max_size=2, unique_by=lambda one: one["name"].strip()), options)
def test_whatever_is_rendered_is_valid(given_models: list[Any], given_options: dict[str, Any]) -> None:
    pytest.importorskip("kubernetes_validate")
    from tests.launch.render.schemas import problems

    made = make_cluster(config(*given_models, **given_options))
    found = [text for one in all_of(made) for text in problems(one)]
    assert found == []


def test_the_same_config_gives_the_same_files() -> None:
    for target in TARGETS.values():
        one, other = (target(cluster(PD, SIM, gateway="main")) for _ in range(2))
        assert list(one.items()) == list(other.items())


def test_another_model_renames_nothing() -> None:
    alone = {one["metadata"]["name"] for one in rendered({**PD, "name": "a/b"})}
    beside = {one["metadata"]["name"] for one in rendered({**PD, "name": "a-b"}, {**PD, "name": "a/b"})}
    assert alone < beside


def test_it_takes_far_less_than_a_second() -> None:
    many = [{**PD, "name": f"org/model-{number}"} for number in range(10)]
    made = config(*many)
    before = time.process_time()
    TARGETS["helm"](make_cluster(made))
    print(f"ten models as a chart: {time.process_time() - before:.3f} s of CPU")


# --- workers ----------------------------------------------------------------------------------------


def test_a_worker_runs_what_the_plan_starts_at_the_address_of_its_pod() -> None:
    container = container_of(only(rendered(), "Deployment", "decode"))
    command, env = container["command"], env_of(container)
    assert command[:3] == ["python3", "-m", "vllm.entrypoints.openai.api_server"]
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert command[-2:] == ["--max-num-seqs", "256"]
    assert env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "$(POD_IP)"
    assert env["VLLM_API_KEY"] == "$(BATON_WORKER_API_KEY)"
    assert "CUDA_VISIBLE_DEVICES" not in env
    (address,) = (one for one in container["env"] if one["name"] == "POD_IP")
    assert address["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}


def test_what_users_write_is_not_expanded_but_for_our_variables() -> None:
    pool = {"engine": "sim", "args": ["$(HOME)", "$$", "a$b", "$(POD_IP)"], "env": {"X": "$(Y)"}}
    container = container_of(only(rendered({"name": "m", "both": pool}), "Deployment", "both"))
    assert container["command"][-4:] == ["$$(HOME)", "$$$$", "a$$b", "$(POD_IP)"]
    assert env_of(container)["X"] == "$$(Y)"


def test_a_simulated_worker_hands_over_at_the_address_of_its_pod() -> None:
    container = container_of(only(rendered(SIM), "Deployment", "prefill"))
    command = container["command"]
    assert command[command.index("--side-channel-host") + 1] == "$(POD_IP)"
    assert "limits" not in container["resources"]


def test_readiness_is_what_the_worker_says_of_itself() -> None:
    container = container_of(only(rendered(), "Deployment", "prefill"))
    assert container["readinessProbe"]["httpGet"]["path"] == "/baton/ready"
    assert container["readinessProbe"]["periodSeconds"] == 1
    assert container["startupProbe"]["httpGet"]["path"] == "/health"
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 1800


def test_a_worker_is_drained_before_it_is_told_to_end() -> None:
    found = rendered(orchestrator={"limits": {"request_timeout_s": 90.5}}, launch={"stop_timeout_s": 20})
    workload = only(found, "Deployment", "prefill")
    command = container_of(workload)["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:4] == ["baton", "drain", "--self", "--wait"]
    assert command[-1] == "91"
    assert pod_of(workload)["spec"]["terminationGracePeriodSeconds"] == 91 + 20 + 15
    assert workload["spec"]["minReadySeconds"] == 15


def test_plain_vllm_is_asked_for_its_health_and_left_time() -> None:
    container = container_of(only(rendered(plugin=False), "Deployment", "prefill"))
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    assert container["lifecycle"]["preStop"] == {"sleep": {"seconds": 600}}
    assert "VLLM_PLUGINS" not in env_of(container)
    own = {**PD, "prefill": {"env": {"VLLM_PLUGINS": "mine"}}}
    container = container_of(only(rendered(own, plugin=False), "Deployment", "prefill"))
    assert env_of(container)["VLLM_PLUGINS"] == "mine"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    ours = container_of(only(rendered(own), "Deployment", "prefill"))
    assert env_of(ours)["VLLM_PLUGINS"] == "mine,baton"


@pytest.mark.parametrize(("spare", "surge"), [(True, (1, 0)), (False, (0, 1))])
def test_a_rollout_needs_a_spare_gpu_or_none(spare: bool, surge: tuple[int, int]) -> None:
    strategy = only(rendered(spare_gpus=spare), "Deployment", "decode")["spec"]["strategy"]["rollingUpdate"]
    assert (strategy["maxSurge"], strategy["maxUnavailable"]) == surge


def test_gpus_memory_and_the_models_volume() -> None:
    model = {**PD, "prefill": {"gpus_per_replica": 2}}
    found = rendered(
        model,
        gpu_resource="amd.com/gpu",
        volumes={"claim": "models", "shm": "4Gi"},
        worker_pod={"memory": "9Gi"},
    )
    workload = only(found, "Deployment", "prefill")
    resources = container_of(workload)["resources"]
    assert resources["limits"] == {"amd.com/gpu": 2, "memory": "9Gi"}
    volumes = {volume["name"]: volume for volume in pod_of(workload)["spec"]["volumes"]}
    assert volumes["cache"]["persistentVolumeClaim"] == {"claimName": "models"}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert {"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod_of(workload)["spec"][
        "tolerations"
    ]


def test_both_roles_of_a_model_have_one_revision_that_changes_with_either() -> None:
    def revisions(made: Any) -> set[str]:
        return {
            pod_of(one)["metadata"]["labels"]["baton/revision"]
            for one in made
            if one["kind"] == "Deployment" and "orch" not in one["metadata"]["name"]
        }

    (first,) = revisions(rendered())
    (second,) = revisions(rendered({**PD, "decode": {"args": ["--x"]}}))
    (third,) = revisions(rendered(image="other:2"))
    assert len({first, second, third}) == 3


def test_an_engine_over_several_pods_is_a_group_whose_first_pod_serves() -> None:
    found = rendered(BIG)
    group = only(found, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 2
    leader, other = (group[kind]["spec"]["containers"][0] for kind in ("leaderTemplate", "workerTemplate"))
    nodes = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "$(LWS_LEADER_ADDRESS)"]
    assert leader["command"][leader["command"].index("--nnodes") :][:6] == nodes
    assert leader["command"][leader["command"].index("--tensor-parallel-size") + 1] == "16"
    assert other["command"][other["command"].index("--node-rank") + 1] == "$(LWS_WORKER_INDEX)"
    assert "--headless" in other["command"]
    assert "--headless" not in leader["command"]
    assert leader["resources"]["limits"] == other["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "readinessProbe" not in other
    service = only(found, "Service", "decode")
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    assert service["metadata"]["name"] != only(found, "LeaderWorkerSet")["metadata"]["name"]
    assert fits(config(BIG)) == []


def test_a_disaggregated_set_has_both_roles() -> None:
    found = rendered({**PD, "both": {"replicas": 1}}, workload="disaggregatedset")
    roles = only(found, "DisaggregatedSet")["spec"]["roles"]
    assert [role["name"] for role in roles] == ["prefill", "decode"]
    assert [role["spec"]["replicas"] for role in roles] == [1, 2]
    assert only(found, "Deployment", "both")


def test_kv_events_are_heard_by_the_orchestrators() -> None:
    found = rendered(more={"routing": {"prefill": "kv_events"}})
    ports = {
        port["name"]: port["containerPort"]
        for port in container_of(only(found, "Deployment", "prefill"))["ports"]
    }
    assert ports["kv-events"] == 10100
    policy = only(found, "NetworkPolicy", "workers")
    assert {"port": 10100, "protocol": "TCP"} in policy["spec"]["ingress"][0]["ports"]


def test_every_data_parallel_engine_has_a_side_channel() -> None:
    pool = {"gpus_per_replica": 4, "data_parallel_size": 4}
    container = container_of(only(rendered({**PD, "decode": pool}), "Deployment", "decode"))
    assert [port["containerPort"] for port in container["ports"]] == [8100, 9100, 9101, 9102, 9103]


# --- autoscaling ------------------------------------------------------------------------------------


class Range:
    """What a range of replicas looks like to whoever renders it."""

    min, max = 2, 6


def scaled(monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[Any]:
    monkeypatch.setattr("launch.render.cluster.replicas", lambda pool: (Range.min, Range.max))
    return rendered(**given)


@pytest.mark.parametrize("workload", ["deployment", "lws", "disaggregatedset"])
@pytest.mark.parametrize("autoscale", ["hpa", "keda"])
def test_pools_follow_what_the_planner_wants(
    autoscale: str, workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = scaled(monkeypatch, autoscale=autoscale, workload=workload)
    needed = {secret.name for secret in needed_secrets(cluster())}
    assert faults(found, needed) == []
    if autoscale == "keda":
        spec = only(found, "ScaledObject", "decode")["spec"]
        assert spec["triggers"][0]["metadata"]["ignoreNullValues"] == "false"
        assert spec["fallback"]["behavior"] == "currentReplicas"
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 6)
        assert (
            spec["triggers"][0]["metadata"]["query"]
            == 'max(baton_wanted_workers{model="qwen",role="decode"})'
        )
    else:
        spec = only(found, "HorizontalPodAutoscaler", "decode")["spec"]
        external = spec["metrics"][0]["external"]
        assert external["metric"]["name"] == "baton_wanted_workers"
        assert external["metric"]["selector"]["matchLabels"] == {"model": "qwen", "role": "decode"}
        assert external["target"] == {"type": "AverageValue", "averageValue": "1"}


def test_autoscaled_objects_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kubernetes_validate")
    from tests.launch.render.schemas import problems

    for autoscale in ("hpa", "keda"):
        found = scaled(monkeypatch, autoscale=autoscale, workload="disaggregatedset")
        assert [text for one in found for text in problems(one)] == []


def test_the_planner_knows_between_what_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    text = only(scaled(monkeypatch, autoscale="keda"), "ConfigMap")["data"]["baton.yaml"]
    (model,) = yaml.safe_load(text)["models"]
    assert model["path"] == "Qwen/Qwen3-8B"
    assert model["decode"]["replicas"] == {"min": 2, "max": 6}
    assert model["decode"]["engine"] == "vllm"


def test_without_an_autoscaler_a_range_begins_with_its_least(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scaled(monkeypatch, autoscale="none")
    assert only(found, "Deployment", "decode")["spec"]["replicas"] == 2


def test_orchestrators_follow_their_cpu_or_are_as_many_as_wanted() -> None:
    found = rendered(orchestrators=3)
    spec = only(found, "HorizontalPodAutoscaler", "orchestrator")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 8)
    assert "replicas" not in only(found, "Deployment", "orchestrator")["spec"]
    fixed = rendered(orchestrators=3, max_orchestrators=1)
    assert only(fixed, "Deployment", "orchestrator")["spec"]["replicas"] == 3
    assert "HorizontalPodAutoscaler" not in kinds(fixed)


# --- orchestrators ----------------------------------------------------------------------------------


def test_orchestrators_read_endpoint_slices_and_nothing_else() -> None:
    (rule,) = only(rendered(), "Role")["rules"]
    assert rule == {
        "apiGroups": ["discovery.k8s.io"],
        "resources": ["endpointslices"],
        "verbs": ["get", "list", "watch"],
    }


def test_one_model_without_workers_does_not_take_the_others_along() -> None:
    probe = container_of(only(rendered(), "Deployment", "orchestrator"))["readinessProbe"]["httpGet"]
    assert probe["path"] == "/ready"
    probe = container_of(only(rendered(PD, SIM), "Deployment", "orchestrator"))["readinessProbe"]["httpGet"]
    assert probe["path"] == "/ready?any"


def test_an_orchestrator_has_time_for_its_last_requests() -> None:
    pod = pod_of(only(rendered(), "Deployment", "orchestrator"))
    assert pod["spec"]["terminationGracePeriodSeconds"] == 615
    found = rendered(orchestrator={"timeout_graceful_shutdown": 40})
    assert pod_of(only(found, "Deployment", "orchestrator"))["spec"]["terminationGracePeriodSeconds"] == 55


def test_a_changed_config_rolls_the_orchestrators() -> None:
    def mark(**given: Any) -> str:
        return str(
            pod_of(only(rendered(**given), "Deployment", "orchestrator"))["metadata"]["annotations"][
                "baton/config"
            ]
        )

    assert mark() == mark()
    assert mark() != mark(orchestrator={"backlog": 7})


def test_the_api_is_served_over_tls() -> None:
    found = rendered(orchestrator={"tls": {"cert": "c.pem", "key": "k.pem"}})
    orchestrator = only(found, "Deployment", "orchestrator")
    assert container_of(orchestrator)["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    assert {"name": "tls", "secret": {"secretName": "baton-tls"}} in pod_of(orchestrator)["spec"]["volumes"]
    (endpoint,) = only(found, "PodMonitor", "orchestrator")["spec"]["podMetricsEndpoints"]
    assert endpoint["scheme"] == "https"
    assert fits(config(orchestrator={"tls": {"cert": "c.pem", "key": "k.pem"}})) == []


def test_keys_come_from_secrets() -> None:
    found = rendered(secrets={"api_keys": "my-keys", "hf_token": "hub"})
    orchestrator = only(found, "Deployment", "orchestrator")
    assert {"name": "keys", "secret": {"secretName": "my-keys"}} in pod_of(orchestrator)["spec"]["volumes"]
    (endpoint,) = only(found, "PodMonitor", "orchestrator")["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "baton-metrics-key", "key": "key"}}
    env = container_of(only(found, "Deployment", "prefill"))["env"]
    token = {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert {"name": "HF_TOKEN", "valueFrom": token} in env


def test_no_secret_of_this_machine_is_in_any_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BATON_WORKER_API_KEY", "HF_TOKEN", "VLLM_API_KEY", "BATON_API_KEY"):
        monkeypatch.setitem(os.environ, name, "hunter2-hunter2")
    for target in TARGETS.values():
        text = json.dumps(target(cluster(PD, SIM, secrets={"hf_token": "hub"})))
        assert "hunter2" not in text


# --- around them ------------------------------------------------------------------------------------


def test_policies_let_in_whom_pods_serve() -> None:
    found = rendered()
    workers = only(found, "NetworkPolicy", "workers")["spec"]
    orchestrators, metrics, peers = workers["ingress"]
    assert orchestrators["ports"] == [{"port": 8100, "protocol": "TCP"}]
    assert (
        orchestrators["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        == "orchestrator"
    )
    assert metrics["from"][0]["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "monitoring"
    }
    assert "ports" not in peers
    assert {"port": 53, "protocol": "UDP"} in workers["egress"][0]["ports"]
    own = only(found, "NetworkPolicy", "orchestrator")["spec"]
    assert own["ingress"][0] == {"ports": [{"port": 8000, "protocol": "TCP"}]}


def test_orchestrators_reach_workers_elsewhere() -> None:
    away = {"name": "away", "both": {"urls": ["http://10.0.0.1:8123"]}}
    found = rendered(
        PD,
        away,
        more={"orchestrator": {"insecure_no_auth": True, "tracing": {"endpoint": "http://otel:4318"}}},
    )
    ports = only(found, "NetworkPolicy", "orchestrator")["spec"]["egress"][-1]["ports"]
    assert {port["port"] for port in ports} == {443, 4318, 6443, 8123}


def test_workers_elsewhere_are_not_rendered() -> None:
    found = rendered({"name": "away", "both": {"urls": ["http://10.0.0.1:8123"]}})
    assert [one["metadata"]["name"] for one in found if one["kind"] == "Deployment"] == ["baton-orchestrator"]
    assert fits(config({"name": "away", "both": {"urls": ["http://10.0.0.1:8123"]}})) == []


def test_a_route_leads_from_the_gateway() -> None:
    found = rendered(
        gateway="infra/main", hostnames=["api.example.com"], orchestrator={"listen": "127.0.0.1:80"}
    )
    spec = only(found, "HTTPRoute")["spec"]
    assert spec["parentRefs"] == [{"name": "main", "namespace": "infra"}]
    assert spec["hostnames"] == ["api.example.com"]
    assert spec["rules"][0]["backendRefs"] == [{"name": "baton", "port": 80}]
    assert spec["rules"][0]["timeouts"] == {"request": "0s"}


def test_what_is_not_wanted_is_not_there() -> None:
    found = rendered(monitoring=False, network_policy=False)
    assert kinds(found).isdisjoint({"PodMonitor", "NetworkPolicy", "HTTPRoute", "ScaledObject"})


def test_two_objects_never_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.render.cluster.slug", lambda name, limit=24: "same")
    with pytest.raises(RenderError, match="rename one of the models"):
        objects(cluster(PD, {**PD, "name": "other"}))


def test_without_a_section_nothing_can_be_rendered() -> None:
    made = Config.model_validate({"models": [SIM]})
    with pytest.raises(RenderError, match=r"launch\.kubernetes is missing"):
        make_cluster(made)
