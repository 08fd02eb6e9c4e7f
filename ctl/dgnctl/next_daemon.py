"""For commands that watch dgnd until Ctrl-C: where it ends, the next one is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from dgnd.control.client import ControlClient
from dgnd.errors import DaemonSilent, NoDaemon

_RETRY_S: Final = 0.3


def next_daemon(connect: Callable[[], ControlClient], ended: NoDaemon) -> ControlClient:
    """A connection to the dgnd that follows the one that `ended`; waits for it without end.

    Raises:
        DaemonSilent: it has not ended, but hangs.
        SocketDenied: this user may not use the next one.
    """
    while not isinstance(ended, DaemonSilent):
        time.sleep(_RETRY_S)
        try:
            return connect()
        except NoDaemon as error:
            ended = error
    raise ended
