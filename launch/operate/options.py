"""These commands look at what runs, and change it. Nothing heavy is imported to know their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from launch import remote
from launch.arguments import Parser, seconds

Command = Callable[[argparse.Namespace], int]
Commands = argparse._SubParsersAction  # of `Parser`

DEFAULT_LINES = 100
TIMEOUT_S = 600.0


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the commands, each with what carries it out as `command`."""
    _add_ps(commands)
    _add_top(commands)
    _add_logs(commands)
    _add_drain(commands)
    _add_restart(commands)
    _add_scale(commands)
    _add_down(commands)


def _add(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    text: str,
    run: Command,
    *,
    is_local: bool,
    outputs: Sequence[str] = ("text", "json"),
) -> Parser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(command=remote.command(run))
    remote.add_options(parser, is_local=is_local)
    parser.add_argument("-o", "--output", choices=outputs, default="text", help="default: %(default)s")
    return parser


def _add_ps(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "list the processes of a run: state and since when, restarts, seats, how fast each is"
    _add(commands, "ps", text, _ps, is_local=False, outputs=("text", "json", "names"))


def _add_top(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "show live what each worker does, what waits, and how fast all is; Ctrl-C ends it"
    top = _add(commands, "top", text, _top, is_local=False)
    top.add_argument("--once", action="store_true", help="print one frame, as without a terminal")
    top.add_argument(
        "--interval-s", type=seconds, default=2.0, metavar="SECONDS", help="between two frames; default: 2"
    )


def _add_logs(commands: argparse._SubParsersAction[Parser]) -> None:
    logs = _add(commands, "logs", "print what the processes of a run have written", _logs, is_local=True)
    logs.add_argument(
        "names", metavar="WORKER", nargs="*", help="MODEL/ROLE/INDEX, or orchestrator; default: all"
    )
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what is written from now on")
    logs.add_argument(
        "-n",
        "--lines",
        type=_lines,
        default=DEFAULT_LINES,
        metavar="LINES",
        help="so many of each at first; default: %(default)s",
    )


def _add_drain(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "send a worker no new requests, until it is undrained; those that it serves go on"
    drain = _add(commands, "drain", text, _drain, is_local=False)
    _add_workers(drain)
    drain.add_argument("--wait", action="store_true", help="wait until it serves none any more")
    _add_timeout(drain, "--wait ends with exit code 1 after this many seconds; it stays drained", "--timeout")
    undrain = _add(commands, "undrain", "let a drained worker serve again", _undrain, is_local=False)
    _add_workers(undrain)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="WORKER", nargs="*", help="MODEL/ROLE/INDEX, as `baton ps` shows it")
    which = parser.add_argument_group("a worker by itself, whatever orchestrators send to it")
    which.add_argument(
        "--self",
        dest="is_self",
        action="store_true",
        help="the worker at --url tells all orchestrators; its key is read from BATON_WORKER_API_KEY",
    )
    which.add_argument(
        "--url", default="http://127.0.0.1:8000", metavar="URL", help="of that worker; default: %(default)s"
    )


def _add_timeout(parser: argparse.ArgumentParser, text: str, *others: str) -> None:
    parser.add_argument(
        "--timeout-s",
        *others,
        type=seconds,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help=f"{text}; default: 600",
    )


def _add_restart(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "restart workers one after the other, each when its last request has ended; none fails by that"
    restart = _add(commands, "restart", text, _restart, is_local=True)
    restart.add_argument(
        "names", metavar="WORKER", nargs="*", help="MODEL/ROLE/INDEX, as `baton ps` shows it"
    )
    restart.add_argument(
        "--rolling", action="store_true", help="all workers, then orchestrators if there are several"
    )
    _add_force(restart)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force", action="store_true", help="go on where requests may fail: see what is refused without it"
    )
    _add_timeout(parser, "a worker whose requests have not ended by then goes on, or is cut by --force")


def _add_scale(commands: argparse._SubParsersAction[Parser]) -> None:
    text = (
        "start workers of a pool, or stop some, until there are N; holds until the run ends. With CONFIG in "
        "their place: print how many workers the load wants, and why"
    )
    scale = _add(commands, "scale", text, _scale, is_local=False)
    scale.add_argument(
        "pool", metavar="MODEL/ROLE", help="for example sim/decode; or CONFIG, the file of a run"
    )
    scale.add_argument("count", metavar="N", type=_count, nargs="?", help="workers on this machine")
    _add_force(scale)


def _add_down(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "stop a run as Ctrl-C does: requests end first"
    down = _add(commands, "down", text, _down, is_local=True)
    down.add_argument("--now", action="store_true", help="cut requests, and kill what does not end at once")
    _add_timeout(down, "exit code 1 if it has not ended after this many seconds")


# --- values ---------------------------------------------------------------------------------------


def _lines(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"expected a number of lines, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got {text!r}; `baton down` stops all")
    return int(text)


# --- what carries them out, imported when it is needed ----------------------------------------------


def _ps(arguments: argparse.Namespace) -> int:
    from launch.operate.ps import run

    return run(arguments)


def _top(arguments: argparse.Namespace) -> int:
    from launch.operate.top import run

    return run(arguments)


def _logs(arguments: argparse.Namespace) -> int:
    from launch.operate.follow import run

    return run(arguments)


def _drain(arguments: argparse.Namespace) -> int:
    from launch.operate import drain, self_drain

    return self_drain.drain(arguments) if arguments.is_self else drain.drain(arguments)


def _undrain(arguments: argparse.Namespace) -> int:
    from launch.operate import drain, self_drain

    return self_drain.undrain(arguments) if arguments.is_self else drain.undrain(arguments)


def _restart(arguments: argparse.Namespace) -> int:
    from launch.operate.change import restart

    return restart(arguments)


def _scale(arguments: argparse.Namespace) -> int:
    if arguments.count is None:
        from launch.operate.wanted import wanted

        return wanted(arguments)
    from launch.operate.change import scale

    return scale(arguments)


def _down(arguments: argparse.Namespace) -> int:
    from launch.operate.down import down

    return down(arguments)
