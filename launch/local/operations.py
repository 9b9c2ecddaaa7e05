"""What operators ask of a run is done here: workers are restarted one by one, added and taken away.

No request fails by that: a worker is drained before it is stopped, and stopped when its last request has
ended; where it is the only one that serves, another one serves in its place meanwhile. Whatever goes wrong,
no worker is left drained that was not before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from launch.engines.base import PlanError
from launch.local.control import Caller, CommandFailed, Request
from launch.local.fleet import Fleet
from launch.local.further import FurtherWorkers, named, pool_of
from launch.local.member import Member, StartFailed
from launch.local.registrar import Registrar, Row
from orchestrator.config.printing import counted
from orchestrator.wire.info import Role

POLL_S: Final = 0.1
# A decode worker pulls the KV cache of a prefill that has just ended; it begins with that at once.
PULLED_S: Final = 1.0
KNOWN_S: Final = 10.0  # until the orchestrator has noticed that a worker is gone
MAX_COUNT: Final = 1000  # workers of a pool on one machine: a slip of the finger is more

_SERVES: Final = ("ready", "suspect")


@dataclass(frozen=True, slots=True)
class Order:
    """This is how an operator wants something done."""

    caller: Caller
    timeout_s: float  # for the requests of a worker to end
    is_forced: bool  # requests may fail


class Operator:
    """An operator's commands are carried out one at a time."""

    def __init__(self, fleet: Fleet, registrar: Registrar, further: FurtherWorkers | None, key: str) -> None:
        """`key` is what the orchestrator takes from us; it is given to whoever can ask at our socket."""
        self._fleet = fleet
        self._registrar = registrar
        self._further = further
        self._key = key
        self._commands: dict[str, Callable[[Request, Order], Awaitable[dict[str, Any]]]] = {
            "restart": self._restart_all,
            "scale": self._scale,
        }

    async def handle(self, request: Request, caller: Caller) -> dict[str, Any]:
        """Carry out a command, see `launch/local/control.py`. Raises `CommandFailed`."""
        name = str(request.get("command"))
        if name == "key":
            return {"key": self._key}
        if name not in self._commands:
            raise CommandFailed(f"there is no command {name!r}")
        self._check_free()
        self._fleet.operation = name
        try:
            return {"done": await self._done(name, request, caller)}
        finally:
            self._fleet.operation = None
            self._fleet.note()

    def _check_free(self) -> None:
        if self._fleet.operation is not None:
            raise CommandFailed(f"something else is under way: {self._fleet.operation}")
        if not self._fleet.is_ready:
            raise CommandFailed("the run is still starting")
        if self._fleet.moving:
            names = ", ".join(sorted(self._fleet.moving))
            raise CommandFailed(f"the load has {names} started or stopped: try again when that is done")

    async def _done(self, name: str, request: Request, caller: Caller) -> dict[str, Any]:
        try:
            order = Order(caller, float(request["timeout_s"]), bool(request["is_forced"]))
            return await self._commands[name](request, order)
        except (KeyError, TypeError, ValueError) as error:
            raise CommandFailed(f"the command {name} is not as it should be: {error!r}") from error
        except StartFailed as error:
            raise CommandFailed(str(error)) from error

    # --- restart --------------------------------------------------------------------------------

    async def _restart_all(self, request: Request, order: Order) -> dict[str, Any]:
        members = self._chosen(request["workers"])
        done: list[str] = []
        for number, member in enumerate(members, 1):
            _check_wanted(order)
            self._fleet.operation = f"restart of {member.spec.name}, {number} of {len(members)}"
            await self._restart(member, order)
            done.append(member.spec.name)
            order.caller.say(f"{member.spec.name}: restarted, {number} of {len(members)}")
        return {"restarted": done}

    def _chosen(self, names: Sequence[str]) -> Sequence[Member]:
        """Return the members with these names, or all workers if there is no name."""
        if not names:
            return [*self._fleet.workers]
        found = {name: self._fleet.find(name) for name in names}
        for name, member in found.items():
            if member is None:
                raise CommandFailed(f"{name} is not of this run")
        return cast("list[Member]", [*found.values()])

    async def _restart(self, member: Member, order: Order) -> None:
        if member is self._fleet.orchestrator:
            await self._restart_orchestrator(member, order)
            return
        spare = await self._spare_for(member, order)
        try:
            with member.held():
                await self._take_out(member, order)
                member.start_anew()
                await self._wait_started(member)
                await self._wait_in_service(member)
        except (CommandFailed, StartFailed):
            if spare is not None:
                order.caller.say(f"{spare.spec.name} goes on in its place; `baton scale` takes it away")
            raise
        if spare is not None:
            await self.retire(spare, order)

    async def _restart_orchestrator(self, member: Member, order: Order) -> None:
        if not order.is_forced:
            raise CommandFailed(
                "while the orchestrator restarts nobody takes connections: --force restarts it all the same"
            )
        with member.held():
            await member.stop(self._fleet.limits.stop_orchestrator_s, self._fleet.hurry)
            member.start_anew()
            await self._wait_started(member)
        await self.bring_in_step()

    async def _spare_for(self, member: Member, order: Order) -> Member | None:
        """Return a worker that serves in place of the only one that does; None where others do."""
        model, role = pool_of(member.spec.name)
        serving = [
            row.url
            for row in await self._registrar.rows()
            if (row.model, row.role) == (model, role) and row.state in _SERVES
        ]
        if member.spec.url not in serving or len(set(serving)) > 1:
            return None
        name = member.spec.name
        try:
            spare = await self.add(model, role, order)
        except PlanError as error:
            if order.is_forced:
                order.caller.say(f"{name} is the only one that serves {model}/{role}: requests may fail")
                return None
            raise CommandFailed(
                f"{name} is the only one that serves {model}/{role}, and none can be started in its place: "
                f"{error}; --force restarts it all the same, and requests wait or fail meanwhile"
            ) from error
        order.caller.say(f"{spare.spec.name} serves in place of {name} meanwhile")
        await self.wait_up(spare, order)
        return spare

    async def _take_out(self, member: Member, order: Order) -> None:
        """Stop a worker when its last request has ended; the orchestrator knows then that it is gone.

        If that fails it goes on to serve, by another start if it was stopped already.
        """
        drained = [row.name for row in await self._rows_of(member) if not row.is_drained]
        try:
            for name in drained:
                await self._registrar.drain(name)
            await self._wait_free(member, order)
            await member.stop(self._fleet.limits.stop_worker_s, self._fleet.hurry)
            await self._wait_known_gone(member)
            await self._undrain(drained)
        except BaseException as error:
            await self._undrain_at_last(drained)
            if isinstance(error, CommandFailed) and not member.is_running:
                member.start_anew()
            raise

    async def _undrain_at_last(self, names: Iterable[str]) -> None:
        """Undrain these, or see to it as soon as the orchestrator answers again."""
        try:
            await self._undrain(names)
        except CommandFailed:
            self._fleet.left_drained.update(names)
            self._fleet.is_in_step = False

    async def _undrain(self, names: Iterable[str]) -> None:
        for name in names:
            await self._registrar.undrain(name)

    # --- scale ----------------------------------------------------------------------------------

    async def _scale(self, request: Request, order: Order) -> dict[str, Any]:
        model, role, count = str(request["model"]), str(request["role"]), int(request["count"])
        if not 1 <= count <= MAX_COUNT:
            raise CommandFailed(f"a pool has 1 to {MAX_COUNT} workers; `baton down` stops all")
        members = [member for member in self._fleet.workers if pool_of(member.spec.name) == (model, role)]
        if not members:
            raise CommandFailed(f"no worker of {model}/{role} was started by this run")
        if (model, role) in self._fleet.scaled:
            raise CommandFailed(f"the load decides how many workers {model}/{role} has: change `replicas`")
        self._fleet.operation = f"scale {model}/{role} from {len(members)} to {count}"
        started = await self._grow(model, role, count - len(members), order)
        stopped = (await self.dispensable(members))[: max(0, len(members) - count)]
        for member in stopped:
            await self.retire(member, order)
        return {
            "model": model,
            "role": role,
            "before": len(members),
            "count": count,
            "started": [member.spec.name for member in started],
            "stopped": [member.spec.name for member in stopped],
        }

    async def dispensable(self, members: Iterable[Member]) -> Sequence[Member]:
        """Return workers in the order in which they are stopped: those that do not serve, then the last."""
        serving = {(row.role, row.url) for row in await self._registrar.rows() if row.state in _SERVES}
        return sorted(
            members, key=lambda member: ((member.spec.role, member.spec.url) in serving, -_place(member))
        )

    async def _grow(self, model: str, role: str, count: int, order: Order) -> Sequence[Member]:
        """Start so many workers more, together, and return them once all serve.

        If there is no place for one of them none is started; those that serve stay if another one fails.
        """
        added: list[Member] = []
        try:
            for _ in range(count):
                added.append(await self.add(model, role, order))
        except PlanError as error:
            for member in added:
                await self._dismiss(member)
            raise CommandFailed(
                f"{model}/{role} cannot have {counted(count, 'worker')} more: {error}"
            ) from error
        waits = (self.wait_up(member, order) for member in added)
        failed = [
            error for error in await asyncio.gather(*waits, return_exceptions=True) if error is not None
        ]
        if failed:
            raise failed[0]
        return added

    async def add(self, model: str, role: str, order: Order) -> Member:
        """Start one worker more. Raises `PlanError` if there is no place for it."""
        if self._further is None or (model, role) not in self._further.pools:
            raise PlanError("the config has no such pool")
        _, pool = self._further.pools[model, cast("Role", role)]
        specs = [member.spec for member in self._fleet.members]
        spec = await asyncio.to_thread(
            self._further.plan, model, cast("Role", role), specs, self._fleet.of_config
        )
        name = await self._registrar.add(spec, model, pool.served_model, pool.zone)
        member = self._fleet.enlist(named(spec, name))
        try:
            member.start()
        except StartFailed:
            await self._dismiss(member)
            raise
        order.caller.say(f"{name}: starting (log: {member.spec.log_name})")
        return member

    async def wait_up(self, member: Member, order: Order) -> None:
        """Wait until a worker that was added serves; one that does not is taken away again."""
        with member.held():
            try:
                await self._wait_started(member)
                await self._wait_in_service(member)
            except BaseException:
                await self._dismiss(member)
                raise
        order.caller.say(f"{member.spec.name}: ready")

    async def retire(self, member: Member, order: Order) -> None:
        """Stop a worker for good, when its last request has ended."""
        with member.held():
            await self._take_out(member, order)
            await self._dismiss(member)
        order.caller.say(f"{member.spec.name}: stopped")

    async def _dismiss(self, member: Member) -> None:
        with contextlib.suppress(CommandFailed):
            for row in await self._rows_of(member):
                await self._registrar.remove(row.name)
        await member.stop(self._fleet.limits.stop_worker_s, self._fleet.hurry)
        self._fleet.dismiss(member)

    # --- waiting --------------------------------------------------------------------------------

    async def _rows_of(self, member: Member) -> Sequence[Row]:
        """Return what the orchestrator knows of a worker: a row for each of its engines."""
        place = member.spec.role, member.spec.url
        return [row for row in await self._registrar.rows() if (row.role, row.url) == place]

    async def _wait_free(self, member: Member, order: Order) -> None:
        """Wait until a worker, which is drained, serves no request. Raises `CommandFailed` if that takes too
        long, unless requests may fail.
        """
        told = None
        try:
            async with asyncio.timeout(order.timeout_s):
                while told := sum(row.in_flight for row in await self._rows_of(member)):
                    _check_wanted(order)
                    await asyncio.sleep(POLL_S)
                if member.spec.role != "decode":
                    await asyncio.sleep(PULLED_S)
        except TimeoutError:
            if not order.is_forced:
                requests = counted(told or 0, "request")
                raise CommandFailed(
                    f"{member.spec.name} still serves {requests} after {order.timeout_s:g} s, and goes "
                    "on with them; --force cuts them, --timeout-s gives them more time"
                ) from None
            order.caller.say(f"{member.spec.name} is stopped, which cuts {counted(told or 0, 'request')}")

    async def _wait_known_gone(self, member: Member) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KNOWN_S):
                await _until(lambda: self._is_known_gone(member))

    async def _is_known_gone(self, member: Member) -> bool:
        return all(row.state != "draining" for row in await self._rows_of(member))

    async def _wait_started(self, member: Member) -> None:
        limit_s = self._fleet.limits.start_s
        try:
            async with asyncio.timeout(limit_s):
                await _until(lambda: _is_started(member))
        except TimeoutError:
            raise CommandFailed(f"{member.spec.name} is not ready after {limit_s:g} s") from None

    async def _wait_in_service(self, member: Member) -> None:
        """Wait until the orchestrator lets a worker serve, unless somebody has drained it before."""
        try:
            async with asyncio.timeout(self._fleet.limits.start_s):
                await _until(lambda: self._is_in_service(member))
        except TimeoutError:
            rows = await self._rows_of(member)
            why = next((row.last_error for row in rows if row.last_error), "it does not say why")
            raise CommandFailed(f"the orchestrator does not let {member.spec.name} serve: {why}") from None

    async def _is_in_service(self, member: Member) -> bool:
        member.check_started()
        return all(row.state == "ready" or row.is_drained for row in await self._rows_of(member))

    # --- after the orchestrator was away ------------------------------------------------

    async def bring_in_step(self) -> None:
        """Tell an orchestrator that was started again, or did not answer, which workers there are beyond, or
        not of, its config, and that those serve again which we could not undrain.

        Raises `CommandFailed` if it cannot be told.
        """
        if self._registrar.has_listener:
            await self._tell_changes()
        self._fleet.is_in_step = True

    async def _tell_changes(self) -> None:
        for row in await self._registrar.rows():
            if (row.role, row.url) in self._fleet.dismissed:
                await self._registrar.remove(row.name)
            elif row.name in self._fleet.left_drained and row.is_drained:
                await self._registrar.undrain(row.name)
        self._fleet.left_drained.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KNOWN_S):
                await _until(self._is_without_dismissed)  # their names are free then
        known = {(row.role, row.url) for row in await self._registrar.rows()}
        for member in self._fleet.workers:
            if (member.spec.role, member.spec.url) not in known:
                await self._introduce(member)

    async def _is_without_dismissed(self) -> bool:
        return not any((row.role, row.url) in self._fleet.dismissed for row in await self._registrar.rows())

    async def _introduce(self, member: Member) -> None:
        if self._further is None:
            return
        model, role = pool_of(member.spec.name)
        _, pool = self._further.pools[model, cast("Role", role)]
        name = await self._registrar.add(member.spec, model, pool.served_model, pool.zone)
        if name != member.spec.name:
            self._fleet.rename(member, name)


async def _until(is_so: Callable[[], Awaitable[bool]]) -> None:
    while not await is_so():  # noqa: ASYNC110  # nobody tells of it unasked
        await asyncio.sleep(POLL_S)


async def _is_started(member: Member) -> bool:
    member.check_started()
    return member.is_ready


def _check_wanted(order: Order) -> None:
    if order.caller.is_gone:
        raise CommandFailed("given up")


def _place(member: Member) -> int:
    return int(member.spec.name.rpartition("/")[2])
