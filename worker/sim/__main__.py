"""`python -m worker.sim` runs one simulated worker in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence

import msgspec

from orchestrator.wire.info import streams_from_env
from worker.info import transport_from_env
from worker.sim import faults
from worker.sim.api import create_app
from worker.sim.faults import Fault
from worker.sim.latency import Latency
from worker.sim.server import SimServer, listen
from worker.sim.settings import Announced, Defects, Publishing, Settings

FAULTS_ENV = "BATON_SIM_FAULTS"
STORE_ENV = "VLLM_ENABLE_RESPONSES_API_STORE"  # vLLM's own: whether responses are kept in memory

_CANNOT_START = 1
_BAD_ARGUMENTS = 2


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        settings = settings_from(args, os.environ)
        listener = listen(args.host, args.port)
    except (ValueError, msgspec.MsgspecError) as error:
        print(f"worker.sim: {error}", file=sys.stderr)
        return _BAD_ARGUMENTS
    except OSError as error:
        print(f"worker.sim: cannot listen on {args.host}:{args.port}: {error}", file=sys.stderr)
        return _CANNOT_START
    server = SimServer(create_app(settings), listener, on_ready=_announce)
    with listener:
        server.run()
    return 0 if server.started else _CANNOT_START


def _announce(url: str) -> None:
    """Say where it answers, if anybody reads that: a closed pipe or a full disk ends no worker."""
    with contextlib.suppress(OSError, ValueError):
        print(f"ready: {url}", flush=True)


def settings_from(args: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Read the settings. Raises `ValueError` for what the parser cannot see, `msgspec.MsgspecError` for
    faults that are none.
    """
    return Settings(
        model_name=args.model_name,
        adapters=tuple(args.adapter),
        role=args.role,
        host=args.host,
        side_channel_port=args.side_channel_port,
        transport=transport_from_env(environ),
        latency=Latency(
            prefill_ms=args.prefill_ms,
            prefill_us_per_token=args.prefill_us_per_token,
            prefill_ns_per_token_squared=args.prefill_ns_per_token_squared,
            transfer_ms=args.transfer_ms,
            transfer_us_per_token=args.transfer_us_per_token,
            decode_ms_per_token=args.decode_ms_per_token,
            decode_ms_per_running=args.decode_ms_per_running,
            decode_ns_per_kv_token=args.decode_ns_per_kv_token,
        ),
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        lease_s=args.lease_s,
        load_failure_policy=args.kv_load_failure_policy,
        late_pulls=args.late_pulls,
        data_parallel_size=args.data_parallel_size,
        scheduling_policy=args.scheduling_policy,
        seed=args.seed,
        api_keys=_api_keys(args.api_key_env, environ),
        faults=_faults(args.fault, environ),
        stores_responses=environ.get(STORE_ENV) == "1",
        kv_events=Publishing(endpoint=args.kv_events, replay=args.kv_events_replay),
        caches=not args.no_prefix_caching,
        announced=_announced(args, environ),
        defects=_defects(args),
        record=args.record,
    )


def _announced(args: argparse.Namespace, environ: Mapping[str, str]) -> Announced:
    return Announced(
        is_plain=args.plain,
        path=args.model_path,
        revision=args.revision,
        dtype=args.dtype,
        kv_dtype=args.kv_cache_dtype,
        tp=args.tensor_parallel_size,
        connector=args.connector,
        engine_version=args.engine_version,
        kv_tokens=args.announced_kv_tokens,
        host=args.side_channel_host,
        streams=streams_from_env(environ),
    )


