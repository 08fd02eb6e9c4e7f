"""`python -m dgnd.probe PARENT_PID`: started by `dgnctl backends` where no daemon runs.

Prints one line of JSON, the result of `backends.list`.
"""

from __future__ import annotations

import signal
import sys

import msgspec
import trio

from dgnd.control.api import BackendInfo
from dgnd.probe.prober import Prober
from dgnd.worker.process import die_with_parent


async def _look() -> list[BackendInfo]:
    found: list[BackendInfo] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_end_by_signal, nursery.cancel_scope)
        found = await Prober().look()
        nursery.cancel_scope.cancel()
    return found


async def _end_by_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as arrivals:
        async for _ in arrivals:
            scope.cancel()  # the children end first


die_with_parent(int(sys.argv[1]), signal.SIGTERM)
sys.stdout.buffer.write(msgspec.json.encode(trio.run(_look)) + b"\n")
