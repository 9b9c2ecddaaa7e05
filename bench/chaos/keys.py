"""A worker asks for another key all at once, in the middle of a load, and later for the right one again."""

from __future__ import annotations

from bench.chaos.client import fetch_json
from bench.chaos.kills import Scale, explain, given_back, load_of
from bench.chaos.report import none_failed
from bench.chaos.site import Orchestrator, Pools, Worker, orchestrating, wait_for
from bench.shared.verdict import Verdict

OTHER_KEY = {"kind": "rekey", "keys": ["another"]}
NO_KEY = {"kind": "rekey", "keys": []}


async def rotated(pools: Pools, scale: Scale) -> list[Verdict]:
    """One decode worker, then one prefill worker answers 401 to everything until its key is put right."""
    reasons: list[str] = []
    async with orchestrating(pools) as orchestrator:
        async with load_of(orchestrator, scale) as load:
            for number, victim in enumerate((pools.decode[0], pools.prefill[0]), start=1):
                await load.reach(number * scale.requests // 3)
                reasons.append(await _with_another_key(orchestrator, pools, victim))
        explain(load.results)
        return [
            none_failed(load.results, "the key of one of 4 decode, then of one of 4 prefill workers changes"),
            Verdict(
                "each is out of service, and `/ready` says why, until its key is right again",
                "; ".join(reasons),
                all("401" in reason for reason in reasons),
            ),
            await given_back(orchestrator),
        ]


async def _with_another_key(orchestrator: Orchestrator, pools: Pools, victim: Worker) -> str:
    """Return what `/ready` says of a worker whose key has changed. Its key is right again then."""
    await victim.add_faults(OTHER_KEY)
    try:
        await wait_for(lambda: _is_unfit(orchestrator, victim), "the worker to be out of service")
        found = await fetch_json(orchestrator.port, "/ready")
    finally:
        await victim.add_faults(NO_KEY)
    await orchestrator.wait_ready(1, len(pools.workers))
    return ", ".join(found.get("workers", {}).values())


async def _is_unfit(orchestrator: Orchestrator, victim: Worker) -> bool:
    return (await orchestrator.worker_states())[victim.port] == "unfit"
