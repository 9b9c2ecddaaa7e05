"""Requests come as vLLM's OpenAI endpoints take them; they are checked, tokenized and turned into a `Job`."""

from __future__ import annotations

import functools
import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

import msgspec

from orchestrator.wire.lax import bool_of, int_of
from worker.sim import text
from worker.sim.handoffs import push
from worker.sim.runs import Prompt
from worker.sim.settings import Settings
from worker.token_ids import IDS_KEY, PLACE

_DEFAULT_COMPLETION_TOKENS = 16
_GREEDY_BELOW = 1e-5
_MAX_CHOICES = 16384  # vLLM's limits
_MAX_LOGPROBS = 20

_MISSING_FIELD = re.compile("Object missing required field `(.*)`")


def random_id() -> str:
    return uuid.uuid4().hex[:16]


class Refused(Exception):
    """The request cannot be served. The defaults are those of a request whose meaning is wrong."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message.encode("utf-8", "replace").decode()  # it may quote lone surrogates
        self.status = status
        self.kind = kind
        self.param = param


class Malformed(Refused):
    """The body is not of the endpoint's type; it was not even looked at."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(f"1 validation error:\n  {message}", kind="Bad Request", param=param)


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class _Sampled(msgspec.Struct, kw_only=True):
    """Tokens are drawn as these fields say."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    use_beam_search: bool = False


class _Request(_Sampled, kw_only=True):
    """Chat and completions share this. Unknown fields are ignored. `NUMBERS` cannot be spelt as texts."""

    NUMBERS: ClassVar[tuple[str, ...]] = ()

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int | None = 1
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    return_token_ids: bool | None = None
    prompt_logprobs: int | None = None
    cache_salt: str | None = None
    request_id: str = msgspec.field(default_factory=random_id)
    echo: bool | None = False
    kv_transfer_params: dict[str, Any] | None = None


class ChatRequest(_Request, kw_only=True):
    NUMBERS: ClassVar[tuple[str, ...]] = ("prompt_logprobs", "top_logprobs")

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    add_generation_prompt: bool = True


class CompletionRequest(_Request, kw_only=True):
    NUMBERS: ClassVar[tuple[str, ...]] = ("prompt_logprobs", "logprobs")

    n: int = 1
    prompt: str | list[str | int | list[int]] | None = None
    logprobs: int | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = False
    add_generation_prompt: bool = True


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[Annotated[int, msgspec.Meta(ge=0)]]
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """It decides, together with the digest, every token of an answer."""

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stops: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    keeps_stop: bool = False
    seed: str | None = None  # None: greedy
    is_beam: bool = False

    def variant(self, index: int) -> bytes:
        """It names the sample. Greedy answers are all the same one."""
        if self.is_beam:
            return f"beam {index}".encode() if index else b""
        return b"" if self.seed is None else f"{self.seed} {index}".encode()


@dataclass(frozen=True, slots=True)
class Job:
    """This is a request that can be served."""

    request_id: str  # as in the answer
    model: str
    is_chat: bool
    is_stream: bool
    prompts: list[Prompt]
    prompt_texts: list[str]
    sampling: Sampling
    choices: int  # per prompt
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None  # alternatives per token; None: none wanted
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    echo: bool = False
    generates: bool = True  # false: `echo` with `max_tokens` 0
    tokenized: int = 0  # prompts that came as text
    asked: Any = None  # the request of an API that answers with more of it


_Any = TypeVar("_Any", bound=msgspec.Struct)


def parse(body: object, kind: type[_Any]) -> _Any:
    """Read a request. Raises `Malformed`."""
    if isinstance(body, dict) and (
        texts := [name for name in _numbers(kind) if isinstance(body.get(name), str)]
    ):
        raise Malformed(f"`{texts[0]}` must be an integer.", param=texts[0])
    try:
        return msgspec.convert(_plain(body, kind), kind, strict=False)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        missing = _MISSING_FIELD.match(message)
        path = path.rstrip("`")
        if missing and not path and isinstance(body, dict):
            added: frozenset[str] = getattr(kind, "ADDED", frozenset())
            message = _missing(f"body.{missing[1]}", len(added.union(body)))
        path += f".{missing[1]}" if missing else ""
        raise Malformed(message, param="body" + path) from error


def _missing(place: str, count: int) -> str:
    counted = f"<dict of {count} items>"
    return str({"type": "missing", "loc": place, "msg": "Field required", "input": counted})


def _numbers(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    return kind.NUMBERS if issubclass(kind, _Request) else ()


def _plain(body: object, kind: type[msgspec.Struct]) -> object:
    """Return a request with its switches and numbers as such, however pydantic lets them be spelt."""
    if not isinstance(body, dict):
        return body
    readers = _readers(kind)
    return {name: _read(value, readers.get(name)) for name, value in body.items()}


def _read(value: object, read: Callable[[object], object] | None) -> object:
    try:
        return value if read is None or value is None else read(value)
    except ValueError:
        return value  # for msgspec to refuse


@functools.cache
def _readers(kind: type[msgspec.Struct]) -> dict[str, Callable[[object], object]]:
    hints = get_type_hints(kind)
    return {name: _OF_TYPES[hint] for name, hint in hints.items() if hint in _OF_TYPES}


_OF_TYPES: dict[Any, Callable[[object], object]] = {
    bool: bool_of,
    bool | None: bool_of,
    float | None: lambda value: float(value) if isinstance(value, bool) else value,
    int: int_of,
    int | None: int_of,
    StreamOptions | None: lambda value: _plain(value, StreamOptions),
}


def chat_job(request: ChatRequest, settings: Settings, header_id: str | None) -> Job:
    """Make the job of a chat. Raises `Refused`, and `Malformed` for messages that are not messages."""
    check_model(request.model, settings)
    messages = [_rendered(index, message) for index, message in enumerate(request.messages)]
    given = _given_ids(request, settings)
    tokens = _tokenized_chat(request, messages) if given is None else given
    if request.max_completion_tokens is not None:
        request.max_tokens = request.max_completion_tokens
    if request.tools == []:
        raise _wrong("`tools` must not be an empty array.", "tools")
    if request.top_logprobs and not request.logprobs:
        raise _wrong("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    answer_id = f"chatcmpl-{request.request_id if header_id is None else header_id}"
    echoed = messages[-1][1] if messages and messages[-1][0] == "assistant" else ""
    job = _job(request, settings, answer_id, [tokens], [echoed], logprobs, is_chat=True)
    return replace(job, tokenized=int(given is None))


def renamed(job: Job, name: str, asked: object) -> Job:
    """Return the job of another API that is served as a chat; requests are told apart by `name`."""
    prompts = [replace(prompt, request_id=f"{name}_0-{uuid.uuid4().hex[:8]}") for prompt in job.prompts]
    return replace(job, request_id=name, prompts=prompts, asked=asked)


def prioritized(job: Job, priority: int) -> Job:
    """Return the job with a priority for the engine's queue."""
    return replace(job, prompts=[replace(prompt, priority=priority) for prompt in job.prompts])


