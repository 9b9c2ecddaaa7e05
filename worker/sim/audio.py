"""Speech is not understood here: the simulated worker tells how much of it came, and what it was."""

from __future__ import annotations

from hashlib import sha256
from typing import Final

import msgspec
from fastapi import Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response

PATHS: Final = ("/v1/audio/transcriptions", "/v1/audio/translations")
_PIECE: Final = 1024 * 1024  # bytes


async def heard(request: Request, model: str) -> Response:
    """Answer a form as vLLM does, with the digest of its file as the text."""
    try:
        form = await request.form()
    except (FormParserError, HTTPException):
        return _error(400, "the form cannot be read")
    try:
        return await _answer(form, model)
    finally:
        await form.close()


async def _answer(form: FormData, model: str) -> Response:
    file, asked = form.get("file"), form.get("model") or model
    if asked != model:
        return _error(404, f"The model `{asked}` does not exist.")
    if not isinstance(file, UploadFile):
        return _error(400, "the form has no file")
    text = await _digest(file)
    if str(form.get("stream", "")).lower() == "true":
        return _stream(text)
    return _json(200, {"text": text, "usage": {"type": "duration", "seconds": 1}})


async def _digest(file: UploadFile) -> str:
    digest, size = sha256(), 0
    while piece := await file.read(_PIECE):
        digest.update(piece)
        size += len(piece)
    return f"{size} {digest.hexdigest()}"


def _stream(text: str) -> Response:
    delta = {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}
    event = msgspec.json.encode({"object": "transcription.chunk", "choices": [delta]})
    return Response(b"data: %b\n\ndata: [DONE]\n\n" % event, media_type="text/event-stream")


def _error(status: int, message: str) -> Response:
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    return _json(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})


def _json(status: int, document: object) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")
