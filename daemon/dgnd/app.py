"""From a configuration to a running daemon: locks, logging, signals, control socket, readiness, exit code.

Knows nothing of frames or models; the node inside does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.metadata
import logging
import signal
import socket as sockets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from dgnd.config.load import LoadedConfig
from dgnd.control.inherited import inherited_socket, path_of
from dgnd.control.lock import LockFile
from dgnd.control.server import serve_control
from dgnd.control.socket_path import daemon_socket
from dgnd.errors import ConfigError, DgnError
from dgnd.identity import IDENTITY_FILE, Identity
from dgnd.logs.flood import Flood
from dgnd.logs.setup import log_to_stderr
from dgnd.node import Node, NodeIdentity
from dgnd.systemd import sdnotify
from dgnd.systemd.restarts import STEADY_S, Restarts
from dgnd.systemd.supervision import Supervision
from dgnd.words import counted

log = logging.getLogger("dgnd")

LOCK_FILE = "lock"
_END_S = 5.0  #: beyond `drain_s`, what a service manager should grant a node that stops


def run(loaded: LoadedConfig, socket: Path | None) -> None:
    """Runs the daemon to its end. Raises DgnError when it can't start or go on."""
    wanted = loaded.config.log
    log_to_stderr(logging.getLevelNamesMapping()[wanted.level.upper()], wanted.format)
    with contextlib.suppress(ValueError, OSError):  # stderr is no file
        faulthandler.enable()  # where it hung, when the service manager's watchdog ends it
    config = loaded.config
    given = inherited_socket()
    state_dir = config.node.state_dir
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{state_dir}: the state directory can't be made: {error.strerror or error}; "
            "set state_dir in [node]"
        ) from None
    lock = LockFile.acquire(state_dir / LOCK_FILE, f"the state directory {state_dir}")
    try:
        who = NodeIdentity(
            identity=Identity.load_or_create(state_dir / IDENTITY_FILE),
            name=config.node.name or sockets.gethostname(),
            version=importlib.metadata.version("distributed-gpt-node"),
        )
        path = daemon_socket(socket or config.control.socket) if given is None else path_of(given)
        restarts = Restarts.of()
        # Modules stay for ever: to look through their 80,000 objects stops every session for some 50 ms.
        gc.freeze()
        gc.enable()
        try:
            trio.run(_main, loaded, who, _Control(path, given), restarts)
            restarts.good()
        except BaseExceptionGroup as group:
            ours = next(_own_errors(group), None)
            if ours is None:
                raise
            if ours.exit_code == ConfigError.exit_code:  # trying again does not help, and is not done
                restarts.good()
            raise ours from None
    finally:
        lock.release()


@dataclass(frozen=True, slots=True)
class _Control:
    """Where clients come; `given`: the socket that the service manager opened there."""

    path: Path
    given: sockets.socket | None


async def _main(loaded: LoadedConfig, who: NodeIdentity, control: _Control, restarts: Restarts) -> None:
    node = Node(loaded, who)
    node.service.log_ring.addFilter(Flood())
    logging.getLogger().addHandler(node.service.log_ring)
    supervision = Supervision(node.standing, control.path)
    failed, delay_s = restarts.begin()
    if delay_s:
        times = counted(failed, "time")
        node.standing.waits = f"it ended badly {times} in a row and waits {delay_s:.0f} s; see its log"
        log.warning("%s", node.standing.waits)
    async with trio.open_nursery() as nursery:
        await nursery.start(_on_signals, node, supervision)
        await nursery.start(serve_control, control.path, node.service, control.given)
        log.info("%s is %s; control socket %s", who.name, node.me, control.path)
        if loaded.config.http.listen:
            await _start_http(nursery, loaded, node)
        if loaded.config.metrics.listen:
            await _start_metrics(nursery, loaded, node)
        nursery.start_soon(supervision.run)
        nursery.start_soon(_forget_failures, supervision, restarts)
        await node.run(delay_s)
        nursery.cancel_scope.cancel()
    log.info("stopped")


async def _start_http(nursery: trio.Nursery, loaded: LoadedConfig, node: Node) -> None:
    """The HTTP API. What it needs is imported here alone: a daemon without it neither has nor loads that."""
    try:
        from dgnd.http.server import serve_http
    except ModuleNotFoundError as error:
        raise loaded.error_at(
            ("http", "listen"),
            f"the HTTP API needs the library {error.name}: pip install 'distributed-gpt-node[http]'",
        ) from None
    config = loaded.config
    at_once, counts = config.sessions.max_sessions, node.counts.http
    address = await nursery.start(serve_http, config.http, node.service, at_once, counts)
    log.info("HTTP API on http://%s", address)


async def _start_metrics(nursery: trio.Nursery, loaded: LoadedConfig, node: Node) -> None:
    """What metrics need is imported here alone, as for the HTTP API."""
    from dgnd.exposition.collect import Exposition
    from dgnd.exposition.server import serve_metrics

    listen = loaded.config.metrics.listen
    try:
        where = await nursery.start(serve_metrics, listen, Exposition(node.watched).page)
    except ConfigError as error:  # of the socket's path
        raise loaded.error_at(("metrics", "listen"), error.message) from None
    log.info("metrics on %s", where)


async def _forget_failures(supervision: Supervision, restarts: Restarts) -> None:
    steady_s = 0
    while steady_s < STEADY_S:
        await trio.sleep(1)
        steady_s = steady_s + 1 if supervision.ready else 0
    restarts.good()


async def _on_signals(
    node: Node, supervision: Supervision, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as arrivals:
        task_status.started()
        async for number in arrivals:
            if number == signal.SIGHUP:
                await _reload(node, supervision)
                continue
            log.info("%s: stopping", signal.Signals(number).name)
            sdnotify.stopping(node.drain.drain_s + _END_S)
            sdnotify.status("stopping: its sessions are handed over first")
            node.stop()


async def _reload(node: Node, supervision: Supervision) -> None:
    """As `dgnctl reload`; nobody waits for what comes of it but the log and the service manager."""
    supervision.reloading()
    try:
        await node.reloader.reload()
    except DgnError as error:
        log.error("the configuration stays as it was: %s", error.message)
        supervision.reloaded(error.message)
    else:
        supervision.reloaded()


def _own_errors(group: BaseExceptionGroup[BaseException]) -> Iterator[DgnError]:
    for error in group.exceptions:
        if isinstance(error, DgnError):
            yield error
        elif isinstance(error, BaseExceptionGroup):
            yield from _own_errors(error)
