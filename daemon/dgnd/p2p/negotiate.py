"""Multistream-select, by which two ends agree on a protocol, with py-libp2p's implementation.

Knows the names of our protocols and nothing of what they carry.
"""

from __future__ import annotations

from libp2p.custom_types import TProtocol
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError, MessageTooLarge
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

#: Streams of a pair of nodes: control and decode on one, prefill on the other.
CONTROL = "/dgn/1"
BULK = "/dgn/1/bulk"


#: What a negotiation may take from the other end, maybe a stranger. The library has no bound of its own:
#: it answers any number of proposals, and takes a message of any length.
MAX_MESSAGE, MAX_BYTES = 1024, 4096


class NotAgreed(Exception):
    """The two ends have no protocol in common, or the other one ended."""


class _Metered(ReadWriteCloser):
    """A channel from which little may be read."""

    def __init__(self, channel: ReadWriteCloser) -> None:
        self._channel = channel
        self._left = MAX_BYTES

    async def read(self, n: int | None = None) -> bytes:
        """As the channel's. Raises MessageTooLarge."""
        if n is None or n > min(MAX_MESSAGE, self._left):
            raise MessageTooLarge(f"{n} bytes while agreeing on a protocol")
        data = await self._channel.read(n)
        if not data:
            raise ConnectionClosedError("closed while agreeing on a protocol")
        self._left -= len(data)
        return data

    async def write(self, data: bytes) -> None:
        """As the channel's."""
        await self._channel.write(data)

    async def close(self) -> None:
        """As the channel's."""
        await self._channel.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """As the channel's."""
        return self._channel.get_remote_address()


async def propose(channel: ReadWriteCloser, protocol: str, timeout_s: float) -> None:
    """Asks the other end for `protocol`. Raises NotAgreed."""
    try:
        await MultiselectClient().select_one_of(
            [TProtocol(protocol)], MultiselectCommunicator(_Metered(channel)), max(1, round(timeout_s))
        )
    except (MultiselectClientError, UnicodeDecodeError) as error:
        raise NotAgreed(str(error)) from error


async def accept(channel: ReadWriteCloser, protocols: tuple[str, ...], timeout_s: float) -> str:
    """The one of `protocols` that the other end asks for. Raises NotAgreed."""
    offered = Multiselect({TProtocol(protocol): None for protocol in protocols})
    try:
        chosen, _ = await offered.negotiate(
            MultiselectCommunicator(_Metered(channel)), max(1, round(timeout_s))
        )
    except (MultiselectError, UnicodeDecodeError) as error:
        raise NotAgreed(str(error)) from error
    return str(chosen)
