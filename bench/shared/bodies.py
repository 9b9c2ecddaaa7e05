"""A benchmark sends these bodies: the same bytes on every run."""

from __future__ import annotations

import json
from random import Random
from typing import Any

MODEL = "mock"
SYSTEM = {"role": "system", "content": "You are a helpful assistant who answers in one sentence."}
QUESTION = {"role": "user", "content": "What is the difference between prefill and decode?"}
# Mostly ASCII, as texts are.
SYLLABLES = [*("ba", "de", "fi", "lu", "mar", "nel", "os", "pri", "ras", "ten", "ur", "wi") * 30, "né", "köl"]


def encoded(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def small_chat(**more: Any) -> bytes:
    """Make a chat of about 250 bytes."""
    return encoded(
        {"model": MODEL, "messages": [SYSTEM, QUESTION], "max_tokens": 64, "temperature": 0, **more}
    )


def long_chat(messages: int = 100, characters: int = 2250) -> bytes:
    """Make a chat of about 230 KB, as a conversation is after fifty turns."""
    random = Random(1)
    roles = ["user", "assistant"]
    turns = [{"role": roles[i % 2], "content": prose(random, characters)} for i in range(messages)]
    return encoded({"model": MODEL, "messages": [SYSTEM, *turns], "max_tokens": 64, "temperature": 0})


def agentic_chat(turns: int = 160, tools: int = 40) -> bytes:
    """Make a chat of about 1 MB: tool definitions, calls with escaped JSON, and file contents as results."""
    random = Random(2)
    history = [message for turn in range(turns) for message in _tool_turn(random, turn)]
    definitions = [_tool(random, number) for number in range(tools)]
    chat = {"model": MODEL, "messages": [SYSTEM, QUESTION, *history], "tools": definitions}
    return encoded({**chat, "tool_choice": "auto", "max_tokens": 64, "temperature": 0})


def _tool_turn(random: Random, turn: int) -> list[dict[str, Any]]:
    arguments = encoded({"path": f"src/{text(random, 12)}.py", "range": [1, random.randrange(500)]}).decode()
    call = {"id": f"call_{turn}", "type": "function", "function": {"name": "tool_0", "arguments": arguments}}
    lines = "\n".join(f'\tprint("{text(random, 50)}")  # {number}' for number in range(80))
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": f"call_{turn}", "content": lines},
    ]


def _tool(random: Random, number: int) -> dict[str, Any]:
    properties = {text(random, 10): {"type": "string", "description": text(random, 120)} for _ in range(6)}
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:2]}
    function = {"name": f"tool_{number}", "description": text(random, 400), "parameters": parameters}
    return {"type": "function", "function": function}


def token_ids(count: int = 40_000, vocabulary: int = 128_000) -> bytes:
    """Make about 250 KB for /v1/completions."""
    random = Random(3)
    prompt = [random.randrange(vocabulary) for _ in range(count)]
    return encoded({"model": MODEL, "prompt": prompt, "max_tokens": 64, "temperature": 0})


def prose(random: Random, characters: int) -> str:
    """Write short paragraphs, with a quotation and an indented line in each: JSON escapes some of it."""
    paragraphs = (
        f'{text(random, 180)} "{text(random, 20)}" {text(random, 60)}:\n\n\t{text(random, 60)}\n'
        for _ in range(characters // 300 + 1)
    )
    return "\n".join(paragraphs)[:characters]


def text(random: Random, characters: int) -> str:
    """Write words of invented syllables, cut to a length."""
    enough = characters // 3 + 1  # the shortest word and its space are 3 characters
    words = ("".join(random.choices(SYLLABLES, k=random.randrange(1, 5))) for _ in range(enough))
    return " ".join(words)[:characters]
