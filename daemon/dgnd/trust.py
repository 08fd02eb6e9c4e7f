"""Whether two nodes that say the same model name mean the same weights. Pure values.

Every node sends its manifest to its peers before they use each other's blocks; equal names with different
digests are refused, naming both. Knows nothing of how digests are made.
"""

from __future__ import annotations

from collections.abc import Iterable

from dgn_backends.manifest import Manifest, compare


class ManifestBook:
    """My manifests and those that peers sent, by model."""

    def __init__(self, me: str) -> None:
        self.me = me
        self._known: dict[str, dict[str, Manifest]] = {}

    def put(self, peer: str, model: str, manifest: Manifest) -> None:
        """Records what `peer` (or this node) says of `model`."""
        self._known.setdefault(model, {})[peer] = manifest

    def get(self, peer: str, model: str) -> Manifest | None:
        """What `peer` said of `model`."""
        return self._known.get(model, {}).get(peer)

    def forget(self, peer: str) -> None:
        """The peer is gone; it may come back with other files."""
        for known in self._known.values():
            known.pop(peer, None)

    def usable(self, peer: str, model: str) -> bool:
        """Whether `peer` has shown a manifest of `model` that agrees with mine, and with every whole one that
        agrees with mine: so parts that have no tensor in common are compared too."""
        if self.get(peer, model) is None:
            return False
        return all(self.conflict(model, (other, peer)) is None for other in (self.me, *self._whole(model)))

    def _whole(self, model: str) -> list[str]:
        """Who has all tensors of `model` and agrees with me; this node first."""
        nodes = sorted(self._known.get(model, {}).items(), key=lambda item: (item[0] != self.me, item[0]))
        return [
            peer
            for peer, manifest in nodes
            if manifest.complete and self.conflict(model, (self.me, peer)) is None
        ]

    def conflict(self, model: str, peers: Iterable[str]) -> tuple[str, str, str] | None:
        """The first pair of `peers` that disagree about `model`, and about what."""
        nodes = [(peer, manifest) for peer in dict.fromkeys(peers) if (manifest := self.get(peer, model))]
        for index, (a, mine) in enumerate(nodes):
            for b, theirs in nodes[index + 1 :]:
                difference = compare(mine, theirs)
                if difference is not None:
                    return a, b, str(difference)
        return None

    def whole_digest(self, model: str) -> str | None:
        """The digest of the whole model, if any node here has all its tensors and agrees with me."""
        for peer in self._whole(model):
            return self._known[model][peer].digest
        return None
