"""A conversation that an SDK has with a server. This runs in the SDK's environment, and imports nothing else.

    python asking.py SDK URL MODEL QUESTION ANSWER      # the model must answer so; an exception tells if not

It prints what was asked, in one line.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

CLIENTS = 8
SHAPE: dict[str, Any] = {
    "type": "object",
    "properties": {"is_right": {"type": "boolean"}},
    "required": ["is_right"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Site:
    url: str
    model: str
    question: str
    answer: str

    @property
    def messages(self) -> Any:
        return [{"role": "user", "content": self.question}]

    def is_answered(self, text: object) -> None:
        same(text, self.answer)


def same(found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"{found!r} in place of {expected!r}")


# --- OpenAI -------------------------------------------------------------------------------------


def ask_openai(site: Site) -> str:
    import openai

    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="none") as client:
        _models(client, site)
        _chats(client, site)
        _usage(client, site)
        _responses(client, site)
    asyncio.run(_at_once(site))
    return "models, chat, stream, tools, schema, completion, responses, usage, asyncio"


def _models(client: Any, site: Site) -> None:
    """`vllm bench serve` reads `root`."""
    (model,) = client.models.list().data
    same((model.id, model.parent, model.permission[0]["object"]), (site.model, None, "model_permission"))
    same((os.path.isdir(model.root), type(model.max_model_len)), (True, int))
    same(client.models.retrieve(site.model), model)


def _chats(client: Any, site: Site) -> None:
    chat: Any = client.chat.completions
    asked: Any = {"model": site.model, "messages": site.messages, "temperature": 0}
    whole = chat.create(**asked)
    site.is_answered(whole.choices[0].message.content)
    chunks = list(chat.create(**asked, stream=True))
    site.is_answered("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    same(chunks[-1].system_fingerprint, whole.system_fingerprint)
    same((bool(whole.system_fingerprint), chunks[-1].usage), (True, None))
    with chat.stream(**asked, stream_options={"include_usage": True}) as stream:
        last = stream.get_final_completion()
    same(last.usage.completion_tokens, whole.usage.completion_tokens)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SHAPE}}]
    site.is_answered(chat.create(**asked, tools=tools).choices[0].message.content)
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SHAPE, "strict": True}}
    chat.create(**asked, response_format=form, max_tokens=30)
    prompt = f"Question: {site.question}\nAnswer:"
    done = client.completions.create(model=site.model, prompt=prompt, temperature=0, max_tokens=80, stop="\n")
    site.is_answered(done.choices[0].text.strip())


def _usage(client: Any, site: Site) -> None:
    """What was found in the prefix cache, and what was added to it, are the prefill worker's."""
    asked: Any = {
        "model": site.model,
        "messages": [{"role": "user", "content": uuid4().hex + " and so on" * 60}],
        "max_tokens": 3,
    }
    first = client.chat.completions.create(**asked).usage.prompt_tokens_details
    same((first.cached_tokens, first.created_cache_tokens > 0), (0, True))
    found = {"cached": first.created_cache_tokens, "created": 0}
    same(_cached(client.chat.completions.create(**asked)), found)
    *_, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    same(_cached(last), found)


def _cached(answer: Any) -> dict[str, int]:
    """Return how many tokens were found in the prefix cache, and how many were added to it."""
    details = answer.usage.prompt_tokens_details
    return {"cached": details.cached_tokens, "created": details.created_cache_tokens}


def _responses(client: Any, site: Site) -> None:
    asked: Any = {"model": site.model, "input": site.question, "temperature": 0}
    site.is_answered(client.responses.create(**asked).output_text)
    with client.responses.stream(**asked) as stream:
        site.is_answered(stream.get_final_response().output_text)


async def _at_once(site: Site) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none") as client:
        create = client.chat.completions.create
        asked: Any = {"model": site.model, "messages": site.messages, "temperature": 0}
        for answer in await asyncio.gather(*(create(**asked) for _ in range(CLIENTS))):
            site.is_answered(answer.choices[0].message.content)
        stream: Any = await create(**asked, stream=True)
        await anext(aiter(stream))
        await stream.close()


# --- the others ---------------------------------------------------------------------------------


def ask_anthropic(site: Site) -> str:
    import anthropic

    with anthropic.Anthropic(base_url=site.url, api_key="none") as client:
        asked: Any = {
            "model": site.model,
            "messages": site.messages,
            "max_tokens": 80,
            "extra_body": {"temperature": 0},
        }
        block: Any = client.messages.create(**asked).content[0]
        site.is_answered(block.text)
        with client.messages.stream(**asked) as stream:
            site.is_answered("".join(stream.text_stream))
        counted = client.messages.count_tokens(model=site.model, messages=site.messages)
        same(counted.input_tokens > 0, True)
    return "message, stream, count_tokens"


def ask_langchain(site: Site) -> str:
    from langchain_openai import ChatOpenAI

    options: Any = {"base_url": f"{site.url}/v1", "api_key": "none", "model": site.model, "temperature": 0}
    model = ChatOpenAI(**options)
    site.is_answered(model.invoke(site.question).content)
    chunks = list(model.stream(site.question))
    site.is_answered("".join(chunk.content for chunk in chunks))
    for answer in model.batch([site.question] * CLIENTS):
        site.is_answered(answer.content)
    tool = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SHAPE}}
    site.is_answered(model.bind_tools([tool]).invoke(site.question).content)
    shape = SHAPE | {"title": "verdict", "description": "a verdict"}
    same(set(model.with_structured_output(shape, method="json_schema").invoke(site.question)), {"is_right"})
    (block,) = ChatOpenAI(**options, use_responses_api=True).invoke(site.question).content
    site.is_answered(block["text"])
    return "invoke, stream, batch, tools, schema, responses"


def ask_litellm(site: Site) -> str:
    import litellm

    called = {"api_base": f"{site.url}/v1", "api_key": "none", "model": f"hosted_vllm/{site.model}"}
    asked: Any = {**called, "messages": site.messages, "temperature": 0}
    site.is_answered(litellm.completion(**asked).choices[0].message.content)
    chunks = litellm.completion(**asked, stream=True)
    site.is_answered("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    answer = litellm.responses(
        **called | {"model": f"openai/{site.model}"}, input=site.question, temperature=0
    )
    site.is_answered(answer.output[0].content[0].text)
    message = asyncio.run(litellm.anthropic.messages.acreate(**asked, max_tokens=80))
    site.is_answered(message["content"][0]["text"])
    return "completion, stream, responses, messages"


SDKS: dict[str, Callable[[Site], str]] = {
    "openai": ask_openai,
    "anthropic": ask_anthropic,
    "langchain-openai": ask_langchain,
    "litellm": ask_litellm,
}


def main(argv: Sequence[str]) -> None:
    sdk, *site = argv
    print(SDKS[sdk](Site(*site)))


if __name__ == "__main__":
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch its prices otherwise
    main(sys.argv[1:])
