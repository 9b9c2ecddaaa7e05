"""This is the command `baton`.

Each subcommand imports what it needs, so that `baton --help` comes at once.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # that of `typing` costs an import, as all that stands here before Ctrl-C is heard
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from launch.arguments import Parser
    from launch.plan import Plan
    from orchestrator.config.options import Config
    from orchestrator.form import Form

    Command = Callable[[argparse.Namespace], int]

# How `baton --help` lists the commands.
_GROUPS = {
    "begin": ["init", "check", "doctor", "plan", "explain", "schema", "metrics", "completion"],
    "run": ["up", "down", "worker", "orchestrator", "key"],
    "look at what runs": ["ps", "top", "logs", "events", "trace", "explain-route"],
    "change what runs": ["drain", "undrain", "restart", "scale"],
    "measure": ["bench", "simulate"],
}
_INTERRUPTED = 130  # `Exit.INTERRUPTED`, whose import may be what is interrupted


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (`launch/exits.py`)."""
    try:
        return _run(argv)
    except KeyboardInterrupt:  # while it starts: a command that runs hears it by itself
        return _INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    from launch.exits import Exit

    try:
        return _done(argv)
    except _Usage as error:
        _complain(error)
        return Exit.USAGE
    except OSError as error:
        if not _is_of_output(error):
            raise
        from launch.local.output import leave

        leave(sys.stdout)
        if isinstance(error, BrokenPipeError):  # `baton schema | head`
            leave(sys.stderr)
        else:
            _complain(_Usage(f"baton: the output cannot be written: {error.strerror}"))
        return Exit.FAILED


def _done(argv: Sequence[str] | None) -> int:
    """Run the command; what it has printed is written then, also if it ends by `SystemExit`."""
    try:
        arguments = _parser().parse_args(argv)
        command: Command = arguments.command
        return command(arguments)
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def _is_of_output(error: OSError) -> bool:
    """Return whether it is of a stream that is open already: no file is named, and such a stream ends so."""
    import errno

    return error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO)


def _complain(error: Exception) -> None:
    from orchestrator.config.printing import masked, printable

    print(printable(masked(str(error))), file=sys.stderr)


class _Usage(Exception):
    """The user must change what the message says; it may have several lines."""