def chat_tokens(request: ChatRequest) -> list[int]:
    """Return the prompt of a chat. Raises `Refused`."""
    return _tokenized_chat(request, [_rendered(*each) for each in enumerate(request.messages)])


def completion_job(request: CompletionRequest, settings: Settings, header_id: str | None) -> Job:
    """Make the job of a completion. Raises `Refused`, and `Malformed` for a prompt of mixed types."""
    if not request.prompt and request.prompt != []:
        raise _wrong("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    prompts = prompts_of(request.prompt, "prompt")
    check_model(request.model, settings)
    if request.use_beam_search and request.stream:
        raise Refused("Streaming is not currently supported with beam search")
    if not prompts:
        raise Refused("You must pass at least one prompt")
    tokens = [text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    texts = [_prompt_text(prompt) if request.echo else "" for prompt in prompts]
    if request.max_tokens is None:
        request.max_tokens = _DEFAULT_COMPLETION_TOKENS
    answer_id = f"cmpl-{request.request_id if header_id is None else header_id}"
    job = _job(request, settings, answer_id, tokens, texts, request.logprobs, is_chat=False)
    return replace(job, tokenized=sum(isinstance(prompt, str) for prompt in prompts))


def tokens_to_count(request: TokenizeRequest, settings: Settings) -> list[int]:
    check_model(request.model, settings)
    if request.messages is not None:
        messages = [_rendered(index, message) for index, message in enumerate(request.messages)]
        return text.encode(text.render_chat(messages, add_generation_prompt=request.add_generation_prompt))
    if request.prompt is None:
        raise Malformed("Object missing required field `prompt`", param="body.prompt")
    return text.encode(request.prompt)


def tokens_to_text(request: DetokenizeRequest, settings: Settings) -> str:
    check_model(request.model, settings)
    return text.decode(request.tokens)


def _job(
    request: ChatRequest | CompletionRequest,
    settings: Settings,
    answer_id: str,
    tokens: list[list[int]],
    texts: list[str],
    logprobs: int | None,
    *,
    is_chat: bool,
) -> Job:
    _check_options(request)
    _check_logprobs(logprobs, "logprobs")
    _check_logprobs(request.prompt_logprobs, "prompt_logprobs")
    for prompt in tokens:
        check_prompt(prompt, settings)
    choices = 1 if request.n is None else request.n
    generates = not (request.echo and request.max_tokens == 0 and not is_chat)
    sampling = _sampling(request, settings, max(map(len, tokens)), generates=generates)
    if choices > 1 and sampling.seed is None and not sampling.is_beam:
        raise Refused(f"n must be 1 when using greedy sampling, got {choices}.")
    options = request.stream_options or StreamOptions()
    kv = None if request.use_beam_search else request.kv_transfer_params  # beam search drops the hand-off
    _check_handoff(kv, len(tokens))
    prompts = [
        Prompt(
            request_id=f"{answer_id}{'' if is_chat else f'-{index}'}-{uuid.uuid4().hex[:8]}",
            tokens=prompt,
            sequences=choices,
            salt=_salt(request, settings),
            kv=kv,
            reads_cache=request.prompt_logprobs is None,
        )
        for index, prompt in enumerate(tokens)
    ]
    return Job(
        request_id=answer_id,
        model=request.model or settings.model_name,
        is_chat=is_chat,
        is_stream=bool(request.stream),
        prompts=prompts,
        prompt_texts=texts,
        sampling=sampling,
        choices=choices,
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        return_token_ids=bool(request.return_token_ids),
        echo=bool(request.echo),
        generates=generates,
    )


def _sampling(
    request: ChatRequest | CompletionRequest, settings: Settings, prompt_tokens: int, *, generates: bool
) -> Sampling:
    max_tokens = _max_tokens(request.max_tokens, settings, prompt_tokens) if generates else 1
    if request.min_tokens > max_tokens:
        raise Refused(
            f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {request.min_tokens}."
        )
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    temperature = 1.0 if request.temperature is None else request.temperature
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        stops=tuple(stops),
        stop_ids=frozenset(request.stop_token_ids or ()),
        keeps_stop=request.include_stop_str_in_output,
        seed=None if temperature < _GREEDY_BELOW else str(request.seed),
        is_beam=request.use_beam_search,
    )


def _max_tokens(asked: int | None, settings: Settings, prompt_tokens: int) -> int:
    room = settings.context_tokens - prompt_tokens
    if asked is not None and asked > settings.context_tokens:
        raise _wrong(
            f"max_tokens={asked} cannot be greater than max_model_len={settings.context_tokens}. "
            "Please request fewer output tokens.",
            "max_tokens",
            asked,
        )
    tokens = room if asked is None else min(asked, room)
    if tokens < 1:
        raise _wrong(f"max_tokens must be at least 1, got {tokens}.", "max_tokens", tokens)
    return tokens


def _salt(request: _Request, settings: Settings) -> str:
    """Return what tells prompts apart that share no cache: those for another adapter do not."""
    salt = request.cache_salt or ""
    return f"{request.model}\0{salt}" if request.model in settings.adapters else salt


def check_model(model: str | None, settings: Settings) -> None:
    if model and model != settings.model_name and model not in settings.adapters:
        raise Refused(
            f"The model `{model}` does not exist. Valid aliases: {settings.model_name}.",
            status=404,
            kind="NotFoundError",
            param="model",
        )


def _check_options(request: ChatRequest | CompletionRequest) -> None:
    if request.stream_options and not request.stream:
        raise _wrong("Stream options can only be defined when `stream=True`.", "stream_options")
    if request.prompt_logprobs and request.stream:
        raise _wrong("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if request.n is not None and not 1 <= request.n <= _MAX_CHOICES:
        bound = "at least 1" if request.n < 1 else f"at most {_MAX_CHOICES}"
        raise Refused(f"n must be {bound}, got {request.n}.")
    if "" in ([request.stop] if isinstance(request.stop, str) else request.stop or ()):
        raise Refused("stop cannot contain an empty string.")
    for name, (is_right, rule) in _KNOBS.items():
        value = getattr(request, name)
        if value is not None and not is_right(value):
            raise _wrong(f"{name} must be {rule}, got {value}.", name, value)


_KNOBS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "non-negative"),
    "top_p": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "top_k": (lambda value: value >= -1, "0 (disable), or at least 1"),
    "min_p": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "in [-2, 2]"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "in [-2, 2]"),
    "repetition_penalty": (lambda value: value > 0, "greater than zero"),
    "min_tokens": (lambda value: value >= 0, "greater than or equal to 0"),
}


