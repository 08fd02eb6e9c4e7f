"""What a node counts while it works, in plain numbers that grow: nothing of it is ever text that was said.

Whoever does a thing counts it here, whether or not anybody reads the counts; that is why each costs next to
nothing. Knows nothing of Prometheus.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dgnd.metrics.histogram import SIZES, Histogram
from dgnd.wire.messages import WorkDone

#: Models and peers that are counted apart; names come from the configuration, ids of peers from who connects.
MOST_APART = 256
#: Those beyond. A blank is in no name of a configuration.
OTHERS = "(other)"


@dataclass(slots=True)
class ModelCounts:
    """Of one model."""

    # As the origin of answers:
    tokens: int = 0
    prompt_tokens: int = 0
    answers: Counter[str] = field(default_factory=Counter)  #: how they ended: a reason, or an error's kind
    mends: int = 0  #: times that answers went on after something was lost
    first_token: Histogram = field(default_factory=Histogram)  #: seconds from the request
    next_token: Histogram = field(default_factory=Histogram)  #: seconds from the token before
    # As a hop of anybody's:
    replays: int = 0  #: times that results were sent again
    replayed_positions: int = 0
    worker_ends: int = 0
    decode_steps: int = 0
    prompt_positions: int = 0
    batch: Histogram = field(default_factory=lambda: Histogram(SIZES))
    queue: Histogram = field(default_factory=Histogram)
    compute: Histogram = field(default_factory=Histogram)

    def token(self, since: float, *, first: bool) -> None:
        """A token of an answer came, so many seconds after the request or the token before."""
        self.tokens += 1
        (self.first_token if first else self.next_token).add(since)

    def replayed(self, positions: int) -> None:
        """Results of so many positions are sent again."""
        self.replays += 1
        self.replayed_positions += positions

    def worked(self, before: WorkDone, now: WorkDone) -> None:
        """A worker said what it had done, `before` and `now`."""
        self.decode_steps += now.decode_steps - before.decode_steps
        self.prompt_positions += now.prompt_positions - before.prompt_positions
        for mine, old, new in (
            (self.batch, before.batch, now.batch),
            (self.queue, before.queue, now.queue),
            (self.compute, before.compute, now.compute),
        ):
            olds = old.counts or (0,) * len(new.counts)
            mine.merge(new.total - old.total, [n - o for n, o in zip(new.counts, olds, strict=False)])


@dataclass(slots=True)
class PeerCounts:
    """Of one peer."""

    connections: int = 0
    losses: int = 0
    serialise: Histogram = field(default_factory=Histogram)
    wire: Histogram = field(default_factory=Histogram)

    @property
    def reconnects(self) -> int:
        """Connections but the first."""
        return max(self.connections - 1, 0)


@dataclass(slots=True)
class HttpCounts:
    """Of the HTTP API's generations."""

    requests: int = 0  #: that are answered or wait, now
    waiting: int = 0  #: answers that wait for a place, now
    refused: int = 0  #: requests that were too many


@dataclass(slots=True)
class Counts:
    """One node's. `refusals`: what was asked of this node as a hop and refused, by the kind of error."""

    models: dict[str, ModelCounts] = field(default_factory=dict)
    peers: dict[str, PeerCounts] = field(default_factory=dict)
    refusals: Counter[str] = field(default_factory=Counter)
    http: HttpCounts = field(default_factory=HttpCounts)

    def model(self, name: str) -> ModelCounts:
        """A model's, by its name."""
        found = self.models.get(name)
        if found is None:
            found = self.models.setdefault(name if len(self.models) < MOST_APART else OTHERS, ModelCounts())
        return found

    def peer(self, peer_id: str) -> PeerCounts:
        """A peer's, by its id."""
        found = self.peers.get(peer_id)
        if found is None:
            found = self.peers.setdefault(peer_id if len(self.peers) < MOST_APART else OTHERS, PeerCounts())
        return found
