"""Cases of chats and completions that are understood: what is generated, and how it is told."""

from __future__ import annotations

from typing import Any

from tests.differential.case import COMPLETION, PATHS, Case, both, chat, completion, spelt

LONG = " ".join(["What is decode, and what is prefill?"] * 60)
STREAM: dict[str, Any] = {"stream": True}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
WITH_EACH: dict[str, Any] = {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 7}


def in_both_forms(name: str, **fields: Any) -> list[Case]:
    """Whole and as a stream, as a chat and as a completion."""
    return [*both(name, **fields), *both(f"{name}, streamed", **{**USAGE, **fields})]


FORMS: list[Case] = [
    *both("whole"),
    *both("stream", **STREAM),
    *both("usage", **USAGE),
    *both("usage of each event", **WITH_EACH),
    *both("no usage", stream=True, stream_options={"include_usage": False}),
    *both("usage null", stream=True, stream_options={"include_usage": None}),
    *both("usage of each event alone", stream=True, stream_options={"continuous_usage_stats": True}),
    *both("empty stream options", stream=True, stream_options={}),
    *both("stream options null", stream=True, stream_options=None),
    *both("unknown stream option", stream=True, stream_options={"include_usage": True, "x": 1}),
    *both("stream false", stream=False),
    *both("stream null", stream=None),
    *both("long prompt", **{"max_tokens": 4}),
    chat("a prompt of many blocks", LONG),
    chat("a prompt of many blocks, streamed", LONG, **USAGE),
    chat("a prompt of many blocks again", LONG, **USAGE),
    completion("a prompt of many blocks", LONG),
    completion("a prompt of many blocks, streamed", LONG, **USAGE),
    *both("stream interval", stream_interval=2, **USAGE, only="real"),
]

LENGTHS: list[Case] = [
    *in_both_forms("one token", max_tokens=1),
    *both("no limit", max_tokens=..., stop=["a"]),
    *both("limit null", max_tokens=None, stop=["a"]),
    *both("the longest", max_tokens=4000, stop=["a"]),
    *both("least number of tokens", min_tokens=4, max_tokens=8),
    *both("as few as many", min_tokens=5, max_tokens=5),
    *both("never ends", ignore_eos=True, max_tokens=24),
    *in_both_forms("ends by itself", max_tokens=80),
    chat("the new name of the limit", max_tokens=..., max_completion_tokens=5),
    chat("both names of the limit", max_tokens=9, max_completion_tokens=5),
    chat("new limit null", max_completion_tokens=None),
    completion("the chat's limit is unknown here", max_completion_tokens=2),
    completion("the chat's limit as text is unknown here", max_completion_tokens="x"),
    completion("no token", max_tokens=0, status=400),
    chat("no token", max_tokens=0, status=400),
    chat("no token, new name", max_completion_tokens=0, status=400),
]

SAMPLING: list[Case] = [
    *in_both_forms("seed", **SAMPLED),
    *both("seed 0", temperature=1, seed=0),
    *both("negative seed", temperature=1, seed=-5),
    *both("largest seed", temperature=1, seed=2**63 - 1),
    *both("top_p", **SAMPLED, top_p=0.5),
    *both("top_k", **SAMPLED, top_k=5),
    *both("top_k -1", **SAMPLED, top_k=-1),
    *both("min_p", **SAMPLED, min_p=0.2),
    *both("frequency penalty", frequency_penalty=1.5),
    *both("presence penalty", presence_penalty=1.5),
    *both("repetition penalty", repetition_penalty=1.3),
    *both("logit bias", logit_bias={"50": 100}, only="real"),
    *both("bad words", bad_words=["a"], only="real"),
    *both("allowed tokens", allowed_token_ids=[50, 51, 52], only="real"),
    *both("temperature null", temperature=None, seed=3),
    *both("hot", temperature=2, seed=3),
    *both("knobs null", top_p=None, seed=None, stop=None, user=None),
    *both("user and metadata", user="me", metadata={"a": "b"}, store=False),
    *both("unknown fields", foo=1, bar={"a": [1, 2]}),
    *both("priority 0", priority=0),
    *both("salt", cache_salt="abc"),
    *both("service tier", service_tier="auto"),
    *both("arguments of others", vllm_xargs={"a": 1}),
    chat("reasoning effort", reasoning_effort="low"),
    completion("best_of", **SAMPLED, best_of=1),
    completion("beam search", use_beam_search=True, n=2, temperature=0, is_whole=True),
    chat("beam search", use_beam_search=True, n=2, temperature=0, is_whole=True),
]

CHOICES: list[Case] = [
    *both("n 1", n=1),
    chat("n null", n=None),
    completion("n null", n=None, status=400),
    *in_both_forms("n 2", **SAMPLED, n=2),
    *both("n 3 with logprobs", **SAMPLED, n=3, logprobs=1, only="real"),
    *both("n 2 that end by themselves", **SAMPLED, n=2, max_tokens=60),
    *both("n 2 of a stream without usage", **SAMPLED, n=2, **STREAM),
    *both("n 2 and usage of each event", **SAMPLED, n=2, **WITH_EACH),
]

