"""NIXL's progress thread is slowed down where its wrapper is as expected, and left alone everywhere else."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from orchestrator.wire.info import NIXL_DELAY_ENV
from worker import nixl_thread
from worker.nixl_thread import delay_from_env, set_progress_delay, slow_down

# As NIXL 1.5.1 is laid out: `nixl` is a front of the package that fits the machine's CUDA.
FRONT = """
import importlib, sys
for name in ("_bindings", "_api"):
    module = importlib.import_module(f"nixl_cu12.{name}")
    sys.modules[f"nixl.{name}"] = module
    globals()[name] = module
"""
BINDINGS = """
class nixlAgentConfig:
    def __init__(self):
        self.pthrDelay = 0

class nixlAgent:
    "An agent."
    def __init__(self, name, config):
        self.name, self.delay = name, config.pthrDelay
"""
API = """
from . import _bindings as nixlBind

class nixl_agent:
    def __init__(self, name, delay=0):
        config = nixlBind.nixlAgentConfig()
        config.pthrDelay = delay
        self.agent = nixlBind.nixlAgent(name, config)
"""
FUNCTION = (
    BINDINGS.replace("class nixlAgent:", "class Agent:")
    + """
def nixlAgent(name, config):
    return Agent(name, config)
"""
)
NO_DELAY = """
class nixlAgentConfig:
    pass

class nixlAgent:
    def __init__(self, name, config):
        pass
"""
OTHER_API = """
class nixl_agent:
    def __init__(self, name):
        self.agent = name
"""


@pytest.fixture(autouse=True)
def python_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delenv(NIXL_DELAY_ENV, raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "other,baton")
    before = {name: module for name, module in sys.modules.items() if name.startswith("nixl")}
    for name in before:
        del sys.modules[name]
    nixl_thread._say.cache_clear()
    yield
    for name in [name for name in sys.modules if name.startswith("nixl")]:
        del sys.modules[name]
    sys.modules.update(before)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, api: str = API, bindings: str = BINDINGS) -> None:
    """A NIXL that stands before any other."""
    for package, files in {
        "nixl": {"__init__": FRONT},
        "nixl_cu12": {"__init__": "", "_bindings": bindings, "_api": api},
    }.items():
        (folder / package).mkdir()
        for name, text in files.items():
            (folder / package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)


def agent(**options: Any) -> Any:
    return importlib.import_module("nixl._api").nixl_agent("a", **options).agent


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def nixl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)


@pytest.mark.usefixtures("nixl")
@pytest.mark.parametrize(("given", "delay"), [(None, 1000), ("", 1000), ("2500", 2500), ("0", 0)])
def test_agents_get_the_delay(given: str | None, delay: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if given is not None:
        monkeypatch.setenv(NIXL_DELAY_ENV, given)
    set_progress_delay()
    assert agent().delay == delay
    assert agent().name == "a"


@pytest.mark.usefixtures("nixl")
def test_nixl_is_not_imported_before_somebody_needs_it() -> None:
    set_progress_delay()
    assert not [name for name in sys.modules if name.startswith("nixl")]


@pytest.mark.usefixtures("nixl")
def test_nixl_may_have_been_imported_before() -> None:
    assert agent().delay == 0
    set_progress_delay()
    assert agent().delay == 1000


@pytest.mark.usefixtures("nixl")
def test_a_process_may_load_the_plugin_more_than_once() -> None:
    set_progress_delay()
    agent()
    set_progress_delay()
    made = agent()
    assert made.delay == 1000
    assert [kind.__name__ for kind in type(made).__mro__].count("nixlAgent") == 2


@pytest.mark.usefixtures("nixl")
def test_modules_and_classes_still_say_where_they_are_from() -> None:
    set_progress_delay()
    api = importlib.import_module("nixl._api")
    assert type(api.__loader__).__name__ == "SourceFileLoader"
    assert api.__spec__ is not None
    assert api.__spec__.loader is api.__loader__
    assert api.nixlBind.nixlAgent.__doc__ == "An agent."


@pytest.mark.usefixtures("nixl")
def test_a_delay_that_nixl_has_chosen_itself_stays() -> None:
    set_progress_delay()
    assert agent(delay=7).delay == 7


@pytest.mark.usefixtures("nixl")
@pytest.mark.parametrize("plugins", [None, "", "other", "baton2"])
def test_a_server_that_is_not_ours_keeps_what_it_has(
    plugins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS")
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    set_progress_delay()
    assert agent().delay == 0


@pytest.mark.parametrize("given", ["soon", "-1", "1e3", "1000001", "9" * 5000, "¹"])
def test_a_delay_that_is_none_is_told_and_not_taken(given: str, caplog: pytest.LogCaptureFixture) -> None:
    assert delay_from_env({NIXL_DELAY_ENV: given}) == 1000
    assert len(said(caplog)) == 1


# --- a NIXL that is another one -----------------------------------------------------------------


def test_without_nixl_nothing_happens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nixl_thread, "_PACKAGES", ("nixl_of_nobody",))
    finders = list(sys.meta_path)
    with caplog.at_level(logging.INFO, "vllm.baton"):
        set_progress_delay()
    assert sys.meta_path == finders
    assert "not installed" in caplog.text


@pytest.mark.parametrize(
    ("api", "bindings"),
    [
        (OTHER_API, ""),
        (API, FUNCTION),
        (API.replace("config.pthrDelay = delay", ""), NO_DELAY),
    ],
    ids=["no bindings", "a function", "no delay"],
)
def test_a_wrapper_of_another_shape_is_left_alone(
    api: str,
    bindings: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(tmp_path, monkeypatch, api, bindings)
    set_progress_delay()
    for _ in range(2):
        agent()
    assert len(said(caplog)) == 1


class FinalMeta(type):
    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> FinalMeta:
        if bases:
            raise TypeError("this class cannot be extended")
        return super().__new__(cls, name, bases, space)


class FinalAgent(metaclass=FinalMeta):
    pass


class Config:
    pthrDelay = 0  # NIXL's name


@pytest.mark.parametrize(
    "bindings",
    [
        SimpleNamespace(),
        SimpleNamespace(nixlAgent=FinalAgent, nixlAgentConfig=Config),
        SimpleNamespace(nixlAgent=lambda name, config: None, nixlAgentConfig=Config),
    ],
    ids=["empty", "cannot be extended", "a function"],
)
def test_bindings_of_another_shape_are_left_alone_and_that_is_said_once(
    bindings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = dict(vars(bindings))
    wrapper = ModuleType("nixl._api")
    wrapper.__dict__["nixlBind"] = bindings
    for _ in range(3):
        slow_down(wrapper, 1000)
    assert vars(bindings) == before
    assert len(said(caplog)) == 1


class Stubborn:
    """A configuration that takes no number."""

    @property
    def pthrDelay(self) -> int:
        return 0

    @pthrDelay.setter
    def pthrDelay(self, value: object) -> None:
        raise TypeError("a timedelta is wanted")


def test_a_configuration_that_takes_no_number_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Agent:
        def __init__(self, name: str, config: Stubborn) -> None:
            self.name = name

    bindings: Any = SimpleNamespace(nixlAgent=Agent, nixlAgentConfig=Stubborn)
    wrapper = ModuleType("nixl._api")
    wrapper.__dict__["nixlBind"] = bindings
    slow_down(wrapper, 1000)
    assert [bindings.nixlAgent(name, Stubborn()).name for name in "ab"] == ["a", "b"]
    assert len(said(caplog)) == 1
