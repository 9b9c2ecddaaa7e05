"""An upload is a form that is sent to its worker while it comes in, as it may have a large file in it.

Its beginning is kept: what is routed on is looked for there, and as long as nothing behind it was taken from
the client, all can be sent again. A form that is whole within it is a body like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Final

from orchestrator.api.view import InvalidRequest
from orchestrator.errors import ClientError, UnknownModel
from orchestrator.http.exchange import Exchange
from orchestrator.http.held import HeldBytes
from orchestrator.transport.base import Part
from orchestrator.wire.forms import FormScanner, InvalidForm, Piece, Value
from orchestrator.wire.lax import bool_of

# A minute of speech, as phones record it, can be sent again; of everything else this is what is in memory.
KEPT_BYTES: Final = 1024 * 1024
MODEL: Final = "model"
STREAM: Final = "stream"

_MAX_SHOWN: Final = 100  # characters of a client's model name

Judge = Callable[[str, str], None]  # of a field and its value: raises `InvalidRequest`


class Upload:
    """An upload takes the form of one request from its client, and gives it on for one worker."""

    def __init__(self, exchange: Exchange, names: Collection[str], judge: Judge, held: HeldBytes) -> None:
        """Fields of these `names` are judged; no part of one goes on before that. What is kept is counted in
        `held`, until `release()`. Raises `ClientError`.
        """
        try:
            self._scanner = FormScanner(exchange.header(b"content-type") or b"", names)
        except InvalidForm as error:
            raise _unreadable(error) from error
        self.fields: dict[str, str] = {}  # of these names, as far as they have come
        self.is_whole = False  # all of the form has come
        self.is_kept = True  # all that was taken from the client: it can be sent again
        self.received = 0  # bytes
        self.kept_size = 0  # bytes of the beginning that are counted
        self.model = ""  # which the client must mean, if it has not said yet; set it before `restart()`
        self._source = exchange.source
        self._content_length = exchange.content_length
        self._judge = judge
        self._held = held
        self._kept: list[Piece] = []
        self._is_given = False  # what is kept was returned by `take()`
        self._model: bytes | None = None  # that the worker gets in place of the client's

    async def begin(self, most: int, *, needs_model: bool) -> None:
        """Take the beginning, and keep it: all of the form if that is small. With `needs_model` this goes on
        until the field `model` has come.

        Raises what `Exchange.read_body` raises, `ClientError` if the form is wrong, or has no model in its
        first `most` bytes, and `Overloaded`.
        """
        wakes = asyncio.Event()
        self._source.on_more(wakes.set)
        try:
            while not self._has_begun(needs_model):
                wakes.clear()
                if not self._keep(self._receive()):
                    await wakes.wait()
                elif self.kept_size > most:
                    raise ClientError(f"the field '{MODEL}' is not in the first {most} bytes", param=MODEL)
        finally:
            self._source.on_more(None)

    def content(self) -> bytes:
        """Return what is kept."""
        return b"".join([piece.content if isinstance(piece, Value) else piece for piece in self._kept])

    def hand_over(self) -> bytes:
        """Return all of a form that is whole, which is the caller's from now on; it stays counted."""
        content, self._kept = self.content(), []
        return content

    def release(self) -> None:
        """Keep nothing any more. This can be repeated."""
        self._held.bodies -= self.kept_size
        self.kept_size = 0
        self._kept = []

    @property
    def is_stream(self) -> bool:
        """The client wants the answer as it is made; this is known when the form is whole."""
        return is_stream(self.fields)

    # --- for a worker ---------------------------------------------------------------------------

    def on_more(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` whenever `take()` may have something, or raises; None: do not any more."""
        self._source.on_more(callback)

    def restart(self, model: str) -> int | None:
        """Begin to give the form to a worker that calls the model so; return how many bytes it will have,
        None if that is not known. All that was taken must be kept.
        """
        self._is_given = False
        size, named = self._content_length, self._scanner.found.get(MODEL)
        if named is None and model == self.model:
            self._model = None
            return size
        self._model = model.encode()
        return None if size is None or named is None else size - len(named) + len(self._model)

    def take(self) -> list[Part]:
        """Return what can go on to the worker. It never waits: nothing if nothing is there now.

        Raises as `begin()` does, and `UnknownModel` if the client means another model than was thought.
        """
        if not self._is_given:
            self._is_given = True
            return [self._for_worker(piece) for piece in self._kept]
        if self.is_whole:
            return []
        pieces = self._receive()
        if pieces:
            self.is_kept = False
            self.release()
        return [self._for_worker(piece) for piece in pieces]

    # --- inside ---------------------------------------------------------------------------------

    def _has_begun(self, needs_model: bool) -> bool:
        return self.is_whole or (
            self.kept_size >= KEPT_BYTES and (not needs_model or MODEL in self._scanner.found)
        )

    def _receive(self) -> list[Piece]:
        data = self._source.take_some()
        self.received += len(data)
        try:
            pieces = self._scanner.feed(data) if data else []
            if self._source.is_taken:
                self._scanner.finish()
                self.is_whole = True
        except InvalidForm as error:
            raise _unreadable(error) from error
        for piece in pieces:
            if isinstance(piece, Value):
                self._look_at(piece)
        return pieces

    def _look_at(self, value: Value) -> None:
        try:
            self.fields[value.name] = text = value.content.decode()
            self._judge(value.name, text)
        except UnicodeDecodeError as error:
            raise _unreadable(error) from error
        except InvalidRequest as invalid:  # by another name: the compiled form has one type for each
            raise ClientError(invalid.message, param=invalid.param) from invalid
        if self.model and value.name == MODEL and text not in ("", self.model):
            raise UnknownModel(
                f"the model '{text[:_MAX_SHOWN]}' does not exist; there is: {self.model}", param=MODEL
            )

    def _keep(self, pieces: list[Piece]) -> bool:
        """Keep these pieces; return whether there is a reason to look for more at once."""
        size = sum([len(piece.content if isinstance(piece, Value) else piece) for piece in pieces])
        self._kept += pieces
        self.kept_size += size
        self._held.bodies += size
        if size:
            self._held.check()
        return size > 0 or self.is_whole

    def _for_worker(self, piece: Piece) -> Part:
        if not isinstance(piece, Value):
            return piece
        return self._model if self._model is not None and piece.name == MODEL else piece.content


def is_stream(fields: dict[str, str]) -> bool:
    """Return what the fields of a form say of its answer. Raises `InvalidRequest`."""
    try:
        return bool_of(fields.get(STREAM) or "false")
    except ValueError as error:
        raise InvalidRequest(f"the field '{STREAM}' is wrong: {error}", STREAM) from error


def _unreadable(error: ValueError) -> ClientError:
    return ClientError(f"the form cannot be read: {error}")
