"""What the drivers of a node's sessions share: identity, peers, ids for hops. Knows no session."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dgnd.identity import Identity
from dgnd.wire.messages import Frame


@dataclass(frozen=True, slots=True)
class DriverHost:
    """What a driver needs of the node."""

    identity: Identity
    post: Callable[[str, Frame], object]
    peer_name: Callable[[str], str]
    is_up: Callable[[str], bool]  #: whether frames reach a peer now; this node itself always
    suspect: Callable[[str], None]  #: a peer does not answer
    pass_over: Callable[[str, str], None]  #: a peer could not take a session of a model
    nudge: Callable[[str], None]  #: a peer is waited for: it is gone if it gives no sign of life
    patience_s: Callable[[str], float]  #: how long a peer may take for a sign of life that is asked for
    hop_ids: Iterator[int]  #: never repeats


def hop_ids() -> Iterator[int]:
    """Hop ids of one origin: they begin with the time in µs, so that a restarted origin's are higher.

    A peer refuses a ticket whose hop id is not above the last one that it saw of a session's name.
    """
    return itertools.count(time.time_ns() // 1000)
