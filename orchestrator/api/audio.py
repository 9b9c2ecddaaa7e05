"""Transcriptions and translations of speech are asked for by a form with a file in it.

One worker makes them. The form goes to it in the client's own bytes, all but the name of the model, and while
it comes in if it is large (`upload.py`).
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from orchestrator.api.leg_form import LegForm
from orchestrator.api.one_leg import OneLegEndpoint
from orchestrator.api.upload import STREAM, Upload, is_stream
from orchestrator.api.view import TRANSFER_FIELDS, InvalidRequest, RequestView
from orchestrator.http.exchange import Exchange
from orchestrator.http.held import HeldBytes
from orchestrator.wire.codec import FORM, Parts
from orchestrator.wire.forms import InvalidForm, Span, text_fields

PATHS: Final = ("/v1/audio/transcriptions", "/v1/audio/translations")
MEDIA_TYPE: Final = b"multipart/form-data"

_WHY_WHOLE: Final = "speech is understood by one worker"
_NAMES: Final = ("model", STREAM, "vllm_xargs", *sorted(TRANSFER_FIELDS))
_json: Final = msgspec.json.Encoder()


class AudioEndpoint(OneLegEndpoint):
    """Bodies are forms. Its answers are JSON, or streams of events."""

    def __init__(self) -> None:
        super().__init__(streams=True)
        self.media_type = MEDIA_TYPE
        self.takes_uploads = True
        self.form = LegForm(gives_ids=False, codec=FORM)

    def upload(self, exchange: Exchange, held: HeldBytes) -> Upload:
        return Upload(exchange, _NAMES, _judge, held)

    def read(self, body: bytes, exchange: Exchange) -> RequestView:
        """Return what is routed on, of a form or its beginning."""
        content_type = exchange.header(b"content-type") or b""
        try:
            spans = text_fields(body, content_type, _NAMES, is_whole=False)
            fields = {name: body[span.start : span.end].decode() for name, span in spans.items()}
        except (InvalidForm, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the form cannot be read: {error}") from error
        for name, value in fields.items():
            _judge(name, value)
        model = fields.get("model", "")
        own = {"model": Raw(_json.encode(model))}
        return RequestView(
            {},
            _around(body, spans.get("model")),
            own,
            _json.encode(own),
            model,
            is_stream(fields),
            True,  # nothing is asked for in a form but what the client asks for
            _WHY_WHOLE,
            exchange,
        )


def _around(body: bytes, model: Span | None) -> Parts:
    """Return the form without the name of the model: what is before it and behind it."""
    if model is None:
        return (body,)
    view = memoryview(body)
    return view[: model.start], view[model.end :]


def _judge(name: str, value: str) -> None:
    """Raise `InvalidRequest` for what is wrong, and for what only the orchestrator may say to a worker, which
    escapes could hide.
    """
    if name == "vllm_xargs" and ("_transfer_params" in value or "\\" in value):
        raise InvalidRequest("'vllm_xargs' can have no transfer parameters, and no escapes", name)
    if name in TRANSFER_FIELDS:
        raise InvalidRequest(f"the field '{name}' is not taken from clients", name)
    if name == STREAM:
        is_stream({name: value})
