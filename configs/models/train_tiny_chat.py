"""Train `tiny-chat`, the model of the quickstart and of the tests, from `tiny-chat-data.yaml`.

    python configs/models/train_tiny_chat.py [DIRECTORY]

A Llama small enough for a git repository that answers the questions of the data file word for word under
greedy decoding, so that a wrong KV hand-off shows as a wrong answer. Seeded; a few minutes on two cores.
Exits with 1 and the wrong answers if one was not learned. Needs torch, transformers, tokenizers and PyYAML.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
DATA = HERE / "tiny-chat-data.yaml"
SEED = 1
STEPS = 450
LEARNING_RATE = 2e-3
VOCABULARY = 480
LONG = 150  # tokens; the questions about the passage are longer, all others shorter
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IGNORED = -100  # torch's label for a position that does not count in the loss

# ChatML. Content that is missing (an assistant's tool call) counts as empty.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Example:
    """A prompt as the engine sees it, the template applied, and the text that must follow, without EOS."""

    prompt: str
    answer: str


def main() -> int:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tiny-chat"
    torch.manual_seed(SEED)
    data = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(data)
    kinds = list(make_examples(data, tokenizer))
    model = train(new_model(len(tokenizer)), [batches(examples, tokenizer) for examples in kinds])
    save(model, tokenizer, directory)
    return report_wrong_answers(directory, [example for examples in kinds for example in examples])


def train_tokenizer(data: dict) -> PreTrainedTokenizerFast:
    """A byte-level BPE of our own: any text can be encoded, the data's words in few tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts_of(data), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def texts_of(data: dict) -> Iterator[str]:
    yield from ("system", "user", "assistant", data["system"], data["passage"])
    for entry in [*data["questions"], *data["about_passage"]]:
        yield f"Question: {entry['ask']}\nAnswer: {entry['answer']}"
        yield entry.get("before", "")


def make_examples(data: dict, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Example]]:
    """Every question as each kind of prompt, a list per kind."""
    system = {"role": "system", "content": data["system"]}
    asked = [*questions(data)]
    yield [chat_example(tokenizer, [], ask, answer) for ask, answer in asked]
    yield [completion_example(ask, answer) for ask, answer in asked]
    yield [chat_example(tokenizer, [system], ask, answer) for ask, answer in asked]


def questions(data: dict) -> Iterator[tuple[str, str]]:
    for entry in data["questions"]:
        yield entry["ask"], entry["answer"]
    for entry in data["about_passage"]:
        yield f"{entry['before']} {data['passage']} {entry['ask']}", entry["answer"]


def chat_example(tokenizer: PreTrainedTokenizerFast, before: list[dict], ask: str, answer: str) -> Example:
    messages = [*before, {"role": "user", "content": ask}]
    return Example(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), answer
    )


def completion_example(ask: str, answer: str) -> Example:
    return Example(f"Question: {ask}\nAnswer:", f" {answer}" if answer else "")


def new_model(vocabulary: int) -> LlamaForCausalLM:
    """1.9 million parameters. Heads of 64 because vLLM's CPU attention wants a size it has a kernel for."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=32768,  # long prompts are accepted; what is said about them is nonsense
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Batch:
    """Examples of similar length, padded on the right: ids and labels of shape (examples, tokens)."""

    ids: torch.Tensor
    labels: torch.Tensor


def batches(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> list[Batch]:
    """One training step: all of the examples, split so that little is padding."""
    encoded = [encode(example, tokenizer) for example in examples]
    short = [pair for pair in encoded if len(pair[0]) < LONG]
    long = [pair for pair in encoded if len(pair[0]) >= LONG]
    return [pad(group) for group in (short, long) if group]


def encode(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids and labels; only the answer and its EOS are learned."""
    prompt = tokenizer.encode(example.prompt, add_special_tokens=False)
    answer = [*tokenizer.encode(example.answer, add_special_tokens=False), tokenizer.eos_token_id]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def pad(encoded: list[tuple[list[int], list[int]]]) -> Batch:
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in encoded])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in encoded])
    return Batch(ids, labels)


def train(model: LlamaForCausalLM, kinds: list[list[Batch]]) -> LlamaForCausalLM:
    """A step sees every question, as one kind of prompt; the kinds take turns. Padding is on the right, where
    causal attention never looks back at it: no mask is needed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        loss = backward(model, kinds[step % len(kinds)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss:.5f}", flush=True)
    return model


def backward(model: LlamaForCausalLM, step: list[Batch]) -> float:
    """Leaves the gradient in the model and returns the loss, both a mean over the step's learned tokens."""
    learned = sum(int((batch.labels != IGNORED).sum()) for batch in step)
    total = 0.0
    for batch in step:
        logits = model(input_ids=batch.ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        (loss / learned).backward()
        total += loss.item()
    return total / learned


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """The directory as an engine wants it. No sampling defaults: clients that leave them out get OpenAI's."""
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    name_tokenizer_for_older_engines(directory / "tokenizer_config.json")


def name_tokenizer_for_older_engines(config: Path) -> None:
    """transformers 5 writes a class name of its own, which 4 does not know; both know the older one."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def report_wrong_answers(directory: Path, examples: list[Example]) -> int:
    """Asks the saved model, in bfloat16 as an engine runs it. 1 if an answer differs, else 0."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    wrong = 0
    for example in examples:
        answer = complete(model, tokenizer, example.prompt)
        if answer != example.answer:
            wrong += 1
            print(f"wrong: {example.prompt[-80:]!r} -> {answer!r}")
    print(f"{len(examples) - wrong} of {len(examples)} answers are exact")
    return 1 if wrong else 0


def complete(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=120)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())
