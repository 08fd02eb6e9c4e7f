"""Multiaddresses of TCP endpoints, with or without `/p2p/ID`. Knows no peers and no sockets."""

from __future__ import annotations

from dataclasses import dataclass

from libp2p.utils.address_validation import expand_wildcard_address
from multiaddr import Multiaddr  # type: ignore[import-untyped]  # it has no type information

from dgnd.errors import BadRequest
from dgnd.identity import parse_peer_id

_HOSTS = ("ip4", "ip6", "dns4", "dns6", "dns")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where TCP goes: `kind` is ip4, ip6, dns, dns4 or dns6."""

    kind: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"/{self.kind}/{self.host}/tcp/{self.port}"


def parse(text: str) -> tuple[Endpoint, str | None]:
    """The endpoint of a multiaddress and the peer id at its end, if it has one. Raises BadRequest."""
    try:
        parts = [(protocol.name, value) for protocol, value in Multiaddr(text).items()]
    except Exception as error:
        why = str(error).removeprefix(f"Invalid MultiAddr {text!r}: ").removesuffix(f" (string: {text})")
        raise BadRequest(f"{text!r} is not a multiaddress: {why}") from error
    names = [name for name, _ in parts]
    if (
        len(parts) not in (2, 3)
        or names[0] not in _HOSTS
        or names[1] != "tcp"
        or names[2:] not in ([], ["p2p"])
    ):
        raise BadRequest(
            f"{text!r} is not an address that can be used; write /ip4/192.168.1.20/tcp/4001/p2p/PEER-ID"
        )
    peer = parse_peer_id(str(parts[2][1])) if len(parts) == 3 else None
    return Endpoint(names[0], str(parts[0][1]), int(str(parts[1][1]))), peer


def endpoint_of(host: str, port: int) -> Endpoint:
    """The endpoint of a socket's address."""
    return Endpoint("ip6" if ":" in host else "ip4", host, port)


def expanded(endpoint: Endpoint) -> list[Endpoint]:
    """The endpoint, or for a wildcard address those of this machine's interfaces."""
    if endpoint.host not in ("0.0.0.0", "::"):
        return [endpoint]
    found = [parse(str(address))[0] for address in expand_wildcard_address(Multiaddr(str(endpoint)))]
    return found or [endpoint]
