"""Tells a peer's multiaddress from other words, without the library: dgnd parses it for good."""

from __future__ import annotations

import re
from typing import Final

from dgnd.errors import BadRequest

_PEER_ID: Final = r"[1-9A-HJ-NP-Za-km-z]{40,64}"
_ADDRESS: Final = re.compile(rf"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/tcp/[0-9]{{1,5}}/p2p/{_PEER_ID}")


def is_multiaddress(text: str) -> bool:
    """Whether it has the form /ip4/HOST/tcp/PORT/p2p/ID (or ip6, dns, dns4, dns6)."""
    return _ADDRESS.fullmatch(text) is not None


def check_multiaddress(text: str) -> None:
    """Raises BadRequest where `is_multiaddress` says no."""
    if not is_multiaddress(text):
        form = "/ip4/ADDRESS/tcp/PORT/p2p/PEER_ID (or dns4, ip6)"
        raise BadRequest(
            f"{text!r} is not a peer's address; it has the form {form}, see 'dgnctl peers' there"
        )
