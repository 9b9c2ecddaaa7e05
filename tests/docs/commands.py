"""Command lines as they stand on the pages: taken apart, and held against what there is."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator

from launch.cli import _parser
from orchestrator.compiled import ROOT

# Commands of others: what they may be given is theirs to say.
OTHERS = {"cd", "docker", "export", "git", "helm", "kubectl", "pip", "python", "vllm"}
PLACEHOLDERS = {"SECONDS": "1", "N": "1", "COUNT": "1"}  # where a number is wanted
_TARGET = re.compile(r"^([\w-]+):", re.MULTILINE)


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of each command; prompts, comments and brackets of synopses are left out."""
    joined = re.sub(r"\\\n", " ", text)
    for line in _whole_lines(joined):
        line = re.sub(r"^\s*\$ ", "", line)
        for part in re.split(r" && | \| ", line):
            words = shlex.split(_without_brackets(part), comments=True)
            if words:
                yield words


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, of which one whose quotes are open goes on."""
    begun = ""
    for line in text.splitlines():
        begun += line
        try:
            shlex.split(begun, comments=True)
        except ValueError:
            begun += "\n"
        else:
            yield begun
            begun = ""
    assert not begun, f"a quote is not closed: {begun}"


def _without_brackets(line: str) -> str:
    return re.sub(r"(?<= )\[(-[^\]]*)\]", r"\1", line)


def fault(words: list[str]) -> str | None:
    """Why a command cannot be as it is written; None if it can, or is another program's."""
    program, *arguments = words
    program = program.rpartition("/")[2]
    if program == "baton":
        return _fault_of_ours(arguments)
    if program == "make":
        return _fault_of_make(arguments)
    if program == "python" and arguments[:1] == ["-m"]:
        return _fault_of_module(arguments[1])
    return None if program in OTHERS else f"there is no rule for {program!r}"


def _fault_of_ours(arguments: list[str]) -> str | None:
    try:
        _parser().parse_args([PLACEHOLDERS.get(word, word) for word in arguments])
    except SystemExit as ended:
        return None if not ended.code else f"baton {' '.join(arguments)}: refused"
    return None


def _fault_of_make(arguments: list[str]) -> str | None:
    targets = {*_TARGET.findall((ROOT / "Makefile").read_text()), ".venv-bench-peers/setup-done"}
    unknown = [word for word in arguments if "=" not in word and word not in targets]
    return f"no such targets: {unknown}" if unknown else None


def _fault_of_module(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"there is no module {name}"


# --- in prose -----------------------------------------------------------------------------------------


def fault_in_prose(words: list[str]) -> str | None:
    """Why what is called a command of ours in a sentence is none; arguments may be left out there."""
    parser: argparse.ArgumentParser = _parser()
    for word in words:
        if word.startswith("-"):
            if word.partition("=")[0] not in parser._option_string_actions:
                return f"no option {word}"
            continue
        found = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if found is None:
            continue
        if word not in found.choices:
            return f"no command {word}"
        parser = found.choices[word]
    return None
