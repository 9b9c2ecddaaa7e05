"""A policy that is not ours: it has typed arguments, reads prompts, and wants to hear of the ends of legs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import pytest

from orchestrator.config.file import ConfigErrors, json_schema, load_config
from orchestrator.config.options import Config
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import (
    Argument,
    C,
    Choice,
    Context,
    End,
    Outcome,
    Policy,
    PolicySpec,
    Request,
)
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.failover.test_failover import CHAT as STREAMED
from tests.orchestrator.failover.test_failover import Cluster as CutCluster
from tests.orchestrator.fakes import DONE, JSON, FakeCluster, FakeExchange

# --- the policy ---------------------------------------------------------------------------------


class Remembered(Choice[Any]):
    """Keeps what its reason is made of; nobody words it before it is read."""

    def __init__(self, worker: Any, beginning: bytes, policy: SamePrefix) -> None:
        super().__init__(worker, "", policy)
        self.beginning = beginning

    def __str__(self) -> str:
        return f"Prompts that share their first {len(self.beginning)} bytes go to it."


class SamePrefix(Policy):
    """Sends prompts with the same beginning to the same worker, by rendezvous hashing."""

    made: ClassVar[list[SamePrefix]] = []

    def __init__(self, context: Context, *, first_bytes: int, salt: str, ties: str, share: float) -> None:
        self.context = context
        self.arguments = (first_bytes, salt, ties, share)
        self.first_bytes = first_bytes
        self.salt = salt.encode()
        self.chosen: list[Remembered] = []
        self.heard: list[tuple[Choice[Any], Outcome]] = []
        self.made.append(self)

    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        beginning = request.prompt(self.first_bytes)
        worker = max(candidates, key=lambda candidate: self._weight(candidate.name, beginning))
        self.chosen.append(Remembered(worker, beginning, self))
        return self.chosen[-1]

    def _weight(self, name: str, beginning: bytes) -> bytes:
        return blake2b(beginning, key=self.salt + name.encode()).digest()

    def ended(self, choice: Choice[Any], outcome: Outcome) -> None:
        self.heard.append((choice, outcome))

    def ends(self) -> list[tuple[str, End]]:
        return [(choice.worker.name, outcome.end) for choice, outcome in self.heard]


SPEC = PolicySpec(
    "same_prefix",
    SamePrefix,
    "Prompts with the same beginning go to the same worker.",
    [
        Argument("first_bytes", 64, "So many bytes of the prompt are compared.", least=1),
        Argument("salt", "", "This text makes another order of the workers."),
        Argument("ties", "turn", "This decides between equals.", choices=("turn", "chance")),
        Argument("share", 1.0, "This part of the requests is kept together.", least=0, most=1),
    ],
)


@pytest.fixture(autouse=True)
def same_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one entry in the table that a new policy needs."""
    monkeypatch.setitem(POLICIES, SPEC.name, SPEC)
    monkeypatch.setattr(SamePrefix, "made", [])


# --- in the config ------------------------------------------------------------------------------


def load(tmp_path: Path, routing: str) -> Config:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"models: [{{name: m, prefill: {{engine: sim}}, decode: {{engine: sim}}}}]\nrouting:\n  {routing}\n"
    )
    return load_config(str(file))


@pytest.mark.parametrize(
    ("routing", "arguments"),
    [
        ("prefill: same_prefix", (64, "", "turn", 1.0)),
        ("prefill: {policy: same_prefix}", (64, "", "turn", 1.0)),
        ("prefill: {policy: same_prefix, first_bytes: 9, share: 0.5}", (9, "", "turn", 0.5)),
        ("prefill:\n    policy: same_prefix\n    salt: s\n    ties: chance", (64, "s", "chance", 1.0)),
    ],
)
def test_a_file_gives_a_policy_its_arguments(
    routing: str, arguments: tuple[Any, ...], tmp_path: Path
) -> None:
    config = load(tmp_path, routing)
    run(answered_once, config)
    (policy,) = SamePrefix.made
    assert policy.arguments == arguments
    assert (policy.context.model, policy.context.role) == ("m", "prefill")


ALLOWED = ", ".join([*POLICIES, SPEC.name])

