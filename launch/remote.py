"""Commands find what runs through the state file of `baton up`, or by the URL of its admin listener.

    admin = remote.connect(arguments)      # of a parser that `add_options` was called with
    with admin:
        rows = admin.get("/admin/workers")

What goes wrong is a `Failed`, whose text is for the user; `command` turns it into an exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias
from urllib.parse import quote, urlsplit

from launch.exits import Exit

if TYPE_CHECKING:
    import httpx

    from launch.local.run_state import RunState
    from launch.replicas import Admins

KEY_VARIABLE: Final = "BATON_ADMIN_KEY"
DIRECTORY: Final = ".baton"
TIMEOUT_S: Final = 10.0
MAX_NAMES: Final = 20  # of what there is, in an error
CONTROL_TIMEOUT_S: Final = 5.0  # until `baton up` takes a connection, or gives its key


class Failed(Exception):
    """It cannot be done, or was refused; the message says why and what to do. The exit code is 1."""


class Mistaken(Failed):
    """The command line is wrong. The exit code is 2."""


class NoRun(Failed):
    """There is no run, nor has there been one: neither here nor in a parent."""


def add_options(parser: argparse.ArgumentParser, *, is_local: bool = False) -> None:
    """Add what says which run is meant. `is_local`: only one that `baton up` started on this machine."""
    which = parser.add_argument_group("which run (default: the one that was started here, or in a parent)")
    which.add_argument("--config", dest="run_config", metavar="CONFIG", help="the run of this config file")
    which.add_argument(
        "--state", dest="run_state", metavar="DIR", help="the run with this directory, .baton/run-..."
    )
    if not is_local:
        which.add_argument(
            "--admin",
            dest="run_admin",
            metavar="URL",
            action="append",
            help="an admin listener anywhere, or several of orchestrators with the same workers; its key is "
            f"read from {KEY_VARIABLE}",
        )


AnyAdmin: TypeAlias = "Admin | Admins"  # of one orchestrator, or of several that are asked as one


def command(function: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Return `function` with errors printed, and turned into exit codes."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            return function(arguments)
        except Failed as error:
            say(str(error))
            return Exit.USAGE if isinstance(error, Mistaken) else Exit.FAILED

    return run


def say(text: str) -> None:
    """Print a line, or several, to stderr; nothing in it steers a terminal."""
    from orchestrator.config.printing import masked, printable

    print(printable(masked(text)), file=sys.stderr, flush=True)


def unknown(what: str, name: str, names: Sequence[str]) -> str:
    """Return an error for a name that there is not; the nearest that there is, and all others, are named."""
    from difflib import get_close_matches

    nearest = get_close_matches(name, names, 1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    there = f"there is {', '.join(names[:MAX_NAMES]) or 'none'}{more}"
    return f"no {what} {name[:200]!r}{hint or ';'} {there}"


# --- which run ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """A run is what one `baton up` has started, or had."""

    directory: Path
    state: RunState

    def check_names(self, names: Sequence[str]) -> None:
        """Raise `Failed` if one of them is not a process of this run."""
        there = [entry.name for entry in self.state.processes]
        for name in names:
            if name not in there:
                raise Failed(unknown("process of this run", name, there))

    def is_ending(self) -> bool:
        """Return whether it is being stopped now, or has ended since it was found."""
        from launch.local.run_state import FILE, STOPPING, NoState, read

        try:
            state = read(self.directory / FILE)
        except (OSError, NoState):
            return False
        return state.operation == STOPPING or not state.is_alive()

    def log_of(self, admin: str) -> str:
        """Return the name of the log of the orchestrator that has this admin listener."""
        logs = [entry.log for entry in self.state.processes if entry.role == "orchestrator"]
        return dict(zip(self.state.admins, logs, strict=False)).get(admin, next(iter(logs), ""))

    def __str__(self) -> str:
        return f"{self.directory} (process {self.state.pid}, {self.state.config})"


def find_run(arguments: argparse.Namespace, *, ended_too: bool = False) -> Run:
    """Return the run that is meant, which is alive, or else the latest that is not if `ended_too`.

    Raises `NoRun` if nothing was ever started here, `Failed` if the one that is meant is not alive, or if
    several are.
    """
    if arguments.run_state is not None:
        found = [named_run(arguments.run_state)]
        refused: list[str] = []
        places: list[Path] = []
    else:
        places = list(_places(Path.cwd(), arguments.run_config, os.environ))
        found, refused = _nearest(places, arguments.run_config)
    alive = [run for run in found if run.state.is_alive()]
    if len(alive) > 1:
        raise Failed(_several(alive))
    if not alive and ended_too and found:
        return max(found, key=lambda run: run.state.started)
    if not alive:
        is_empty = not found and not refused and arguments.run_config is None
        raise (NoRun if is_empty else Failed)(_nothing(found, refused, places, arguments.run_config))
    return alive[0]


def named_run(directory: str) -> Run:
    """Return the run with this directory, alive or not. Raises `Failed` if there is none."""
    from launch.local.run_state import FILE, NoState, read

    path = Path(directory)
    file = path if path.name == FILE else path / FILE
    try:
        return Run(file.parent, read(file))
    except NoState as error:
        raise Failed(str(error)) from error
    except OSError as error:
        raise Failed(f"no run has the directory {path}: {file}: {error.strerror}") from error


def _places(cwd: Path, config: str | None, environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield the directories that may have runs: from here upwards, and from the config's own upwards."""
    from launch.local.logs import state_directory

    starts = [cwd] if config is None else [cwd, Path(config).absolute().parent]
    yield from dict.fromkeys(place / DIRECTORY for start in starts for place in (start, *start.parents))
    yield state_directory(environ)


