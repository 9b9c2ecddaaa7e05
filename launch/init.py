"""`baton init` writes a config to start from, with comments, and the schema that editors show help from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from launch.exits import Exit

DEFAULT_FILE = "baton.yaml"
SCHEMA = Path(".baton/schema.json")  # beside the file
CHECKOUT = Path(__file__).parents[1]  # of an installed package: where nothing of a checkout is

_OF_CHECKOUT = re.compile(
    r"(?P<key>^ *(?:- )?path: )?(?P<path>(?<![\w/.-])configs/models/[\w-]+)", re.MULTILINE
)
_is_plain = re.compile(r"[\w/.-]+", re.ASCII).fullmatch  # in YAML, without quotes

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
  # prefill: prefix           # who reads a prompt; docs/routing.md has all policies
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
DEFAULT_ENGINE = "vllm"


class InitError(Exception):
    """The file cannot be written; the message says why and what to do."""


def config_text(file: str, engine: str) -> str:
    """Return a config for one of `ENGINES`."""
    return _HEAD.format(schema=SCHEMA, file=file) + _MODELS[engine] + _TAIL


def example_text(name: str, file: str) -> str:
    """Return the example config of this name as a text for `file`. Raises `InitError`.

    Its comments name `file`, and a model that lies in the checkout is named by its absolute path.
    """
    from launch.examples import examples

    known = examples()
    if name not in known:
        raise InitError(f"there is no example {name!r}; there is: {', '.join(known) or 'none'}")
    text = known[name].read_text("utf-8").replace(f"configs/{name}.yaml", file)
    return _OF_CHECKOUT.sub(_with_place, text)


def _with_place(found: re.Match[str]) -> str:
    place = CHECKOUT / found["path"]
    if not place.exists():
        return found[0]
    key, path = found["key"] or "", str(place)
    return key + (json.dumps(path) if key and not _is_plain(path) else path)


def missing_models(text: str) -> list[str]:
    """Return the models of a config's text that are in a checkout alone, which is not there."""
    return list(dict.fromkeys(found["path"] for found in _OF_CHECKOUT.finditer(text) if found["key"]))


def init(file: str, engine: str, example: str | None, *, force: bool) -> Exit:
    """Write the file, a copy of the example if one is named, and the schema beside it. Raises `InitError`."""
    path = Path(file)
    text = config_text(file, engine) if example is None else example_text(example, file)
    is_new = not os.path.lexists(path)
    try:
        with path.open("a" if force else "x", encoding="utf-8") as opened, _undone(path, is_new):
            _write_schema(path.parent / SCHEMA)
            opened.truncate(0)
            opened.write(text)
            opened.flush()
    except FileExistsError as error:
        raise InitError(f"{file} is there already: give another name, or --force") from error
    except OSError as error:
        raise InitError(f"{file} cannot be written: {error.strerror}") from error
    print(f"wrote {file}; next: baton check {file}, baton doctor {file}, baton up {file}")
    for model in missing_models(text):
        print(
            f"before that, change `path: {model}`: it is in a checkout of Baton; name a model that you have"
        )
    return Exit.OK


@contextmanager
def _undone(path: Path, is_new: bool) -> Iterator[None]:
    """Leave no new file behind if the block fails."""
    try:
        yield
    except (OSError, InitError):
        if is_new:
            path.unlink(missing_ok=True)
        raise


def _write_schema(path: Path) -> None:
    from orchestrator.config.file import json_schema

    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
    except FileExistsError as error:
        raise InitError(f"{path.parent} is no directory: {path} is to be written; move it away") from error
    except OSError as error:
        raise InitError(f"{error.filename or path} cannot be written: {error.strerror}") from error
