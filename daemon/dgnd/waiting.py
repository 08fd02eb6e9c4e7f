"""Waiting for what other nodes do, frame by frame, of which no single event tells. Knows no reasons."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

_POLL_S = 0.02


async def wait_while(busy: Callable[[], object], at_most_s: float = math.inf) -> None:
    """Returns when nothing is `busy` any more, or after `at_most_s`."""
    with trio.move_on_after(at_most_s):
        while busy():  # noqa: ASYNC110 - see the module
            await trio.sleep(_POLL_S)