def _nearest(places: Iterable[Path], config: str | None) -> tuple[list[Run], list[str]]:
    """Return the runs in the first place that has one which is alive, else all; and why some are left out."""
    found: list[Run] = []
    refused: list[str] = []
    wanted = None if config is None else os.path.realpath(config)
    for place in places:
        runs = [run for run in _runs(place, refused) if wanted in (None, os.path.realpath(run.state.config))]
        if any(run.state.is_alive() for run in runs):
            return runs, refused
        found += runs
    return found, refused


def _runs(place: Path, refused: list[str]) -> Iterator[Run]:
    """Yield the runs in a directory that are this user's: another one's file could lead anywhere."""
    from launch.local.run_state import FILE, NoState, read

    try:
        directories = sorted(place.glob("run-*"))
    except OSError:
        return
    for directory in directories:
        file = directory / FILE
        try:
            if file.stat().st_uid == os.geteuid():
                yield Run(directory, read(file))
            else:
                refused.append(f"{directory} belongs to another user: give it as --state if you trust it")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            refused.append(f"{directory} belongs to another user, and cannot be read")
        except (NoState, OSError) as error:
            refused.append(str(error))


def _several(runs: Sequence[Run]) -> str:
    lines = "".join(f"\n  --state {run.directory}   {run.state.config}" for run in runs)
    return (
        f"{len(runs)} runs are alive here; say which one is meant by --config CONFIG or --state DIR:{lines}"
    )


def _nothing(found: Sequence[Run], refused: Sequence[str], places: Sequence[Path], config: str | None) -> str:
    which = "" if config is None else f" of {config}"
    if found:
        last = max(found, key=lambda run: run.state.started)
        lines = [f"nothing runs{which}: the last run, {last}, {_fate(last.state)}"]
    else:
        lines = [f"no run{which} of `baton up` was found in {DIRECTORY} of {places[0].parent} or its parents"]
    lines.append("start one with `baton up`, or name one by --state DIR or --admin URL")
    return "\n".join([lines[0], *refused, *lines[1:]])


def _fate(state: RunState) -> str:
    if state.ended is not None:
        return "was stopped"
    return "was killed" if state.is_here() else f"is on another machine, {state.host}"


def runs_left(config: str | None) -> list[Run]:
    """Return the runs, of this config or any, that were killed and have left workers on a backend."""
    found, _ = _nearest(_places(Path.cwd(), config, os.environ), config)
    return [run for run in found if run.state.has_left_workers()]


