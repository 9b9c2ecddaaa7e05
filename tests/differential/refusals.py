"""Cases that a worker refuses, or that come in a way that is not quite right."""

from __future__ import annotations

from tests.differential.case import (
    CHAT,
    COMPLETION,
    JSON,
    MODEL,
    PATHS,
    Case,
    both,
    chat,
    completion,
    raw,
    spelt,
)

OWN_WORDS = ("own words",)
TOO_LONG = "word " * 5000
SMALL = f'{{"model": "{MODEL}", "temperature": 0, "max_tokens": 3, "prompt": "a"}}'
SMALL_CHAT = SMALL.replace('"prompt": "a"', '"messages": [{"role": "user", "content": "a"}]')

# Refused by their worker, in its words.
VALUES: list[Case] = [
    *both("n 0", n=0, status=400),
    *both("n -1", n=-1, status=400),
    *both("n 2 and greedy", n=2, status=400),
    *both("n as a word", n="two", status=400),
    *both("max_tokens -1", max_tokens=-1, status=400),
    *both("max_tokens beyond the context", max_tokens=100_000, status=400),
    *both("max_tokens beyond 64 bits", max_tokens=10**20, status=400),
    *both("min_tokens -1", min_tokens=-1, status=400, only="real"),
    *both("min_tokens beyond max_tokens", min_tokens=9, max_tokens=3, status=400),
    *both("temperature -1", temperature=-1, status=400),
    *both("temperature as a word", temperature="warm", status=400),
    *both("top_p 0", top_p=0, status=400),
    *both("top_p 2", top_p=2, status=400),
    *both("top_k -2", top_k=-2, status=400),
    *both("min_p 2", min_p=2, status=400),
    *both("frequency penalty 3", frequency_penalty=3, status=400),
    *both("presence penalty -3", presence_penalty=-3, status=400),
    *both("repetition penalty 0", repetition_penalty=0, status=400),
    *both("seed as a word", seed="x", status=400),
    *both("seed beyond 64 bits", seed=2**70, status=400),
    *both("stop is a number", stop=3, status=400),
    *both("a stop is a number", stop=[3], status=400),
    *both("empty stop", stop=[""], status=400),
    *both("stop tokens are words", stop_token_ids=["a"], status=400),
    *both("ignore_eos as a word", ignore_eos="maybe", status=400),
    *both("stream options without a stream", stream_options={"include_usage": True}, status=400),
    *both("prompt logprobs of a stream", prompt_logprobs=1, stream=True, status=400),
    *both("prompt logprobs -5", prompt_logprobs=-5, status=400),
    *both("logit bias of no token", logit_bias={"x": 1}, status=400, only="real"),
    *both("logit bias beyond the vocabulary", logit_bias={"999999999": 1}, status=400, only="real"),
    *both("bad regex", structured_outputs={"regex": "("}, status=400, only="real"),
    *both("empty choice", structured_outputs={"choice": []}, status=400, only="real"),
    *both("allowed tokens empty", allowed_token_ids=[], status=400, only="real"),
    *both("an error before a stream", n=0, stream=True, status=400),
    *both("salt is empty", cache_salt="", status=400, only="real"),
    completion("best_of beyond n", best_of=1, n=2, status=400, only="real"),
    completion("beam search of a stream", use_beam_search=True, stream=True, status=400),
    completion("logprobs -5", logprobs=-5, status=400),
    completion("logprobs 100", logprobs=100, status=400),
    chat("top logprobs 100", logprobs=True, top_logprobs=100, status=400),
    chat("top logprobs without logprobs", top_logprobs=2, status=400),
    chat("logprobs as a word", logprobs="x", status=400),
    *(
        chat(f"{stream or 'whole'}: too long", TOO_LONG, stream=bool(stream), status=400)
        for stream in ("", "stream")
    ),
    completion("too long", TOO_LONG, status=400),
    completion("too many tokens asked for", max_tokens=4096, status=200, stop=["a"]),
]

PROMPTS: list[Case] = [
    completion("no prompt", ..., status=400),
    completion("prompt null", None, status=400),
    completion("empty prompt", "", status=400),
    completion("empty list", [], status=400),
    completion("a list of nothing", [""], status=400),
    completion("a list of an empty list", [[]], status=400),
    completion("a prompt is a number", 7, status=400),
    completion("a prompt is an object", {"a": 1}, status=400),
    completion("mixed prompts", ["a", 1], status=400),
    completion("mixed lists", ["a", [1]], status=400),
    completion("a token beyond the vocabulary", [10**9], status=400),
    completion("a token below zero", [-1], status=400),
    completion("a token is no integer", [1.5], status=400),
    completion("prompts are null", [None], status=400),
    completion("embeddings that are none", prompt_embeds="abc", status=400, only="real"),
    chat("no messages", messages=..., status=400),
    chat("messages null", messages=None, status=400),
    chat("messages are text", messages="Hi", status=400),
    chat("messages are an object", messages={"role": "user"}, status=400),
    chat("empty messages", messages=[], status=400),
    chat("a message is text", messages=["Hi"], status=400),
    chat("a message is null", messages=[None], status=400),
    chat("content is a number", messages=[{"role": "user", "content": 7}], status=400),
    chat("role is a number", messages=[{"role": 7, "content": "a"}], status=400),
    chat(
        "an image",
        only="real",
        status=400,
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
            }
        ],
    ),
    chat(
        "an unknown part",
        only="real",
        status=400,
        messages=[{"role": "user", "content": [{"type": "poem", "poem": "x"}]}],
    ),
    chat("tools are text", tools="x", status=400),
    chat("a chat with a prompt", messages=..., prompt="Hi", status=400),
    completion("a completion with messages", ..., messages=[{"role": "user", "content": "Hi"}], status=400),
]