def _parser() -> Parser:
    import argparse

    from launch.arguments import Parser
    from launch.bench import options
    from launch.exits import Exit
    from launch.operate import options as operating

    parser = Parser(
        prog="baton",
        description="Disaggregated LLM serving: one OpenAI API in front of prefill and decode workers.",
        epilog="exit codes:\n" + "\n".join(f"  {code.value:3}  {code.meaning}" for code in Exit),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.groups = _GROUPS
    parser.add_argument("--version", action=_version_action(), help="say which version and form this is")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_init(commands)
    up = _add(commands, "up", _up, "start all that CONFIG puts on this machine; Ctrl-C stops it")
    up.add_argument(
        "--dry-run", action="store_true", help="print what would be started, as `baton plan` does"
    )
    up.add_argument(
        "--compile",
        action="store_true",
        help="of a checkout: build the orchestrator's compiled form while workers start, if it is not there",
    )
    _add(commands, "plan", _plan, "print what `baton up` would start: commands, environment, ports")
    _add(commands, "check", _check, "validate CONFIG; print all mistakes at once, as FILE:LINE:COL: message")
    _add_doctor(commands)
    operating.add_commands(commands)
    _add(commands, "orchestrator", _orchestrator, "run the orchestrator alone, in the foreground")
    worker = _add(commands, "worker", _worker, "run one worker alone, in the foreground")
    worker.add_argument("name", metavar="MODEL/ROLE/INDEX", help="for example tiny-chat/prefill/0")
    _add_simulate(commands)
    _add_key(commands)
    _add_explain_route(commands)
    _add_trace(commands)
    _add_events(commands)
    schema = commands.add_parser("schema", help="print the JSON Schema of CONFIG", allow_abbrev=False)
    schema.set_defaults(command=_schema)
    _add_metrics(commands)
    _add_explain(commands)
    _add_completion(commands)
    bench = commands.add_parser("bench", help=options.ABOUT, description=options.ABOUT, allow_abbrev=False)
    options.add_options(bench)
    bench.set_defaults(command=_bench)
    return parser


def _add_explain(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "say what an option or section of CONFIG is for, and what it may be; alone: list the sections"
    parser = commands.add_parser("explain", help=text, description=text, allow_abbrev=False)
    parser.add_argument("option", metavar="OPTION", nargs="?", help="for example routing.prefill")
    parser.set_defaults(command=_explain)


def _add_explain_route(commands: argparse._SubParsersAction[Parser]) -> None:
    from launch import explain_route

    text = explain_route.ABOUT
    parser = commands.add_parser("explain-route", help=text, description=text, allow_abbrev=False)
    explain_route.add_options(parser)
    parser.set_defaults(command=_explain_route)


def _add_trace(commands: argparse._SubParsersAction[Parser]) -> None:
    from launch import trace

    trace.add_options(_asking(commands, "trace", trace.ABOUT, _trace))


def _add_events(commands: argparse._SubParsersAction[Parser]) -> None:
    from launch import events

    events.add_options(_asking(commands, "events", events.ABOUT, _events))


def _asking(commands: argparse._SubParsersAction[Parser], name: str, text: str, command: Command) -> Parser:
    """Add a command that asks what runs."""
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(command=command)
    return parser


def _add_simulate(commands: argparse._SubParsersAction[Parser]) -> None:
    from launch.simulate import options as simulation

    simulation.add_options(_add(commands, "simulate", _simulate, simulation.ABOUT))


def _add_init(commands: argparse._SubParsersAction[Parser]) -> None:
    from launch import init

    text = "write a config to start from, with comments, and its schema for editors"
    parser = commands.add_parser("init", help=text, description=text, allow_abbrev=False)
    parser.add_argument(
        "file", metavar="FILE", nargs="?", default=init.DEFAULT_FILE, help="default: %(default)s"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--engine",
        choices=init.ENGINES,
        help="sim: simulated workers; vllm: vLLM on the CPU; gpu: vLLM on two GPUs; "
        f"default: {init.DEFAULT_ENGINE}",
    )
    which.add_argument(
        "--example", metavar="NAME", help="copy an example config instead: quickstart, sim, gpu-1p1d, ..."
    )
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    parser.set_defaults(command=_init)


def _add_metrics(commands: argparse._SubParsersAction[Parser]) -> None:
    from launch.monitoring.command import ABOUT, PRINTED

    parser = commands.add_parser("metrics", help=ABOUT, description=ABOUT, allow_abbrev=False)
    parser.add_argument("what", choices=tuple(PRINTED))
    parser.set_defaults(command=_metrics)


def _add_completion(commands: argparse._SubParsersAction[Parser]) -> None:
    from launch.completion import SHELLS

    text = 'print a script that lets a shell complete words: eval "$(baton completion bash)"'
    parser = commands.add_parser("completion", help=text, description=text, allow_abbrev=False)
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(command=_completion)


def _add_doctor(commands: argparse._SubParsersAction[Parser]) -> None:
    from launch.arguments import seconds

    text = "look for what keeps the cluster of CONFIG from serving, and say what to do"
    doctor = _add(commands, "doctor", _doctor, text)
    doctor.add_argument(
        "--static", action="store_true", help="ask no worker, and start none: files, settings, this machine"
    )
    doctor.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="a line for each check, or JSON"
    )
    doctor.add_argument(
        "--timeout-s",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long a worker may take for an answer; default: %(default)g",
    )


def _version_action() -> type[argparse.Action]:
    """Return what answers `--version`: only then is it looked up, as that takes a look at all sources."""
    import argparse

    class Version(argparse.Action):
        def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
            super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

        def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
            print(_version())
            parser.exit()

    return Version


def _version() -> str:
    from orchestrator import __version__

    return f"baton {__version__} ({'compiled' if _take_form().is_compiled else 'pure Python'})"


def _take_form() -> Form:
    from orchestrator.form import FormError, take_form

    try:
        return take_form(os.environ)
    except FormError as error:
        raise _Usage(str(error)) from error


def _add(commands: argparse._SubParsersAction[Parser], name: str, command: Command, text: str) -> Parser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="the YAML file")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY.PATH=VALUE",
        action="append",
        default=[],
        help="override one value, e.g. models.0.prefill.replicas=2; may be repeated",
    )
    parser.set_defaults(command=command)
    return parser


