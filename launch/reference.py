"""docs/commands.md, made of the command line itself, so that an option is described where it is declared.

It is printed by `python -m launch.reference`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, Final

from launch.exits import Exit

_HEAD: Final = """\
# Commands

`baton COMMAND --help` prints what stands here. Relative paths in CONFIG are looked up from the current
directory, then from the file's and the two above that.

This page is made by `python -m launch.reference`.
"""

# Where more is to be read of a command.
_MORE: Final = {
    "init": ("the first steps", "quickstart.md"),
    "up": ("logs, disks and what is executed", "operating.md"),
    "check": ("all options", "config.md"),
    "doctor": ("what it looks for", "doctor.md"),
    "render": ("from a file to a cluster", "kubernetes.md"),
    "worker": ("workers of your own", "quickstart.md#workers-of-your-own"),
    "simulate": ("traces, policies and numbers of workers", "simulate.md"),
    "key": ("who may do what", "operating.md#keys-who-may-do-what"),
    "explain-route": ("how workers are chosen", "routing.md#why-these-workers"),
    "explain": ("all options", "config.md"),
    "schema": ("all options", "config.md"),
    "bench": ("load tests of your own cluster", "bench.md"),
}


def page(parser: argparse.ArgumentParser) -> str:
    """Return docs/commands.md for the parser of the command line."""
    parts = [_HEAD]
    for name, about, command in _commands(parser, "baton"):
        parts += _section(name, about, command)
    parts += ["## Exit codes\n", "| code | means |", "|---|---|"]
    parts += [f"| {code.value} | {_cell(code.meaning)} |" for code in Exit]
    return "\n".join(parts) + "\n"


def _commands(
    parser: argparse.ArgumentParser, prefix: str
) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Yield the commands that do something by themselves, with what is said of each."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        for told in action._choices_actions:
            command, name = action.choices[told.dest], f"{prefix} {told.dest}"
            if any(isinstance(one, argparse._SubParsersAction) for one in command._actions):
                yield from _commands(command, name)
            else:
                yield name, command.description or told.help or "", command


def _section(name: str, about: str, command: argparse.ArgumentParser) -> Iterator[str]:
    words = [_usage(one) for one in command._actions if not one.option_strings]
    yield f"## `{name}`\n"
    yield f"`{' '.join([name, *words])}`: {_sentence(about)}\n"
    actions = [one for one in command._actions if one.dest != "help" and one.help != argparse.SUPPRESS]
    if actions:
        yield "| argument | what it is for |"
        yield "|---|---|"
        yield from (f"| {_name(one)} | {_cell(_help(one))} |" for one in actions)
        yield ""
    more = _MORE.get(name.split()[1])
    if more is not None:
        yield f"More: [{more[0]}]({more[1]}).\n"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _usage(action: argparse.Action) -> str:
    return f"[{_metavar(action)}]" if action.nargs in ("?", "*") else _metavar(action)


def _name(action: argparse.Action) -> str:
    options = [option for option in action.option_strings if option.startswith("--")] or action.option_strings
    takes_value = bool(options) and action.nargs != 0
    words = [*(f"`{option}`" for option in action.option_strings)] or [f"`{_metavar(action)}`"]
    if takes_value:
        words[-1] = f"{words[-1][:-1]} {_metavar(action)}`"
    return _cell(", ".join(words))


def _metavar(action: argparse.Action) -> str:
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    if action.metavar is not None:
        return action.metavar
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    return action.dest.upper().replace("_", "-")


def _help(action: argparse.Action) -> str:
    known: dict[str, Any] = {**vars(action), "prog": "baton"}
    return (action.help or "") % known


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    from launch.cli import _parser

    print(page(_parser()), end="")
