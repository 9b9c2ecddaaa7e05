from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.config.file import ConfigErrors, json_schema, load_config
from orchestrator.config.options import Config, split_address
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
    load("models: [{name: m, path: /cache/m, both: {replicas: 2, discover: {dns: 'workers:8100'}}}]")


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