# Refused by Baton, which routes on these fields.
ROUTED: list[Case] = [
    *(
        spelt(f"{field} {value}", path, status=400, differs=OWN_WORDS, **{field: value})
        for path in PATHS
        for field, value in [
            ("model", "7"),
            ("model", "[]"),
            ("stream", '"maybe"'),
            ("stream", "2"),
            ("stream", "[]"),
            ("stream_options", "7"),
            ("stream_options", '{"include_usage": "maybe"}'),
            ("max_tokens", '"x"'),
            ("max_tokens", "1.5"),
            ("max_tokens", "[]"),
            ("max_tokens", "NaN"),
            ("echo", '"maybe"'),
            ("use_beam_search", "7"),
            ("prompt_logprobs", '"x"'),
        ]
    ),
    spelt("new limit as a word", max_completion_tokens='"x"', status=400, differs=OWN_WORDS),
]

MODELS: list[Case] = [
    *both("no model", model=...),
    *both("model null", model=None),
    *both("empty model", model=""),
    *both("unknown model", model="other", status=404, differs=("unknown model",)),
    *both("unknown model of a stream", model="other", stream=True, status=404, differs=("unknown model",)),
]

BODIES: list[Case] = [
    *(
        raw(f"{path}: {name}", path, body, status=400, differs=OWN_WORDS)
        for path in PATHS
        for name, body in [
            ("empty body", ""),
            ("blank body", " \n"),
            ("half an object", '{"model": '),
            ("no JSON", "hello"),
            ("a list", "[]"),
            ("a string", '"x"'),
            ("a number", "7"),
            ("null", "null"),
            ("two documents", "{}{}"),
            ("a comma too many", '{"model": "m",}'),
            ("single quotes", "{'model': 'm'}"),
            ("not UTF-8", b'{"model": "\xff"}'),
            ("comment", '{"a": 1} // x'),
        ]
    ),
    raw(f"{CHAT}: no field", CHAT, "{}", status=400),
    raw(f"{COMPLETION}: no field", COMPLETION, "{}", status=400),
    raw(f"{COMPLETION}: a BOM", COMPLETION, b"\xef\xbb\xbf" + SMALL.encode()),
    raw(f"{CHAT}: a BOM", CHAT, b"\xef\xbb\xbf" + SMALL_CHAT.encode()),
    *(
        spelt("a routed field twice", path, **{"max_tokens": '3, "max_tokens": 2'}, differs=("given twice",))
        for path in PATHS
    ),
    spelt("the model twice", model=f'"{MODEL}", "model": "{MODEL}"', differs=("given twice",)),
    *(
        spelt("a hand-off of the client's", path, kv_transfer_params='{"do_remote_prefill": false}')
        for path in PATHS
    ),
    raw(
        "half of a pair in a prompt",
        COMPLETION,
        SMALL.replace('"a"', '"a \\ud83d "'),
        only="real",
        status=400,
        differs=OWN_WORDS,
    ),
    raw(
        "half of a pair in a message",
        CHAT,
        SMALL_CHAT.replace('"a"', '"a \\ud83d "'),
        only="real",
        status=400,
        differs=OWN_WORDS,
    ),
    *(
        spelt("a lone surrogate that nobody reads", path, foo='"\\ud800 "', differs=("no text",))
        for path in PATHS
    ),
    raw(
        "white space around",
        CHAT,
        f' \r\n{{ "model" : "{MODEL}",\t"max_tokens":3, "temperature" : 0, '
        '"messages":[ {"role":"user","content":"a"} ] } \n',
    ),
]

TYPES: list[Case] = [
    *(
        raw(f"content type {kind}", COMPLETION, SMALL, headers={"content-type": kind})
        for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/json;x=y")
    ),
    *(
        raw(
            f"content type {kind}",
            COMPLETION,
            SMALL,
            headers={"content-type": kind},
            status=400,
            differs=OWN_WORDS,
        )
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/jsonp",
            "text/json",
            "application/vnd.api+json",
            "json",
            "",
        )
    ),
    raw("no content type", COMPLETION, SMALL, headers={}, status=400, differs=OWN_WORDS),
    raw("no content type of a chat", CHAT, "{}", headers={}, status=400, differs=OWN_WORDS),
    raw("a key that is not asked for", COMPLETION, SMALL, headers={**JSON, "authorization": "Bearer x"}),
    raw("accepts text", COMPLETION, SMALL, headers={**JSON, "accept": "text/plain"}),
    raw("a priority in a header", COMPLETION, SMALL, headers={**JSON, "x-vllm-priority": "0"}),
    raw("a session", COMPLETION, SMALL, headers={**JSON, "x-session-id": "a"}),
    raw("a query", COMPLETION + "?a=b", SMALL),
    *both("request_id null", request_id=None, status=400),
    completion("request_id is a number", request_id=7, status=400),
]

REFUSALS: list[Case] = [*VALUES, *PROMPTS, *ROUTED, *MODELS, *BODIES, *TYPES]
