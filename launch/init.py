"""`baton init` writes a config to start from, with comments, and the schema that editors show help from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from launch.exits import Exit

DEFAULT_FILE = "baton.yaml"
SCHEMA = Path(".baton/schema.json")  # beside the file

_HEAD = """\
# yaml-language-server: $schema={schema}
#
# One orchestrator, and the workers of a model: prefill workers read prompts, decode workers write answers.
#
#   baton check {file}     names all mistakes in this file
#   baton doctor {file}    tries what it describes, and says what would not work
#   baton up {file}        starts it
#
# The line at the top lets editors complete and explain every option; `baton schema` prints them all.

orchestrator:
  listen: 127.0.0.1:8000      # the OpenAI API; beyond loopback it wants api_keys_file
  admin: 127.0.0.1:8001       # /metrics and /admin, for the operator
  # api_keys_file: keys       # of API keys: baton key new NAME --scope infer --file keys
  # processes: 2              # more of them for many short answers

models:
"""
_TAIL = """
routing:
  disaggregate: always        # never: one worker serves each request
  # prefill: least_loaded     # who reads a prompt; docs/routing.md has all policies
  # decode: least_loaded      # who writes the answer
  # failover: true            # a stream whose worker is lost is resumed by another one

# base_port: 8100             # workers listen from here upwards, side channels from 1000 above
"""
_MODELS: Mapping[str, str] = {
    "sim": """\
  - name: sim                 # what clients put into "model"
    prefill:
      engine: sim             # answers as vLLM does, with made-up words
      replicas: 2
      sim: {prefill_us_per_token: 50, transfer_us_per_token: 5}
    decode:
      engine: sim
      replicas: 2
      sim: {decode_ms_per_token: 10, decode_ms_per_running: 0.2}
""",
    "vllm": """\
  - name: qwen                # what clients put into "model"
    path: Qwen/Qwen3-0.6B     # a model of the hub, or a directory
    prefill:
      engine: vllm
      device: cpu
      replicas: 1
      args: &args [--max-model-len, 4096, --max-num-seqs, 32]
    decode:
      engine: vllm
      device: cpu
      replicas: 1
      seats: 32               # requests that it serves at once: its --max-num-seqs
      args: *args
      # env: {VLLM_CPU_KVCACHE_SPACE: "4"}   # GiB
""",
    "gpu": """\
  - name: qwen                # what clients put into "model"
    path: Qwen/Qwen3-8B       # a model of the hub, or a directory
    prefill:
      engine: vllm
      device: cuda
      replicas: 1             # each takes the next GPUs of this machine
      gpus_per_replica: 1     # 2: one engine over two of them
      args: &args [--max-model-len, 32768, --max-num-seqs, 256]
    decode:
      engine: vllm
      device: cuda
      replicas: 1
      gpus_per_replica: 1
      seats: 256              # requests that it serves at once: its --max-num-seqs
      args: *args
      # workers: [{host: node-2, port: 8100}]   # in place of replicas: on other machines
""",
}
ENGINES = tuple(_MODELS)


class InitError(Exception):
    """The file cannot be written; the message says why and what to do."""


def config_text(file: str, engine: str) -> str:
    """Return a config for one of `ENGINES`."""
    return _HEAD.format(schema=SCHEMA, file=file) + _MODELS[engine] + _TAIL


def example_text(name: str) -> str:
    """Return the example config of this name. Raises `InitError`."""
    from launch.examples import examples

    known = examples()
    if name not in known:
        raise InitError(f"there is no example {name!r}; there is: {', '.join(known) or 'none'}")
    return known[name].read_text("utf-8")


def init(file: str, engine: str, example: str | None, *, force: bool) -> Exit:
    """Write the file, a copy of the example if one is named, and the schema beside it. Raises `InitError`."""
    path, text = Path(file), config_text(file, engine) if example is None else example_text(example)
    try:
        with path.open("w" if force else "x", encoding="utf-8") as opened:
            opened.write(text)
        _write_schema(path.parent / SCHEMA)
    except FileExistsError as error:
        raise InitError(f"{file} is there already: give another name, or --force") from error
    except OSError as error:
        raise InitError(f"{file} cannot be written: {error.strerror}") from error
    print(f"wrote {file}; next: baton check {file}, baton doctor {file}, baton up {file}")
    return Exit.OK


def _write_schema(path: Path) -> None:
    from orchestrator.config.file import json_schema

    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
