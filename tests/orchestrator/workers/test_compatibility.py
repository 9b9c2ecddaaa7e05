"""Workers that cannot hand over to each other are kept out of service, by name; nobody else is."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any, get_args

import msgspec
import pytest

from orchestrator.config.options import HealthConfig, RoutingConfig
from orchestrator.wire.info import Role, WorkerInfo
from orchestrator.workers.health import Prober
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import WorkerState
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import Clock, address, announcement, registry_of
from tests.simulation.loop import run_virtually

A = announcement("json")
A = msgspec.structs.replace(A, dtype="bfloat16", block_size=16, connector="NixlConnector", path="org/m", tp=1)
B = msgspec.structs.replace(A, dtype="float32")


def join(registry: Registry, name: str, info: WorkerInfo | None) -> WorkerState:
    """A probe finds the worker well."""
    worker = find(registry, name)
    registry.announce(worker, Introduction(info, None))
    misfit = registry.judge.misfit(worker)
    if misfit is None:
        registry.judge.mark_ready(worker)
    else:
        assert misfit.worker is worker
        registry.judge.note_unfit(worker, misfit.why, misfit.reason)
    return worker.state


def find(registry: Registry, name: str) -> Worker:
    worker = registry.find(f"m/{name}")
    assert worker is not None
    return worker


def new(**counts: int) -> Registry:
    roles: dict[Role, int] = {"prefill": counts.get("p", 1), "decode": counts.get("d", 1), "both": 1}
    return registry_of(roles, ready=False)


def states(registry: Registry) -> dict[str, str]:
    found = {worker.name.removeprefix("m/"): str(worker.state) for worker in registry.workers}
    return {name: state for name, state in found.items() if state != "starting"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "float32"),
        ("block_size", 32),
        ("path", "org/n"),
        ("connector", "Other"),
        ("kv_dtype", "fp8"),
    ],
)
def test_the_worker_the_field_both_values_and_what_to_do_are_named(field: str, value: object) -> None:
    registry = new()
    info = msgspec.structs.replace(A, kv_dtype="auto")
    assert join(registry, "prefill/0", info) == "ready"
    assert join(registry, "decode/0", msgspec.structs.replace(info, **{field: value})) == "unfit"
    status = find(registry, "decode/0").status()
    assert status.reason == f"does not fit the other workers ({field})"
    error = status.last_error or ""
    theirs = getattr(info, field)
    assert error.startswith(f"its {field} is {value!r}, that of m/prefill/0 is {theirs!r}: ")
    assert "same" in error.partition(": ")[2]


def test_a_worker_without_a_connector_is_refused_by_itself() -> None:
    registry = new()
    assert join(registry, "decode/0", msgspec.structs.replace(A, connector="none")) == "unfit"
    assert "--kv-transfer-config" in (find(registry, "decode/0").last_error or "")
    assert join(registry, "both/0", msgspec.structs.replace(A, connector="none")) == "ready"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_of_the_other_role_is_refused_by_itself_and_is_nobodys_partner(role: Role) -> None:
    registry = new(p=2, d=2)
    other: Role = "decode" if role == "prefill" else "prefill"
    right = msgspec.structs.replace(A, role=role)
    wrong = msgspec.structs.replace(B, role=other)
    assert join(registry, f"{role}/0", wrong) == "unfit"
    status = find(registry, f"{role}/0").status()
    assert status.reason == "has another role"
    error = (
        f"it announces the role '{other}', and its pool is '{role}': are the URLs of the two pools exchanged?"
    )
    assert status.last_error == f"{error} else start it with BATON_ROLE={role}"
    assert join(registry, f"{role}/1", right) == "ready"
    assert join(registry, f"{other}/0", wrong) == "unfit"  # with the first it would be a whole path
    assert join(registry, f"{other}/1", msgspec.structs.replace(A, role=other)) == "ready"


def test_an_engine_for_both_serves_any_role_and_any_engine_serves_alone() -> None:
    for announced in get_args(Role):
        registry = new()
        info = msgspec.structs.replace(A, role=announced)
        assert join(registry, "both/0", info) == "ready"
        assert (join(registry, "prefill/0", info) == "ready") == (announced != "decode")
        assert (join(registry, "decode/0", info) == "ready") == (announced != "prefill")


def test_a_worker_in_service_that_was_started_again_in_another_role_goes() -> None:
    registry = new()
    for name, role in (("prefill/0", "prefill"), ("decode/0", "decode")):
        assert join(registry, name, msgspec.structs.replace(A, role=role)) == "ready"
    assert join(registry, "decode/0", msgspec.structs.replace(A, role="prefill")) == "unfit"
    assert states(registry)["prefill/0"] == "ready"


def test_plain_workers_are_taken_as_they_are() -> None:
    registry = new(p=2, d=2)
    assert [join(registry, "prefill/0", A), join(registry, "decode/0", None)] == ["ready", "ready"]
    assert join(registry, "prefill/1", announcement("json")) == "ready"  # of ours, but it says less


def test_revisions_may_differ() -> None:
    registry = new()
    join(registry, "prefill/0", msgspec.structs.replace(A, revision="old"))
    assert join(registry, "decode/0", msgspec.structs.replace(A, revision="new")) == "ready"
    assert [find(registry, name).revision for name in ("prefill/0", "decode/0")] == ["old@0", "new@0"]


def test_versions_of_engines_may_differ_where_pairs_are_kept_within_one() -> None:
    newer = msgspec.structs.replace(A, engine_version="9")
    registry = new()
    registry.reconfigure(HealthConfig(), RoutingConfig(pair="any"))
    join(registry, "prefill/0", A)
    assert join(registry, "decode/0", newer) == "unfit"
    assert "routing.pair: same_revision" in (find(registry, "decode/0").last_error or "")
    registry = new()
    registry.reconfigure(HealthConfig(), RoutingConfig(pair="same_revision"))
    assert [join(registry, "prefill/0", A), join(registry, "decode/0", newer)] == ["ready", "ready"]


@pytest.mark.parametrize(
    "other",
    [{"engine_version": "9"}, {"revision": "new"}, {"deployment": "new"}],
    ids=["version", "revision", "deployment"],
)
def test_a_new_revision_need_not_fit_the_old_one_in_anything(other: dict[str, str]) -> None:
    changed = msgspec.structs.replace(A, kv_dtype="fp8", block_size=64, path="/models/new", **other)
    registry = new(p=2, d=2)
    for name in ("prefill/0", "decode/0"):
        assert join(registry, name, A) == "ready"
    for name in ("prefill/1", "decode/1"):
        assert join(registry, name, changed) == "ready"
    assert all(state == "ready" for state in states(registry).values())
    wrong = msgspec.structs.replace(changed, kv_dtype="auto")  # but those of one revision must fit each other
    registry.judge.mark_gone(find(registry, "decode/1"), "refused")
    assert join(registry, "decode/1", wrong) == "unfit"


def test_workers_that_serve_a_whole_path_keep_their_place() -> None:
    registry = new(p=3, d=3)
    for name in ("prefill/0", "decode/0"):
        assert join(registry, name, A) == "ready"
    for name in ("prefill/1", "prefill/2", "decode/1", "decode/2"):
        assert join(registry, name, B) == "unfit"
    assert states(registry)["prefill/0"] == states(registry)["decode/0"] == "ready"


def test_one_wrong_worker_that_is_up_first_keeps_nobody_out_for_long() -> None:
    registry = new(p=2, d=2)
    assert join(registry, "decode/1", B) == "ready"
    assert join(registry, "prefill/0", A) == "unfit"
    assert join(registry, "decode/0", A) == "ready"  # with prefill/0, which was refused, it is a whole path
    assert join(registry, "prefill/0", A) == "ready"
    assert join(registry, "decode/1", B) == "unfit"
    assert join(registry, "prefill/1", A) == "ready"
    assert "that of m/prefill/0 is 'bfloat16'" in (find(registry, "decode/1").last_error or "")


def test_of_a_pair_that_does_not_fit_the_first_stays() -> None:
    registry = new()
    for _ in range(3):
        assert join(registry, "prefill/0", A) == "ready"
        assert join(registry, "decode/0", B) == "unfit"


def test_a_worker_that_was_refused_joins_once_the_others_are_gone() -> None:
    registry = new()
    join(registry, "prefill/0", A)
    join(registry, "decode/0", B)
    registry.judge.mark_gone(find(registry, "prefill/0"), "refused")
    assert join(registry, "decode/0", B) == "ready"
    assert join(registry, "prefill/0", B) == "ready"


def test_a_worker_that_is_gone_is_no_ally() -> None:
    registry = new(p=1, d=2)
    assert join(registry, "decode/1", B) == "ready"
    join(registry, "prefill/0", A)
    registry.judge.mark_gone(find(registry, "prefill/0"), "refused")
    assert join(registry, "decode/0", A) == "unfit"
    assert states(registry)["decode/1"] == "ready"


def test_a_drained_worker_keeps_nobody_out() -> None:
    registry = new(p=2, d=2)
    join(registry, "prefill/0", A)
    join(registry, "decode/0", A)
    registry.drain(find(registry, "decode/0"))
    registry.drain(find(registry, "prefill/0"))
    assert join(registry, "prefill/1", B) == "ready"


@pytest.mark.parametrize("routing", [{"misfits": "allow"}, {"disaggregate": "never"}])
def test_nobody_is_refused_where_that_is_wanted(routing: dict[str, Any]) -> None:
    registry = new()
    registry.reconfigure(HealthConfig(), RoutingConfig.model_validate(routing))
    assert [join(registry, "prefill/0", A), join(registry, "decode/0", B)] == ["ready", "ready"]
    registry.reconfigure(HealthConfig(), RoutingConfig())
    assert join(registry, "decode/0", B) == "unfit"


def test_models_are_apart() -> None:
    addresses = [address("prefill", 0), address("decode", 0, model="n")]
    registry = Registry(addresses, ["m", "n"], "json", time=Clock())
    for worker, info in zip(registry.workers, (A, B), strict=True):
        registry.announce(worker, Introduction(info, None))
        assert registry.judge.misfit(worker) is None
        registry.judge.mark_ready(worker)


def test_a_hostile_announcement_is_shown_in_one_short_line() -> None:
    registry = new()
    join(registry, "prefill/0", A)
    join(registry, "decode/0", msgspec.structs.replace(A, dtype="\x1b[31m\n" + "x" * 250))
    error = find(registry, "decode/0").last_error or ""
    assert error.isprintable()
    assert len(error) < 300


# --- what the prober makes of it --------------------------------------------------------------------


def test_the_log_names_it_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        registry = Registry(
            [address("prefill", 0), address("decode", 0, port=2)], ["m"], "json", time=loop.time
        )
        said = {"m/prefill/0": A, "m/decode/0": B}

        async def probe(worker: Worker) -> Introduction | None:
            return None if worker.state is WorkerState.READY else Introduction(said[worker.name], None)

        prober = Prober(registry, probe, random=Random(1), time=loop.time)
        prober.start()
        await asyncio.sleep(60)
        await prober.aclose()
        assert states(registry) == {"prefill/0": "ready", "decode/0": "unfit"}

    run_virtually(main())
    lines = [record.getMessage() for record in caplog.records if "m/decode/0" in record.getMessage()]
    assert len(lines) == 1
    assert "its dtype is 'float32', that of m/prefill/0 is 'bfloat16': give both the same --dtype" in lines[0]


def test_a_worker_that_was_started_again_in_place_goes_if_it_does_not_fit_any_more() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        registry = Registry(
            [address("prefill", 0), address("decode", 0, port=2)], ["m"], "json", time=loop.time
        )
        said = {"m/prefill/0": A, "m/decode/0": A}

        async def probe(worker: Worker) -> Introduction | None:
            found = Introduction(said[worker.name], None)
            is_known = worker.state is WorkerState.READY and worker.introduction == found
            return None if is_known else found

        prober = Prober(registry, probe, random=Random(1), time=loop.time)
        prober.start()
        await asyncio.sleep(60)
        assert states(registry) == {"prefill/0": "ready", "decode/0": "ready"}
        for change in ({"dtype": "float32"}, {"role": "prefill"}):
            said["m/decode/0"] = msgspec.structs.replace(A, **change)
            await asyncio.sleep(60)
            assert states(registry) == {"prefill/0": "ready", "decode/0": "unfit"}
            said["m/decode/0"] = A
            await asyncio.sleep(60)
            assert states(registry) == {"prefill/0": "ready", "decode/0": "ready"}
        await prober.aclose()

    run_virtually(main())
