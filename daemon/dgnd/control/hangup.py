"""Whether the other end of a socket is gone, or has only stopped sending. Both read as the end of its data.

Knows nothing of what is said on the socket.
"""

from __future__ import annotations

import select
from typing import Final, Protocol

import trio

_POLL_S: Final = 0.1  #: no event of trio's tells it; only ends that are closed by half are watched so


class HasFileno(Protocol):
    """What can be polled."""

    def fileno(self) -> int:
        """The file descriptor."""
        ...


def is_gone(sock: HasFileno) -> bool:
    """Whether nobody can read what is sent any more."""
    poller = select.poll()
    poller.register(sock, 0)
    return any(state & (select.POLLHUP | select.POLLERR) for _, state in poller.poll(0))


async def gone(sock: HasFileno) -> None:
    """Returns when it is."""
    while not is_gone(sock):  # noqa: ASYNC110 - see _POLL_S
        await trio.sleep(_POLL_S)