def is_alive(config: str) -> bool:
    """Return whether a run of this config is alive that commands find from here."""
    found, _ = _nearest(_places(Path.cwd(), config, os.environ), config)
    return any(run.state.is_alive() for run in found)


# --- the admin listener ---------------------------------------------------------------------------


def connect(arguments: argparse.Namespace) -> AnyAdmin:
    """Return a client of the admin listener that is meant. Raises `Failed`."""
    return named_admin(arguments) or connect_to(find_run(arguments))


def named_admin(arguments: argparse.Namespace) -> AnyAdmin | None:
    """Return a client of the admin listeners that `--admin` names; None without it. Raises `Mistaken`."""
    urls = getattr(arguments, "run_admin", None)
    if urls is None:
        return None
    if arguments.run_state is not None or arguments.run_config is not None:
        raise Mistaken("--admin names a run by itself: leave out --state and --config")
    return _together([Admin(url, _given_key()) for url in dict.fromkeys(map(_base, urls))])


def connect_to(run: Run) -> AnyAdmin:
    """Return a client of the admin listeners of a run. Raises `Failed`."""
    if run.state.admin is None:
        raise Failed(f"{run} has no admin listener: give its config one (orchestrator.admin), and restart")
    key = _given_key() or key_of(run)
    return _together([Admin(url, key, run) for url in run.state.admins or (run.state.admin,)])


def _together(admins: Sequence[Admin]) -> AnyAdmin:
    from launch.replicas import Admins

    return admins[0] if len(admins) == 1 else Admins(admins)


def _base(url: str) -> str:
    base = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(base)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or not base.isascii() or not base.isprintable() or " " in base:
        raise Mistaken(f"--admin: expected http://HOST:PORT, got {url!r}")
    return base


def _given_key() -> str | None:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise Mistaken(f"{KEY_VARIABLE} holds a blank, or another character that no key has")
    return key or None


def key_of(run: Run) -> str | None:
    """Return the key that `baton up` made for this run: who may use its socket may do all that it can."""
    try:
        with asked(run, {"command": "key"}) as answers:
            answer = next(answers, {})
    except Failed:
        return None
    key = answer.get("key")
    return key if isinstance(key, str) else None


