"""`/openapi.json` says this about the data plane, which FastAPI does not serve and so cannot describe."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT = {"type": "string"}
_SAMPLING: Schema = {
    "model": {
        **_TEXT,
        "description": "One of the names that GET /v1/models lists; needed if there are several.",
    },
    "stream": {"type": "boolean", "default": False},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "max_tokens": {"type": "integer", "minimum": 0},
    "temperature": {"type": "number", "minimum": 0},
    "top_p": {"type": "number"},
    "n": {"type": "integer", "minimum": 1, "default": 1},
    "stop": {"oneOf": [_TEXT, {"type": "array", "items": _TEXT}]},
    "seed": {"type": "integer"},
}
_CHAT: Schema = {
    "messages": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["role"],
            "properties": {"role": _TEXT, "content": {}},
            "additionalProperties": True,
        },
    },
    "max_completion_tokens": {"type": "integer", "minimum": 0},
    "tools": {"type": "array", "items": {"type": "object"}},
}
_PROMPT: Schema = {
    "prompt": {
        "description": "Text, token ids, or a list of either.",
        "oneOf": [_TEXT, {"type": "array", "items": {}}],
    }
}
_MESSAGES: Schema = {
    "messages": _CHAT["messages"],
    "system": {},
    "tools": {"type": "array", "items": {"type": "object"}},
    "stop_sequences": {"type": "array", "items": _TEXT},
}
_INPUT: Schema = {
    "input": {"description": "Text, or a list of items.", "oneOf": [_TEXT, {"type": "array", "items": {}}]},
    "instructions": _TEXT,
    "max_output_tokens": {"type": "integer"},
    "previous_response_id": _TEXT,
    "background": {"type": "boolean", "default": False},
    "tools": {"type": "array", "items": {"type": "object"}},
}
_BODIES: dict[str, tuple[str, Schema, list[str]]] = {
    "/v1/chat/completions": ("Chat completion", _CHAT, ["messages"]),
    "/v1/completions": ("Completion", _PROMPT, ["prompt"]),
    "/v1/messages": ("Anthropic message", _MESSAGES, ["messages", "max_tokens"]),
    "/v1/messages/count_tokens": ("Tokens of an Anthropic message", _MESSAGES, ["messages"]),
    "/v1/responses": ("Response", _INPUT, ["input"]),
}
_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    "400": "The request is malformed.",
    "401": "No valid API key.",
    "404": "No such model.",
    "413": "The body is too large.",
    "429": "The API key is over a limit, too many requests wait, or a worker refused the load; see "
    "retry-after.",
    "502": "A worker failed.",
    "503": "No worker can take the request now; see retry-after.",
    "504": "The request took too long.",
}


def describe_data_plane(document: Schema) -> None:
    """Add the endpoints of generation, and API keys, to an OpenAPI document.

    Fields that are not listed go to the worker untouched, so every body allows more than it names.
    """
    document["paths"] |= {path: {"post": _operation(path, *body)} for path, body in _BODIES.items()}
    document.setdefault("components", {})["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "Needed if api_keys_file is configured."}
    }
    document["security"] = [{"key": []}, {}]  # the empty one: no key is fine too


def _operation(path: str, summary: str, fields: Schema, required: list[str]) -> Schema:
    schema = {
        "type": "object",
        "properties": {**_SAMPLING, **fields},
        "required": required,
        "additionalProperties": True,
    }
    return {
        "summary": summary,
        "description": "Prefill runs on one worker and decode on another (docs/apis.md).",
        "operationId": path.strip("/").replace("/", "_"),
        "tags": ["inference"],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": _ANSWER, **{status: _error(text) for status, text in _STATUSES.items()}},
    }


_ANSWER: Schema = {
    "description": "The answer, or with `stream: true` server-sent events that end in `data: [DONE]`.",
    "headers": {
        "x-request-id": {"schema": _TEXT},
        "x-baton-path": {"schema": {"enum": ["disaggregated", "aggregated"]}},
        "server-timing": {"schema": _TEXT, "description": "Queue, prefill and decode to first byte, in ms."},
    },
    "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": _TEXT}},
}


def _error(description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": _ERROR}}}
