"""A file and `--set` overrides become a `Config`, or all mistakes at once, each with its place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path as FilePath
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.config.base import model_in, options_of
from orchestrator.config.checks import Finding, findings
from orchestrator.config.files import read_config
from orchestrator.config.options import Config, ModelConfig, OrchestratorConfig, RoutingConfig
from orchestrator.config.policies import NAME, PolicyConfig, model_for
from orchestrator.config.yaml12 import MAX_BYTES, Mark, Node, Path, Problem, YamlError, parse
from orchestrator.legs.connectors import CONNECTORS
from orchestrator.routing.policies import POLICIES

# Where policies stand, each as a name or as a mapping.
_POLICIES = frozenset(
    ("routing", name)
    for name, field in RoutingConfig.model_fields.items()
    if isinstance(field.get_default(call_default_factory=True), PolicyConfig)
)

PARENTS_SEARCHED = 2  # above the config file's directory: configs/x.yaml and the project's root


class ConfigErrors(Exception):
    """The config has mistakes: `problems` holds all in the order of the file, each of them a line as text."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(sorted(problems)))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def load_config(
    path: str, overrides: Sequence[str] = (), more: Callable[[Config], Iterator[Finding]] | None = None
) -> Config:
    """Return the config in the file at `path` with each `key.path=value` of `overrides` put over it.

    Relative file names in it are resolved (see `_found`). `more` finds mistakes that only its caller knows.
    Raises `ConfigErrors`.
    """
    try:
        root = parse(_content(path), path)
    except YamlError as error:
        raise ConfigErrors(error.problems) from error
    root = _overridden(root, overrides)
    config, refused = _validated(root)
    problems = [_problem(root, *place_and_message) for place_and_message in refused]
    if config is not None:
        config = _with_found_files(config, FilePath(path).parent)
        found = (*findings(config), *(more(config) if more is not None else ()))
        fresh = (finding for finding in found if not _is_void(finding, refused))
        problems += [_problem(root, finding.path, finding.message) for finding in fresh]
    if problems or config is None:
        raise ConfigErrors(problems)
    return config


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for `baton schema` and for editors."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | Config.model_json_schema() | {"title": "Baton configuration"}


def _content(path: str) -> bytes:
    try:
        return read_config(path, MAX_BYTES)
    except OSError as error:
        raise ConfigErrors([Problem(Mark(path), error.strerror or str(error))]) from error


# --- overrides --------------------------------------------------------------------------------------


def _overridden(root: Node, overrides: Sequence[str]) -> Node:
    problems: list[Problem] = []
    for override in overrides:
        try:
            root = _with_override(root, override)
        except YamlError as error:
            problems += error.problems
    if problems:
        raise ConfigErrors(problems)
    return root


def _with_override(root: Node, override: str) -> Node:
    """Return `root` with one `key.path=value` put over it. Raises `YamlError`."""
    key, equals, value = override.partition("=")
    mark = Mark(f"--set {key}")
    if not equals or not all(key.split(".")):
        raise YamlError([Problem(mark, "expected KEY.PATH=VALUE")])
    try:
        path = _path(key)
        return _spelt_out(root, path).replaced(path, parse(value, mark.source, is_located=False))
    except LookupError as error:
        raise YamlError([Problem(mark, error.args[0])]) from error


def _spelt_out(root: Node, path: Path) -> Node:
    """Return `root` with the policy that `path` leads into as a mapping, if it is a mere name there."""
    place = path[:2]
    node = root.find(place)
    is_name = place in _POLICIES and node is not root and isinstance(node.value, str)
    if len(path) < 3 or not is_name:
        return root
    return root.replaced(place, replace(node, value={NAME: node}))


def _path(key: str) -> Path:
    return tuple(int(part) if part.isascii() and part.isdigit() else part for part in key.split("."))


# --- shapes -----------------------------------------------------------------------------------------

_Refusal = tuple[Path, str]


