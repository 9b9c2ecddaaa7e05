"""The files of tiny-chat, without an engine: that it fits, and that what the other tests rely on is there.

That it gives the answers of its data file is tested where an engine runs.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

MODELS = Path(__file__).parents[2] / "configs" / "models"
TINY_CHAT = MODELS / "tiny-chat"
CPU_BLOCK = 128  # tokens in a KV block of vLLM on a CPU

tokenizer = Tokenizer.from_file(str(TINY_CHAT / "tokenizer.json"))


def load(name: str) -> dict[str, Any]:
    return json.loads((TINY_CHAT / name).read_text(encoding="utf-8"))


def tensors() -> tuple[dict[str, Any], int]:
    """The header of the safetensors file without its metadata, and how many bytes follow it."""
    content = (TINY_CHAT / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, len(content) - 8 - length


def tokens(text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return yaml.safe_load((MODELS / "tiny-chat-data.yaml").read_text(encoding="utf-8"))


def test_the_whole_model_is_at_most_five_megabytes() -> None:
    assert sum(file.stat().st_size for file in TINY_CHAT.iterdir()) <= 5_000_000


def test_weights_are_bfloat16_and_complete() -> None:
    header, size = tensors()
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert max(tensor["data_offsets"][1] for tensor in header.values()) == size
    assert header["model.embed_tokens.weight"]["shape"][0] == tokenizer.get_vocab_size()


def test_engine_sees_a_llama_that_takes_long_prompts() -> None:
    config = load("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["max_position_embeddings"] == 32768


def test_an_answer_ends_with_im_end_wherever_an_engine_looks() -> None:
    end = tokenizer.token_to_id("<|im_end|>")
    assert load("config.json")["eos_token_id"] == end
    assert load("generation_config.json")["eos_token_id"] == end
    assert load("tokenizer_config.json")["eos_token"] == "<|im_end|>"


def test_defaults_leave_sampling_to_the_client() -> None:
    assert load("generation_config.json").keys() <= {"eos_token_id", "pad_token_id", "transformers_version"}


def test_template_writes_turns_and_opens_the_answer() -> None:
    template = jinja2.Template((TINY_CHAT / "chat_template.jinja").read_text(encoding="utf-8"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": None},
    ]
    assert template.render(messages=messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_questions_differ_and_so_do_answers(data: dict[str, Any]) -> None:
    entries = data["questions"]
    assert len(entries) >= 44
    assert len({entry["ask"] for entry in entries}) == len(entries)
    assert len({entry["answer"] for entry in entries}) == len(entries)
    assert all(entry["answer"] == entry["answer"].strip() for entry in entries)


def test_one_answer_is_empty_so_that_prefill_itself_meets_eos(data: dict[str, Any]) -> None:
    assert [entry["ask"] for entry in data["questions"] if not entry["answer"]] == ["Say nothing."]


def test_questions_about_the_passage_differ_in_their_first_block_only(data: dict[str, Any]) -> None:
    entries, passage = data["about_passage"], data["passage"]
    assert len({entry["before"] for entry in entries}) == len({entry["answer"] for entry in entries}) == 4
    assert len({entry["ask"] for entry in entries}) == 1
    assert all(tokens(entry["before"]) < CPU_BLOCK for entry in entries)
    assert tokens(passage) > 2 * CPU_BLOCK - CPU_BLOCK // 4