def _add_key(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "make API keys, which say who may ask and for what"
    key = commands.add_parser("key", help=text, description=text, allow_abbrev=False)
    made = key.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "new", help="make one", description="Print a new key; only its digest is kept.", allow_abbrev=False
    )
    made.add_argument("name", metavar="NAME", help="the log and the metrics call its owner so")
    made.add_argument(
        "--scope",
        dest="scopes",
        metavar="SCOPE",
        action="append",
        help="what it is for: requests (infer, if none is given), /metrics, or the whole admin listener; "
        "may be repeated",
    )
    for limit, what in _KEY_LIMITS.items():
        made.add_argument(f"--{limit}", metavar="N", help=what)
    made.add_argument("--file", help="add its line to this file (orchestrator.api_keys_file)")
    made.set_defaults(command=_new_key)


_KEY_LIMITS = {
    "rpm": "it may send this many requests per minute; without it as orchestrator.tenants has it, 0: any",
    "tpm": "it may use this many tokens per minute",
    "concurrency": "it may have this many requests open at a time",
    "weight": "its share of the seats beside other keys, which usually have 1",
}


# --- commands ---------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> int:
    from launch.engines.base import PlanError
    from launch.exits import Exit
    from launch.surroundings import check_environment
    from orchestrator.config.printing import one_line

    config = _load(arguments, starts=True)
    try:
        check_environment(os.environ)
    except PlanError as error:
        raise _Usage(str(error)) from error
    _note_missing_gpus(arguments, config)
    _note_missing_scopes(config)
    names = ", ".join(model.name for model in config.models)
    print(one_line(f"{arguments.config}: right; models: {names}"))
    return Exit.OK


def _new_key(arguments: argparse.Namespace) -> int:
    from launch.keys import KeyRefused, new_key

    try:
        given = {limit: getattr(arguments, limit) for limit in _KEY_LIMITS}
        limits = [f"{limit}={value}" for limit, value in given.items() if value is not None]
        return new_key(arguments.name, ",".join(arguments.scopes or ["infer"]), arguments.file, limits)
    except KeyRefused as error:
        raise _Usage(str(error)) from error


def _init(arguments: argparse.Namespace) -> int:
    from launch import init

    try:
        engine = arguments.engine or init.DEFAULT_ENGINE
        return init.init(arguments.file, engine, arguments.example, force=arguments.force)
    except init.InitError as error:
        raise _Usage(str(error)) from error


def _completion(arguments: argparse.Namespace) -> int:
    from launch.completion import script
    from launch.exits import Exit

    print(script(_parser(), arguments.shell), end="")
    return Exit.OK


def _metrics(arguments: argparse.Namespace) -> int:
    from launch.exits import Exit
    from launch.monitoring.command import PRINTED

    print(PRINTED[arguments.what](), end="")
    return Exit.OK


def _schema(_: argparse.Namespace) -> int:
    import json

    from launch.exits import Exit
    from orchestrator.config.file import json_schema

    print(json.dumps(json_schema(), indent=2))
    return Exit.OK


def _explain(arguments: argparse.Namespace) -> int:
    from launch import manual
    from launch.exits import Exit

    try:
        text = manual.overview() if arguments.option is None else manual.explained(arguments.option)
    except manual.NoSuchOption as error:
        raise _Usage(str(error)) from error
    print(text, end="")
    return Exit.OK


def _plan(arguments: argparse.Namespace) -> int:
    from launch.exits import Exit
    from launch.listing import plan_text

    config = _load(arguments, starts=True)
    plan = _make_plan(arguments, config)
    _note_missing_gpus(arguments, config)
    print(plan_text(plan))
    return Exit.OK


