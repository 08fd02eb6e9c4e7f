"""sd_notify(3) in the few lines it takes: tells the service manager that started us how we are.

The protocol is one datagram to the Unix socket that $NOTIFY_SOCKET names (a leading @ means the abstract
namespace). Does nothing when nobody asked. Knows nothing of what the daemon does.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Sends `state`, such as `"READY=1"`; whether a service manager took it. Never raises, never waits."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)
        try:
            sender.sendto(state.encode(), address)
        except OSError:  # nobody listens there any more, or its queue is full: not worth dying for
            return False
    return True


def is_asked(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a service manager wants to know."""
    return environ.get("NOTIFY_SOCKET", "").startswith(("/", "@"))


def watchdog_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """How long the service manager waits for `alive` before it takes the daemon for hung; None: it does
    not."""
    text, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not text.isdecimal() or len(text) > 18 or int(text) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(text) / 1e6


def alive() -> bool:
    """Feeds the watchdog."""
    return notify("WATCHDOG=1")


def longer(within_s: float) -> bool:
    """What is under way needs up to `within_s` from now, whatever was granted."""
    return notify(f"EXTEND_TIMEOUT_USEC={round(within_s * 1e6)}")


def reloading(now_s: float) -> bool:
    """The configuration is read again; `ready` ends that. `now_s`: by the monotonic clock."""
    return notify(f"RELOADING=1\nMONOTONIC_USEC={round(now_s * 1e6)}")


def ready(status: str) -> bool:
    """The daemon answers requests; `status` is one line for `systemctl status`."""
    return notify(f"READY=1\nSTATUS={_one_line(status)}")


def status(text: str) -> bool:
    """What the daemon is doing, in one line."""
    return notify(f"STATUS={_one_line(text)}")


def stopping(within_s: float) -> bool:
    """The daemon has begun to stop, and asks to be given `within_s` for it."""
    return notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(within_s * 1e6)}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
