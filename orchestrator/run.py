"""The orchestrator runs in the foreground: as one process that serves, or several below a supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping

import uvloop

from orchestrator.app import Orchestrator
from orchestrator.config.descriptors import raise_limit
from orchestrator.config.keys import worker_key
from orchestrator.config.options import Config
from orchestrator.control.admin import admin_app
from orchestrator.control.certificate_watch import CertificateWatch
from orchestrator.control.reload import ConfigSource, Reloader
from orchestrator.discovery.discovery import Discovery
from orchestrator.errors import StartError
from orchestrator.form import Form, handed_down, take_form
from orchestrator.http.listeners import PublicServer, admin_served, bound
from orchestrator.interpreter import import_variables
from orchestrator.loop import garbage
from orchestrator.loop.signals import hold_hangup, on_hangup, on_signals
from orchestrator.processes.supervisor import supervise
from orchestrator.telemetry.logs import LineWriter, configure_logging
from orchestrator.transport.mux import upstream
from orchestrator.wire.codec import CODECS
from orchestrator.wire.info import DEFAULT_TRANSPORT, RUN_KEY_ENV, TRANSPORT_ENV, Streams, streams_from_env
from orchestrator.workers.cache_alarm import CacheAlarm
from orchestrator.workers.health import HttpProbe, Prober

_log = logging.getLogger("baton.run")


def run(config: Config, source: ConfigSource, form: Form | None = None) -> int:
    """Serve until SIGINT or SIGTERM, in one process or in several; SIGHUP reloads `config` from `source`.

    `form` is what `take_form` returned, if it was asked. Returns the process's exit code.

    Raises `StartError` if it cannot start: a port that is taken, an unreadable file, a wrong BATON_TRANSPORT
    or BATON_STREAMS.
    """
    hold_hangup()
    form = form or take_form(os.environ)
    # For the data processes and those for large bodies.
    os.environ.update({**import_variables(os.environ), **handed_down(form)})
    transport = os.environ.get(TRANSPORT_ENV) or DEFAULT_TRANSPORT
    if transport not in CODECS:
        raise StartError(f"{TRANSPORT_ENV} must be one of {', '.join(CODECS)}, not {transport!r}")
    streams = _streams(os.environ)
    credential = worker_key(os.environ)
    run_key = os.environ.pop(RUN_KEY_ENV, None)  # for this process alone
    writer = LineWriter()
    configure_logging(config.orchestrator.log, writer.write)
    writer.start()
    raise_limit()
    _log.info("%s runs", form)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            if config.orchestrator.processes == 1:
                served = _serve(
                    config,
                    source,
                    writer,
                    run_key,
                    transport=transport,
                    streams=streams,
                    credential=credential,
                )
                runner.run(served)
            else:
                supervised = supervise(
                    config,
                    source,
                    run_key,
                    writer,
                    transport=transport,
                    credential=credential,
                )
                runner.run(supervised)
    finally:
        writer.close()
    return 0


def _streams(environ: Mapping[str, str]) -> Streams:
    """Return what `BATON_STREAMS` says. Raises `StartError`."""
    try:
        return streams_from_env(environ)
    except ValueError as error:
        raise StartError(str(error)) from error


async def _serve(
    config: Config,
    source: ConfigSource,
    writer: LineWriter,
    run_key: str | None,
    *,
    transport: str,
    streams: Streams,
    credential: str | None,
) -> None:
    orchestrator = Orchestrator(
        config,
        upstream(streams, connect_timeout_s=config.orchestrator.limits.connect_timeout_s),
        transport=transport,
        credential=credential,
    )
    probe = HttpProbe(
        credential, sender=orchestrator.core.dispatcher.sender, tell=orchestrator.registry.reports.note
    )
    prober = Prober(orchestrator.registry, probe, random=orchestrator.core.random, events=orchestrator.events)
    options = config.orchestrator
    discovery = Discovery(config, orchestrator.registry, orchestrator.events, orchestrator.core.random)
    reloader = Reloader(source, orchestrator, discovery.reconfigure)
    with bound(options.listen, options.backlog) as listener:
        admin, random = admin_app(orchestrator, reloader.reload, run_key), orchestrator.core.random
        async with admin_served(admin, options, random, orchestrator.certificate):
            prober.start()
            discovery.start()
            certificate = CertificateWatch(orchestrator.certificate, orchestrator.events)
            alarm, rejections = CacheAlarm(orchestrator.registry), orchestrator.rejections
            loops = (alarm.run(), orchestrator.watch.run(), rejections.run(), certificate.run())
            watches = [asyncio.create_task(loop) for loop in loops]
            writer.tell_lost(orchestrator.note_log_lost)
            orchestrator.start(writer.write)
            garbage.tune()
            try:
                await _serve_until_signalled(orchestrator, listener, reloader)
            finally:
                for watch in watches:
                    watch.cancel()
                await discovery.aclose()
                await prober.aclose()
                await probe.aclose()
                await orchestrator.aclose()


async def _serve_until_signalled(
    orchestrator: Orchestrator, listener: socket.socket, reloader: Reloader
) -> None:
    """Serve until a signal: the first one drains, the second cuts."""
    server = PublicServer(orchestrator.server_config(), orchestrator, orchestrator.config.orchestrator)
    with on_signals(server.stop_or_cut), on_hangup(reloader.reload_soon, server.stop_or_cut):
        await server.serve(sockets=[listener])