MISTAKES = {
    "prefill: same_prefx": (
        f"2:3: prefill: 'same_prefx' is not possible, did you mean 'same_prefix'? (allowed: {ALLOWED})"
    ),
    "prefill: {policy: same_prefx}": (
        f"2:13: policy: 'same_prefx' is not possible, did you mean 'same_prefix'? (allowed: {ALLOWED})"
    ),
    "prefill: {first_bytes: 1}": "2:3: 'policy' is missing",
    "prefill: {policy: 1}": "2:13: policy: expected a text, got 1",
    "prefill: [same_prefix]": (
        "2:3: prefill: expected the name of a policy, or a mapping with `policy` and its arguments"
    ),
    "prefill: {policy: same_prefix, frst_bytes: 1}": (
        "2:34: unknown key 'frst_bytes', did you mean 'first_bytes'?"
    ),
    "prefill: {policy: same_prefix, zzz: 1}": (
        "2:34: unknown key 'zzz' (known keys: policy, first_bytes, salt, ties, share)"
    ),
    "prefill: {policy: round_robin, first_bytes: 1}": "2:34: unknown key 'first_bytes' (known keys: policy)",
    "prefill: {policy: same_prefix, first_bytes: many}": (
        "2:34: first_bytes: expected a whole number, got 'many'"
    ),
    "prefill: {policy: same_prefix, first_bytes: 0}": "2:34: first_bytes: must be at least 1, got 0",
    "prefill: {policy: same_prefix, share: 1.5}": "2:34: share: must be at most 1, got 1.5",
    "prefill: {policy: same_prefix, salt: 1}": "2:34: salt: expected a text, got 1",
    "prefill: {policy: same_prefix, ties: chanse}": (
        "2:34: ties: 'chanse' is not possible, did you mean 'chance'? (allowed: turn, chance)"
    ),
}


@pytest.mark.parametrize("routing", MISTAKES)
def test_mistakes_are_told_with_their_places(routing: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load(tmp_path, routing)
    assert [str(problem).split("c.yaml:", 1)[1] for problem in caught.value.problems] == [
        MISTAKES[routing].replace("2:", "3:", 1)
    ]


def test_the_schema_has_names_and_arguments() -> None:
    names, *mappings = json_schema()["$defs"]["RoutingConfig"]["properties"]["prefill"]["anyOf"]
    assert names == {"enum": [*POLICIES]}
    (mapping,) = (found for found in mappings if found["properties"]["policy"]["const"] == "same_prefix")
    assert mapping["additionalProperties"] is False
    assert mapping["required"] == ["policy"]
    assert mapping["description"] == SPEC.description
    first_bytes = dict(mapping["properties"]["first_bytes"])
    del first_bytes["title"]
    assert first_bytes == {
        "type": "integer",
        "default": 64,
        "minimum": 1,
        "description": "So many bytes of the prompt are compared.",
    }
    assert mapping["properties"]["ties"]["enum"] == ["turn", "chance"]


def test_the_config_survives_its_way_to_another_process(tmp_path: Path) -> None:
    config = load(tmp_path, "prefill: {policy: same_prefix, first_bytes: 9}")
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert config.model_dump()["routing"]["prefill"] == {"policy": "same_prefix", "first_bytes": 9}
    assert config.model_dump()["routing"]["decode"] == "least_loaded"


# --- at work ------------------------------------------------------------------------------------

Test = Callable[[FakeCluster], Awaitable[None]]
BOTH = "prefill: {policy: same_prefix, first_bytes: 40}\n  decode: {policy: same_prefix, salt: d}"


def run(test: Test, config: Config, make: Callable[..., FakeCluster] = FakeCluster) -> FakeCluster:
    """At the end nothing is held, and every choice was told how its leg had ended, once."""

    async def main() -> FakeCluster:
        cluster = make(routing=config.routing, roles=("prefill", "prefill", "prefill", "decode", "decode"))
        await test(cluster)
        await cluster.aclose()
        cluster.assert_at_rest()
        return cluster

    cluster = asyncio.run(main())
    for policy in SamePrefix.made:
        assert sorted(map(id, policy.chosen)) == sorted(id(choice) for choice, _ in policy.heard)
    return cluster


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 5, **more}


async def answered_once(cluster: FakeCluster) -> None:
    assert (await cluster.ask(chat("hi"))).status == 200


def policy_of(role: str) -> SamePrefix:
    (found,) = (policy for policy in SamePrefix.made if policy.context.role == role)
    return found