def _validated(root: Node) -> tuple[Config | None, list[_Refusal]]:
    """Return the config, None if nothing sensible remains of it, and what was refused.

    What is refused is left out, so that the rest can be checked too."""
    data = root.data()
    strange = [*_strange(data)]
    for path, _ in strange:
        _remove(data, path)
    try:
        return Config.model_validate(data), strange
    except ValidationError as error:
        details = error.errors(include_url=False)
    missing = {path for path, _ in strange}
    details = [detail for detail in details if detail["loc"] not in missing]
    refused = [*strange, *((detail["loc"], _refusal(detail, data)) for detail in details)]
    for detail in details:
        _leave_out(data, detail)
    try:
        return Config.model_validate(data), refused
    except ValidationError:
        return None, refused


# Engines may take these for something of theirs.
_VERBATIM = frozenset({"args", "env"})
_VARIABLE = re.compile(r"\$\{\w+\}|\$[A-Z_][A-Z0-9_]*\b")
_MAX_INT = 2**53  # what every reader of JSON can take; nothing that is counted here is as large


def _strange(data: Any, path: Path = ()) -> Iterator[_Refusal]:
    """Yield the values that no option can have, with their places."""
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children:
        if isinstance(value, str) and (found := _VARIABLE.search(value)):
            yield (*path, key), f"{found[0]} stands for itself: {_NO_VARIABLES}"
        elif type(value) is int and abs(value) > _MAX_INT:
            yield (*path, key), f"{_name((*path, key))}: the number {_shown(value)} is too large"
        elif key not in _VERBATIM:
            yield from _strange(value, (*path, key))


_NO_VARIABLES = "this file has no variables; --set KEY.PATH=VALUE gives one value"
_MERGE_KEY = "merge keys (<<) are of YAML 1.1, and this is YAML 1.2: write the keys out, or repeat an alias"


def _leave_out(data: Any, detail: ErrorDetails) -> None:
    if detail["type"] != "missing":
        _remove(data, detail["loc"])


def _remove(data: Any, place: Path) -> None:
    path = _key_path(place)  # without an item the others would change their places
    if not path:
        return
    *way, last = path
    for key in way:
        data = data[key]
    if isinstance(data, dict):
        data.pop(last, None)


def _key_path(path: Path) -> Path:
    """Return `path` without indexes at its end."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    return path


def _is_void(finding: Finding, refused: Sequence[_Refusal]) -> bool:
    """Return whether a mistake may only follow from another one: from a refused value beside or above it."""
    if finding.follows_from is not None:
        starts = [path[: len(cause)] for path, _ in refused for cause in finding.follows_from]
        return any(cause in starts for cause in finding.follows_from)
    places = [_key_path(path)[:-1] for path, _ in refused]
    return any(_is_inside(path, place) for path in (finding.path, *finding.also) for place in places if place)


def _is_inside(path: Path, place: Path) -> bool:
    return len(path) > len(place) and path[: len(place)] == place


def _problem(root: Node, path: Path, message: str) -> Problem:
    return Problem(root.find(path).mark, message)


_EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
# What a name can stand for is in a table of its own, to which a file can add.
_TABLES: dict[str, Mapping[str, object]] = {"unknown_policy": POLICIES, "unknown_connector": CONNECTORS}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _refusal(detail: ErrorDetails, data: Any) -> str:
    """Return one error of pydantic in our words; `data` is the whole file."""
    path: Path = detail["loc"]
    match detail["type"]:
        case "extra_forbidden" if path[-1] == "<<":
            return _MERGE_KEY
        case "extra_forbidden":
            return f"unknown key {path[-1]!r}{_key_hint(str(path[-1]), _known_keys(path[:-1], data))}"
        case "missing":
            return f"{path[-1]!r} is missing"
    return f"{_name(path[:-1] if path[-1:] == ('[key]',) else path)}: {_value_refusal(detail, data)}"


def _value_refusal(detail: ErrorDetails, data: Any) -> str:
    """Return why the value is refused that an error of pydantic is about."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "literal_error" or kind in _TABLES:
        allowed = [*_TABLES[kind]] if kind in _TABLES else _allowed(detail["loc"], data)
        return f"{_shown(value)} is not possible{_instead(str(value), allowed, 'allowed')}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {_shown(value)}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"must be {words} {context[key]:g}, got {_shown(value)}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    return f"{context['error']}" if kind == "value_error" else detail["msg"]


