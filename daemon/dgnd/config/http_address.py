"""Where the HTTP API listens: `127.0.0.1:11435`, `[::1]:11435`. Knows nothing of sockets or of HTTP."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<four>[0-9.]+|localhost)):(?P<port>[0-9]{1,5})")


class HttpAddressError(Exception):
    """What is wrong with such an address."""


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """An IP address, and a port; 0 is one that is free."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_http_address(text: str) -> HttpAddress:
    """`text` as an address. Raises HttpAddressError."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise HttpAddressError(f'"{text}" is no address to listen on; one such as 127.0.0.1:11435')
    host = match["six"] or match["four"].replace("localhost", "127.0.0.1")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise HttpAddressError(f'"{text}": "{host}" is no IP address') from None
    port = int(match["port"])
    if port > 65535:
        raise HttpAddressError(f'"{text}": a port is at most 65535')
    return HttpAddress(host, port)
