"""What comes in on a connection is counted while it waits, and not read on while too much of it does."""

from __future__ import annotations

import asyncio
from abc import abstractmethod

from orchestrator.errors import BatonError
from orchestrator.http.backlog import Backlog
from orchestrator.http.crowd import Guest
from orchestrator.http.deadlines import Deadlines
from orchestrator.http.held import Holder
from orchestrator.http.http_exchange import HttpExchange


class Receiver(Guest):
    """A reader sees its connection as a receiver, which answers one request after the other."""

    active: HttpExchange | None  # the one in progress
    max_requests: int | None  # the server ends after so many

    @abstractmethod
    def is_last(self) -> bool:
        """Return whether `max_requests` are about to be served, if they are limited."""
        ...

    @abstractmethod
    def accept(self, exchange: HttpExchange) -> None:
        """Answer a request in its turn: its head is complete, or nothing more of it will be."""
        ...

    @abstractmethod
    def advance(self) -> None:
        """Go on behind the exchange in progress, which is over on both sides."""
        ...

    @abstractmethod
    def schedule(self) -> None:
        """Have `Reader.read_on()` called in the next turn of the loop."""
        ...

    @abstractmethod
    def linger(self) -> None:
        """Close behind the answer, as the rest of what comes cannot be read."""
        ...


class Intake(Holder):
    """This is the part of a reader that counts what has come in, and pauses; `reader.py` has the rest."""

    __deletable__ = ("_connection",)  # mypyc's word for what `Reader.close()` deletes

    backlog: Backlog
    in_head: bool
    incoming: HttpExchange | None  # whose body is being read
    is_deaf: bool  # what else comes is thrown away
    is_paused: bool  # nothing comes for now
    _quiet_bytes: int  # since the last piece of a body: chunk extensions, trailers
    _counted: int  # bytes of a head and of the backlog that are counted as held
    _seen: int  # bytes of the incoming body that were counted
    _is_counted: bool  # something of what is coming in is
    _connection: Receiver
    _deadlines: Deadlines
    _transport: asyncio.Transport

    @abstractmethod
    def break_off(self, error: BatonError) -> None:
        """Answer with `error` in its turn and close, as nothing more of what comes can be read."""
        ...

    # --- memory

    def _count(self) -> None:
        """Count what has come in and waits, for the rest of a request or for its turn."""
        incoming, size = self.incoming, self.backlog.size
        if self.in_head:
            size += self._quiet_bytes
        more, self._counted = size - self._counted, size
        if incoming is not None:
            new, self._seen = incoming.body_size - self._seen, incoming.body_size
            more += incoming.body.count(new)
        if size or incoming is not None:
            self._is_counted = True
            self._connection.held.note(self, more)
        elif self._is_counted:
            self._is_counted = False
            self._connection.held.forget(self, -more)

    def _uncount(self) -> None:
        self._is_counted = False
        size, self._counted = self._counted, 0
        self._connection.held.forget(self, size)

    def give_way(self, error: BatonError) -> None:
        active = self._connection.active
        if self.in_head or self.incoming is not None:
            self.break_off(error)
        else:
            self.is_deaf = True
            if active is not None:
                active.keep_alive = False
        self.backlog.clear()
        self._uncount()
        self._set_reading()

    # --- reading

    def pause(self) -> None:
        """Pause reading: the application has enough of the body for now."""
        self.backlog.is_body_unwanted = True
        self._set_reading()
        if self.incoming is not None and self.incoming is self._connection.active:
            self._deadlines.look_soon()

    def resume(self) -> None:
        """Resume reading. This can be repeated."""
        self.backlog.is_body_unwanted = False
        self._set_reading()

    def _set_reading(self) -> None:
        is_to_pause = self.backlog.is_to_pause
        if is_to_pause == self.is_paused or self._transport.is_closing():
            return
        self.is_paused = is_to_pause
        if is_to_pause:
            self._deadlines.pause()
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
            if self.incoming is not None and self.incoming is self._connection.active:
                self._deadlines.forgive_pause()
