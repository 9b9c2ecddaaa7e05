"""The command line says what was probably meant where a word of it is wrong."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

_WRONG = re.compile(r"invalid choice: '([^']*)'|unrecognized arguments: (\S+)")


class Parser(argparse.ArgumentParser):
    """A parser whose errors name the nearest command, option or choice."""

    groups: Mapping[str, Sequence[str]] = {}  # commands by what they are for
    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as `argparse` does, and remember what was given for the errors."""
        self._given = tuple(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """Return the help; the commands are in their groups, those that are in none last."""
        if not self.groups:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, actions in _grouped(self, self.groups):
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.start_section("options")
        formatter.add_arguments(options_of(self))
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        super().error(f"{message}{self._hint(message)}")

    def _hint(self, message: str) -> str:
        from difflib import get_close_matches  # only errors need it

        found = _WRONG.search(message)
        wrong = (found[1] or found[2]).partition("=")[0] if found else ""
        nearest = get_close_matches(wrong, [*self._names()], 1)
        return f", did you mean {nearest[0]!r}?" if nearest else ""

    def _names(self) -> Iterator[str]:
        """Return what could stand in place of a wrong word: of a command, if one was given."""
        commands = commands_of(self)
        chosen = next((commands[word] for word in self._given if word in commands), self)
        yield from commands if chosen is self else ()
        for action in options_of(chosen):
            yield from action.option_strings
            yield from map(str, action.choices or ())


def _grouped(
    parser: argparse.ArgumentParser, groups: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, list[argparse.Action]]]:
    """Yield each group with what the help says of its commands."""
    told = {
        action.dest: action
        for found in parser._actions
        if isinstance(found, argparse._SubParsersAction)
        for action in found._choices_actions
    }
    for title, names in groups.items():
        yield title, [told.pop(name) for name in names if name in told]
    if told:
        yield "more", [*told.values()]


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return a parser's commands by name; none if it has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return a parser's options, and the arguments that are none, in the order of the help."""
    return [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]


def seconds(text: str) -> float:
    """Return a time in seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value
