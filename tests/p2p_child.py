"""A peer network in a process of its own, for tests that stop or kill one: SEED-HEX LISTEN ALLOWED-ID
[ADDRESS].
"""

from __future__ import annotations

import sys

import trio
from p2p_kit import Node, running

from dgnd.identity import Identity


async def main(seed: str, listen: str, allowed: str, address: str = "") -> None:
    """Prints its address once it listens; echoes every frame; ends when killed."""
    node = Node("child", Identity(bytes.fromhex(seed)), listen=(listen,))
    node.network.allow(allowed, "parent", (address,) if address else (), keep_connected=bool(address))
    async with running(node), trio.open_nursery() as nursery:
        node.on_frame = lambda peer, frame: nursery.start_soon(node.network.send, peer, frame)
        print(node.address, flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
