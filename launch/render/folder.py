"""Files are written into a folder, over those that were written by this command and not changed since."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from launch.render.errors import RenderError
from orchestrator.config.printing import one_line

_MARK = "Written by `baton render`, which writes over it while the rest has the SHA-256"
_BESIDE = (".", "templates")  # where it writes
_MAX_NAMED = 5


def write(folder: Path, files: Mapping[str, str], *, force: bool) -> list[str]:
    """Write all files, and remove those of an earlier run that are none of them any more.

    `force` writes over files of others, too; none of theirs is ever removed. Returns the paths of other YAML
    in the folder, which is left alone. Raises `RenderError` if a file of others is in the way, then nothing
    is written; `OSError` if the folder cannot be written.
    """
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    ours = {name for name, path in there.items() if is_ours(path)}
    foreign = sorted(name for name in files if name in there and name not in ours)
    if foreign and not force:
        raise RenderError(_in_the_way(folder, foreign))
    for name, text in files.items():
        _replace(folder / name, marked(name, text))
    for name in ours - files.keys():
        there[name].unlink()
    return sorted(
        name for name in there.keys() - ours - files.keys() if name.endswith((".yaml", ".yml", ".json"))
    )


def marked(name: str, text: str) -> str:
    """Return the text with a first line that says whose it is."""
    line = f"{_MARK} {_digest(text)}"
    return f"<!-- {line} -->\n{text}" if name.endswith(".md") else f"# {line}\n{text}"


def is_ours(path: Path) -> bool:
    """Tell whether a file is as this command wrote it."""
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        return False
    _, _, rest = text.partition("\n")
    return _MARK in text and text == marked(path.name, rest)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


def _files(folder: Path) -> Iterator[Path]:
    for place in _BESIDE:
        inner = folder / place
        if inner.is_dir():
            yield from (path for path in sorted(inner.iterdir()) if path.is_symlink() or not path.is_dir())


def _in_the_way(folder: Path, names: Iterable[str]) -> str:
    shown = [*names]
    more = f" and {len(shown) - _MAX_NAMED} more" if len(shown) > _MAX_NAMED else ""
    listed = ", ".join(map(one_line, shown[:_MAX_NAMED])) + more
    return (
        f"{one_line(str(folder))}: {listed} would be written over, and baton render has not written it, "
        "or it was changed since: name another folder, or add --force"
    )


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole: whoever reads meanwhile gets the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, "utf-8")
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
