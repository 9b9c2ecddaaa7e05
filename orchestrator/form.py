"""The orchestrator has two forms, compiled and pure Python: this decides which one a process imports.

A build is a folder with an extension for each module of `compiled.MODULES` and their common library, made by
`launch/compile.py`. Its name is the digest of all that it depends on, so edited sources have no build until
one is made, and run as they are. A process has one form: all modules come from one build, or all from their
sources.

This imports the standard library only: it runs before anything else does.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

from orchestrator.compiled import MODULES, ROOT, digest, is_compiled, library

FORM_ENV = "BATON_FORM"
BUILDS_ENV = "BATON_BUILDS"
WISHES = ("auto", "pure", "compiled")
MANIFEST = "manifest"  # in a build; as sha256sum writes it
SUFFIX = EXTENSION_SUFFIXES[0]  # it names the machine and the version of Python


class FormError(Exception):
    """The form that is asked for cannot run here; the message says what to do."""


class BadBuild(Exception):
    """A build cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Form:
    """A process runs in this form."""

    is_compiled: bool
    reason: str

    def __str__(self) -> str:
        return f"{'the compiled form' if self.is_compiled else 'pure Python'} ({self.reason})"


def take_form(environ: Mapping[str, str]) -> Form:
    """Have Python import the form that is asked for, and return it.

    Once one of the modules is imported, that decides. Raises `FormError` for a form that nobody knows, and if
    it must be the compiled one and cannot.
    """
    wish = wished(environ)
    if any(module in sys.modules for module in MODULES):
        form = Form(is_compiled(), "imported before")
    else:
        _withdraw()
        form = _chosen(wish, environ)
    if wish == "compiled" and not form.is_compiled:
        raise FormError(f"{FORM_ENV}=compiled, but {form.reason}: {_remedy()}")
    return form


def handed_down(form: Form) -> dict[str, str]:
    """Return what is set in the environment of processes that belong to one of this form.

    Where the sources have been edited since, they run as they are: a process that follows another must serve.
    """
    return {FORM_ENV: "auto" if form.is_compiled else "pure"}


def wished(environ: Mapping[str, str]) -> str:
    """Return the form that is asked for. Raises `FormError` if nobody knows it."""
    wish = environ.get(FORM_ENV) or WISHES[0]
    if wish not in WISHES:
        raise FormError(f"{FORM_ENV} must be one of {', '.join(WISHES)}, not {wish!r}")
    return wish


def _chosen(wish: str, environ: Mapping[str, str]) -> Form:
    if wish == "pure":
        _take_sources()
        return Form(False, f"{FORM_ENV}=pure")
    if is_current_in_place():
        return Form(True, "installed")
    try:
        folder = build_folder(environ)
        _take_build(folder)
    except BadBuild as error:
        _take_sources()
        return Form(False, str(error))
    return Form(True, f"built in {folder}")


def _remedy() -> str:
    return "`make compile` builds it" if is_checkout() else "install Baton where there is a C compiler"


def is_checkout() -> bool:
    """Tell whether our packages are in a checkout: others were built when they were installed, or never."""
    return (ROOT / "setup.py").is_file() and (ROOT / "pyproject.toml").is_file()


def is_current_in_place() -> bool:
    """Tell whether extensions made from the present sources lie beside them, as after an installation."""
    return is_compiled() and (ROOT / f"{library()}__mypyc{SUFFIX}").is_file()


# --- builds -------------------------------------------------------------------------------------


def builds_folder(environ: Mapping[str, str]) -> Path:
    """Return where builds are kept: with the virtual environment, else in the user's cache."""
    if given := environ.get(BUILDS_ENV):
        return Path(given).absolute()
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix, "baton-builds")
    cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "baton", "builds")


def key(root: Path) -> str:
    """Return the name of a build of the checkout at `root`. Raises `OSError`.

    `setup.py` is part of it because it has the compiler's flags, Python because of its ABI.
    """
    parts = (digest(root).encode(), (root / "setup.py").read_bytes(), sys.version.encode(), SUFFIX.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def build_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of the build of the present sources. Raises `BadBuild` if there is none."""
    if not is_checkout():
        raise BadBuild("it was installed without its compiled form, or edited since")
    try:
        folder = builds_folder(environ) / key(ROOT)
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError) as error:  # the latter: nobody knows the user's home
        raise BadBuild(f"no build can be looked for: {error}") from error
    raise BadBuild("no build of these sources is there")


def built(folder: Path) -> dict[str, Path]:
    """Return the modules of a build and their files, all as they were made. Raises `BadBuild`."""
    try:
        lines = (folder / MANIFEST).read_text("ascii").splitlines()
        files = dict(_checked(folder, line) for line in lines)
    except (OSError, ValueError) as error:
        raise BadBuild(f"the build in {folder} is damaged: {error}") from error
    if not set(MODULES) <= set(files):
        raise BadBuild(f"the build in {folder} is damaged: it has not all modules")
    return files


def _checked(folder: Path, line: str) -> tuple[str, Path]:
    expected, name = line.split()
    file = folder / name
    if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
        raise ValueError(f"{name} is not as it was made")
    return name.removesuffix(SUFFIX), file


# --- imports ------------------------------------------------------------------------------------


class _Finder(MetaPathFinder):
    """Python finds modules here first. A file that has gone is an `ImportError`, never the other form."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        file = self._files.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


def _take_build(folder: Path) -> None:
    """Import from a build. Raises `BadBuild`, and then nothing is changed."""
    files = built(folder)
    sys.meta_path.insert(0, _Finder(files))
    try:
        import_module(next(name for name in files if name.endswith("__mypyc")))
    except (ImportError, StopIteration) as error:
        _withdraw()
        raise BadBuild(f"the build in {folder} cannot be loaded: {error}") from error


def _take_sources() -> None:
    """Import sources also where extensions lie beside them."""
    if is_compiled():
        files = {module: ROOT / f"{module.replace('.', os.sep)}.py" for module in MODULES}
        sys.meta_path.insert(0, _Finder(files))


def _withdraw() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
