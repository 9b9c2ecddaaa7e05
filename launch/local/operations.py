"""What operators ask of a run is done here: workers are restarted one by one, added and taken away.

No request fails by that: a worker is drained before it is stopped, and stopped when its last request has
ended; where it is the only one that serves, another one serves in its place meanwhile. Whatever goes wrong,
no worker is left drained that was not before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, cast

from launch.backends.placed import PlacedWorkers
from launch.engines.base import PlanError
from launch.local.control import Caller, CommandFailed, Request
from launch.local.fleet import Fleet
from launch.local.further import FurtherWorkers, pool_of
from launch.local.member import Member, StartFailed
from launch.local.order import Nobody, Order, check_wanted
from launch.local.registrar import Registrar
from launch.local.waits import KNOWN_S, Waits, until
from launch.plan import named
from orchestrator.config.printing import counted
from orchestrator.loop.bounded_calls import BoundedCalls
from orchestrator.wire.info import Role

MOVE_S: Final = 600.0  # for the requests of a worker to end that moves unasked
PLAN_S: Final = 60.0  # to look at ports and GPUs, of which a broken driver may never tell
MAX_COUNT: Final = 1000  # workers of a pool on one machine: a slip of the finger is more

_SERVES: Final = ("ready", "suspect")


class Operator:
    """An operator's commands are carried out one at a time."""

    def __init__(
        self, fleet: Fleet, registrar: Registrar, further: FurtherWorkers | PlacedWorkers | None, key: str
    ) -> None:
        """`key` is what the orchestrator takes from us; it is given to whoever can ask at our socket."""
        self._fleet = fleet
        self._registrar = registrar
        self._waits = Waits(fleet, registrar)
        self._further = further
        self._key = key
        self._calls = BoundedCalls("plan a worker", PLAN_S)
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
        members = _chosen(self._fleet, request["workers"])
        done: list[str] = []
        for number, member in enumerate(members, 1):
            check_wanted(order)
            self._fleet.operation = f"restart of {member.spec.name}, {number} of {len(members)}"
            await self._restart(member, order)
            done.append(member.spec.name)
            order.caller.say(f"{member.spec.name}: restarted, {number} of {len(members)}")
        return {"restarted": done}

    async def _restart(self, member: Member, order: Order) -> None:
        if member in self._fleet.orchestrators:
            await self._restart_orchestrator(member, order)
            return
        spare = await self._spare_for(member, order)
        try:
            with member.held():
                await self._take_out(member, order)
                member.start_anew()
                await self._waits.until_started(member)
                await self._waits.until_in_service(member)
        except (CommandFailed, StartFailed):
            if spare is not None:
                order.caller.say(f"{spare.spec.name} goes on in its place; `baton scale` takes it away")
            raise
        if spare is not None:
            await self.retire(spare, order)

    async def _restart_orchestrator(self, member: Member, order: Order) -> None:
        if len(self._fleet.orchestrators) == 1 and not order.is_forced:
            raise CommandFailed(
                "while the orchestrator restarts nobody takes connections: --force restarts it all the same"
            )
        with member.held():
            await member.stop(self._fleet.limits.stop_orchestrator_s, self._fleet.hurry)
            member.start_anew()
            await self._waits.until_started(member)
            await self._waits.until_serving(member)
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
        drained = [row.name for row in await self._waits.rows_of(member) if not row.is_drained]
        try:
            for name in drained:
                await self._registrar.drain(name)
            await self._waits.until_free(member, order)
            await member.stop(self._fleet.limits.stop_worker_s, self._fleet.hurry)
            await self._waits.until_known_gone(member)
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

    # --- unasked --------------------------------------------------------------------------------

    async def move_one(self) -> None:
        """Have a worker whose place is lost soon, if there is one, start anew in another place, as a restart
        does. Raises `CommandFailed`.
        """
        member = next(iter(self._fleet.expiring()), None)
        if member is None:
            return
        self._fleet.operation = f"move of {member.spec.name}, whose place is lost soon"
        self._fleet.progress.say(f"{member.spec.name} moves, as its place is lost soon")
        try:
            await self._restart(member, Order(Nobody(self._fleet.progress.say), MOVE_S, is_forced=False))
        except StartFailed as error:
            raise CommandFailed(str(error)) from error
        finally:
            self._fleet.operation = None
            self._fleet.note()

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
        try:
            spec = await self._calls.make(
                self._further.plan, model, cast("Role", role), specs, self._fleet.of_config
            )
        except TimeoutError:
            why = "nobody knows which ports and GPUs are free"
            raise PlanError(f"{why}: this machine has not told within {PLAN_S:g} s") from None
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
                await self._waits.until_started(member)
                await self._waits.until_in_service(member)
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
            for row in await self._waits.rows_of(member):
                await self._registrar.remove(row.name)
        await member.stop(self._fleet.limits.stop_worker_s, self._fleet.hurry)
        self._fleet.dismiss(member)

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
                await until(self._is_without_dismissed)  # their names are free then
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


def _chosen(fleet: Fleet, names: Sequence[str]) -> Sequence[Member]:
    """Return the members with these names; if there is no name all workers, and orchestrators if there are
    several. Raises `CommandFailed`.
    """
    if not names:
        return [*fleet.workers, *(fleet.orchestrators if len(fleet.orchestrators) > 1 else ())]
    found = {name: fleet.find(name) for name in names}
    for name, member in found.items():
        if member is None:
            raise CommandFailed(f"{name} is not of this run")
    return cast("list[Member]", [*found.values()])


def _place(member: Member) -> int:
    return int(member.spec.name.rpartition("/")[2])
