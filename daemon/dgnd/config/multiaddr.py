"""The multiaddresses that a configuration may hold: `/ip4/192.168.1.20/tcp/4001`, with or without `/p2p/ID`.

Checks the form alone, so that a typing error is found when the file is read and not when a dial fails. Knows
nothing of libp2p, of name resolution or of who answers.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_DNS_NAME = re.compile(r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_EXPECTED = "expected the form /ip4/192.168.1.20/tcp/4001 or /dns4/attic.lan/tcp/4001"


class MultiaddrError(ValueError):
    """A multiaddress that can't be read; the message quotes it and says what is expected."""


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """`host` is of the `kind` ip4, ip6, dns, dns4 or dns6. `peer_id`: None where no peer is named."""

    kind: str
    host: str
    port: int
    peer_id: str | None = None


def parse_multiaddr(text: str) -> TcpAddress:
    """The TCP address that `text` writes. The peer id, if any, is not looked into. Raises MultiaddrError."""
    parts = text.split("/")
    if len(parts) not in (5, 7) or parts[0]:
        raise MultiaddrError(f'"{text}" is no TCP multiaddress: {_EXPECTED}')
    _, kind, host, transport, port = parts[:5]
    if transport != "tcp":
        raise MultiaddrError(f'"{text}" uses {transport or "no transport"}; only tcp is served: {_EXPECTED}')
    _check_host(text, kind, host)
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise MultiaddrError(f'"{text}" has no port from 0 to 65535 after /tcp/: {_EXPECTED}')
    peer_id = None
    if len(parts) == 7:
        if parts[5] != "p2p" or not parts[6]:
            raise MultiaddrError(f'"{text}" should end in /p2p/ and a peer id, or after the port')
        peer_id = parts[6]
    return TcpAddress(kind, host, int(port), peer_id)


def _check_host(text: str, kind: str, host: str) -> None:
    if kind in ("ip4", "ip6"):
        try:
            ipaddress.IPv4Address(host) if kind == "ip4" else ipaddress.IPv6Address(host)
        except ValueError:
            version = "IPv4" if kind == "ip4" else "IPv6"
            raise MultiaddrError(f'"{host}" in "{text}" is no {version} address: {_EXPECTED}') from None
        if "%" in host:
            raise MultiaddrError(f'"{host}" in "{text}" has a zone, which a multiaddress can\'t say')
    elif kind in ("dns", "dns4", "dns6"):
        if not _DNS_NAME.fullmatch(host):
            raise MultiaddrError(f'"{host}" in "{text}" is no host name: {_EXPECTED}')
    else:
        raise MultiaddrError(f'"{text}" begins with none of /ip4/, /ip6/, /dns4/, /dns6/: {_EXPECTED}')
