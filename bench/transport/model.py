"""A model for vLLM is made up that costs next to nothing to run, with a tokenizer as dense as a real one.

Its weights are random (`--load-format dummy`), so no file holds any and its words mean nothing; its tokenizer
is trained on such texts as the benchmark sends, which then have about five characters per token, as texts
have with the tokenizers of large models. Its vocabulary is filled up to a large model's size, for the sake of
prompts of token ids. One layer of one head: the engine is quick even for long prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.shared.bodies import prose

VOCABULARY = 128_000
TRAINED = 8192  # of these
CONTEXT = 1 << 20
END = "<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", END]
CORPUS_CHARACTERS = 400_000

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def write_model(folder: Path) -> None:
    """Write everything that vLLM reads of a model but the weights."""
    _write(folder / "tokenizer.json", _tokenizer())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": CONTEXT}
    _write(folder / "tokenizer_config.json", about)
    _write(folder / "config.json", CONFIG)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _tokenizer() -> dict[str, Any]:
    """Make a byte-level BPE, the same on every run."""
    document: dict[str, Any] = json.loads(_trained().to_str())
    document["model"]["vocab"] |= {f"<{token}>": token for token in range(TRAINED, VOCABULARY)}
    return document


def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose(Random(4), CORPUS_CHARACTERS)], trainer)
    return tokenizer


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")