def _name(path: Path) -> str:
    """Return the last key, with the index of an item: `args[1]`."""
    if not path:
        return "the file"
    if isinstance(path[-1], int) and len(path) > 1:
        return f"{path[-2]}[{path[-1]}]"
    return str(path[-1])


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _instead(given: str, possible: Sequence[str], title: str) -> str:
    nearest = difflib.get_close_matches(given, possible, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    return f"{hint} ({title}: {', '.join(possible)})" if title == "allowed" or not nearest else hint


def _key_hint(key: str, known: Sequence[str]) -> str:
    """Return what an unknown key may stand for: a key of another section, or one with nearly its name."""
    sections = [
        name.removesuffix(key).rstrip(".") for name in _all_options() if f".{name}".endswith(f".{key}")
    ]
    if sections and key not in known:
        places = [f"in {section}" if section else "at the top of the file" for section in sections]
        return f", it belongs {' or '.join(dict.fromkeys(places))}"
    return _instead(key, known, "known keys")


@cache
def _all_options() -> tuple[str, ...]:
    """Return the names of all options, those of the three roles once."""
    roles = re.compile(r"^models\.\*\.(prefill|decode|both)(?=\.)")
    return tuple(dict.fromkeys(roles.sub("models.*.ROLE", name) for name, _ in options_of(Config)))


def _known_keys(path: Path, data: Any) -> Sequence[str]:
    model = _model_at(path, data)
    return tuple(model.model_fields) if model is not None else ()


def _allowed(path: Path, data: Any) -> Sequence[str]:
    *way, key = _key_path(path)
    model = _model_at(tuple(way), data)
    return (
        [] if model is None else [str(value) for value in _literals(model.model_fields[str(key)].annotation)]
    )


def _model_at(path: Path, data: Any) -> type[BaseModel] | None:
    """Return the model of the value at `path`, or of the list's items; a policy's name tells its model."""
    model: type[BaseModel] | None = Config
    for key in path:
        data = data[key]
        if isinstance(key, str) and model is not None:
            model = model_in(model.model_fields[key].annotation)
        if model is PolicyConfig:
            model = model_for(data)
    return model


def _literals(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for arg in get_args(annotation) if (found := _literals(arg))), ())


# --- files ------------------------------------------------------------------------------------------


def _with_found_files(config: Config, folder: FilePath) -> Config:
    models = [_with_found_model(model, folder) for model in config.models]
    orchestrator = _with_found_secrets(config.orchestrator, folder)
    return config.model_copy(update={"models": models, "orchestrator": orchestrator})


def _with_found_model(model: ModelConfig, folder: FilePath) -> ModelConfig:
    return model if model.path is None else model.model_copy(update={"path": _found(model.path, folder)})


def _with_found_secrets(orchestrator: OrchestratorConfig, folder: FilePath) -> OrchestratorConfig:
    update: dict[str, Any] = {}
    if orchestrator.api_keys_file is not None:
        update["api_keys_file"] = _found(orchestrator.api_keys_file, folder)
    if orchestrator.tls is not None:
        tls = orchestrator.tls
        pair = {"cert": _found(tls.cert, folder), "key": _found(tls.key, folder)}
        update["tls"] = tls.model_copy(update=pair)
    return orchestrator.model_copy(update=update)


def _found(name: str, folder: FilePath) -> str:
    """Return a relative name as seen from the first directory that has it.

    These are the current directory, the config file's, and the two above that. The name stays as it was if
    none has it (a hub name, or a mistake)."""
    path = FilePath(name).expanduser()
    if path.exists() or path.is_absolute():
        return str(path)
    here = folder.resolve()
    places = (here, *here.parents[:PARENTS_SEARCHED])
    return next((str(place / path) for place in places if (place / path).exists()), name)
