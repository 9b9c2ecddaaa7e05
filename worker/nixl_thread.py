"""NIXL's progress thread sleeps between two looks: this is a general plugin of vLLM, loaded in all its
processes.

NIXL's Python wrapper (1.5.1) has no option for it and sets `pthrDelay` to 0, with which the UCX progress
thread's `poll()` returns at once, for ever: an idle worker burns a core and starves its own engine. The delay
becomes the longest time that `poll()` waits; events on the descriptors of UCX end it at once. What it means
on GPUs: docs/performance.md, "Idle workers".

NIXL is not imported here: most processes of a worker never need it, and vLLM has to set UCX up before. The
wrapper is changed when somebody else imports it.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from orchestrator.wire.info import DEFAULT_NIXL_DELAY_US, MOST_NIXL_DELAY_US, NIXL_DELAY_ENV

_PLUGIN = "baton"
_PLUGINS_ENV = "VLLM_PLUGINS"

_PACKAGES = ("nixl", "nixl_rocm")  # one of which vLLM imports
_WRAPPER = re.compile(r"nixl(_\w+)?\._api")  # `nixl_cu12._api` and the like, behind `nixl._api`

_log = logging.getLogger("vllm.baton")  # below vLLM's own, whose handler writes the worker's log


def set_progress_delay() -> None:
    """Have NIXL agents of this process made with the delay. It may be called again, and never raises.

    It does nothing where Baton's plugin is not asked for by name: in a server that is not ours.
    """
    delay_us = delay_from_env(os.environ)
    if not delay_us or any(isinstance(finder, _WrapperFinder) for finder in sys.meta_path):
        return
    if not any(package in sys.modules or find_spec(package) for package in _PACKAGES):
        _log.info("NIXL is not installed: there is no progress thread to be slowed down")
        return
    sys.meta_path.insert(0, _WrapperFinder(delay_us))
    for wrapper in [module for name, module in sys.modules.items() if _WRAPPER.fullmatch(name)]:
        slow_down(wrapper, delay_us)


def delay_from_env(environ: Mapping[str, str]) -> int:
    """Read the delay in microseconds; 0 leaves NIXL as it comes. A value that is none is told in the log, and
    not taken.
    """
    given = environ.get(NIXL_DELAY_ENV, "").strip()
    if not given:
        return DEFAULT_NIXL_DELAY_US if _PLUGIN in environ.get(_PLUGINS_ENV, "").split(",") else 0
    if given.isascii() and given.isdigit() and len(given) < 10 and int(given) <= MOST_NIXL_DELAY_US:
        return int(given)
    _log.warning(
        "%s=%r is no number from 0 to %d: it is %d",
        NIXL_DELAY_ENV,
        given,
        MOST_NIXL_DELAY_US,
        DEFAULT_NIXL_DELAY_US,
    )
    return DEFAULT_NIXL_DELAY_US


def slow_down(wrapper: ModuleType, delay_us: int) -> None:
    """Let `wrapper`, NIXL's Python wrapper, make its agents with this delay where it asks for none.

    A wrapper of another shape stays as it is; the log says so.
    """
    try:
        bindings: Any = wrapper.nixlBind
        if getattr(bindings.nixlAgent, "baton_delay_us", None) is None:
            bindings.nixlAgent = _slow(bindings.nixlAgent, delay_us)
    except Exception as error:  # whatever it is: the worker is worth more
        _leave_alone(error)


def _slow(agent: Any, delay_us: int) -> Any:
    class SlowAgent(agent):  # type: ignore[misc]  # a class of NIXL's bindings
        baton_delay_us = delay_us

        def __init__(self, *args: Any, **options: Any) -> None:
            _set_delay((*args, *options.values()), delay_us)
            super().__init__(*args, **options)

    return functools.update_wrapper(SlowAgent, agent, updated=())


def _set_delay(arguments: Sequence[Any], delay_us: int) -> None:
    """Set the delay in the configuration that is among an agent's arguments. A delay that NIXL has chosen
    itself stays.
    """
    try:
        config = next(argument for argument in arguments if hasattr(argument, "pthrDelay"))
        if config.pthrDelay == 0:
            config.pthrDelay = delay_us
            _log.info(
                "NIXL's progress thread waits for up to %d us; %s=0 leaves it", delay_us, NIXL_DELAY_ENV
            )
    except Exception as error:
        _leave_alone(error)


@functools.cache  # said once
def _say(message: str) -> None:
    _log.warning("NIXL's progress thread is left as it comes, and may burn a core: %s", message)


def _leave_alone(error: Exception) -> None:
    _say(f"its Python wrapper is not as expected: {error!r}")


class _WrapperFinder(MetaPathFinder):
    """It finds NIXL's wrapper where Python does, and sees to it that it is changed once it is loaded."""

    def __init__(self, delay_us: int) -> None:
        self._delay_us = delay_us

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _WRAPPER.fullmatch(fullname):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _WrapperLoader(spec.loader, self._delay_us)
        return spec


class _WrapperLoader(Loader):
    def __init__(self, loader: Loader, delay_us: int) -> None:
        self._loader = loader
        self._delay_us = delay_us

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        slow_down(module, self._delay_us)
