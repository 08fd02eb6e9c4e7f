"""Where peers were last seen, kept over restarts: a peer whose address changed is found where it is now.

A hint and nothing more: whoever answers at such an address proves its peer id as anybody does. The file is
small and bounded, and one that can't be understood is begun anew. Knows no connections.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import trio

from dgn_backends.errors import ModelError
from dgn_backends.regular_file import open_regular
from dgn_backends.whole_file import write_whole
from dgnd.errors import BadRequest
from dgnd.identity import parse_peer_id
from dgnd.p2p import addresses
from dgnd.p2p.addresses import Endpoint

log = logging.getLogger("dgnd.p2p")

#: Peers that are remembered, those seen last; and addresses of each, the newest first.
PEERS, PER_PEER = 256, 4
#: More than a file of so many can have.
_MAX_BYTES = 256 << 10
_FORMAT = 1


class LastSeen:
    """The addresses, and their file; without a `path` they are kept in memory alone."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen: dict[str, list[Endpoint]] = _read(path) if path else {}
        self._changed = trio.Event()
        self._complained = ""

    def of(self, peer_id: str) -> list[Endpoint]:
        """Where the peer was seen, the newest first."""
        return list(self._seen.get(peer_id, ()))

    def note(self, peer_id: str, endpoints: Iterable[Endpoint]) -> None:
        """The peer is connected, and may be dialled at `endpoints`."""
        new = list(dict.fromkeys(endpoints))
        old = self._seen.get(peer_id, [])
        if new == old[: len(new)]:
            return
        self._seen.pop(peer_id, None)
        self._seen[peer_id] = list(dict.fromkeys((*new, *old)))[:PER_PEER]
        while len(self._seen) > PEERS:
            del self._seen[next(iter(self._seen))]
        self._changed.set()

    def forget(self, peer_id: str, endpoint: Endpoint | None = None) -> None:
        """The peer is not at `endpoint` any more; without one, it is no peer any more."""
        left = [known for known in self._seen.pop(peer_id, ()) if endpoint not in (None, known)]
        if left:
            self._seen[peer_id] = left
        self._changed.set()

    async def keep(self) -> None:
        """Writes what changes, until cancelled. A file that can't be written is done without."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            if self._path is not None:
                await trio.to_thread.run_sync(self._write, self._path, self._text())

    def _text(self) -> bytes:
        peers = {peer: [str(endpoint) for endpoint in found] for peer, found in self._seen.items()}
        return json.dumps({"format": _FORMAT, "peers": peers}, indent=1).encode()

    def _write(self, path: Path, text: bytes) -> None:
        try:
            write_whole(path, text)
            self._complained = ""
        except OSError as error:
            why = error.strerror or str(error)
            if why != self._complained:
                log.warning("%s: where peers were last seen can't be kept: %s", path, why)
            self._complained = why


def _read(path: Path) -> dict[str, list[Endpoint]]:
    """What the file says; nothing where there is none or it is not what a node wrote."""
    try:
        with open_regular(path) as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        return _checked(json.loads(text))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, ModelError, BadRequest) as error:
        log.warning("%s: where peers were last seen is begun anew: %s", path, error)
        return {}


def _checked(value: object) -> dict[str, list[Endpoint]]:
    match value:
        case {"format": int(form), "peers": dict(peers)} if form == _FORMAT and len(peers) <= PEERS:
            return {parse_peer_id(peer): _endpoints(found) for peer, found in peers.items()}
    raise ValueError(f"it is not of the format {_FORMAT}, or has more than {PEERS} peers")


def _endpoints(value: object) -> list[Endpoint]:
    if not isinstance(value, list) or len(value) > PER_PEER:
        raise ValueError(f"the addresses of a peer are not a list of at most {PER_PEER}")
    found = []
    for text in value:
        endpoint, named = addresses.parse(str(text)[:200])
        if endpoint.kind not in ("ip4", "ip6") or named is not None:
            raise ValueError(f"{endpoint} is no address that a connection has")
        found.append(endpoint)
    return found
