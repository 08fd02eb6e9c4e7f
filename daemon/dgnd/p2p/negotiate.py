"""Multistream-select, by which two ends agree on a protocol, with py-libp2p's implementation.

Knows the names of our protocols and nothing of what they carry.
"""

from __future__ import annotations

from libp2p.custom_types import TProtocol
from libp2p.io.abc import ReadWriteCloser
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

#: Streams of a pair of nodes: control and decode on one, prefill on the other.
CONTROL = "/dgn/1"
BULK = "/dgn/1/bulk"


class NotAgreed(Exception):
    """The two ends have no protocol in common, or the other one ended."""


async def propose(channel: ReadWriteCloser, protocol: str, timeout_s: float) -> None:
    """Asks the other end for `protocol`. Raises NotAgreed."""
    try:
        await MultiselectClient().select_one_of(
            [TProtocol(protocol)], MultiselectCommunicator(channel), max(1, round(timeout_s))
        )
    except (MultiselectClientError, UnicodeDecodeError) as error:
        raise NotAgreed(str(error)) from error


async def accept(channel: ReadWriteCloser, protocols: tuple[str, ...], timeout_s: float) -> str:
    """The one of `protocols` that the other end asks for. Raises NotAgreed."""
    offered = Multiselect({TProtocol(protocol): None for protocol in protocols})
    try:
        chosen, _ = await offered.negotiate(MultiselectCommunicator(channel), max(1, round(timeout_s)))
    except (MultiselectError, UnicodeDecodeError) as error:
        raise NotAgreed(str(error)) from error
    return str(chosen)