def _check_logprobs(asked: int | None, parameter: str) -> None:
    if asked is not None and asked < -1:
        raise _wrong(f"`{parameter}` must be a positive value or -1.", parameter, asked)
    if asked is not None and asked > _MAX_LOGPROBS:
        message = f"Requested {parameter} of {asked}, which is greater than max allowed: {_MAX_LOGPROBS}"
        raise _wrong(message, parameter, asked)


def _check_handoff(kv: dict[str, Any] | None, prompts: int) -> None:
    """Check the hand-off of a push only. (vLLM does not look at those of a pull before it pulls.)"""
    try:
        if kv is not None and push.is_push(kv):
            push.check(kv, prompts)
    except push.BadPush as error:
        raise _wrong(str(error), "kv_transfer_params") from error


def check_prompt(tokens: Sequence[int], settings: Settings) -> None:
    if not tokens:
        raise Refused("The decoder prompt cannot be empty")
    if len(tokens) > settings.context_tokens:
        raise _wrong(
            f"This model's maximum context length is {settings.context_tokens} tokens. However, your prompt "
            f"contains {len(tokens)} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt.",
            "input_tokens",
            len(tokens),
        )
    for token in (min(tokens), max(tokens)):
        if not 0 <= token < text.VOCAB_SIZE:
            raise Refused(f"Token id {token} is out of vocabulary")


