"""What is said of peers that should serve blocks and don't."""

from __future__ import annotations

from dgnd.config.schema import BlocksRow, Config, ModelSection, PeerSection
from dgnd.models.blocksmap import BlocksMap
from dgnd.p2p.settings import PeerState
from dgnd.peers.names import Names
from dgnd.peers.notes import away_notes, who_should_serve

ROWS = (("attic", "2-3,head"), ("cellar", "3,head"), ("desk", "0-1"))
PEERS = {name: PeerSection(id=f"id-of-{name}") for name in ("attic", "cellar", "desk", "hall")}


def told(states: dict[str, str], plans: dict[str, set[int]], away: dict[str, str] | None = None) -> str:
    blocks = tuple(BlocksRow(model="m", peer=peer, span=span) for peer, span in ROWS)
    config = Config(models={"m": ModelSection()}, peers=PEERS, blocks=blocks)
    peers = [PeerState(f"id-of-{name}", name, state) for name, state in states.items()]  # type: ignore[arg-type]
    by_id = {f"id-of-{name}": units for name, units in plans.items()}
    names = Names("me", "here", PEERS, {})
    return who_should_serve("3,head", "m", BlocksMap.build(config, {"m": 4}), names, peers, by_id, away or {})


def test_who_has_rows_is_named_with_how_it_is() -> None:
    states = {"attic": "refused", "cellar": "connected", "desk": "unreachable"}
    assert told(states, {"cellar": {1}}) == (
        "attic refused this node, cellar is connected but does not serve them; see 'dgnctl peers'"
    )


def test_who_is_about_to_have_them_is_said_to_be() -> None:
    """Also one that chooses its blocks itself and has no row here."""
    states = {"attic": "unreachable", "cellar": "connected", "hall": "connected"}
    assert told(states, {"cellar": {4, 5}, "hall": {3, 4}}) == (
        "cellar is loading them, hall is loading them, attic is unreachable; see 'dgnctl peers'"
    )


def test_who_is_paused_is_said_to_be_in_its_own_words() -> None:
    away = {"id-of-attic": "paused by its user until 14:05"}
    states = {"attic": "connected", "cellar": "unreachable"}
    assert told(states, {}, away) == (
        "attic is paused by its user until 14:05, cellar is unreachable; see 'dgnctl peers'"
    )
    peers = [PeerState("id-of-attic", "attic", "connected"), PeerState("id-of-desk", "desk", "connected")]
    assert away_notes(peers, 0, away) == ["attic is paused by its user until 14:05"]
