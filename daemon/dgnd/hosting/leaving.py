"""What of a node's own is about to leave: all of it, or some models. One for each node; knows no reasons."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Leaving:
    """Nothing new begins in what is named here; what runs there goes on until its origin takes it away."""

    everything: bool = False  #: for other origins; this node's own answers may still mend with its own blocks
    models: set[str] = field(default_factory=set)
    paused: bool = False  #: nothing computes here, not even for this node itself

    def refuses(self, model: str, *, own: bool) -> bool:
        """Whether no hop of `model` is opened; `own`: for an answer of this node itself."""
        return self.paused or model in self.models or (self.everything and not own)
