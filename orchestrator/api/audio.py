"""Transcriptions and translations of speech are asked for by a form with a file in it.

One worker makes them. The form goes to it in the client's own bytes, all but the name of the model.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from orchestrator.api.leg_form import LegForm
from orchestrator.api.one_leg import OneLegEndpoint
from orchestrator.api.view import TRANSFER_FIELDS, InvalidRequest, RequestView
from orchestrator.http.exchange import Exchange
from orchestrator.wire.codec import FORM, Parts
from orchestrator.wire.forms import InvalidForm, Span, text_fields
from orchestrator.wire.lax import bool_of

PATHS: Final = ("/v1/audio/transcriptions", "/v1/audio/translations")
MEDIA_TYPE: Final = b"multipart/form-data"

_WHY_WHOLE: Final = "speech is understood by one worker"
_NAMES: Final = ("model", "stream", "vllm_xargs", *sorted(TRANSFER_FIELDS))
_json: Final = msgspec.json.Encoder()


class AudioEndpoint(OneLegEndpoint):
    """Bodies are forms. Its answers are JSON, or streams of events."""

    def __init__(self) -> None:
        super().__init__(streams=True)
        self.media_type = MEDIA_TYPE
        self.form = LegForm(gives_ids=False, codec=FORM)

    def read(self, body: bytes, exchange: Exchange) -> RequestView:
        try:
            spans = text_fields(body, exchange.header(b"content-type") or b"", _NAMES)
            fields = {name: body[span.start : span.end].decode() for name, span in spans.items()}
        except (InvalidForm, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the form cannot be read: {error}") from error
        _refuse_transfer(fields)
        model = fields.get("model", "")
        own = {"model": Raw(_json.encode(model))}
        return RequestView(
            {},
            _around(body, spans.get("model")),
            own,
            _json.encode(own),
            model,
            _is_stream(fields),
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


def _is_stream(fields: dict[str, str]) -> bool:
    try:
        return bool_of(fields.get("stream") or "false")
    except ValueError as error:
        raise InvalidRequest(f"the field 'stream' is wrong: {error}", "stream") from error


def _refuse_transfer(fields: dict[str, str]) -> None:
    """Raise `InvalidRequest` for what only the orchestrator may say to a worker; escapes could hide it."""
    arguments = fields.get("vllm_xargs", "")
    if "_transfer_params" in arguments or "\\" in arguments:
        raise InvalidRequest("'vllm_xargs' can have no transfer parameters, and no escapes", "vllm_xargs")
    for name in TRANSFER_FIELDS & fields.keys():
        raise InvalidRequest(f"the field '{name}' is not taken from clients", name)
