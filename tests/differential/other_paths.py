"""Cases of all paths beside chats and completions."""

from __future__ import annotations

from typing import Any

from tests.differential.case import CHAT, COMPLETION, MODEL, Case, document_case, raw

HI = [{"role": "user", "content": "Hi"}]


def tokenize(name: str, **about: Any) -> Case:
    document = about.pop("document")
    return document_case(f"tokenize: {name}", "/tokenize", document, **about)


def detokenize(name: str, **about: Any) -> Case:
    document = about.pop("document")
    return document_case(f"detokenize: {name}", "/detokenize", document, **about)


def message(name: str, **fields: Any) -> Case:
    about = {key: fields.pop(key) for key in ("status", "differs", "only") if key in fields}
    document = {"model": MODEL, "messages": HI, "max_tokens": 6, "temperature": 0} | fields
    kept = {key: value for key, value in document.items() if value is not ...}
    return document_case(f"messages: {name}", "/v1/messages", kept, **about)


def response(name: str, **fields: Any) -> Case:
    about = {key: fields.pop(key) for key in ("status", "differs", "only") if key in fields}
    document = {
        "model": MODEL,
        "input": "Hi",
        "max_output_tokens": 6,
        "temperature": 0,
        "store": False,
    } | fields
    kept = {key: value for key, value in document.items() if value is not ...}
    return document_case(f"responses: {name}", "/v1/responses", kept, **about)


def embedding(name: str, **fields: Any) -> Case:
    """The tiny chat model of the tests on vLLM has none."""
    about = {key: fields.pop(key) for key in ("status", "differs") if key in fields}
    document = {"model": MODEL, "input": "a b c"} | fields
    kept = {key: value for key, value in document.items() if value is not ...}
    return document_case(f"embeddings: {name}", "/v1/embeddings", kept, **about, only="sim")


TOKENS: list[Case] = [
    tokenize("text", document={"model": MODEL, "prompt": "a b c"}),
    tokenize("no model", document={"prompt": "a b c"}),
    tokenize("model null", document={"model": None, "prompt": "a b c"}),
    tokenize("messages", document={"model": MODEL, "messages": HI}),
    tokenize(
        "messages without a prompt for the answer",
        document={"model": MODEL, "messages": HI, "add_generation_prompt": False},
    ),
    tokenize("strings", document={"model": MODEL, "prompt": "a b", "return_token_strs": True}),
    tokenize("no special tokens", document={"model": MODEL, "prompt": "a b", "add_special_tokens": False}),
    tokenize("empty text", document={"model": MODEL, "prompt": ""}),
    tokenize("nothing", document={"model": MODEL}, status=400),
    tokenize("a number", document={"model": MODEL, "prompt": 7}, status=400),
    tokenize(
        "unknown model", document={"model": "other", "prompt": "a"}, status=404, differs=("unknown model",)
    ),
    detokenize("ids", document={"model": MODEL, "tokens": [20, 21, 22]}),
    detokenize("no model", document={"tokens": [20, 21, 22]}),
    detokenize("no id", document={"model": MODEL, "tokens": []}),
    detokenize("words", document={"model": MODEL, "tokens": ["a"]}, status=400),
    detokenize("an id below zero", document={"model": MODEL, "tokens": [-1]}, status=400),
    detokenize("nothing", document={"model": MODEL}, status=400),
    raw("tokenize: no JSON", "/tokenize", "x", status=400, differs=("own words",)),
]

