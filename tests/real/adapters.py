"""Adapters for the quickstart model, which change what it says: weights by chance, in PEFT's files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.real.conftest import MODEL

RANK = 8


def make_adapter(folder: Path, seed: int) -> Path:
    """Write a LoRA adapter of the attention's queries and values, and return its folder."""
    folder.mkdir()
    model = json.loads((MODEL / "config.json").read_text())
    heads = {"q_proj": model["num_attention_heads"], "v_proj": model["num_key_value_heads"]}
    random, tensors = np.random.default_rng(seed), {}
    for layer in range(model["num_hidden_layers"]):
        for name, count in heads.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = _weights(random, RANK, model["hidden_size"])
            tensors[f"{module}.lora_B.weight"] = _weights(random, count * model["head_dim"], RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": [*heads]}))
    return folder


def _weights(
    random: np.random.Generator, rows: int, columns: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return random.standard_normal((rows, columns), dtype=np.float32)