def _defects(args: argparse.Namespace) -> Defects:
    return Defects(
        weights=args.weights,
        advertised_port=args.advertised_side_channel_port,
        clock_offset_s=args.clock_offset_s,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="worker.sim",
        description="A simulated vLLM worker. BATON_TRANSPORT says what bodies it decodes; with "
        "BATON_STREAMS=mux a connection may carry many requests.",
    )
    add = parser.add_argument
    add("--model-name", required=True, help="what clients put into `model`")
    add("--adapter", action="append", default=[], help="a LoRA adapter's name; may be given more than once")
    add("--role", choices=("prefill", "decode", "both"), default="both", help="announced, not enforced")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=0, help="0 takes a free one; the ready line names it")
    add(
        "--side-channel-port",
        type=int,
        default=0,
        help="where decode workers ask for KV caches; 0: any",
    )
    add("--side-channel-host", metavar="HOST", help="where they reach it, if not at --host")
    add(
        "--api-key-env",
        action="append",
        default=[],
        metavar="NAME",
        help="variable that holds a key to ask for",
    )
    add("--prefill-ms", type=_not_negative, default=0.0, help="of every prompt, beside that of its tokens")
    add("--prefill-us-per-token", type=_not_negative, default=0.0)
    add("--prefill-ns-per-token-squared", type=_not_negative, default=0.0)
    add("--transfer-ms", type=_not_negative, default=0.0, help="of every transfer, beside that of its tokens")
    add("--transfer-us-per-token", type=_not_negative, default=0.0)
    add("--decode-ms-per-token", type=_not_negative, default=0.0, help="a step with one running request")
    add("--decode-ms-per-running", type=_not_negative, default=0.0, help="per further running request")
    add("--decode-ns-per-kv-token", type=_not_negative, default=0.0, help="per token that the batch has")
    add("--block-size", type=_positive, default=16)
    add("--num-blocks", type=_positive, default=65536)
    add("--max-model-len", type=_positive, default=1_000_000)
    add("--max-num-seqs", type=_positive, default=256)
    add("--lease-s", type=_not_negative, default=30.0, help="how long blocks are pinned for a decode worker")
    add("--kv-load-failure-policy", choices=("fail", "recompute"), default="fail")
    add("--late-pulls", choices=("fail", "stale"), default="fail", help="stale: another prompt's KV, as vLLM")
    add("--kv-events", metavar="ENDPOINT", help="publish events of the prefix cache there, with ZeroMQ")
    add("--kv-events-replay", metavar="ENDPOINT", help="where missed batches of them can be asked for")
    add("--no-prefix-caching", action="store_true", help="no prompt is found in the prefix cache")
    add("--announced-kv-tokens", type=_positive, metavar="N", help="in place of those that fit")
    add("--data-parallel-size", type=_positive, default=1, help="engines, which X-data-parallel-rank chooses")
    add(
        "--scheduling-policy",
        choices=("fcfs", "priority"),
        default="fcfs",
        help="how prompts wait, as in vLLM",
    )
    add("--seed", type=int, default=0, help="for faults with a probability")
    add("--fault", action="append", default=[], metavar="JSON", help=f"also as a list in {FAULTS_ENV}")
    add("--plain", action="store_true", help="announce nothing, like vLLM without Baton's plugin")
    add("--model-path", help="announced, like the six that follow")
    add("--revision")
    add("--dtype", default="bfloat16")
    add("--kv-cache-dtype", default="auto")
    add("--tensor-parallel-size", type=_positive, default=1)
    add("--connector", default="sim", help="none: it says that it has none")
    add("--engine-version")
    add(
        "--weights",
        default="",
        metavar="NAME",
        help="the model has these weights, and answers with other words",
    )
    add("--advertised-side-channel-port", type=_positive, help="what hand-offs say instead of the real one")
    add("--clock-offset-s", type=float, default=0.0, help="the Date in answers is wrong by so much")
    add("--record", type=_not_negative_int, nargs="?", const=100, default=0, help="keep the last N bodies")
    return parser


def _api_keys(names: Sequence[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    missing = [name for name in names if not environ.get(name, "").strip()]
    if missing:
        raise ValueError(f"--api-key-env: {', '.join(missing)} is not set")
    return tuple(environ[name].strip() for name in names)


def _faults(given: Sequence[str], environ: Mapping[str, str]) -> tuple[Fault, ...]:
    found = [fault for content in given for fault in faults.parse(content)]
    if content := environ.get(FAULTS_ENV):
        found += faults.parse(content)
    return tuple(found)


def _not_negative(value: str) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is negative or not finite")
    return number


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return number


def _not_negative_int(value: str) -> int:
    number = int(value)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return number


if __name__ == "__main__":
    sys.exit(main())
