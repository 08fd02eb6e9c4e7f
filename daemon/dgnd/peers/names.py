"""What a peer is called: the name in this node's configuration, else what the peer says, else its id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dgnd.config.check import SELF
from dgnd.config.schema import PeerSection
from dgnd.wire.messages import Hello


@dataclass(slots=True)
class Names:
    """Names of nodes by peer id, and the other way round. `peers` changes with the configuration; `heard` is
    what connected peers said."""

    me: str
    my_name: str
    peers: Mapping[str, PeerSection]
    heard: Mapping[str, Hello]

    def of(self, peer: str) -> str:
        """The name to show for a peer id."""
        if peer == self.me:
            return self.my_name
        for name, section in self.peers.items():
            if section.id == peer:
                return name
        hello = self.heard.get(peer)
        return hello.name if hello is not None and hello.name else peer

    def id_of(self, node: str) -> str:
        """The peer id of a node of the BlocksMap: "self" or a name of [peers]."""
        return self.me if node == SELF else self.peers[node].id
