"""Who is at the other end of the control socket, as the kernel says it, and whether they may use it.

The file's mode lets the same people in; this holds also where somebody loosened it, or passed a descriptor
on. Knows nothing of what is said on the socket.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from dgnd.errors import SocketDenied

_UCRED: Final = struct.Struct("3i")
_SO_PEERGROUPS: Final = 59  #: Linux 4.13 and later, on all architectures that number as x86 does
_MOST_BYTES: Final = 1024  #: that Python lets an option have: 256 groups


class HasOptions(Protocol):
    """A socket, trio's or Python's."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """As that of socket.socket."""
        ...


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """A client's process when it connected."""

    pid: int
    uid: int
    gids: frozenset[int]
    all_groups: bool = True  #: whether `gids` is all of them


def peer_credentials(sock: HasOptions) -> PeerCredentials | None:
    """Those of the other end; None where the system does not say."""
    if sys.platform != "linux":
        return None
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        more = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_BYTES)
    except OSError:  # too many groups, or a kernel that does not tell
        return PeerCredentials(pid, uid, frozenset((gid,)), all_groups=False)
    return PeerCredentials(pid, uid, frozenset((gid, *struct.unpack(f"{len(more) // 4}I", more))))


def check_peer(sock: HasOptions, path: Path) -> None:
    """Lets root, this daemon's own user, and members of the group of the socket at `path` pass.

    Raises:
        SocketDenied: for anybody else.
    """
    peer = peer_credentials(sock)
    if peer is None or peer.uid in (0, os.geteuid()):
        return
    try:
        group = os.stat(path).st_gid  # noqa: PTH116 - as the other users of this file do
    except OSError:
        group = os.getegid()
    if group not in peer.gids and (peer.all_groups or not _is_listed(peer.uid, group)):
        raise SocketDenied(
            f"user {peer.uid} (pid {peer.pid}) may not use dgnd's control socket: it is for root, the user "
            f"of dgnd and members of group {_group_name(group)}"
        )


def _is_listed(uid: int, gid: int) -> bool:
    """Whether the system's files have the user as a member of the group."""
    import grp
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name in grp.getgrgid(gid).gr_mem
    except KeyError:
        return False


def _group_name(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