STOPS: list[Case] = [
    *in_both_forms("stop", stop=["a"], max_tokens=30),
    *in_both_forms("stop kept", stop=["a"], include_stop_str_in_output=True, max_tokens=30),
    *both("stop as text", stop="e", max_tokens=30),
    *both("several stops", stop=["zzz", "o", "i"], max_tokens=30),
    *both("a stop that never comes", stop=["\u2603"]),
    *both("a stop of several tokens", stop=["the "], max_tokens=30),
    *both("no stop", stop=[]),
    *both("stop token", stop_token_ids=[50], max_tokens=30),
    *both("no stop token", stop_token_ids=[]),
    *both("stop with least tokens", stop=["a"], min_tokens=4, max_tokens=30),
]

LOGPROBS: list[Case] = [
    chat("logprobs", logprobs=True),
    chat("logprobs false", logprobs=False),
    chat("top logprobs 0", logprobs=True, top_logprobs=0),
    chat("top logprobs", logprobs=True, top_logprobs=3),
    chat("top logprobs, streamed", logprobs=True, top_logprobs=3, **USAGE),
    chat("logprobs, streamed", logprobs=True, **STREAM),
    chat("logprobs of a sample", logprobs=True, top_logprobs=2, **SAMPLED),
    chat("logprobs until a stop", logprobs=True, top_logprobs=1, stop=["a"], max_tokens=20),
    completion("logprobs 0", logprobs=0),
    completion("logprobs 1", logprobs=1),
    completion("logprobs 5", logprobs=5),
    completion("logprobs, streamed", logprobs=2, **USAGE),
    completion("logprobs null", logprobs=None),
    *both("logprobs of the prompt", prompt_logprobs=1, is_whole=True),
    *both("no logprobs of the prompt", prompt_logprobs=0, is_whole=True),
    *both("token ids", return_token_ids=True),
    *both("token ids, streamed", return_token_ids=True, **USAGE),
    *both("token ids false", return_token_ids=False),
    completion("token ids and logprobs", return_token_ids=True, logprobs=1),
    completion("tokens as ids", return_tokens_as_token_ids=True, logprobs=1, only="real"),
    chat("tokens as ids", return_tokens_as_token_ids=True, logprobs=True, only="real"),
]

ECHOES: list[Case] = [
    *in_both_forms("echo", echo=True, is_whole=True),
    *both("echo false", echo=False),
    completion("echo and no token", echo=True, max_tokens=0, is_whole=True),
    completion("echo, no token, logprobs", echo=True, max_tokens=0, logprobs=1, is_whole=True),
    completion("echo and logprobs", echo=True, logprobs=1, is_whole=True),
    completion("echo of token ids", [20, 21, 22], echo=True, is_whole=True),
    completion("echo of two", ["a b", "c d"], echo=True, is_whole=True),
]

PROMPTS: list[Case] = [
    completion("a list of one", ["Go on"]),
    completion("a list of one, streamed", ["Go on"], **USAGE),
    completion("a prompt of ids", [20, 21, 22, 23]),
    completion("a prompt of ids, streamed", [20, 21, 22, 23], **USAGE),
    completion("one token id", [20]),
    completion("a list of one list of ids", [[20, 21, 22]]),
    completion("two prompts", ["Go on", "Say more"], is_whole=True),
    completion("two prompts, streamed", ["Go on", "Say more"], is_whole=True, **USAGE),
    completion("two prompts, two choices", ["Go on", "Say more"], n=2, **SAMPLED, is_whole=True),
    completion("two lists of ids", [[20, 21], [22]], is_whole=True),
    completion("a text of blanks", "   "),
    completion(
        "other scripts",
        "\u4f60\u597d, \u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439, \U0001f44b",
    ),
    completion("control characters", "a\tb\r\nc\u0001"),
    completion("a suffix", suffix="!", only="real", status=400),
    chat(
        "other scripts",
        "\u4f60\u597d, \u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439, \U0001f44b",
        **USAGE,
    ),
    chat("nothing said", ""),
    chat(
        "a conversation",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "What is decode?"},
        ],
    ),
    chat("parts", messages=[{"role": "user", "content": [{"type": "text", "text": "What is decode?"}]}]),
    chat(
        "two parts",
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        ],
    ),
    chat("names", messages=[{"role": "user", "name": "me", "content": "Hi"}]),
    chat(
        "content null", messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    ),
    chat("no role", messages=[{"content": "Hi"}], status=400),
    chat("another role", messages=[{"role": "pilot", "content": "Hi"}]),
    chat("no prompt for the answer", add_generation_prompt=False),
    chat(
        "the answer goes on",
        only="real",
        add_generation_prompt=False,
        continue_final_message=True,
        messages=[
            {"role": "user", "content": "What is prefill?"},
            {"role": "assistant", "content": "Prefill"},
        ],
    ),
    chat("arguments of the template", chat_template_kwargs={"a": 1}),
    chat("documents", documents=[{"title": "a", "text": "b"}], only="real"),
]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}

