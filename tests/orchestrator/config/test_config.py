from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.config.file import ConfigErrors, json_schema, load_config
from orchestrator.config.options import Config, split_address
from orchestrator.routing.policies import POLICIES
from tests.orchestrator.certificate import CERT, KEY

SIM = "prefill: {engine: sim}\n    decode: {engine: sim}"
GOOD = f"models:\n  - name: m\n    {SIM}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, so that messages name files as they were given."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(text: str, overrides: Sequence[str] = ()) -> list[str]:
    """What is wrong with a file `c.yaml` in the current directory."""
    Path("c.yaml").write_text(textwrap.dedent(text))
    with pytest.raises(ConfigErrors) as caught:
        load_config("c.yaml", overrides)
    return [str(problem) for problem in caught.value.problems]


def load(text: str, overrides: Sequence[str] = ()) -> Config:
    Path("c.yaml").write_text(textwrap.dedent(text))
    return load_config("c.yaml", overrides)


# Each file, and each of its mistakes: where, and how the message begins.
BROKEN: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["c.yaml:1:1: the file: expected a mapping, got nothing"]),
    "a list": ("- models", ["c.yaml:1:1: the file: expected a mapping, got a list"]),
    "no models": ("base_port: 1", ["c.yaml:1:1: 'models' is missing"]),
    "models empty": ("models: []", ["c.yaml:1:1: models: must not be empty"]),
    "models a mapping": ("models: {name: x}", ["c.yaml:1:1: models: expected a list, got a mapping"]),
    "model a text": ("models: [x]", ["c.yaml:1:10: models[0]: expected a mapping, got 'x'"]),
    "syntax": ("models: [", ["c.yaml:1:10: while parsing a flow node"]),
    "ranks": (
        "models: [{name: m, path: a/b, both: {data_parallel_size: 2, gpus_per_replica: 3}}]",
        ["c.yaml:1:38: 3 GPUs cannot be divided among 2 engines: set gpus_per_replica"],
    ),
    "ranks of others": (
        "orchestrator: {relay_data_parallel_rank: true}\n"
        "models: [{name: m, both: {urls: ['http://h:1'], data_parallel_size: 2}}]",
        ["c.yaml:2:49: with relay_data_parallel_rank clients choose the rank: give one or the other"],
    ),
    "ports of ranks": (
        "models: [{name: m, both: {engine: sim, data_parallel_size: 2, workers: ["
        "{side_channel_port: 7000}, {side_channel_port: 7001}]}}]",
        ["c.yaml:1:101: 127.0.0.1 port 7001 is taken by models.0.both.workers.0.side_channel_port"],
    ),
    "names twice": (
        f"{GOOD}    adapters: [a, m, a]\naliases: {{m: a, a: m, b: c}}",
        [
            "c.yaml:5:19: models.0 has the name 'm' too",
            "c.yaml:5:22: models.0.adapters.0 has the name 'a' too",
            "c.yaml:6:11: models.0 has the name 'm' too",
            "c.yaml:6:17: models.0.adapters.0 has the name 'a' too",
            "c.yaml:6:23: there is no model or adapter 'c'; there is: m, a",
        ],
    ),
    "key twice": (f"{GOOD}base_port: 1\nbase_port: 2", ["c.yaml:6:1: the key 'base_port' was given before"]),
    "unknown key": (
        f"{GOOD}rooting: {{}}",
        ["c.yaml:5:1: unknown key 'rooting', did you mean 'routing'?"],
    ),
    "unknown key, nothing near": (
        f"{GOOD}routing: {{zzz: 1}}",
        [
            "c.yaml:5:11: unknown key 'zzz' "
            "(known keys: prefill, decode, pair, disaggregate, misfits, tokenize_once, failover, "
            "kv_lease_s, handoff_stall_s, kv_missing, prefill_order, overrides)"
        ],
    ),
    "unknown key in a pool": (
        "models: [{name: m, both: {engine: sim, relicas: 2}}]",
        ["c.yaml:1:40: unknown key 'relicas', did you mean 'replicas'?"],
    ),
    "unknown engine": (
        "models: [{name: m, path: a/b, both: {engine: vlm}}]",
        ["c.yaml:1:38: engine: 'vlm' is not possible, did you mean 'vllm'? (allowed: vllm, sim)"],
    ),
    "unknown policy": (
        f"{GOOD}routing: {{prefill: cache_aware}}",
        [f"c.yaml:5:11: prefill: 'cache_aware' is not possible (allowed: {', '.join(POLICIES)})"],
    ),
    "unknown way to disaggregate": (
        f"{GOOD}routing:\n  disaggregate: often",
        ["c.yaml:6:3: disaggregate: 'often' is not possible (allowed: always, auto, strict, never)"],
    ),
    "unknown way to pair": (
        f"{GOOD}routing:\n  pair: some",
        ["c.yaml:6:3: pair: 'some' is not possible (allowed: any, same_revision)"],
    ),
    "a zone of a worker that is not there": (
        "models: [{name: m, both: {urls: ['http://h:1'], zones: {a: ['http://h:2']}}}]",
        ["c.yaml:1:20: both: zones: http://h:2 is none of the urls"],
    ),
    "a worker in two zones": (
        "models: [{name: m, both: {urls: ['http://h:1'], zones: {a: ['http://h:1'], b: ['http://h:1']}}}]",
        ["c.yaml:1:20: both: zones: http://h:1 is in several"],
    ),
    "no is a text": (
        f"{GOOD}orchestrator: {{log: {{access: no}}}}",
        ["c.yaml:5:22: access: expected true or false, got 'no'"],
    ),
    "a time is a text": (
        f"{GOOD}orchestrator: {{backlog: 12:30}}",
        ["c.yaml:5:16: backlog: expected a whole number, got '12:30'"],
    ),
    "number in quotes": (
        f'{GOOD}base_port: "8100"',
        ["c.yaml:5:1: base_port: expected a whole number, got '8100'"],
    ),
    "fraction": (
        "models: [{name: m, both: {engine: sim, replicas: 1.5}}]",
        ["c.yaml:1:40: replicas: expected a whole number, got 1.5"],
    ),
    "true is no number": (
        "models: [{name: m, both: {engine: sim, replicas: true}}]",
        ["c.yaml:1:40: replicas: expected a whole number, got true"],
    ),
    "too small": (
        "models: [{name: m, both: {engine: sim, replicas: 0}}]",
        ["c.yaml:1:40: replicas: must be at least 1, got 0"],
    ),
    "port too large": (
        f"{GOOD}base_port: 65536",
        ["c.yaml:5:1: base_port: must be at most 65535, got 65536"],
    ),
    "zero seconds": (
        f"{GOOD}orchestrator: {{limits: {{body_timeout_s: 0}}}}",
        ["c.yaml:5:25: body_timeout_s: must be more than 0, got 0"],
    ),
    "infinite seconds": (
        f"{GOOD}orchestrator: {{limits: {{body_timeout_s: .inf}}}}",
        ["c.yaml:5:25: body_timeout_s: expected a finite number, got inf"],
    ),
    "no process": (
        f"{GOOD}orchestrator: {{processes: 0}}",
        ["c.yaml:5:16: processes: must be at least 1, got 0"],
    ),
    "address without port": (
        f"{GOOD}orchestrator: {{listen: localhost}}",
        ["c.yaml:5:16: listen: expected HOST:PORT, got 'localhost'"],
    ),
    "address is a number": (
        f"{GOOD}orchestrator: {{listen: 8000}}",
        ["c.yaml:5:16: listen: expected a text, got 8000"],
    ),
    "IPv6 without brackets": (
        f"{GOOD}orchestrator: {{listen: '::1:8000'}}",
        ["c.yaml:5:16: listen: write an IPv6 address in brackets: [::1]:8000"],
    ),
    "open without keys": (
        f"{GOOD}orchestrator:\n  listen: 0.0.0.0:8000\n  admin: '[::]:8001'",
        [
            "c.yaml:6:3: 0.0.0.0:8000 is open to other machines: give api_keys_file, or insecure",
            "c.yaml:7:3: [::]:8001 is open to other machines",
        ],
    ),
    "notice beyond the grace time": (
        f"{GOOD}orchestrator: {{drain_notice_s: 31}}",
        ["c.yaml:5:16: drain_notice_s is longer than timeout_graceful_shutdown"],
    ),
    "files that are not there": (
        f"{GOOD}orchestrator: {{api_keys_file: keys, tls: {{cert: c.pem, key: .}}}}",
        [
            "c.yaml:5:16: cannot read keys: No such file or directory",
            "c.yaml:5:43: cannot read c.pem: No such file or directory",
            "c.yaml:5:56: cannot read .: Is a directory",
        ],
    ),
    "files that are not there beside other mistakes": (
        f"{GOOD}orchestrator: {{listn: 1, api_keys_file: keys, tls: {{cert: c.pem, key: c.pem, colour: 1}}}}",
        [
            "c.yaml:5:16: unknown key 'listn', did you mean 'listen'?",
            "c.yaml:5:26: cannot read keys: No such file or directory",
            "c.yaml:5:53: cannot read c.pem: No such file or directory",
            "c.yaml:5:66: cannot read c.pem: No such file or directory",
            "c.yaml:5:78: unknown key 'colour'",
        ],
    ),
    "a model that is not there beside another mistake": (
        "models: [{name: m, path: ./nowhere, both: {}, colour: 1}]",
        ["c.yaml:1:20: no such directory: ./nowhere", "c.yaml:1:47: unknown key 'colour'"],
    ),
    "a model that may not be needed": (
        "models: [{name: m, path: ./nowhere, both: {engin: sim}}]",
        ["c.yaml:1:44: unknown key 'engin', did you mean 'engine'?"],
    ),
    "policy under another key": (
        f"{GOOD}routing: {{decode: {{polcy: round_robin}}}}",
        ["c.yaml:5:11: decode: unknown key 'polcy', did you mean 'policy'?"],
    ),
    "a session that nobody has": (
        f"{GOOD}routing: {{prefill: {{policy: session, headers: [], fields: []}}}}",
        ["c.yaml:5:11: prefill: without headers and fields no request has a session"],
    ),
    "sessions under names that none can have": (
        f"{GOOD}routing:\n  prefill: {{policy: session, headers: [x-a, 'x b']}}\n"
        "  decode: {policy: session, headers: [''], fields: ['']}",
        [
            "c.yaml:6:3: prefill: no header has the name 'x b'",
            "c.yaml:7:3: decode: no header has the name ''",
        ],
    ),
    "a field without a name": (
        f"{GOOD}routing: {{prefill: {{policy: session, fields: [a, '']}}}}",
        ["c.yaml:5:11: prefill: a field has a name"],
    ),
    "engines that take clients' ids for their own": (
        "models: [{name: m, both: {engine: sim, env: {VLLM_DISABLE_REQUEST_ID_RANDOMIZATION: '1'}}}]",
        ["c.yaml:1:46: VLLM_DISABLE_REQUEST_ID_RANDOMIZATION cannot be given here: clients choose ids"],
    ),
    "variables of ours that say what they cannot": (
        "models: [{name: m, both: {engine: sim, env: {BATON_TRANSPORT: smoke}, "
        "workers: [{env: {BATON_NIXL_PROGRESS_DELAY_US: fast}}]}}]",
        [
            "c.yaml:1:46: BATON_TRANSPORT must be one of json, orjson, msgpack, not 'smoke'",
            "c.yaml:1:88: BATON_NIXL_PROGRESS_DELAY_US must be a number from 0 to 1000000, not 'fast'",
        ],
    ),
    "files of another kind": (
        f"{GOOD}orchestrator: {{api_keys_file: c.yaml, tls: {{cert: c.yaml, key: c.yaml}}}}",
        [
            "c.yaml:5:16: c.yaml:1: ",
            "c.yaml:5:16: c.yaml:2: ",
            "c.yaml:5:16: c.yaml:3: ",
            "c.yaml:5:16: c.yaml:4: ",
            "c.yaml:5:16: c.yaml:5: ",
            "c.yaml:5:39: c.yaml and c.yaml are no certificate and its unencrypted key: ",
        ],
    ),
    "TLS without key": (f"{GOOD}orchestrator: {{tls: {{cert: c.yaml}}}}", ["c.yaml:5:16: 'key' is missing"]),
    "no workers": (
        "models: [{name: m}]",
        ["c.yaml:1:10: 'm' has no workers: give prefill and decode, or both"],
    ),
    "prefill alone": (
        "models: [{name: m, prefill: {engine: sim}}]",
        ["c.yaml:1:20: 'm' has prefill workers and no decode workers"],
    ),
    "decode alone beside both": (
        "models: [{name: m, both: {engine: sim}, decode: {engine: sim}}]",
        ["c.yaml:1:41: 'm' has decode workers and no prefill workers"],
    ),
    "engines that do not hand over": (
        "models: [{name: m, path: a/b, prefill: {engine: sim}, decode: {engine: vllm}}]",
        ["c.yaml:1:64: prefill is sim, so decode must be sim too"],
    ),
    "no path": ("models: [{name: m, both: {}}]", ["c.yaml:1:10: 'm' has no path"]),
    "path that is not there": (
        "models: [{name: m, path: some/where/else, both: {}}]",
        ["c.yaml:1:20: no such directory: some/where/else"],
    ),
    "absolute path that is not there": (
        "models: [{name: m, path: /no/such, both: {}}]",
        ["c.yaml:1:20: no such directory: /no/such"],
    ),
    "two models of one name": (
        "models: [{name: m, both: {engine: sim}}, {name: m, both: {engine: sim}}]",
        ["c.yaml:1:43: models.0 has the name 'm' too"],
    ),
    "replicas and urls": (
        "models: [{name: m, both: {replicas: 1, urls: ['http://h']}}]",
        ["c.yaml:1:20: both: give one of replicas, workers, urls, not replicas and urls"],
    ),
    "url with a path": (
        "models: [{name: m, both: {urls: ['http://h:1/v1']}}]",
        ["c.yaml:1:34: urls[0]: expected only http(s)://HOST:PORT, got 'http://h:1/v1'"],
    ),
    "url of another kind": (
        "models: [{name: m, both: {urls: ['ftp://h', 'h:1', 'http://h:99999', 'http://u@h', 'http://']}}]",
        [
            "c.yaml:1:34: urls[0]: expected http://HOST:PORT or https://HOST:PORT, got 'ftp://h'",
            "c.yaml:1:45: urls[1]: expected http://HOST:PORT",
            "c.yaml:1:52: urls[2]: expected http://HOST:PORT",
            "c.yaml:1:70: urls[3]: expected only http(s)://HOST:PORT",
            "c.yaml:1:84: urls[4]: expected only http(s)://HOST:PORT",
        ],
    ),
    "settings for urls": (
        "models: [{name: m, both: {urls: ['http://h'], args: [x], served_model: n, "
        "zone: b, zones: {a: ['http://h']}}}]",
        ["c.yaml:1:47: args has no effect on urls: Baton does not start these workers"],
    ),
    "seats of prefill workers": (
        "models: [{name: m, prefill: {urls: ['http://h'], seats: 4}, decode: {urls: ['http://i']}}]",
        ["c.yaml:1:50: seats has no effect on prefill workers: give it to decode"],
    ),
    "settings of the other engine": (
        "models:\n- {name: m, path: a/b, both: {sim: {}}}\n"
        "- {name: n, both: {engine: sim, device: cpu, workers: [{gpus: [0]}]}}",
        [
            "c.yaml:2:31: sim has no effect without engine: sim",
            "c.yaml:3:33: device has no effect on the simulated engine",
            "c.yaml:3:57: gpus has no effect on the simulated engine",
        ],
    ),
    "GPUs for a CPU": (
        "models: [{name: m, path: a/b, both: {device: cpu, workers: [{gpus: [0]}]}}]",
        ["c.yaml:1:62: gpus has no effect on device: cpu"],
    ),
    "no such GPU": (
        "models: [{name: m, path: a/b, both: {workers: [{gpus: [-1]}, {gpus: []}]}}]",
        ["c.yaml:1:56: gpus[0]: must be at least 0, got -1", "c.yaml:1:63: gpus: must not be empty"],
    ),
    "workers that listen everywhere": (
        "models: [{name: m, both: {engine: sim, workers: [{host: 0.0.0.0}, {host: 'h:1'}]}}]",
        ["c.yaml:1:51: host: workers are reached at their host", "c.yaml:1:68: host: expected a host name"],
    ),
    "arguments that the plan sets": (
        "models: [{name: m, path: a/b, prefill: {args: [--port, 1, '--kv_transfer_config={}']}, decode: {}}]",
        [
            "c.yaml:1:48: --port cannot be given here: set workers: [{port: ...}]",
            "c.yaml:1:59: --kv-transfer-config cannot be given here: the role decides it",
        ],
    ),
    "a secret as an argument": (
        "models: [{name: m, path: a/b, both: {workers: [{args: [--api-key=hush]}]}}]",
        ["c.yaml:1:56: --api-key cannot be given here: every user of the machine can read it there"],
    ),
    "environment that the plan sets": (
        "models: [{name: m, path: a/b, both: {env: {VLLM_NIXL_SIDE_CHANNEL_PORT: 1}}}]",
        ["c.yaml:1:44: VLLM_NIXL_SIDE_CHANNEL_PORT cannot be given here"],
    ),
    "unclear text": (
        "models: [{name: m, both: {engine: sim, args: [true, 1], env: {A: 1.5, B: ~}}}]",
        ["c.yaml:1:47: args[0]: write the value in quotes", "c.yaml:1:71: B: write the value in quotes"],
    ),
    "one port for two": (
        "models: [{name: m, both: {engine: sim, workers: [{port: 8000}, {port: 7, side_channel_port: 7}]}}]",
        [
            "c.yaml:1:51: 127.0.0.1 port 8000 is taken by orchestrator.listen",
            "c.yaml:1:74: 127.0.0.1 port 7 is taken by models.0.both.workers.1.port",
        ],
    ),
    "listen and admin at one port": (
        f"{GOOD}orchestrator: {{listen: 127.0.0.1:80, admin: 'localhost:80'}}",
        ["c.yaml:5:38: localhost port 80 is taken by orchestrator.listen"],
    ),
    "a url twice in one model": (
        "models: [{name: m, both: {urls: ['http://h', 'http://h:80']}}]",
        ["c.yaml:1:46: h port 80 is taken by models.0.both.urls.0"],
    ),
    "no ports left": (
        "models: [{name: m, both: {engine: sim, replicas: 9}}]\nbase_port: 64530",
        ["c.yaml:2:1: no port from 65530 up is left on 127.0.0.1"],
    ),
    "several of each kind": (
        """\
        orchestrator:
          listen: 10.1.1.1:8000
          proceses: 1
        models:
          - name: m
            prefill: {engine: sm, replicas: 0}
          - nam: n
        routing: {prefill: fastest}
        """,
        [
            "c.yaml:3:3: unknown key 'proceses', did you mean 'processes'?",
            "c.yaml:6:15: engine: 'sm' is not possible, did you mean 'sim'?",
            "c.yaml:6:27: replicas: must be at least 1, got 0",
            "c.yaml:7:5: 'name' is missing",
            "c.yaml:7:5: unknown key 'nam', did you mean 'name'?",
            f"c.yaml:8:11: prefill: 'fastest' is not possible (allowed: {', '.join(POLICIES)})",
        ],
    ),
    "shapes and what follows from other values": (
        """\
        models:
          - name: m
            both: {engine: sim, relicas: 2}
          - name: m
            prefill: {engine: sim}
        orchestrator: {api_keys_file: none, listen: 10.1.1.1:80}
        """,
        [
            "c.yaml:3:25: unknown key 'relicas'",
            "c.yaml:4:5: models.0 has the name 'm' too",
            "c.yaml:5:5: 'm' has prefill workers and no decode workers",
            "c.yaml:6:16: cannot read none: No such file or directory",
        ],
    ),
    "one mistake is said once": (
        "models: [{name: m, pth: a/b, both: {engin: sim}}]\n"
        "orchestrator: {listen: 10.1.1.1:80, api_key_file: k}",
        [
            "c.yaml:1:20: unknown key 'pth', did you mean 'path'?",
            "c.yaml:1:37: unknown key 'engin', did you mean 'engine'?",
            "c.yaml:2:37: unknown key 'api_key_file', did you mean 'api_keys_file'?",
        ],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.usefixtures("here")
def test_all_mistakes_at_once_with_their_places(case: str) -> None:
    text, expected = BROKEN[case]
    found = problems(text)
    assert len(found) == len(expected), found
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start), found


