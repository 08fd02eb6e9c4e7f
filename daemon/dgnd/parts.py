"""The parts of a node that reach beyond its process, and which ones it takes: a simulation brings its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dgnd.identity import Identity
from dgnd.p2p.network import PeerNetwork
from dgnd.p2p.settings import NetworkHandlers, NetworkSettings
from dgnd.wire.messages import LoadSpans
from dgnd.workers.handle import WorkerHandle, WorkerHandlers
from dgnd.workers.seal import Seal


@dataclass(frozen=True, slots=True)
class NodeParts:
    """How they are made: by default libp2p, child processes, and files whose digests a child makes."""

    network: Callable[[Identity, NetworkSettings, NetworkHandlers], PeerNetwork] = PeerNetwork
    worker: Callable[[LoadSpans, WorkerHandlers, Seal], WorkerHandle] = WorkerHandle
    seal: Callable[[Path, Path], Seal] = Seal
    keeps_ledger: bool = True  #: whether memory of real processes is counted and limited
