"""Shells complete the words of `baton` by a script that is made from its parser."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Iterator

from launch.arguments import commands_of, options_of

SHELLS = ("bash", "zsh")
_FILE_NAMES = ("CONFIG", "DIR")  # what an option takes
# What a place is for that takes what runs, with the function that names it.
_RUNNING = {"WORKER": "_baton_workers", "MODEL/ROLE": "_baton_pools"}

_BASH = """\
# Completion of `baton`; `baton completion {shell}` prints it anew after an update.
{before}_baton_workers() {{
    local name  # compared, never expanded: a name is what somebody has called a model
    while IFS= read -r name; do
        [[ $name == "$1"* ]] && COMPREPLY+=("$name")
    done < <(baton ps -o names 2>/dev/null)
}}
_baton_pools() {{
    local name
    while IFS= read -r name; do
        [[ $name == "$1"* ]] && COMPREPLY+=("$name")
    done < <(baton ps -o names 2>/dev/null | sed -n 's|/[^/]*$||p' | sort -u)
}}
_baton() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {commands} -- "$word"))
        return
    fi
    case "$command $before" in
{values}
    esac
    case "$word" in -*)
        case "$command" in
{options}
        esac
        return
    esac
    case "$command" in
{places}
    esac
}}
complete -o filenames -F _baton baton
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return what a shell of `SHELLS` has to read."""
    commands = commands_of(parser)
    return _BASH.format(
        shell=shell,
        before=_ZSH if shell == "zsh" else "",
        commands=_quoted([*commands, *_flags(parser)]),
        values="\n".join(line for name, one in commands.items() for line in _values(name, one)),
        options="\n".join(f"            {name}) {_reply(_flags(one))} ;;" for name, one in commands.items()),
        places="\n".join(f"        {name}) {_place(one)} ;;" for name, one in commands.items()),
    )


def _values(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    """Return a case for each option that takes one of some words, or a file."""
    for action in options_of(command):
        if action.option_strings and (action.choices or action.metavar in _FILE_NAMES):
            patterns = "|".join(f'"{name} {option}"' for option in action.option_strings)
            yield f"        {patterns}) {_completed(action)}; return ;;"


def _completed(action: argparse.Action) -> str:
    return _reply(map(str, action.choices)) if action.choices else _FILES


def _flags(command: argparse.ArgumentParser) -> list[str]:
    return [option for action in options_of(command) for option in action.option_strings]


def _place(command: argparse.ArgumentParser) -> str:
    """Return what completes a word that is no option: what runs if the command takes that, choices if it has
    some, else files.
    """
    places = [action for action in options_of(command) if not action.option_strings]
    running = [_RUNNING[str(action.metavar)] for action in places if action.metavar in _RUNNING]
    if running:
        return f'{running[0]} "$word"'
    return next((_completed(action) for action in places if action.choices), _FILES if places else ":")


_FILES = 'COMPREPLY=($(compgen -f -- "$word"))'


def _reply(words: Iterable[str]) -> str:
    return f'COMPREPLY=($(compgen -W {_quoted(words)} -- "$word"))'


def _quoted(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))