BROKEN_OVERRIDES: list[tuple[list[str], list[str]]] = [
    (["base_port"], ["--set base_port: expected KEY.PATH=VALUE"]),
    (["=1"], ["--set : expected KEY.PATH=VALUE"]),
    (["a..b=1"], ["--set a..b: expected KEY.PATH=VALUE"]),
    (["base_port=x"], ["--set base_port: base_port: expected a whole number, got 'x'"]),
    (["base_prt=1"], ["--set base_prt: unknown key 'base_prt', did you mean 'base_port'?"]),
    (["models.1.name=x"], ["--set models.1.name: no item 1 in a list of 1"]),
    (["models.x.name=x"], ["--set models.x.name: 'x' is not an index of a list"]),
    (["models.0.name.x=1"], ["--set models.0.name.x: nothing can be inside the value 'm'"]),
    (["base_port=[1"], ["--set base_port: while parsing a flow sequence"]),
    (["routing={decode: a, decode: b}"], ["--set routing: the key 'decode' was given before"]),
    (["routing={decode: best}"], ["--set routing: decode: 'best' is not possible"]),
    (["orchestrator.listen=0.0.0.0:1"], ["--set orchestrator.listen: 0.0.0.0:1 is open to other machines"]),
    (["models.0.name=m m", "x=1", "y="], ["--set x: unknown key 'x'", "--set y: unknown key 'y'"]),
]


