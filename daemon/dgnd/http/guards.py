"""Who may ask: an API key where keys are configured; else programs of this machine, and no page of a website.

A browser lets every page send requests to this machine. It says for which page (Origin), and a page that
passes itself off as this machine by its name (DNS rebinding) gives that name (Host).
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from dgnd.http.exchange import Exchange
from dgnd.http.keys import KeyFile
from dgnd.http.status import Forbidden, Unauthorized


class Guard:
    """Checks each request before it is read. `keys`: None where none are asked for."""

    def __init__(self, keys: KeyFile | None) -> None:
        self._keys = keys

    def check(self, exchange: Exchange, keyless: bool) -> None:
        """Raises Unauthorized, Forbidden. `keyless`: what is asked for needs no key."""
        if self._keys is None:
            self._check_page(exchange)
        elif not keyless:
            scheme, _, key = (exchange.header("authorization") or "").partition(" ")
            if scheme.lower() != "bearer" or not self._keys.accepts(key.strip()):
                given = "this API key is not known here" if key else "an API key is needed"
                raise Unauthorized(f"{given}: send Authorization: Bearer KEY, of those in [http] keys_file")

    def _check_page(self, exchange: Exchange) -> None:
        host = exchange.header("host") or ""
        if not _is_number_or_local(_host_of(f"//{host}")):
            raise Forbidden(
                f"Host is {host!r}: without API keys only localhost and IP addresses are answered"
            )
        origin = exchange.header("origin")
        if origin is not None and not _is_loopback(_host_of(origin)):
            raise Forbidden(
                f"a page of {origin!r} asks: without API keys only pages of this machine are answered"
            )


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_number_or_local(host: str) -> bool:
    return host == "localhost" or _address(host) is not None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
