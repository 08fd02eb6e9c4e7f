"""The last inbound peers that were not let in. Bounded; knows nothing of connections."""

from __future__ import annotations

from datetime import UTC, datetime

from dgnd.p2p.settings import RefusalRecord

KEPT = 20


class Refusals:
    """One record for each peer id, the newest last: one stranger that keeps trying must not push out the
    others.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._records: dict[str, RefusalRecord] = {}
        self.total = 0  #: how many there were

    def add(self, peer_id: str, addr: str, reason: str) -> bool:
        """Records a refusal.

        Whether this peer was not among the records already (and is worth a log line).
        """
        when = datetime.now(UTC).isoformat(timespec="seconds")
        known = self._records.pop(peer_id, None)
        self.total += 1
        self._records[peer_id] = RefusalRecord(peer_id, addr, when, reason)
        while len(self._records) > self._kept:
            del self._records[next(iter(self._records))]
        return known is None

    def forget(self, peer_id: str) -> None:
        """The peer is let in now."""
        self._records.pop(peer_id, None)

    def list(self) -> list[RefusalRecord]:
        """Oldest first."""
        return list(self._records.values())
