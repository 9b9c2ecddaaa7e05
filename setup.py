"""Baton's hot modules as C extensions, where they can be built; everything else is in pyproject.toml.

BATON_COMPILE=1: or else fail. BATON_COMPILE=0: not at all. An editable installation has none unless it is 1:
its sources are there to be edited, and what is compiled would not notice.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from launch.compile import lacks  # noqa: E402  # both import nothing that is not Python's own
from orchestrator.compiled import MYPYC, SOURCES, library  # noqa: E402

WISH = os.environ.get("BATON_COMPILE", "")
IS_EDITABLE = "editable_wheel" in sys.argv or "develop" in sys.argv


def main() -> None:
    if WISH == "0" or (IS_EDITABLE and WISH != "1"):
        setup()
        return
    missing = lacks()
    if missing:
        _give_up(missing)
        setup()
    elif "egg_info" in sys.argv:  # pip asks what the build needs
        setup(setup_requires=_requirements())
    else:
        setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildIfPossible})


class BuildIfPossible(build_ext):
    """Leaves the package as it is, in Python, if its extensions cannot be built."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # of whatever kind: the installation goes on
            _give_up(f"they cannot be built: {error}")
            for built in Path(self.build_lib).rglob("*.so"):
                built.unlink()
            self.extensions = []


def _give_up(why: str) -> None:
    if WISH == "1":
        sys.exit(f"BATON_COMPILE=1, but {why}")
    print(f"Baton's hot modules stay Python: {why}", file=sys.stderr)


def _requirements() -> list[str]:
    """mypyc, and what it takes the types of: all that Baton itself needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [f"mypy[mypyc]=={MYPYC}", *project["dependencies"]]


def _extensions() -> list[Extension]:
    try:
        from mypyc.build import mypycify
    except ImportError:
        _give_up(f"mypy {MYPYC} is not installed")
        return []
    try:
        extensions = mypycify(list(SOURCES), opt_level="3", debug_level="0", group_name=library())
    except SystemExit as refusal:  # of types, mostly: it has printed them
        _give_up(f"mypyc refuses them: {refusal}")
        return []
    for extension in extensions:
        # Nothing outside calls what is inside, so calls need no table, and may be inlined: 4 % of a request.
        extension.extra_compile_args = [*extension.extra_compile_args, "-fvisibility=hidden", "-fno-plt"]
    return extensions


main()
