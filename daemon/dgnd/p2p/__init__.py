"""The libp2p host: who may connect, and frames between peers. The only place that imports libp2p."""

from __future__ import annotations

from dgnd.p2p import slim_libp2p

slim_libp2p.postpone()  # before any module here imports a part of it