def _up(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return _plan(arguments)
    from orchestrator.loop.signals import hold_hangup

    hold_hangup()
    from launch.local.up import up

    config = _load(arguments, starts=True)
    return up(config, _make_plan(arguments, config), arguments.config, compiles=arguments.compile)


def _orchestrator(arguments: argparse.Namespace) -> int:
    from orchestrator.loop.signals import hold_hangup

    hold_hangup()
    form = _take_form()  # before anything is imported that has two
    config = _load(arguments)
    from launch.exits import Exit
    from orchestrator.control.reload import ConfigSource
    from orchestrator.errors import SettingError, StartError
    from orchestrator.run import run

    try:
        return run(config, ConfigSource(arguments.config, arguments.overrides), form)
    except StartError as error:
        _complain(error)
        return Exit.USAGE if isinstance(error, SettingError) else Exit.FAILED


def _worker(arguments: argparse.Namespace) -> int:
    """Become the worker; this does not return if that is possible."""
    from launch.engines.base import PlanError
    from launch.plan import worker_specs
    from launch.surroundings import look_around
    from orchestrator.config.printing import one_line

    config = _load(arguments, starts=True)
    try:
        specs = worker_specs(config, look_around())
    except PlanError as error:
        raise _Usage(one_line(f"{arguments.config}: {error}")) from error
    spec = specs.get(arguments.name)
    if spec is None:
        names = "".join(f"\n  {one_line(name)}" for name in specs) or " none that Baton starts"
        raise _Usage(f"{arguments.config}: no worker {arguments.name!r}; there are:{names}")
    sys.stdout.flush()
    os.execvpe(spec.argv[0], spec.argv, {**os.environ, **spec.env})  # noqa: S606  # the worker, without a shell


def _simulate(arguments: argparse.Namespace) -> int:
    from launch.exits import Exit
    from launch.simulate.command import run
    from launch.simulate.errors import OutOfReach, SimulationError
    from orchestrator.config.printing import one_line

    try:
        return run(arguments, _load(arguments))
    except OutOfReach as error:
        print(one_line(f"baton simulate: {error}"), file=sys.stderr)
        return Exit.FAILED
    except SimulationError as error:
        raise _Usage(one_line(f"baton simulate: {error}")) from error
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _explain_route(arguments: argparse.Namespace) -> int:
    from launch import explain_route

    return explain_route.run(arguments)


def _trace(arguments: argparse.Namespace) -> int:
    from launch import trace

    return trace.run(arguments)


def _events(arguments: argparse.Namespace) -> int:
    from launch import events

    return events.run(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    from launch.doctor.command import run

    return run(arguments, config)


def _bench(arguments: argparse.Namespace) -> int:
    from launch.bench.command import run

    return run(arguments)


def _load(arguments: argparse.Namespace, *, starts: bool = False) -> Config:
    """Read the config; `starts` looks at what its engines are given, too."""
    from orchestrator.config.file import ConfigErrors, load_config

    more = None
    if starts:
        from launch.engines.flags import engine_findings

        more = engine_findings
    try:
        return load_config(arguments.config, arguments.overrides, more)
    except ConfigErrors as error:
        raise _Usage(str(error)) from error


def _note_missing_scopes(config: Config) -> None:
    """Say on stderr what nobody can do with the keys, as the orchestrator's log does."""
    from orchestrator.config.keys import missing_scopes, read_keys
    from orchestrator.config.printing import one_line

    file = config.orchestrator.api_keys_file
    if file is not None:
        for told in missing_scopes(read_keys(file), config.orchestrator):
            print(one_line(f"note: {told}"), file=sys.stderr)


def _note_missing_gpus(arguments: argparse.Namespace, config: Config) -> None:
    """Say on stderr which GPUs this machine has not: the file may be for another one."""
    from launch.engines.base import PlanError
    from launch.engines.flags import count_gpus, missing_gpus
    from launch.plan import make_plan
    from launch.surroundings import look_around
    from orchestrator.config.printing import one_line

    try:
        plan = make_plan(config, arguments.config, arguments.overrides, look_around())
    except PlanError:
        return  # `up` and `plan` say why
    wanted = {spec.name: spec.gpus for spec in plan.workers}
    for sentence in missing_gpus(wanted, count_gpus()):
        print(one_line(f"note: {sentence}"), file=sys.stderr)


def _make_plan(arguments: argparse.Namespace, config: Config) -> Plan:
    from launch.engines.base import PlanError
    from launch.plan import make_plan
    from launch.surroundings import look_around
    from orchestrator.config.printing import one_line

    try:
        return make_plan(config, arguments.config, arguments.overrides, look_around())
    except PlanError as error:
        raise _Usage(one_line(f"{arguments.config}: {error}")) from error


if __name__ == "__main__":
    sys.exit(main())
