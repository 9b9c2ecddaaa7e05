"""The config says which engines the workers run, or else a model of 70B on eight H100."""

from __future__ import annotations

from typing import Final

from launch.simulate.engine import EngineModel
from launch.simulate.errors import SimulationError
from orchestrator.config.options import Config, ModelConfig, PoolConfig, SimConfig
from orchestrator.wire.info import Role
from worker.sim.latency import Latency

# Llama-2-70B with tensor parallelism 8 on H100. Prefill and decode follow the timings that splitwise-sim
# publishes (`data/perf_model.csv`, MIT), the square that of FlashAttention's operations. A token of KV cache
# has 320 KiB (80 layers, 8 heads of 128, K and V, 2 bytes), and goes over a link of 40 GB/s.
LARGE: Final = Latency(
    prefill_ms=20.0,
    prefill_us_per_token=90.0,
    prefill_ns_per_token_squared=0.6,
    transfer_ms=4.0,
    transfer_us_per_token=327_680 / 40e9 * 1e6,
    decode_ms_per_token=28.2,
    decode_ms_per_running=0.2,
    decode_ns_per_kv_token=40.0,
)
LARGE_KV_TOKENS: Final = 2700 * 512  # what is left of 640 GB beside the weights, at 320 KiB each
TIMES: Final = tuple(name for name in SimConfig.model_fields if name in Latency.__slots__)
PREFILL_TIMES: Final = tuple(name for name in TIMES if name.startswith("prefill_"))


def engine_models(model: ModelConfig, latency: Latency | None = None) -> dict[Role, EngineModel]:
    """Return what the workers of each role run. The times are `latency`; if that is None, those of the
    config's `sim` sections, if any of them says how long anything takes, and else those of `LARGE`.
    """
    pools = dict(model.pools())
    if latency is None and not any(_has_times(pool) for pool in pools.values()):
        latency = LARGE
    prefill = pools.get("prefill")
    return {
        role: EngineModel(
            latency or latency_of(pool.sim, None if prefill is None else prefill.sim),
            _kv_tokens(pool),
            pool.seats,
        )
        for role, pool in pools.items()
    }


def latency_of(sim: SimConfig, prefill: SimConfig | None = None) -> Latency:
    """Return how long an engine takes for what. Where its section says nothing of prefill, it takes as long
    for that as one of `prefill` does.
    """
    if prefill is not None and not any(getattr(sim, name) for name in PREFILL_TIMES):
        sim = sim.model_copy(update={name: getattr(prefill, name) for name in PREFILL_TIMES})
    return Latency(**{name: getattr(sim, name) for name in TIMES})


def _has_times(pool: PoolConfig) -> bool:
    return any(getattr(pool.sim, name) for name in TIMES)


def _kv_tokens(pool: PoolConfig) -> int:
    sim = pool.sim
    is_said = {"block_size", "num_blocks"} & sim.model_fields_set
    return sim.block_size * sim.num_blocks if is_said else LARGE_KV_TOKENS


def model_named(config: Config, name: str | None) -> ModelConfig:
    """Return the config's model of that name or alias, or its first one. Raises `SimulationError`."""
    if name is not None:
        name = config.aliases.get(name, name)
    found = [model for model in config.models if name in (None, model.name)]
    if not found:
        names = ", ".join(model.name for model in config.models)
        raise SimulationError(f"there is no model {name!r}; there is: {names}")
    return found[0]


def with_workers(model: ModelConfig, prefill: int | None, decode: int | None) -> ModelConfig:
    """Return the model with so many workers instead, where a number is given; without prefill workers for
    0. Raises `SimulationError` where nobody says how many there are.
    """
    pools: dict[str, PoolConfig | None] = {}
    if prefill is not None:
        pools["prefill"] = _of_size(model.prefill or model.decode or model.both, prefill)
    if decode is not None:
        pools["decode"] = _of_size(model.decode or model.both, decode)
    made = model.model_copy(update=pools)
    for role, pool in made.pools():
        if pool.discover is not None and pool.replicas is None:
            option = "--prefill" if role == "prefill" else "--decode"
            raise SimulationError(
                f"the workers of {made.name}/{role} are discovered: say how many with {option}"
            )
    return made


def _of_size(pool: PoolConfig | None, count: int) -> PoolConfig | None:
    if not count:
        return None
    pool = pool or PoolConfig(engine="sim")
    return pool.model_copy(update={"replicas": count, "workers": None, "urls": None})