class Admin:
    """A client of an admin listener. Use it in a `with` block. Paths begin with a slash."""

    def __init__(self, url: str, key: str | None, run: Run | None = None) -> None:
        import ssl

        import httpx

        self.url = url
        self.run = run  # None if it was named by its URL
        self._has_key = key is not None
        self._client = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=TIMEOUT_S,
            trust_env=False,
            # The certificate of a run on this machine is for its clients: it need not name this address.
            verify=ssl.create_default_context() if url.startswith("https:") and run is None else False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str, query: Mapping[str, str | int | float] | None = None) -> Any:
        """Return the document at `path`. Raises `Failed`."""
        return self._document(self._ask("GET", path, query=query))

    def text(self, path: str) -> str:
        """Return the text at `path`, as of `/metrics`. Raises `Failed`."""
        return self._ask("GET", path).text

    def post(self, path: str, document: object = None) -> Any:
        """Change something; returns the document of the answer. Raises `Failed`."""
        return self._document(self._ask("POST", path, document=document))

    def delete(self, path: str) -> Any:
        """Remove something; returns the document of the answer. Raises `Failed`."""
        return self._document(self._ask("DELETE", path))

    def forward(
        self, path: str, query: Sequence[tuple[str, str]], body: bytes, headers: Mapping[str, str]
    ) -> httpx.Response:
        """Post somebody's request as it is; returns the answer, whatever its status. Raises `Failed`.

        An authorization header among `headers` comes before the key of this client.
        """
        import httpx

        try:
            return self._client.post(path, params=tuple(query), content=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Failed(self._unanswered(error)) from error

    @contextmanager
    def lines(
        self, path: str, query: Mapping[str, str | int | float] | None = None
    ) -> Iterator[Iterator[str]]:
        """Follow an answer that has no end, line by line. Raises `Failed`, from the iterator too."""
        import httpx

        timeout = httpx.Timeout(TIMEOUT_S, read=None)
        try:
            with self._client.stream("GET", path, params=query, timeout=timeout) as answer:
                if answer.status_code >= 400:
                    answer.read()
                self._check(answer)
                yield answer.iter_lines()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Failed(self._unanswered(error)) from error

    def _ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | float] | None = None,
        document: object = None,
    ) -> httpx.Response:
        import httpx

        try:
            if document is None:
                answer = self._client.request(method, path, params=query)
            else:
                answer = self._client.request(method, path, params=query, json=document)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Failed(self._unanswered(error)) from error
        self._check(answer)
        return answer

    def _unanswered(self, error: Exception) -> str:
        where = f"the admin listener {self.url} does not answer: {error or type(error).__name__}"
        if self.run is None:
            return where
        log = self.run.directory / self.run.log_of(self.url)
        return f"{where}\nthe orchestrator's log may say why: {log}"

    def _check(self, answer: httpx.Response) -> None:
        if answer.status_code < 400:
            return
        said = _message_of(answer)
        if answer.status_code == 401 and not self._has_key:
            said += f"\nput a key with the scope admin into {KEY_VARIABLE} (baton key new NAME --scope admin)"
        if answer.status_code == 403:
            said += f"\n{KEY_VARIABLE} must hold a key with the scope admin"
        raise Refused(answer.status_code, f"{self.url}: {answer.status_code}: {said}")

    def _document(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise Failed(f"{self.url} is no admin listener of Baton: its answer is no JSON") from error


@contextmanager
def understood(url: str) -> Iterator[None]:
    """Turn what is raised when somebody else's answer is read into a `Failed`."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise Failed(f"{url} answers as no admin listener of this version does: {error!r}") from error


class Refused(Failed):
    """The admin listener answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def queried() -> Iterator[None]:
    """Turn a query that the admin listener does not understand into a `Mistaken`: the user gave it."""
    try:
        yield
    except Refused as error:
        if error.status == 400:
            raise Mistaken(str(error)) from error
        raise


def worker_path(name: str, change: str = "") -> str:
    """Return the path of a worker at the admin listener, or of a change of it: `drain`, `undrain`."""
    return f"/admin/workers/{quote(name, safe='/')}{f'/{change}' if change else ''}"


def _message_of(answer: httpx.Response) -> str:
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return "it gives no reason; is this the admin listener?"
    return str(message)


# --- `baton up` itself ----------------------------------------------------------------------------


@contextmanager
def asked(run: Run, request: Mapping[str, object]) -> Iterator[Iterator[dict[str, Any]]]:
    """Ask `baton up` for something, and yield its answers as they come (`launch/local/control.py`).

    Raises `Failed`, from the iterator too. Whoever leaves the block early gives up what was asked for.
    """
    with _connected(run) as connection:
        try:
            connection.sendall(json.dumps(request).encode() + b"\n")
            connection.settimeout(None if request.get("command") != "key" else CONTROL_TIMEOUT_S)
            with connection.makefile("rb") as lines:
                yield map(json.loads, lines)
        except OSError as error:
            raise Failed(f"{run} has ended, or broke off: {error.strerror or error}") from error


@contextmanager
def _connected(run: Run) -> Iterator[socket.socket]:
    from launch.local.run_state import SOCKET

    descriptor = -1
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(CONTROL_TIMEOUT_S)
        try:
            descriptor = os.open(run.directory, os.O_RDONLY | os.O_DIRECTORY)
            # The directory's path may be longer than the 107 bytes that the address of a socket can have.
            connection.connect(f"/proc/self/fd/{descriptor}/{SOCKET}")
        except OSError as error:
            if run.is_ending():
                raise Failed(f"{run} is being stopped, or has ended: it takes no commands") from error
            raise Failed(f"{run} takes no commands: {run.directory / SOCKET}: {error.strerror}") from error
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        yield connection