@pytest.mark.parametrize(("overrides", "expected"), BROKEN_OVERRIDES)
@pytest.mark.usefixtures("here")
def test_mistakes_in_overrides_name_the_key(overrides: list[str], expected: list[str]) -> None:
    found = problems(GOOD, overrides)
    assert len(found) == len(expected), found
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start), found


@pytest.mark.usefixtures("here")
def test_a_policy_that_stands_as_a_name_is_overridden_in_its_long_form() -> None:
    text = f"{GOOD}routing: {{prefill: round_robin, decode: session}}\n"
    routing = load(text, ["routing.prefill.policy=prefix", "routing.decode.load_factor=2"]).routing
    assert routing.prefill.policy == "prefix"
    assert (routing.decode.policy, routing.decode.arguments["load_factor"]) == ("session", 2)
    assert load(GOOD, ["routing.prefill.policy=random"]).routing.prefill.policy == "random"
    [said] = problems(text, ["routing.prefill.polcy=random"])
    assert said.startswith("--set routing.prefill.polcy: ")


@pytest.mark.usefixtures("here")
def test_overrides() -> None:
    config = load(
        GOOD,
        [
            "models.0.prefill.replicas=2",
            "models.0.decode={engine: sim, replicas: 3}",
            "orchestrator.log.format=json",
            "orchestrator.limits.request_timeout_s=5",
            "models.0.prefill.env.A=x=y",
            "orchestrator.admin=127.0.0.1:1",
            "orchestrator.admin=~",
        ],
    )
    (model,) = config.models
    assert model.prefill is not None
    assert model.decode is not None
    assert (model.prefill.replicas, model.decode.replicas) == (2, 3)
    assert model.prefill.env == {"A": "x=y"}
    assert config.orchestrator.log.format == "json"
    assert config.orchestrator.limits.request_timeout_s == 5
    assert config.orchestrator.admin is None