MESSAGES: list[Case] = [
    message("whole"),
    message("stream", stream=True),
    message("stop", stop_sequences=["a"], max_tokens=30),
    message("stop, streamed", stop_sequences=["a"], max_tokens=30, stream=True),
    message("ends by itself", max_tokens=80),
    message("a system prompt", system="Be brief."),
    message("a system prompt of parts", system=[{"type": "text", "text": "Be brief."}]),
    message("parts", messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
    message("knobs", top_p=0.5, top_k=4, metadata={"user_id": "a"}),
    message("no limit", max_tokens=..., status=400, differs=("Anthropic's form",)),
    message("no messages", messages=..., status=400, differs=("Anthropic's form",)),
    message("empty messages", messages=[], status=400),
    message("limit 0", max_tokens=0, status=400, differs=("Anthropic's form",)),
    message("limit as a word", max_tokens="x", status=400, differs=("Anthropic's form",)),
    message("unknown model", model="other", status=404, differs=("unknown model",)),
    raw("messages: no JSON", "/v1/messages", "x", status=400, differs=("Anthropic's form",)),
    raw("messages: empty", "/v1/messages", "", status=400, differs=("Anthropic's form",)),
    document_case("count_tokens: text", "/v1/messages/count_tokens", {"model": MODEL, "messages": HI}),
    document_case(
        "count_tokens: system",
        "/v1/messages/count_tokens",
        {"model": MODEL, "messages": HI, "system": "Be brief."},
    ),
    document_case(
        "count_tokens: nothing",
        "/v1/messages/count_tokens",
        {"model": MODEL},
        status=400,
        differs=("Anthropic's form",),
    ),
]

RESPONSES: list[Case] = [
    response("whole"),
    response("stream", stream=True),
    response("instructions", instructions="Be brief."),
    response("messages", input=HI),
    response("ends by itself", max_output_tokens=80),
    response("no input", input=..., status=400),
    response("input null", input=None, status=400),
    response("limit 0", max_output_tokens=0, status=400),
    response("limit as a word", max_output_tokens="x", status=400),
    response("unknown model", model="other", status=404, differs=("unknown model",)),
    response("unknown previous response", previous_response_id="resp_x", status=404, differs=("own words",)),
    raw("responses: no JSON", "/v1/responses", "x", status=400, differs=("own words",)),
    raw(
        "responses: one that is not there",
        "/v1/responses/resp_x",
        method="GET",
        headers={},
        status=404,
        differs=("own words",),
    ),
    raw(
        "responses: cancel one that is not there",
        "/v1/responses/resp_x/cancel",
        method="POST",
        headers={},
        status=404,
        differs=("own words",),
    ),
]

PATHS: list[Case] = [
    raw("models", "/v1/models", method="GET", headers={}, differs=("owner",)),
    raw("health", "/health", method="GET", headers={}, differs=("own pages",)),
    raw("ping", "/ping", method="GET", headers={}, differs=("own pages",)),
    raw("version", "/version", method="GET", headers={}, differs=("own pages",), only="real"),
    *(
        raw(
            f"{method} {path}",
            path,
            method=method,
            headers={},
            status=405,
            differs=() if method == "HEAD" else ("errors of paths",),
        )
        for path in (CHAT, COMPLETION, "/tokenize", "/v1/messages", "/v1/responses")
        for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD")
    ),
    raw("POST /v1/models", "/v1/models", "{}", status=405, differs=("errors of paths",)),
    raw("HEAD /v1/models", "/v1/models", method="HEAD", headers={}, status=405, differs=("own pages",)),
    raw("no such path", "/v1/nothing", method="GET", headers={}, status=404, differs=("errors of paths",)),
    raw("no such path, POST", "/v1/nothing", "{}", status=404, differs=("errors of paths",)),
    raw("the root", "/", method="GET", headers={}, status=404, differs=("errors of paths",)),
    raw("upper case", "/V1/Chat/Completions", "{}", status=404, differs=("errors of paths",)),
    raw("a slash too many", "/v1//chat/completions", "{}", status=404, differs=("errors of paths",)),
    raw("a slash behind", CHAT + "/", "{}", status=307, differs=("slash behind",)),
    raw(
        "a slash behind models",
        "/v1/models/",
        method="GET",
        headers={},
        status=307,
        differs=("slash behind",),
    ),
    raw(
        "a model by its name",
        f"/v1/models/{MODEL}",
        method="GET",
        headers={},
        status=404,
        differs=("own pages",),
    ),
]

EMBEDDINGS: list[Case] = [
    embedding("text"),
    embedding("a list", input=["a b", "c"]),
    embedding("ids", input=[20, 21]),
    embedding("lists of ids", input=[[20, 21], [22]]),
    embedding("base64", encoding_format="base64"),
    embedding("no model", model=...),
    embedding("no input", input=..., status=400),
    embedding("empty text", input="", status=400),
    embedding("unknown model", model="other", status=404, differs=("unknown model",)),
]

OTHERS: list[Case] = [*EMBEDDINGS, *TOKENS, *MESSAGES, *RESPONSES, *PATHS]
