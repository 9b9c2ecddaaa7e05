"""Options that contradict each other, and secrets in the file, are found before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.render.checks import kubernetes_findings
from orchestrator.config.checks import dotted
from orchestrator.config.options import Config
from tests.launch.render.clusters import PD, SIM, config

BIG = {**PD, "decode": {"gpus_per_replica": 13}}


def found(*models: Any, **given: Any) -> dict[str, str]:
    return {
        dotted(finding.path): finding.message for finding in kubernetes_findings(config(*models, **given))
    }


def test_a_config_without_the_section_is_not_looked_at() -> None:
    assert [*kubernetes_findings(Config.model_validate({"models": [SIM]}))] == []


@pytest.mark.parametrize(
    "more", [{}, {"gateway": "main"}, {"workload": "lws"}, {"workload": "disaggregatedset"}]
)
def test_nothing_is_wrong(more: dict[str, Any]) -> None:
    assert found(PD, SIM, **more) == {}


K = "launch.kubernetes"
CASES: list[tuple[str, str, list[Any], dict[str, Any]]] = [
    (K, "pods are open to other machines", [PD], {"orchestrator": {"insecure_no_auth": False}}),
    (
        f"{K}.gateway",
        "end TLS there",
        [PD],
        {"gateway": "g", "orchestrator": {"tls": {"cert": "c", "key": "k"}}},
    ),
    (f"{K}.hostnames", "no effect without gateway", [PD], {"hostnames": ["a.example"]}),
    (f"{K}.volumes.host_path", "not both", [PD], {"volumes": {"claim": "c", "host_path": "/c"}}),
    (f"{K}.volumes.size", "no effect", [PD], {"volumes": {"claim": "c", "size": "1Gi"}}),
    (f"{K}.autoscale", "nothing to scale", [PD], {"autoscale": "keda"}),
    (f"{K}.prometheus", "no effect without autoscale: keda", [PD], {"prometheus": "http://p:9090"}),
    (
        f"{K}.workload",
        "no model has prefill and decode",
        [{"name": "m", "both": {"engine": "sim"}}],
        {"workload": "disaggregatedset"},
    ),
    (f"{K}.models.qwem", "no model 'qwem'", [PD], {"models": {"qwem": "/m"}}),
    (f"{K}.worker_pod.env.HF_TOKEN", "holds a secret", [PD], {"worker_pod": {"env": {"HF_TOKEN": "x"}}}),
    (
        f"{K}.worker_pod.secret_env.A",
        "in env too",
        [PD],
        {"worker_pod": {"env": {"A": "x"}, "secret_env": {"A": "s/k"}}},
    ),
    (
        f"{K}.orchestrator_pod.env.HOME",
        "pods have one already",
        [PD],
        {"orchestrator_pod": {"env": {"HOME": "/x"}}},
    ),
    (
        "models.0.both.workers",
        "give replicas",
        [{"name": "m", "both": {"engine": "sim", "workers": [{"host": "10.0.0.1"}]}}],
        {},
    ),
    ("models.0.decode.env.MY_TOKEN", "holds a secret", [{**PD, "decode": {"env": {"MY_TOKEN": "x"}}}], {}),
    ("models.0.decode.env.URL", "holds a secret", [{**PD, "decode": {"env": {"URL": "http://u:p@h/"}}}], {}),
    ("models.0.decode.args.1", "holds a secret", [{**PD, "decode": {"args": ["--my-token", "abc"]}}], {}),
    (
        "models.0.decode.env.A",
        "secret_env too",
        [{**PD, "decode": {"env": {"A": "x"}}}],
        {"worker_pod": {"secret_env": {"A": "s/k"}}},
    ),
    ("models.0.decode.env.POD_IP", "have one already", [{**PD, "decode": {"env": {"POD_IP": "x"}}}], {}),
    (
        f"{K}.worker_pod.secret_env.HF_TOKEN",
        "secrets.hf_token already",
        [PD],
        {"secrets": {"hf_token": "hub"}, "worker_pod": {"secret_env": {"HF_TOKEN": "s/k"}}},
    ),
    ("models.0.prefill.engine", "plugin must be true", [SIM], {"plugin": False}),
    ("models.0.decode.gpus_per_replica", "cannot be divided", [BIG], {"gpus_per_pod": 5}),
    (
        "models.0.decode.gpus_per_replica",
        "data-parallel",
        [{**PD, "decode": {"gpus_per_replica": 16, "data_parallel_size": 2}}],
        {},
    ),
    (
        "models.0.both.discover.file",
        "no such file",
        [{"name": "m", "both": {"discover": {"file": "w.yaml"}}}],
        {},
    ),
    (
        "models.0.both.discover.kubernetes.namespace",
        "default only",
        [{"name": "m", "both": {"discover": {"kubernetes": {"service": "s", "namespace": "other"}}}}],
        {},
    ),
]


@pytest.mark.parametrize(("place", "words", "models", "given"), CASES, ids=[f"{c[0]}: {c[1]}" for c in CASES])
def test_a_mistake_is_found(place: str, words: str, models: list[Any], given: dict[str, Any]) -> None:
    problems = found(*models, **given)
    assert words in problems[place]


def test_a_folder_of_this_machine_is_not_in_pods(tmp_path: Path) -> None:
    model = {**PD, "path": str(tmp_path)}
    assert "pods cannot load" in found(model)["models.0.path"]
    assert found(model, models={"qwen": "/cache/qwen"}) == {}


def test_hpa_asks_only_for_names_that_are_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.render.checks.replicas", lambda pool: (1, 2))
    assert found(PD, autoscale="hpa") == {}
    assert "use keda" in found({**PD, "name": "org/m"}, autoscale="hpa")[f"{K}.autoscale"]
    assert found({**PD, "name": "org/m"}, autoscale="keda") == {}


BAD: list[dict[str, Any]] = [
    *({"name": name} for name in ("", "Upper", "1a", "a_b", "thirteen-long", "a-", "ö")),
    *({"namespace": name} for name in ("", "A", "a.b", "-a", "x" * 64)),
    *({"image": image} for image in ("", "a b", "-x", "a\nb")),
    *({"gateway": name} for name in ("a/b/c", "/a", "a/", "A")),
    *({"prometheus": url} for url in ("prometheus:9090", "http://u:p@h:1", "http://h/?q")),
    *({"volumes": {"shm": size}} for size in ("", "-1", "1gb", "Gi", "1 Gi")),
    *({"worker_pod": {"cpu": cpu}} for cpu in (True, "x", -1)),
    {"worker_pod": {"env": {"A B": "x"}}},
    {"worker_pod": {"secret_env": {"A": "hunter2"}}},
    {"worker_pod": {"node_selector": {"a": "b c"}}},
    {"worker_pod": {"resources": {"rdma/hca/x": 1}}},
    {"volumes": {"host_path": "relative"}},
    {"volumes": {"host_path": "/a/../b"}},
    {"models": {"qwen": "./here"}},
    {"models": {"qwen": ""}},
    {"secrets": {"worker_key": "A"}},
    {"hostnames": ["https://a.example"]},
    {"hostnames": [f"{number}.example" for number in range(17)]},
    {"orchestrators": 0},
    {"gpus_per_pod": 0},
    {"workload": "statefulset"},
    {"gpu_resource": "nvidia.com/"},
    {"unknown": 1},
]


@pytest.mark.parametrize("given", BAD, ids=str)
def test_bad_values_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"kubernetes"):
        config(**given)


def test_what_is_in_a_secret_is_never_shown() -> None:
    with pytest.raises(ValueError, match="SECRET/KEY") as refused:
        config(worker_pod={"secret_env": {"A": "hunter2"}})
    assert "hunter2" not in str(refused.value.errors(include_input=False))  # type: ignore[attr-defined]
