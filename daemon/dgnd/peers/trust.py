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
        """Whether `peer` has shown a manifest of `model`, and nothing speaks against its being mine."""
        return self.get(peer, model) is not None and self.quarrel(peer, model) is None

    def quarrel(self, peer: str, model: str) -> tuple[str, str, str] | None:
        """What shows that `peer` has another `model` than this node, as `conflict` puts it: a tensor that
        both have, or a whole manifest that agrees with one of them alone, where they have no tensor in
        common."""
        found = self.conflict(model, (self.me, peer))
        for other in self._whole(model):
            if found is None:
                mine, theirs = (self.conflict(model, (node, other)) for node in (self.me, peer))
                found = (mine or theirs) if (mine is None) != (theirs is None) else None
        return found

    def _whole(self, model: str) -> list[str]:
        """Who has all tensors of `model`, this node first."""
        whole = [peer for peer, manifest in self._known.get(model, {}).items() if manifest.complete]
        return sorted(whole, key=lambda peer: (peer != self.me, peer))

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
            if self.conflict(model, (self.me, peer)) is None:
                return self._known[model][peer].digest
        return None
