"""What an SDK raises. This runs in the environment of the SDK, so it imports nothing of the project.

python raising.py SDK < CASES       # CASES: JSON, [[URL, IS_STREAM], ...]; prints a JSON list of names
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

Ask = Callable[[str, bool], object]  # a URL and whether to stream: it raises what the SDK does
SAID: list[dict[str, str]] = [{"role": "user", "content": "Hello"}]
THREADS = 40  # all cases at once: most of the time they wait to try again


def ask_openai(url: str, stream: bool) -> None:
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        create: Any = client.chat.completions.create
        answer = create(model="m", messages=SAID, stream=stream)
        list(answer if stream else ())


def ask_anthropic(url: str, stream: bool) -> None:
    import anthropic

    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        create: Any = client.messages.create
        answer = create(model="m", max_tokens=5, messages=SAID, stream=stream)
        list(answer if stream else ())


def ask_langchain(url: str, stream: bool) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="m")
    list(model.stream("Hello")) if stream else model.invoke("Hello")


def ask_litellm(url: str, stream: bool) -> None:
    import litellm

    asked = {"model": "hosted_vllm/m", "messages": SAID, "api_base": f"{url}/v1", "api_key": "none"}
    answer = litellm.completion(**asked, stream=stream)
    list(answer if stream else ())


SDKS: dict[str, Ask] = {
    "openai": ask_openai,
    "anthropic": ask_anthropic,
    "langchain-openai": ask_langchain,
    "litellm": ask_litellm,
}


def raised(sdk: str, cases: Sequence[tuple[str, bool]]) -> list[str]:
    """Return the names of the classes that it raises for each case."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(partial(_raised, SDKS[sdk]), *zip(*cases, strict=True)))


def _raised(ask: Ask, url: str, stream: bool) -> str:
    try:
        ask(url, stream)
    except Exception as error:
        return type(error).__name__
    return "nothing"


if __name__ == "__main__":
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch its prices otherwise
    print(json.dumps(raised(sys.argv[1], json.load(sys.stdin))))
