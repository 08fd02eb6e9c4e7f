"""From a configuration to a running daemon: locks, logging, signals, control socket, readiness, exit code.

Knows nothing of frames or models; the node inside does.
"""

from __future__ import annotations

import importlib.metadata
import logging
import signal
import socket as sockets
from collections.abc import Iterator
from pathlib import Path

import trio

from dgnd import sdnotify
from dgnd.config.load import LoadedConfig
from dgnd.control.lock import LockFile
from dgnd.control.server import serve_control
from dgnd.control.socket_path import daemon_socket
from dgnd.errors import ConfigError, DgnError
from dgnd.identity import IDENTITY_FILE, Identity
from dgnd.logs import log_to_stderr
from dgnd.node import Node, NodeIdentity

log = logging.getLogger("dgnd")

LOCK_FILE = "lock"
_POLL_S = 0.1  #: of the state while starting
_END_S = 5.0  #: beyond `drain_s`, what a service manager should grant a node that stops
_STEADY_POLL_S = 1.0  #: once ready: what it costs is spent for as long as the daemon runs


def run(loaded: LoadedConfig, socket: Path | None) -> None:
    """Runs the daemon to its end. Raises DgnError when it can't start or go on."""
    log_to_stderr(logging.INFO)
    config = loaded.config
    state_dir = config.node.state_dir
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{state_dir}: the state directory can't be made: {error.strerror or error}"
        ) from None
    lock = LockFile.acquire(state_dir / LOCK_FILE, f"the state directory {state_dir}")
    try:
        who = NodeIdentity(
            identity=Identity.load_or_create(state_dir / IDENTITY_FILE),
            name=config.node.name or sockets.gethostname(),
            version=importlib.metadata.version("distributed-gpt-node"),
        )
        path = daemon_socket(socket or config.control.socket)
        try:
            trio.run(_main, loaded, who, path)
        except BaseExceptionGroup as group:
            ours = next(_own_errors(group), None)
            if ours is None:
                raise
            raise ours from None
    finally:
        lock.release()


async def _main(loaded: LoadedConfig, who: NodeIdentity, path: Path) -> None:
    node = Node(loaded, who)
    async with trio.open_nursery() as nursery:
        await nursery.start(_on_signals, node)
        await nursery.start(serve_control, path, node.service)
        log.info("%s is %s; control socket %s", who.name, node.me, path)
        if loaded.config.http.listen:
            await _start_http(nursery, loaded, node)
        nursery.start_soon(_tell_service_manager, node)
        await node.run()
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
    address = await nursery.start(serve_http, config.http, node.service, config.sessions.max_sessions)
    log.info("HTTP API on http://%s", address)


async def _on_signals(node: Node, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as arrivals:
        task_status.started()
        async for number in arrivals:
            if number == signal.SIGHUP:
                await _reload(node)
                continue
            log.info("%s: stopping", signal.Signals(number).name)
            sdnotify.stopping(node.drain.drain_s + _END_S)
            node.stop()


async def _reload(node: Node) -> None:
    """As `dgnctl reload`; nobody waits for what comes of it but the log."""
    try:
        await node.reloader.reload()
    except DgnError as error:
        log.error("the configuration stays as it was: %s", error.message)


async def _tell_service_manager(node: Node) -> None:
    """READY once this node's own blocks are loaded; after that, what the state is whenever it changes."""
    told = ""
    ready = False
    while True:
        state = node.service.state()
        if state in ("ready", "degraded") and not ready:
            ready = sdnotify.ready(state) or True
            log.info("serving")
        elif state != told:
            sdnotify.status(state)
        told = state
        await trio.sleep(_STEADY_POLL_S if ready else _POLL_S)


def _own_errors(group: BaseExceptionGroup[BaseException]) -> Iterator[DgnError]:
    for error in group.exceptions:
        if isinstance(error, DgnError):
            yield error
        elif isinstance(error, BaseExceptionGroup):
            yield from _own_errors(error)
