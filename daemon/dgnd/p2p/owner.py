"""What a link asks of whoever has it, and tells it. An interface only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from dgnd.wire.messages import Frame, Hello

if TYPE_CHECKING:
    from dgnd.p2p.link import Link


class LinkOwner(Protocol):
    """What a link asks of the network, and tells it. Only `choose` may wait."""

    def hello(self) -> Hello:
        """What to say now."""

    def identify(self, link: Link) -> bytes:
        """What libp2p's identify says now."""

    def admits(self, link: Link) -> bool:
        """Whether the peer may still connect."""

    async def choose(self, link: Link) -> bool:
        """Whether this becomes the peer's connection."""

    def up(self, link: Link) -> None:
        """Hello went both ways."""

    def down(self, link: Link) -> None:
        """The link has ended."""

    def frame(self, link: Link, frame: Frame) -> None:
        """A frame has arrived."""
