"""Before anything is measured: is it there, is it OpenAI, which model, and how long are its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec

from launch.bench.client import Client, explain
from launch.bench.endpoint import KEY_VARIABLES
from launch.bench.errors import BenchError, WrongUsage
from launch.bench.prompts import Corpus, Prompts
from launch.bench.sample import Sample
from launch.bench.shapes import Workload
from orchestrator.errors import WorkerError

# What a request asks for beyond OpenAI's basics: answers of a fixed length (vLLM, SGLang, Baton), and the
# endpoint's own count of tokens. The first that is not refused is taken.
_OPTIONS: tuple[Mapping[str, Any], ...] = (
    {"stream_options": {"include_usage": True}, "ignore_eos": True},
    {"stream_options": {"include_usage": True}},
    {},
)
_REFUSED = ("http 400", "http 422")

# Two prompts, so that what the chat template adds to both does not count.
_FEW_WORDS, _MANY_WORDS = 8, 136
_USUAL_TOKENS_PER_WORD = 1.2  # where the endpoint does not count tokens
_LEAST_TOKENS_PER_WORD = 0.5  # less cannot be: what counts so would make prompts without end

_NAMES_SHOWN = 20  # gateways have hundreds

_LENGTH_MARGIN = 1.05  # prompts are cut by words, not by tokens


@dataclass(frozen=True, slots=True)
class Target:
    """A model of an endpoint, and how to ask it."""

    model: str
    longest: int | None  # tokens of prompt and answer that it takes; None: it does not say
    options: Mapping[str, Any]
    tokens_per_word: float

    @property
    def has_fixed_length(self) -> bool:
        """Answers are as long as asked for, not as the model likes."""
        return "ignore_eos" in self.options

    def takes(self, workload: Workload) -> bool:
        return self.longest is None or workload.longest * _LENGTH_MARGIN <= self.longest


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Listing(msgspec.Struct):
    data: list[_Card]


async def probe(client: Client, wanted: str | None, corpus: Corpus) -> Target:
    """Look at the endpoint with a few small requests. Raises `BenchError` with what is wrong with it.

    One corpus gives one answer, so that two benches with the same seed send prompts of the same length.
    """
    card = await _choose_model(client, wanted)
    for options in _OPTIONS:
        prompts = Prompts(corpus, card.id, options, 1.0, seed="", salt="")
        few = await client.ask(prompts.plain(_FEW_WORDS, answer=2))
        if few.error not in _REFUSED:
            break
    many = await client.ask(prompts.plain(_MANY_WORDS, answer=2))
    _check_answered(client, few)
    _check_answered(client, many)
    return Target(card.id, card.max_model_len, options, _tokens_per_word(few, many))


async def _choose_model(client: Client, wanted: str | None) -> _Card:
    """The model named, or the only one."""
    status, content = await _get_models(client)
    if status != 200 and wanted is not None:
        return _Card(wanted)  # not every gateway lists what it has
    cards = _cards(client, status, content)
    names = ", ".join([*islice(cards, _NAMES_SHOWN), *["..."] * (len(cards) > _NAMES_SHOWN)])
    if wanted is None and len(cards) > 1:
        raise WrongUsage(f"{client.endpoint.url} has several models, choose with --model: {names}")
    if wanted is not None and wanted not in cards:
        raise WrongUsage(f"{client.endpoint.url} has no model {wanted!r}; it has: {names}")
    return cards[wanted] if wanted is not None else next(iter(cards.values()))


async def _get_models(client: Client) -> tuple[int, bytes]:
    try:
        return await client.get("/models")
    except WorkerError as error:
        raise BenchError(f"{client.endpoint.url}: {explain(error)[1]}") from error
    except TimeoutError as error:
        raise BenchError(f"{client.endpoint.url}: no answer in time") from error


def _cards(client: Client, status: int, content: bytes) -> dict[str, _Card]:
    url = client.endpoint.url
    if status in (401, 403):
        raise BenchError(f"{url} answers {status}: is the key in {' or '.join(KEY_VARIABLES)} right?")
    if status != 200:
        raise BenchError(f"{url} is no OpenAI endpoint: it answers {status} to GET {url}/models")
    try:
        cards = msgspec.json.decode(content, type=_Listing).data
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BenchError(f"{url} is no OpenAI endpoint: its list of models is none") from error
    if not cards:
        raise BenchError(f"{url} has no model")
    return {card.id: card for card in cards}


def _check_answered(client: Client, sample: Sample) -> None:
    if sample.error is not None:
        said = f"{sample.error}: {sample.detail}" if sample.detail else sample.error
        raise BenchError(f"{client.endpoint.url}: a chat completion failed: {said}")


def _tokens_per_word(few: Sample, many: Sample) -> float:
    if few.usage is None or many.usage is None:
        return _USUAL_TOKENS_PER_WORD
    tokens = many.usage.prompt_tokens - few.usage.prompt_tokens
    return max(_LEAST_TOKENS_PER_WORD, tokens / (_MANY_WORDS - _FEW_WORDS))