STRUCTURED: list[Case] = [
    *both("json object", response_format={"type": "json_object"}, only="real", max_tokens=12),
    *both(
        "json schema",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        only="real",
        max_tokens=12,
    ),
    *both("format text", response_format={"type": "text"}),
    *both("choice", structured_outputs={"choice": ["yes", "no"]}, only="real"),
    *both("choice, streamed", structured_outputs={"choice": ["yes", "no"]}, only="real", **USAGE),
    *both("regex", structured_outputs={"regex": "[0-9]{3}"}, only="real"),
    *both("json", structured_outputs={"json": SCHEMA}, only="real", max_tokens=12),
    *both("grammar", structured_outputs={"grammar": 'root ::= "a" | "b"'}, only="real"),
    *both("two kinds", structured_outputs={"regex": "a", "choice": ["a"]}, only="real", status=400),
    *both("unknown format", response_format={"type": "poem"}, only="real", status=400),
    *both("schema missing", response_format={"type": "json_schema"}, only="real", status=400),
    chat("tools", tools=[TOOL], max_tokens=12),
    chat("tools, streamed", tools=[TOOL], max_tokens=12, **USAGE, only="real"),
    chat("tools, none wanted", tools=[TOOL], tool_choice="none"),
    chat("a tool required", tools=[TOOL], tool_choice="required", only="real", max_tokens=20),
    chat(
        "a tool by name",
        only="real",
        max_tokens=20,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    ),
    chat(
        "an unknown tool by name",
        only="real",
        tools=[TOOL],
        status=400,
        tool_choice={"type": "function", "function": {"name": "clock"}},
    ),
    chat("not in parallel", tools=[TOOL], parallel_tool_calls=False),
    chat("no tools", tools=[], status=400),
    chat("a choice without tools", tool_choice="auto", only="real", status=400),
    chat("a tool without a function", tools=[{"type": "function"}], only="real", status=400),
    chat(
        "after a tool's answer",
        tools=[TOOL],
        only="real",
        messages=[
            {"role": "user", "content": "The weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ],
    ),
]

# Numbers and switches as pydantic takes them.
LAX: list[Case] = [
    *(
        spelt(f"{field} {value}", path, **{field: value})
        for path in PATHS
        for field, value in [
            ("max_tokens", "4.0"),
            ("max_tokens", "1e1"),
            ("max_tokens", '"5"'),
            ("max_tokens", "true"),
            ("max_tokens", '" 5 "'),
            ("max_tokens", '"1_0"'),
            ("stream", '"true"'),
            ("stream", '"yes"'),
            ("stream", "1"),
            ("stream", "0"),
            ("stream", "1.0"),
            ("echo", "0"),
            ("echo", '"off"'),
            ("seed", "7.0"),
            ("seed", '"7"'),
            ("temperature", '"0"'),
            ("top_p", '"0.5"'),
            ("top_k", "3.0"),
            ("n", "1.0"),
            ("n", '"1"'),
            ("n", "true"),
            ("min_tokens", "2.0"),
            ("min_tokens", '"2"'),
            ("ignore_eos", '"t"'),
            ("return_token_ids", "1"),
            ("stop_token_ids", '["7", 8.0]'),
        ]
    ),
    *(spelt("temperature true", path, temperature="true", seed="7") for path in PATHS),
    spelt("usage 1", stream="true", stream_options='{"include_usage": 1}'),
    spelt("usage yes", COMPLETION, stream="true", stream_options='{"include_usage": "yes"}'),
    spelt("new limit as text", max_completion_tokens='"3"'),
    spelt("logprobs 1", logprobs="1"),
    spelt("logprobs as text", COMPLETION, logprobs='"1"', status=400),
    spelt("prompt logprobs as text", prompt_logprobs='"0"', status=400),
    spelt("a NaN that nobody reads", foo="NaN"),
    spelt("infinities that nobody reads", foo="[Infinity, -Infinity]"),
    spelt("a large number that nobody reads", foo="1" * 60),
    spelt("a unicode name", **{"\\u0073eed": "7"}),
    spelt("a field twice that is not routed on", **{"top_p": '0.5, "top_p": 0.9'}),
]

GENERATION: list[Case] = [
    *FORMS,
    *LENGTHS,
    *SAMPLING,
    *CHOICES,
    *STOPS,
    *LOGPROBS,
    *ECHOES,
    *PROMPTS,
    *STRUCTURED,
    *LAX,
]