@pytest.mark.usefixtures("here")
def test_numbers_are_text_where_only_text_is_possible() -> None:
    config = load("models: [{name: m, both: {engine: sim, args: [--max-model-len, 4096, 0.4], env: {A: 1}}}]")
    assert config.models[0].both is not None
    assert config.models[0].both.args == ["--max-model-len", "4096", "0.4"]
    assert config.models[0].both.env == {"A": "1"}


@pytest.mark.usefixtures("here")
def test_what_may_be_open_or_shared() -> None:
    load(f"{GOOD}orchestrator: {{listen: '0.0.0.0:1', insecure_no_auth: true}}")
    Path("keys").write_text(f"me {'0' * 64}\n")
    load(f"{GOOD}orchestrator: {{listen: '0.0.0.0:1', api_keys_file: keys}}")
    load("models: [{name: m, both: {urls: ['http://h']}}, {name: n, both: {urls: ['http://h']}}]")
    load("models: [{name: m, prefill: {urls: ['http://h:1']}, decode: {urls: ['http://h:2']}}]")
    load("models: [{name: m, prefill: {urls: ['http://h:1']}, decode: {engine: sim}}]")
    load(f"{GOOD}orchestrator: {{listen: '127.0.0.1:0', admin: '127.0.0.1:0'}}")


