"""What is said of peers that should serve blocks and don't: lines for `status`, words for missing blocks.

Pure; knows nothing of how peers are reached.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from dgn_backends.span import parse_units
from dgnd.models.blocksmap import BlocksMap
from dgnd.p2p.settings import PeerState
from dgnd.peers.names import Names

_STATE: Final = {
    "refused": "refused this node",
    "unreachable": "is unreachable",
    "connecting": "is not connected yet",
    "connected": "is connected but does not serve them",
}


def away_notes(peers: Sequence[PeerState], turned_away: int, away: Mapping[str, str]) -> list[str]:
    """A line for each peer that can't be reached or is `away`, by id and in its words, and one for strangers
    that this node turned away."""
    lines = [f"{peer.name} is {away[peer.id]}" for peer in peers if away.get(peer.id)]
    for peer in peers:
        if peer.state in ("refused", "unreachable") and peer.detail:
            known = peer.detail.startswith(peer.name)
            lines.append(peer.detail if known else f"{peer.name} {_STATE[peer.state]}: {peer.detail}")
    if turned_away:
        lines.append(f"{turned_away} turned away here; see 'dgnctl peers --refused'")
    return lines


def who_should_serve(
    missing: str,
    model: str,
    blocks: BlocksMap,
    names: Names,
    peers: Sequence[PeerState],
    plans: Mapping[str, Collection[int]],
    away: Mapping[str, str],
) -> str:
    """Who has rows for the missing blocks, in the config's notation, and how each is. `plans`: for connected
    peers, by id, the units that they have or are about to have, with a row here or not."""
    wanted = parse_units(missing, blocks.n_blocks[model])
    states = {peer.id: peer.state for peer in peers}
    loading = [names.of(peer) for peer, units in plans.items() if wanted.intersection(units)]
    found = [f"{node} is loading them" for node in loading]
    found += [
        f"{node} is {away[names.id_of(node)]}"
        if away.get(names.id_of(node))
        else f"{node} {_STATE[states.get(names.id_of(node), 'unreachable')]}"
        for node in blocks.peers_of(model)
        if blocks.units[model][node] & wanted and node not in loading
    ]
    return (
        f"{', '.join(found)}; see 'dgnctl peers'" if found else "no peer has a row for them; see 'dgnctl map'"
    )
