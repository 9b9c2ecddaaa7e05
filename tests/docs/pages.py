"""The pages as tests see them: their headings, links and code blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.compiled import ROOT

DOCS = ROOT / "docs"
PAGES = (*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md")

_FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<kind>[\w-]*)$")
_NOTE = re.compile(r"^<!-- (.*) -->$")
_HEADING = re.compile(r"^(#{1,6}) (.*)$")
_LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of code, with the HTML comment above it."""

    page: str
    line: int  # of its first line
    kind: str
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Section:
    """What stands between a heading and the next one."""

    level: int
    title: str
    blocks: tuple[Block, ...]
    text: str


class Page:
    def __init__(self, path: Path, root: Path = ROOT) -> None:
        """Names in blocks, and what is told of the page, are from `root`."""
        self.path = path
        self.name = str(path.relative_to(root))
        self._lines = path.read_text("utf-8").splitlines()
        self.blocks = tuple(self._blocks())
        self._prose = self._without_blocks()

    def _blocks(self) -> Iterator[Block]:
        start, opened = 0, None
        for number, line in enumerate(self._lines):
            if opened is None and (opened := _FENCE.match(line)):
                start = number
            elif opened is not None and line == opened["ticks"]:
                text = "\n".join(self._lines[start + 1 : number]) + "\n"
                yield Block(self.name, start + 2, opened["kind"], self._note(start - 1), text)
                opened = None
        assert opened is None, f"{self.name}:{start + 1}: the block does not end"

    def _note(self, number: int) -> str:
        found = _NOTE.match(self._lines[number]) if number >= 0 else None
        return found[1] if found else ""

    def _without_blocks(self) -> list[str]:
        """The lines; those of blocks are empty."""
        lines = list(self._lines)
        for block in self.blocks:
            count = block.text.count("\n")
            lines[block.line - 2 : block.line + count] = [""] * (count + 2)
        return lines

    def sections(self) -> list[Section]:
        heads = [(n, found) for n, line in enumerate(self._prose) if (found := _HEADING.match(line))]
        ends = [*(n for n, _ in heads[1:]), len(self._lines)]
        return [
            Section(
                len(found[1]),
                found[2],
                tuple(block for block in self.blocks if start < block.line <= end),
                "\n".join(self._prose[start + 1 : end]),
            )
            for (start, found), end in zip(heads, ends, strict=True)
        ]

    def anchors(self) -> set[str]:
        """Where links into this page may lead."""
        return {anchor(section.title) for section in self.sections()}

    def links(self) -> Iterator[tuple[int, str]]:
        """Where each link leads, and its line."""
        for number, line in enumerate(self._prose, start=1):
            for target in _LINK.findall(line):
                yield number, target


def anchor(title: str) -> str:
    """What GitHub, and mkdocs.yml, make of a title."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def read(name: str) -> Page:
    return Page(ROOT / name)