@pytest.mark.usefixtures("here")
def test_a_certificate_and_its_key() -> None:
    tls = f"{{cert: {CERT}, key: {KEY}}}"
    assert load(f"{GOOD}orchestrator: {{tls: {tls}}}").orchestrator.tls is not None


@pytest.mark.parametrize("place", ["", "configs", "configs/more"])
def test_files_are_found_from_here_or_beside_the_config(here: Path, place: str) -> None:
    (here / "models" / "tiny").mkdir(parents=True)
    (here / "keys").write_text(f"me {'0' * 64}\n")
    folder = here / place
    folder.mkdir(parents=True, exist_ok=True)
    text = "models: [{name: m, path: models/tiny, both: {}}]\norchestrator: {api_keys_file: keys}"
    (folder / "c.yaml").write_text(text)
    near = load_config(str(folder / "c.yaml"))
    assert near.models[0].path == "models/tiny"
    assert near.orchestrator.api_keys_file == "keys"


def test_files_are_found_from_elsewhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "models" / "tiny").mkdir(parents=True)
    (here / "configs").mkdir()
    (here / "configs" / "c.yaml").write_text("models: [{name: m, path: models/tiny, both: {}}]")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    config = load_config("../configs/c.yaml")
    assert config.models[0].path == str(here / "models" / "tiny")


@pytest.mark.usefixtures("here")
def test_paths_that_need_not_be_here() -> None:
    assert load("models: [{name: m, path: Org/Name-1.5B, both: {}}]").models[0].path == "Org/Name-1.5B"
    elsewhere = "models: [{name: m, path: /data/m, both: {workers: [{host: 10.0.0.1}]}}]"
    assert load(elsewhere).models[0].path == "/data/m"
    load("models: [{name: m, path: gone/for/good, both: {urls: ['http://h']}}]")


@pytest.mark.usefixtures("here")
def test_a_file_that_cannot_be_read() -> None:
    with pytest.raises(ConfigErrors, match=r"^none\.yaml: No such file or directory$"):
        load_config("none.yaml")
    with pytest.raises(ConfigErrors, match=r"^\.: Is a directory$"):
        load_config(".")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("h:1", ("h", 1)), ("[::1]:80", ("::1", 80)), ("127.0.0.1:0", ("127.0.0.1", 0))],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize("text", ["h", ":1", "h:", "h:x", "h:-1", "h:65536", "::1:80", "[]:1", "h:\u0661"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|brackets"):
        split_address(text)


def test_the_schema_knows_every_section() -> None:
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["models"]