def prompts_of(given: str | list[str | int | list[int]], field: str) -> list[str | list[int]]:
    """Read a prompt in any of the forms: text, token ids, a list of either. Raises `Malformed` for mixed
    ones.
    """
    if isinstance(given, str):
        return [given]
    kinds = {type(part) for part in given}
    if len(kinds) > 1:
        raise Malformed("Prompts of several types", param=f"body.{field}")
    if kinds == {int}:
        return [given]  # type: ignore[list-item]  # msgspec has no union of two list types
    return list(given)  # type: ignore[arg-type]


def _prompt_text(prompt: str | list[int]) -> str:
    return text.decode(text.encode(prompt) if isinstance(prompt, str) else prompt)


def _rendered(index: int, message: dict[str, Any]) -> tuple[str, str]:
    """Return a message as (role, content): text as it is, all else as JSON, so that the digest covers it."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise Malformed("Field required", param=f"body.messages.{index}.role")
    if content is not None and not isinstance(content, str | list):
        raise Malformed("Input should be a valid string", param=f"body.messages.{index}.content")
    parts = content if isinstance(content, list) else [content or ""]
    rest = {key: message[key] for key in message.keys() - {"role", "content"} if message[key] is not None}
    return role, "".join(map(_part_text, parts)) + (_dump(rest) if rest else "")


def _tokenized_chat(request: ChatRequest, messages: list[tuple[str, str]]) -> list[int]:
    if not messages:
        raise Refused("Cannot apply chat template to an empty conversation. Provide at least one message.")
    tools = [("tools", _dump(request.tools))] if request.tools else []
    rendered = text.render_chat(tools + messages, add_generation_prompt=request.add_generation_prompt)
    return text.encode(rendered)


def _given_ids(request: ChatRequest, settings: Settings) -> list[int] | None:
    """Return the prompt as the prefill worker tokenized it. As in vLLM, the messages count if they have more
    in them than text, and if they are echoed.
    """
    ids = (request.kv_transfer_params or {}).pop(IDS_KEY, None)
    if ids is None or request.echo or any(map(_has_media, request.messages)):
        return None
    if not isinstance(ids, list) or not ids or any(type(one) is not int or one < 0 for one in ids):
        raise _wrong(f"`{PLACE}` must be a non-empty list of non-negative integers.", PLACE)
    if max(ids) >= text.VOCAB_SIZE:
        raise _wrong(f"Token id {max(ids)} is out of vocabulary", PLACE)
    if len(ids) > settings.context_tokens:
        room = settings.context_tokens
        raise Refused(f"Input length ({len(ids)}) exceeds model's maximum context length ({room}).")
    return ids


def _has_media(message: dict[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return any(isinstance(part, dict) and part.get("type", "text") != "text" for part in parts)


def _part_text(part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        part = part.get("text")
    return part if isinstance(part, str) else _dump(part)


def _dump(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def _wrong(message: str, parameter: str, value: object = None) -> Refused:
    place = f"parameter={parameter}" if value is None else f"parameter={parameter}, value={value}"
    return Refused(f"{message} ({place})", param=parameter)
