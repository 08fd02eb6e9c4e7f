"""The parts of a node that metrics are read from. Knows nothing of how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dgnd.engine import Engine
from dgnd.hops import HopServer
from dgnd.ledger import Ledger
from dgnd.metrics.counts import Counts
from dgnd.models import LocalModel
from dgnd.names import Names
from dgnd.p2p.network import PeerNetwork
from dgnd.postoffice import PostOffice
from dgnd.standing import Standing


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
