"""The control socket: accepts clients, at most so many at once, and serves each until it hangs up.

Who may connect is the socket file's mode (0660) and what the kernel says of the client; who may listen is
the lock beside it. Knows nothing of methods.
"""

from __future__ import annotations

import errno
import logging
import socket
from pathlib import Path
from typing import Final

import trio

from dgnd.control.connection import Connection
from dgnd.control.listener import control_socket
from dgnd.control.peer_credentials import check_peer
from dgnd.control.service import ControlService
from dgnd.control.ties import Ties
from dgnd.errors import NoRoomNow, SocketDenied

log = logging.getLogger("dgnd.control")

MAX_CONNECTIONS: Final = 64
_OUT_OF_FILES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_CLIENT_GONE: Final = (errno.ECONNABORTED, errno.EPERM, errno.EPROTO)
_OUT_OF_FILES_PAUSE_S: Final = 0.1


async def serve_control(
    path: Path,
    service: ControlService,
    given: socket.socket | None = None,
    *,
    task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves `service` on a Unix socket at `path` until cancelled; then tells the clients, and removes the
    socket. `given`: the one that listens there already; it stays.

    `task_status` is started with the path once clients can connect.

    Raises:
        AlreadyRunning: another daemon has the socket; names its pid.
        ConfigError: the socket can't be created there.
    """
    ties = Ties(service)
    with control_socket(path, given) as sock:
        listener = trio.socket.from_stdlib_socket(sock)
        async with trio.open_nursery() as nursery:
            task_status.started(path)
            clients = 0

            async def serve(connection: Connection) -> None:
                nonlocal clients
                try:
                    await connection.serve()
                finally:
                    clients -= 1

            while True:
                client = await _accept(listener)
                connection = Connection(client, service, ties)
                try:
                    check_peer(client, path)
                except SocketDenied as error:
                    log.warning("refused a client of the control socket: %s", error.message)
                    nursery.start_soon(connection.turn_away, error)
                    continue
                if clients >= MAX_CONNECTIONS:
                    log.warning("refused a client of the control socket: %d are connected", clients)
                    reason = f"{MAX_CONNECTIONS} clients are connected to dgnd; close one"
                    nursery.start_soon(connection.turn_away, NoRoomNow(reason))
                    continue
                clients += 1
                nursery.start_soon(serve, connection)


async def _accept(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    while True:
        try:
            client, _ = await listener.accept()
        except OSError as error:
            if error.errno in _OUT_OF_FILES:
                log.error("can't accept a client of the control socket: %s", error.strerror)
                await trio.sleep(_OUT_OF_FILES_PAUSE_S)
            elif error.errno not in _CLIENT_GONE:
                raise
        else:
            return client
