"""An exchange asks this of the connection that it came on."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

from orchestrator.errors import BatonError
from orchestrator.http.date import DateLine
from orchestrator.http.exchange import FormError
from orchestrator.http.held import HeldBytes
from orchestrator.http.ids import IdSource

OnRefused = Callable[[BatonError, str, str], None]  # an error, the id of its request, and the path


class Addresses(NamedTuple):
    """Both ends of a connection have a host and a port; those of Unix sockets are None."""

    client: tuple[str, int] | None
    server: tuple[str, int] | None
    scheme: str


class Carrier(ABC):
    """Exchanges see their connection as this.

    It is a class and no `typing.Protocol`, whose compiled form would look up each name for each chunk.
    """

    write: Callable[[bytes], None]  # the transport's, without a call in between
    writelines: Callable[[Iterable[bytes]], None]  # in one system call, without copies
    is_write_paused: bool  # the client takes too little; `Exchange.writable()` tells of the end of that
    is_ending: bool  # the connection closes behind its next answer
    tasks: set[asyncio.Task[None]]  # of the requests in progress
    ids: IdSource
    date: DateLine
    held: HeldBytes  # what the requests of the process have come to
    on_refused: OnRefused | None  # told of errors that the server itself answers
    form_error: FormError  # how clients are told of them
    addresses: Addresses

    @abstractmethod
    def pause_reading(self) -> None:
        """Pause reading: the reader of a body has enough for now."""
        ...

    @abstractmethod
    def resume_reading(self) -> None:
        """Resume reading: the body is wanted, or what comes instead of it."""
        ...

    @abstractmethod
    def await_whole_body(self) -> None:
        """Start the deadline of the body: only now does the client know that it may send it."""
        ...

    @abstractmethod
    def answered(self) -> None:
        """Note that the exchange in progress has its whole answer."""
        ...

    @abstractmethod
    def cut(self, *, resets: bool) -> None:
        """Close at once; with a reset if a plain end of the connection would look like that of the answer."""
        ...
