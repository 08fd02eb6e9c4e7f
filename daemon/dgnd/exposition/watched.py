"""The parts of a node that metrics are read from. Knows nothing of how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dgnd.hosting.server import HopServer
from dgnd.metrics.counts import Counts
from dgnd.models.local import LocalModel
from dgnd.origin.engine import Engine
from dgnd.p2p.network import PeerNetwork
from dgnd.peers.names import Names
from dgnd.peers.postoffice import PostOffice
from dgnd.upkeep.ledger import Ledger
from dgnd.upkeep.standing import Standing


@dataclass(frozen=True, slots=True)
class Watched:
    """One node's."""

    version: str
    counts: Counts
    names: Names
    models: Mapping[str, LocalModel]
    engine: Engine
    hops: HopServer
    network: PeerNetwork
    office: PostOffice
    ledger: Ledger
    standing: Standing