def test_prompts_with_one_beginning_go_to_one_worker(tmp_path: Path) -> None:
    async def test(cluster: FakeCluster) -> None:
        for turn in range(12):
            await cluster.ask({"temperature": turn, **chat(f"the same beginning, and then {turn}")})
        for turn in range(12):
            await cluster.ask(chat(f"{turn}: another beginning"))

    config = load(tmp_path, "prefill: {policy: same_prefix, first_bytes: 40}")
    records = [*run(test, config).telemetry.records]
    assert len({record.prefill_worker for record in records[:12]}) == 1
    assert {record.prefill_worker for record in records[12:]} == {f"m/prefill/{index}" for index in range(3)}
    assert records[0].reasons is not None
    assert str(records[0].reasons.prefill_choice) == "Prompts that share their first 40 bytes go to it."


def test_both_legs_hear_that_they_have_answered(tmp_path: Path) -> None:
    run(answered_once, load(tmp_path, BOTH))
    (prefilled,) = policy_of("prefill").heard
    assert (prefilled[1].end, prefilled[1].cached_tokens) == (End.ANSWERED, 16)
    (decoded,) = policy_of("decode").heard
    assert decoded[1].end is End.ANSWERED
    assert decoded[1].moment >= prefilled[1].moment
    assert policy_of("both").heard == []


def test_one_worker_for_all_of_it_hears_too(tmp_path: Path) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await cluster.ask({"model": "m", "prompt": ["one", "two"]}, path="/v1/completions")
        assert answer.status == 200

    run(test, load(tmp_path, BOTH))
    assert [end for _, end in policy_of("both").ends()] == [End.ANSWERED]
    assert policy_of("prefill").heard == policy_of("decode").heard == []


async def refusing(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.answer(400, b"{}", JSON)


async def failing(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.answer(500, b"{}", JSON)


def serve_on(cluster: FakeCluster, role: str, handler: Any) -> None:
    for worker in cluster.registry.workers:
        if worker.address.role == role:
            cluster.upstream.serve(worker.origin, handler)


def test_a_refusal_is_told_and_the_other_leg_was_not_sent(tmp_path: Path) -> None:
    async def test(cluster: FakeCluster) -> None:
        serve_on(cluster, "prefill", refusing)
        assert (await cluster.ask(chat("hi"))).status == 400

    run(test, load(tmp_path, BOTH))
    assert [end for _, end in policy_of("prefill").ends()] == [End.REFUSED]
    assert [end for _, end in policy_of("decode").ends()] == [End.CANCELLED]


def test_each_attempt_is_told_of(tmp_path: Path) -> None:
    async def test(cluster: FakeCluster) -> None:
        serve_on(cluster, "prefill", failing)
        assert (await cluster.ask(chat("hi"))).status == 500

    run(test, load(tmp_path, BOTH))
    prefill = policy_of("prefill")
    assert [end for _, end in prefill.ends()] == [End.FAILED, End.FAILED]
    assert len({name for name, _ in prefill.ends()}) == 2
    assert [end for _, end in policy_of("decode").ends()] == [End.CANCELLED, End.CANCELLED]


def test_a_stream_that_goes_on_elsewhere_is_told_of_twice(tmp_path: Path) -> None:
    async def test(cluster: FakeCluster) -> None:
        assert isinstance(cluster, CutCluster)
        cluster.cuts = [4]
        assert (await cluster.stream(STREAMED)).sent.endswith(DONE)

    run(test, load(tmp_path, BOTH), make=CutCluster)
    assert [end for _, end in policy_of("prefill").ends()] == [End.ANSWERED, End.ANSWERED]
    (first, lost), (second, end) = policy_of("decode").ends()
    assert (lost, end) == (End.FAILED, End.ANSWERED)
    assert first != second


@pytest.mark.parametrize("step", range(1, 24))
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_may_leave_at_any_moment(is_stream: bool, step: int, tmp_path: Path) -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.workers.step = 3
        body = chat("hi", stream=is_stream)
        exchange = FakeExchange(json.dumps(body).encode())
        serving = asyncio.create_task(cluster.serve(exchange))
        for _ in range(step):
            await asyncio.sleep(0)
        exchange.leave()
        await serving

    run(test, load(tmp_path, BOTH))
    decoded = [end for _, end in policy_of("decode").ends()]
    assert decoded in ([], [End.CANCELLED], [End.ANSWERED])
