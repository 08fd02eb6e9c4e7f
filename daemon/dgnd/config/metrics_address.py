"""Where metrics are read: `127.0.0.1:9464`, `[::1]:9464`, `unix:/run/dgn/metrics.sock`. Knows nothing of
sockets.
"""

from __future__ import annotations

import os
from pathlib import Path

from dgnd.config.http_address import HttpAddress, HttpAddressError, parse_http_address

_UNIX = "unix:"
#: What fits in sockaddr_un with its closing NUL, beside what is added while the socket is made.
_PATH_BYTES = 102
_EXAMPLES = "one such as 127.0.0.1:9464 or unix:/run/dgn/metrics.sock"


class MetricsAddressError(Exception):
    """What is wrong with such an address."""


def parse_metrics_address(text: str) -> HttpAddress | Path:
    """`text` as a loopback address, or as the path of a Unix socket. Raises MetricsAddressError."""
    if text.startswith(_UNIX):
        path = Path(text.removeprefix(_UNIX))
        if not path.is_absolute() or "\x00" in text or not path.name:
            raise MetricsAddressError(f'"{text}" names no socket by its whole path; {_EXAMPLES}')
        if len(os.fsencode(path)) > _PATH_BYTES:
            raise MetricsAddressError(f"a socket's path has at most {_PATH_BYTES} bytes here")
        return path
    try:
        address = parse_http_address(text)
    except HttpAddressError:
        raise MetricsAddressError(f'"{text}" is no address for metrics; {_EXAMPLES}') from None
    if not address.is_loopback:
        raise MetricsAddressError(
            f'"{text}" can be reached from other machines, which would read how this node is used: '
            f"listen on 127.0.0.1:{address.port} or unix:/run/dgn/metrics.sock"
        )
    return address
