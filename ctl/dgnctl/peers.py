"""`dgnctl peers`, `connect` and `disconnect`."""

from __future__ import annotations

from typing import Final

import click

from dgnctl.completion import peer_names
from dgnctl.multiaddress import check_multiaddress
from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json
from dgnctl.speeds import in_words, ms
from dgnd.control.api import ConnectParams, PeerInfo, PeerList, PeerParams, Refusal

_LET_IN: Final = """\
To let one in for good, add its lines to the configuration; then: dgnctl reload
Until dgnd ends: dgnctl connect ADDRESS, which 'dgnctl peers' shows there.
"""


@click.command()
@click.option(
    "--refused", is_flag=True, help="Show the last refused connections, with the lines to let them in."
)
@json_option
@socket_option
@click.pass_context
def peers(ctx: click.Context, refused: bool, as_json: bool) -> None:
    """List the peers, or with --refused who was turned away."""
    with connect_client(ctx) as client:
        found: PeerList = client.call("peers.list")
    if as_json:
        emit_json(found.refused if refused else found.peers)
    elif refused:
        emit(describe_refusals(found.refused))
    else:
        emit(describe_peers(found))


@click.command()
@click.argument("multiaddr")
@json_option
@socket_option
@click.pass_context
def connect(ctx: click.Context, multiaddr: str, as_json: bool) -> None:
    """Dial a peer, and let it be used and served until dgnd ends.

    MULTIADDR is what `dgnctl peers` shows on that peer as its own address, for example
    /ip4/192.168.1.20/tcp/4001/p2p/12D3KooW...
    """
    check_multiaddress(multiaddr)
    with connect_client(ctx) as client:
        found: PeerInfo = client.call("peers.connect", ConnectParams(addr=multiaddr))
    if as_json:
        emit_json(found)
    else:
        emit(describe_connected(found))


@click.command()
@click.argument("peer", shell_complete=peer_names)
@json_option
@socket_option
@click.pass_context
def disconnect(ctx: click.Context, peer: str, as_json: bool) -> None:
    """Close the connection to a peer.

    PEER is its name or its id.
    """
    with connect_client(ctx) as client:
        done = client.call("peers.disconnect", PeerParams(peer=peer))
    if as_json:
        emit_json(done)
    else:
        emit(f"disconnected from {peer}\n")


def describe_peers(found: PeerList) -> str:
    """For people, in 80 columns; ids and addresses whole, to be copied."""
    parts = [describe_peer(peer) for peer in found.peers] or [
        "no peers; add one with 'dgnctl connect MULTIADDR'\n"
    ]
    if found.self_addrs:
        parts.append("this node\n" + "".join(f"  {addr}\n" for addr in found.self_addrs))
    if found.refused:
        parts.append(f"{len(found.refused)} refused; see 'dgnctl peers --refused'\n")
    return "\n".join(parts)


def describe_peer(peer: PeerInfo) -> str:
    """One peer in a few lines."""
    trip = "" if peer.rtt_ms is None else f", {peer.rtt_ms:.1f} ms"
    lines = [f"{peer.name or peer.id}: {peer.state}{trip}"]
    if peer.detail:
        lines.append(f"  {peer.detail}")
    for offer in peer.offers:
        lines.append(f"  offers {offer.model} {offer.spans}")
        lines += [f"    {item.span}: {words}" for item in offer.figures if (words := in_words(item))]
    if peer.trips:
        trips = ", ".join(f"{name} {ms(trip)} ms" for name, trip in peer.trips.items())
        lines.append(f"  round trips: {trips}")
    lines.append(f"  {peer.id}")
    lines += [f"  {addr}" for addr in peer.addrs]
    return "\n".join(lines) + "\n"


def describe_connected(peer: PeerInfo) -> str:
    """What came of dialling a peer."""
    offers = ", ".join(f"{offer.model} {offer.spans}" for offer in peer.offers) or "no blocks"
    note = f" ({peer.detail})" if peer.detail else ""
    return f"{peer.state}: {peer.name or peer.id} offers {offers}{note}\n"


def describe_refusals(refused: list[Refusal]) -> str:
    """The last refusals in dgnd's order, each with the lines to paste, and what to do with them."""
    if not refused:
        return "nobody was refused\n"
    parts = [
        f"{refusal.when} {refusal.addr}: {refusal.reason}\n{refusal.paste.rstrip()}\n" for refusal in refused
    ]
    return "\n".join([*parts, _LET_IN])
