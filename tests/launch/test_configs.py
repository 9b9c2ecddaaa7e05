"""Every config that is shipped loads and is planned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.plan import Plan, make_plan
from launch.surroundings import look_around
from orchestrator.config.file import load_config

CONFIGS = Path(__file__).parents[2] / "configs"

# What `up` starts on a machine that is none of those in the file.
STARTED = {
    "quickstart": ["tiny-chat/prefill/0", "tiny-chat/decode/0", "orchestrator"],
    "sim": ["sim/prefill/0", "sim/prefill/1", "sim/decode/0", "sim/decode/1", "orchestrator"],
    "embeddings": ["tiny-embed/both/0", "sim/prefill/0", "sim/decode/0", "orchestrator"],
    "gpu-one-card": ["qwen/prefill/0", "qwen/decode/0", "orchestrator"],
    "gpu-1p1d": ["qwen/prefill/0", "qwen/decode/0", "orchestrator"],
    "multi-node": ["orchestrator"],
    "kubernetes": ["qwen/prefill/0", "qwen/prefill/1", "qwen/decode/0", "qwen/decode/1", "orchestrator"],
}


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files are found from anywhere; and the GPUs are those of the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def plan_of(name: str, overrides: Sequence[str] = ()) -> Plan:
    path = str(CONFIGS / f"{name}.yaml")
    return make_plan(load_config(path, overrides), path, overrides, look_around())


def test_none_is_left_out() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(STARTED)


@pytest.mark.parametrize("name", STARTED)
def test_each_is_planned(name: str) -> None:
    assert [spec.name for spec in plan_of(name).processes] == STARTED[name]


def test_quickstart_runs_the_real_engine_on_the_cpu() -> None:
    prefill, decode = plan_of("quickstart").workers
    for spec in (prefill, decode):
        assert "vllm.entrypoints.openai.api_server" in spec.argv
        assert "--enforce-eager" in spec.argv
        assert str(CONFIGS / "models" / "tiny-chat") in spec.argv
        assert spec.env["HF_HUB_OFFLINE"] == "1"


def test_quickstart_takes_a_model_of_the_hub_with_one_line() -> None:
    prefill, _ = plan_of("quickstart", ["models.0.path=Qwen/Qwen3-0.6B"]).workers
    assert "Qwen/Qwen3-0.6B" in prefill.argv
    assert "HF_HUB_OFFLINE" not in prefill.env


def test_one_card_is_shared_and_two_are_not() -> None:
    assert [spec.gpus for spec in plan_of("gpu-one-card").workers] == [(0,), (0,)]
    assert [spec.gpus for spec in plan_of("gpu-1p1d").workers] == [(0,), (1,)]


def test_multi_node_names_what_is_elsewhere() -> None:
    assert plan_of("multi-node").elsewhere == ("qwen/prefill/0", "qwen/decode/0", "qwen/decode/1")
