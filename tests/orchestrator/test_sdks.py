"""Clients' own SDKs, through an orchestrator of two processes; the simulated workers store responses."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import anthropic
import httpx
import openai
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, simulated, starting
from tests.waiting import wait_for
from worker.sim.__main__ import STORE_ENV

pytestmark = pytest.mark.processes

KEY = "a key"
GREEDY = {"temperature": 0}
LEASE_S = 2.0  # for the engines and the orchestrator: a lost decode leg leaves a lease to run out
OPTIONS = ["--lease-s", str(LEASE_S), "--decode-ms-per-token", "20"]  # tokens come one by one
TOOL_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


class Front:
    """The orchestrator, what is behind it, and each SDK as its users make it."""

    def __init__(self, orchestrator: Orchestrator, workers: list[SimWorker]) -> None:
        self.orchestrator = orchestrator
        self.workers = workers
        self.url = orchestrator.url
        self.anthropic = anthropic.Anthropic(base_url=self.url, api_key=KEY, max_retries=0)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def close(self) -> None:
        self.anthropic.close()
        self.openai.close()

    def post(self, path: str, document: Any, **headers: str) -> httpx.Response:
        return httpx.post(self.url + path, json=document, headers={"x-api-key": KEY} | headers, timeout=60)

    def wait_well(self) -> None:
        def are_ready() -> bool:
            return {state.lower() for state in self.orchestrator.worker_states().values()} == {"ready"}

        wait_for(are_ready, "all workers in service")

    @contextmanager
    def fault(self, kind: str, *, workers: int = 2, **fields: Any) -> Iterator[None]:
        """So many decode workers commit it."""
        decoders = [worker for worker in self.workers if worker.role == "decode"][:workers]
        for worker in decoders:
            httpx.post(f"{worker.url}/sim/faults", json={"kind": kind, **fields}).raise_for_status()
        try:
            yield
        finally:
            for worker in decoders:
                httpx.delete(f"{worker.url}/sim/faults").raise_for_status()


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("sdks")
    keys = folder / "keys"
    keys.write_text(f"someone {hashlib.sha256(KEY.encode()).hexdigest()} infer,admin\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STORE_ENV, "1")
        with (
            simulated("prefill", "decode", "decode", options=OPTIONS) as workers,
            starting(folder, workers) as start,
        ):
            orchestrator = start(api_keys_file=str(keys), key=KEY, routing={"kv_lease_s": LEASE_S})
            front = Front(orchestrator, workers)
            yield front
            front.close()


@pytest.fixture(autouse=True)
def nothing_is_held(front: Front) -> Iterator[None]:
    yield
    names = ("baton_requests_in_flight", "baton_worker_in_flight", "baton_kv_leases")
    wait_for(lambda: not any(map(front.orchestrator.gauge, names)), "nothing held")


def say(words: int = 40) -> str:
    """A prompt that nobody has seen, of several blocks."""
    return uuid4().hex + " and so on" * words


# --- Anthropic ----------------------------------------------------------------------------------


def message(said: str | None = None, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": said or say()}]
    return {"model": MODEL, "max_tokens": 5, "messages": messages, "extra_body": GREEDY} | fields


def test_a_message(front: Front) -> None:
    raw = front.anthropic.messages.with_raw_response.create(**message())
    assert raw.headers["x-baton-kv"] == "transferred"
    assert raw.headers["x-baton-path"] == "disaggregated"
    answer = raw.parse()
    assert isinstance(answer, anthropic.types.Message)
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 5
    assert answer.usage.cache_read_input_tokens == 0  # as the prefill worker found it
    assert answer.usage.cache_creation_input_tokens
    counted = front.anthropic.messages.count_tokens(model=MODEL, messages=message("Hello")["messages"])
    usage = front.anthropic.messages.create(**message("Hello")).usage
    created, read = usage.cache_creation_input_tokens or 0, usage.cache_read_input_tokens or 0
    assert counted.input_tokens == usage.input_tokens + created + read


def test_a_prompt_that_was_asked_before_is_read_from_the_cache(front: Front) -> None:
    asked = message()
    first, again = (front.anthropic.messages.create(**asked) for _ in range(2))
    assert again.content[0].text == first.content[0].text
    created = first.usage.cache_creation_input_tokens
    assert (again.usage.cache_read_input_tokens, again.usage.cache_creation_input_tokens) == (created, 0)
    assert again.usage.input_tokens == first.usage.input_tokens


def test_a_stream_of_a_message(front: Front) -> None:
    asked = message(system="Be brief.", max_tokens=12)
    whole = front.anthropic.messages.create(**asked)
    with front.anthropic.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == last.content[0].text == whole.content[0].text
    assert (last.stop_reason, last.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert last.usage.cache_read_input_tokens == whole.usage.cache_creation_input_tokens
    kinds = [event.type for event in front.anthropic.messages.create(**asked, stream=True)]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]


def test_tools_are_passed_on(front: Front) -> None:
    tools = [{"name": "weather", "description": "d", "input_schema": TOOL_SCHEMA}]
    for choice in ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "weather"}):
        raw = front.anthropic.messages.with_raw_response.create(**message(tools=tools, tool_choice=choice))
        assert raw.headers["x-baton-kv"] == "transferred"


def test_thinking_has_its_budget(front: Front) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    raw = front.anthropic.messages.with_raw_response.create(**message(thinking=thinking, max_tokens=1025))
    assert raw.headers["x-baton-kv"] == "transferred"
    with pytest.raises(anthropic.BadRequestError):
        front.anthropic.messages.create(**message(thinking=thinking))


@pytest.mark.parametrize(
    ("fields", "kind", "name"),
    [
        ({"model": "unknown"}, anthropic.NotFoundError, "not_found_error"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error"),
        ({"system": 5}, anthropic.BadRequestError, "invalid_request_error"),
        ({"messages": 5}, anthropic.BadRequestError, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "x" * 17_000_000}]}, anthropic.APIStatusError, "too"),
    ],
)
def test_a_wrong_message(front: Front, fields: dict[str, Any], kind: type[Exception], name: str) -> None:
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            front.anthropic.messages.create(**message() | fields, stream=stream)
        assert caught.value.body["type"] == "error"
        assert name in caught.value.body["error"]["type"]
        assert caught.value.body["error"]["message"]


def test_a_key_is_taken_from_either_header(front: Front) -> None:
    front.anthropic.messages.create(**message())
    with anthropic.Anthropic(base_url=front.url, auth_token=KEY, max_retries=0) as client:
        client.messages.create(**message())
    for wrong in ({"api_key": "wrong"}, {"auth_token": "wrong"}):
        with (
            anthropic.Anthropic(base_url=front.url, max_retries=0, **wrong) as client,
            pytest.raises(anthropic.AuthenticationError) as caught,
        ):
            client.messages.create(**message())
        assert caught.value.body["error"]["type"] == "authentication_error"
    unknown = front.post("/v1/chat/completions", {"model": MODEL, "messages": []})
    assert unknown.status_code == 401  # OpenAI's endpoints know one header


def test_a_stream_of_a_message_that_breaks(front: Front) -> None:
    for kind in ("reset", "error", "truncate"):
        with front.fault(kind, at_token=2):
            stream = front.anthropic.messages.create(**message(), stream=True)
            with pytest.raises(anthropic.APIStatusError) as caught:
                list(stream)
        assert caught.value.body["type"] == "error"


def test_a_message_whose_worker_fails_before_its_first_word(front: Front) -> None:
    """The other decode worker answers: nothing was said."""
    for kind in ("reset", "kv_lost", "error", "truncate"):
        with front.fault(kind, workers=1, **({} if kind == "kv_lost" else {"at_token": 0})):
            for _ in range(2):
                with front.anthropic.messages.stream(**message()) as stream:
                    assert stream.get_final_message().usage.output_tokens == 5
        front.wait_well()


# --- Responses ----------------------------------------------------------------------------------


def response(said: Any = None, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_output_tokens": 5, "temperature": 0, "input": said or say()} | fields


def test_a_response(front: Front) -> None:
    raw = front.openai.responses.with_raw_response.create(**response(instructions="Be brief."))
    assert raw.headers["x-baton-kv"] == "transferred"
    answer = raw.parse()
    assert answer.status == "incomplete"
    assert answer.output_text
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.usage.input_tokens_details.cached_tokens) == (5, 0)


def test_a_stream_of_a_response(front: Front) -> None:
    asked = response([{"role": "user", "content": [{"type": "input_text", "text": say()}]}])
    whole = front.openai.responses.create(**asked)
    with front.openai.responses.stream(**asked) as stream:
        events = list(stream)
        last = stream.get_final_response()
    assert last.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    before, usage = whole.usage, last.usage
    assert before is not None
    assert usage is not None
    assert usage.input_tokens == before.input_tokens
    written = before.input_tokens_details.cache_write_tokens
    assert usage.input_tokens_details.cached_tokens == written > 0


def test_a_response_is_asked_for_from_any_process(front: Front) -> None:
    made = [front.openai.responses.create(**response()) for _ in range(6)]
    assert len({one.id[-12:] for one in made}) == 2  # each worker has some
    for client in front.orchestrator.client_of_each():
        for one in made:
            answer = client.get(f"/v1/responses/{one.id}", headers={"authorization": f"Bearer {KEY}"})
            assert answer.json()["id"] == one.id
    found = front.openai.responses.retrieve(made[0].id)
    assert found.output_text == made[0].output_text


def test_a_conversation_goes_on_where_it_is_known(front: Front) -> None:
    first = front.openai.responses.create(**response())
    raw = front.openai.responses.with_raw_response.create(**response(previous_response_id=first.id))
    assert raw.headers["x-baton-path"] == "aggregated"
    second = raw.parse()
    assert second.id[-12:] == first.id[-12:]
    assert second.previous_response_id == first.id
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


def test_a_response_in_the_background(front: Front) -> None:
    queued = front.openai.responses.create(**response(background=True))
    assert queued.status == "queued"
    wait_for(lambda: front.openai.responses.retrieve(queued.id).status == "incomplete", "its end")
    with front.fault("slow", seconds=60):
        slow = front.openai.responses.create(**response(background=True))
        assert front.openai.responses.cancel(slow.id).status == "cancelled"
        assert front.openai.responses.retrieve(slow.id).status == "cancelled"


def test_the_events_of_a_response_in_the_background_can_be_read_again(front: Front) -> None:
    events = list(front.openai.responses.create(**response(background=True), stream=True))
    again = list(front.openai.responses.retrieve(events[0].response.id, stream=True))
    assert [event.type for event in again] == [event.type for event in events]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "unknown"}, openai.NotFoundError),
        ({"input": 5}, openai.BadRequestError),
        ({"max_output_tokens": "many"}, openai.BadRequestError),
        ({"previous_response_id": "resp_unknown"}, openai.NotFoundError),
        ({"background": True, "store": False}, openai.BadRequestError),
    ],
)
def test_a_wrong_response(front: Front, fields: dict[str, Any], kind: type[Exception]) -> None:
    for stream in (False, True):
        with pytest.raises(kind):
            front.openai.responses.create(**response() | fields, stream=stream)


def test_what_nobody_has_is_not_found(front: Front) -> None:
    known = front.openai.responses.create(**response(store=False)).id
    for name in (known, "resp_unknown", "resp_" + "0" * 44):
        with pytest.raises(openai.NotFoundError):
            front.openai.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            front.openai.responses.cancel(name)
    answer = httpx.delete(f"{front.url}/v1/responses/{known}", headers={"authorization": f"Bearer {KEY}"})
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


def test_a_stream_of_a_response_that_breaks(front: Front) -> None:
    """It ends with the event of a response that failed, in its turn and with its name."""
    for kind in ("reset", "error", "truncate"):
        with front.fault(kind, at_token=2):
            events = list(front.openai.responses.create(**response(), stream=True))
        last = events[-1]
        assert last.type == "response.failed"
        assert last.response.id == events[0].response.id
        assert last.response.status == "failed"
        assert last.response.error is not None
        assert last.response.error.message
        assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_response_whose_worker_fails_before_its_first_word(front: Front) -> None:
    for kind in ("reset", "kv_lost", "error", "truncate"):
        with front.fault(kind, workers=1, **({} if kind == "kv_lost" else {"at_token": 0})):
            for _ in range(2):
                events = list(front.openai.responses.create(**response(), stream=True))
                assert events[-1].type == "response.completed"
        front.wait_well()


# --- what the server itself refuses -------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("content-length: 99999999", 413),
        ("content-length: 2\r\ncontent-encoding: gzip", 415),
        ("transfer-encoding: gzip", 400),
        (f"x: {'y' * 40_000}", 431),
    ],
)
def test_refusals_of_the_server_have_the_endpoints_form(
    front: Front, path: str, head: str, status: int
) -> None:
    answer = raw(front.url, f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{head}\r\n\r\n{{}}")
    assert answer.startswith(f"HTTP/1.1 {status} ")
    assert '{"type":"error","error":{"type":"' in answer


def raw(url: str, request: str) -> str:
    parts = httpx.URL(url)
    with socket.create_connection((parts.host, parts.port or 80), timeout=30) as connection:
        connection.sendall(request.encode())
        return connection.recv(65536).decode()
