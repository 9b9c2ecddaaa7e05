"""Each bug that is planted here breaks an invariant on some of the first schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.transport.mux import MuxUpstream, _MuxAnswer, _MuxConnection
from orchestrator.wire.streams import CREDIT, DATA, END, HEADER, LAST, RESET, WINDOW, FrameError, credit
from tests.simulation.streams.seeds import problems
from worker import streams
from worker.streams import Connection, Output, Stream

SEEDS = range(500)

Plant = Callable[[pytest.MonkeyPatch], None]


def nothing(*args: Any, **options: Any) -> None:
    """What a forgotten call does."""


# --- credit, at the orchestrator's end ----------------------------------------------------------


def the_orchestrator_gives_no_credit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_MuxAnswer, "_give_credit", nothing)


def a_client_that_goes_on_gives_no_credit(patch: pytest.MonkeyPatch) -> None:
    def resume(answer: Any) -> None:
        answer._is_paused = False

    patch.setattr(_MuxAnswer, "_resume_reading", resume)


def the_orchestrator_gives_a_whole_window(patch: pytest.MonkeyPatch) -> None:
    def give(answer: Any) -> None:
        if answer.connection is not None:
            answer.connection.write(credit(answer.stream, WINDOW))
            answer._window = WINDOW

    patch.setattr(_MuxAnswer, "_give_credit", give)


def the_orchestrator_loses_credit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_MuxAnswer, "add_credit", lambda answer, size: False)


def a_body_that_waits_is_not_gone_on_with(patch: pytest.MonkeyPatch) -> None:
    add = _MuxAnswer.add_credit

    def add_and_forget(answer: Any, size: int) -> bool:
        add(answer, size)
        return False

    patch.setattr(_MuxAnswer, "add_credit", add_and_forget)


def the_orchestrator_sends_without_credit(patch: pytest.MonkeyPatch) -> None:
    write = _MuxAnswer.write_piece

    def write_on(answer: Any, connection: Any) -> bool:
        answer._credit = max(answer._credit, 1000)
        return write(answer, connection)

    patch.setattr(_MuxAnswer, "write_piece", write_on)


def a_slow_client_stops_the_connection(patch: pytest.MonkeyPatch) -> None:
    def pause(answer: Any) -> None:
        if answer.connection is not None:
            answer.connection._transport.pause_reading()

    patch.setattr(_MuxAnswer, "_pause_reading", pause)


def a_body_that_waits_for_credit_holds_up_others(patch: pytest.MonkeyPatch) -> None:
    def write_bodies(connection: Any) -> None:
        while connection._bodies and not connection.is_write_held:
            answer = connection._bodies[0]
            if answer.connection is not connection or not answer._left:
                connection._bodies.popleft()
            elif answer._credit:
                answer.write_piece(connection)
            else:
                return

    patch.setattr(_MuxConnection, "_write_bodies", write_bodies)


# --- ends, at the orchestrator's end ------------------------------------------------------------


def the_orchestrator_sends_no_reset(patch: pytest.MonkeyPatch) -> None:
    def finish(answer: Any, is_end: bool) -> None:
        connection, answer.connection = answer.connection, None
        if connection is not None:
            connection.forget(answer.stream)

    patch.setattr(_MuxAnswer, "_finish", finish)


def a_stream_that_is_given_up_stays(patch: pytest.MonkeyPatch) -> None:
    finish = _MuxAnswer._finish

    def keep(answer: Any, is_end: bool) -> None:
        connection = answer.connection
        finish(answer, is_end)
        if connection is not None and not is_end:
            connection._streams[answer.stream] = answer

    patch.setattr(_MuxAnswer, "_finish", keep)


def what_has_crossed_the_end_is_an_error(patch: pytest.MonkeyPatch) -> None:
    take = _MuxConnection._take_unowned

    def refuse(connection: Any, kind: int, stream: int, payload: bytes) -> None:
        if stream:
            raise FrameError(f"a frame of stream {stream}, which is over")
        take(connection, kind, stream, payload)

    patch.setattr(_MuxConnection, "_take_unowned", refuse)


def what_has_crossed_the_end_goes_to_another_stream(patch: pytest.MonkeyPatch) -> None:
    take = _MuxConnection._take_unowned

    def mix_up(connection: Any, kind: int, stream: int, payload: bytes) -> None:
        for answer in connection._streams.values():
            if kind & 0x7F == DATA and answer.status:
                answer.take(payload, kind >= END)
                return
        take(connection, kind, stream, payload)

    patch.setattr(_MuxConnection, "_take_unowned", mix_up)


def a_body_has_no_end(patch: pytest.MonkeyPatch) -> None:
    write = _MuxConnection.write_parts

    def write_without(connection: Any, parts: list[Any]) -> None:
        size, kind, stream = HEADER.unpack(parts[0])
        write(connection, [HEADER.pack(size, kind & ~END, stream), *parts[1:]])

    patch.setattr(_MuxConnection, "write_parts", write_without)


def a_number_is_used_twice(patch: pytest.MonkeyPatch) -> None:
    carry = _MuxConnection.carry

    def carry_again(connection: Any, answer: Any) -> None:
        if connection._last == 3:
            connection._last = 1
        carry(connection, answer)

    patch.setattr(_MuxConnection, "carry", carry_again)


def streams_go_on_after_the_last(patch: pytest.MonkeyPatch) -> None:
    take = _MuxConnection._take_unowned

    def take_others(connection: Any, kind: int, stream: int, payload: bytes) -> None:
        if kind & 0x7F != LAST:
            take(connection, kind, stream, payload)

    patch.setattr(_MuxConnection, "_take_unowned", take_others)


def a_refused_stream_is_not_sent_again(patch: pytest.MonkeyPatch) -> None:
    lost = _MuxAnswer.lost
    patch.setattr(
        _MuxAnswer, "lost", lambda answer, error, *, may_retry: lost(answer, error, may_retry=False)
    )


def a_lost_connection_is_kept_to_itself(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_MuxAnswer, "lost", nothing)


def silence_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_MuxConnection, "_tick", nothing)


def pings_are_not_answered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "_on_ping", nothing)


def an_upgrade_may_take_for_ever(patch: pytest.MonkeyPatch) -> None:
    async def wait_for(waited: Any, seconds: float) -> Any:
        return await waited

    patch.setattr("asyncio.wait_for", wait_for)


def connections_stay_when_the_orchestrator_stops(patch: pytest.MonkeyPatch) -> None:
    async def close(upstream: Any) -> None:
        await upstream._pool.aclose()

    patch.setattr(MuxUpstream, "aclose", close)


# --- credit, at the worker's end ----------------------------------------------------------------


def the_worker_gives_no_credit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "_note_read", lambda stream, size: stream._connection.note_unread(-size))


def the_worker_gives_credit_before_it_reads(patch: pytest.MonkeyPatch) -> None:
    note = Stream._note_read

    def note_double(stream: Any, size: int) -> None:
        stream._consumed += size
        note(stream, size)

    patch.setattr(Stream, "_note_read", note_double)


def the_worker_loses_credit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "_add_credit", nothing)


def the_worker_sends_without_credit(patch: pytest.MonkeyPatch) -> None:
    put = Stream._put

    def put_free(stream: Any, body: Any, more: bool) -> None:
        put(stream, body, more)
        stream._credit += len(body)

    patch.setattr(Stream, "_put", put_free)


def a_slow_application_stops_the_connection(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(streams, "MOST_UNREAD", 0)


def frames_of_one_turn_are_turned_around(patch: pytest.MonkeyPatch) -> None:
    put = Output.put_data

    def put_first(output: Any, kind: int, stream: int, payload: Any) -> None:
        before = output._pieces[:]
        put(output, kind, stream, payload)
        if before and output._pieces:
            output._pieces[:] = [*output._pieces[len(before) :], *before]

    patch.setattr(Output, "put_data", put_first)


# --- ends, at the worker's end ------------------------------------------------------------------


def the_worker_ignores_resets(patch: pytest.MonkeyPatch) -> None:
    on_frame = Stream.on_frame

    def ignore(stream: Any, kind: int, is_last: bool, payload: bytes) -> None:
        if kind != RESET:
            on_frame(stream, kind, is_last, payload)

    patch.setattr(Stream, "on_frame", ignore)


def a_reset_leaves_a_stream_behind(patch: pytest.MonkeyPatch) -> None:
    on_frame = Stream.on_frame

    def keep(stream: Any, kind: int, is_last: bool, payload: bytes) -> None:
        on_frame(stream, kind, is_last, payload)
        if kind == RESET:
            stream._connection._streams[stream.number] = stream

    patch.setattr(Stream, "on_frame", keep)


def a_reset_does_not_wake_who_waits_for_credit(patch: pytest.MonkeyPatch) -> None:
    def end(stream: Any) -> None:
        stream._is_over = True
        stream.leave()

    patch.setattr(Stream, "end", end)


def what_crosses_the_end_of_an_answer_is_an_error(patch: pytest.MonkeyPatch) -> None:
    on_frame = Connection._on_frame

    def refuse(connection: Any, kind: int, is_last: bool, number: int, payload: bytes) -> None:
        if kind in (CREDIT, RESET) and number not in connection._streams:
            raise FrameError(f"a frame of stream {number}, which is over")
        on_frame(connection, kind, is_last, number, payload)

    patch.setattr(Connection, "_on_frame", refuse)


def what_crosses_the_end_of_an_answer_goes_to_another_stream(patch: pytest.MonkeyPatch) -> None:
    on_frame = Connection._on_frame

    def mix_up(connection: Any, kind: int, is_last: bool, number: int, payload: bytes) -> None:
        if kind == RESET and number not in connection._streams and connection._streams:
            number = min(connection._streams)
        on_frame(connection, kind, is_last, number, payload)

    patch.setattr(Connection, "_on_frame", mix_up)


def an_answer_has_no_end(patch: pytest.MonkeyPatch) -> None:
    put = Output.put_data
    patch.setattr(
        Output, "put_data", lambda output, kind, stream, data: put(output, kind & ~END, stream, data)
    )


def a_broken_answer_has_an_end(patch: pytest.MonkeyPatch) -> None:
    def break_off(stream: Any) -> None:
        if not (stream._is_complete or stream._is_over):
            stream._put(b"", False)

    patch.setattr(Stream, "break_off", break_off)


def a_broken_answer_has_no_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "break_off", nothing)


def the_application_is_not_told_of_leaving(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "leave", nothing)


def who_leaves_gets_no_answer(patch: pytest.MonkeyPatch) -> None:
    leave = Stream.leave

    def leave_and_end(stream: Any) -> None:
        stream._is_over = True
        leave(stream)

    patch.setattr(Stream, "leave", leave_and_end)


def the_application_is_not_told_of_a_lost_connection(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "_lose", nothing)


def a_server_that_stops_keeps_its_connections(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "shutdown", nothing)


def a_server_that_stops_closes_at_once(patch: pytest.MonkeyPatch) -> None:
    def shutdown(connection: Any) -> None:
        connection.transport.close()

    patch.setattr(Connection, "shutdown", shutdown)


BUGS: list[tuple[Plant, str]] = [
    (the_orchestrator_gives_no_credit, "never ended"),
    (a_client_that_goes_on_gives_no_credit, "never ended"),
    (the_orchestrator_gives_a_whole_window, "more credit than it has read"),
    (the_orchestrator_loses_credit, "never ended"),
    (a_body_that_waits_is_not_gone_on_with, "never ended"),
    (the_orchestrator_sends_without_credit, "bytes beyond the credit"),
    (a_slow_client_stops_the_connection, "somebody has held it up"),
    (a_body_that_waits_for_credit_holds_up_others, "somebody has held it up"),
    (the_orchestrator_sends_no_reset, "have no end on the link"),
    (a_stream_that_is_given_up_stays, "left: streams at the orchestrator's end"),
    (what_has_crossed_the_end_is_an_error, "which is over: its connection is closed"),
    (what_has_crossed_the_end_goes_to_another_stream, "not its own"),
    (a_body_has_no_end, "never ended"),
    (a_number_is_used_twice, "has a number that was used"),
    (streams_go_on_after_the_last, "although the worker takes no more"),
    (a_refused_stream_is_not_sent_again, "it has failed for no reason"),
    (a_lost_connection_is_kept_to_itself, "never ended"),
    (silence_is_not_noticed, "somebody has held it up"),
    (pings_are_not_answered, "it has failed for no reason"),
    (an_upgrade_may_take_for_ever, "somebody has held it up"),
    (connections_stay_when_the_orchestrator_stops, "left: connections of the orchestrator"),
    (the_worker_gives_no_credit, "never ended"),
    (the_worker_gives_credit_before_it_reads, "more credit than it has read"),
    (the_worker_loses_credit, "never ended"),
    (the_worker_sends_without_credit, "bytes beyond the credit"),
    (a_slow_application_stops_the_connection, "somebody has held it up"),
    (frames_of_one_turn_are_turned_around, "comes after its END"),
    (the_worker_ignores_resets, "that its client had left"),
    (a_reset_leaves_a_stream_behind, "left: streams at the worker's end"),
    (a_reset_does_not_wake_who_waits_for_credit, "left: requests in the server"),
    (what_crosses_the_end_of_an_answer_is_an_error, "a line is logged"),
    (what_crosses_the_end_of_an_answer_goes_to_another_stream, "never ended"),
    (an_answer_has_no_end, "never ended"),
    (a_broken_answer_has_an_end, "the application has failed"),
    (a_broken_answer_has_no_end, "never ended"),
    (the_application_is_not_told_of_leaving, "that its client had left"),
    (who_leaves_gets_no_answer, "was on its way"),
    (the_application_is_not_told_of_a_lost_connection, "left: requests in the server"),
    (a_server_that_stops_keeps_its_connections, "of a server that was stopped"),
    (a_server_that_stops_closes_at_once, "it has failed for no reason"),
]


@pytest.mark.pure  # each replaces a method
@pytest.mark.parametrize(("plant", "symptom"), BUGS, ids=[plant.__name__ for plant, _ in BUGS])
def test_a_planted_bug_is_found(plant: Plant, symptom: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in SEEDS:
        if any(symptom in problem for problem in problems(seed)):
            return
    pytest.fail(f"none of {len(SEEDS)} schedules shows {symptom!r}")
