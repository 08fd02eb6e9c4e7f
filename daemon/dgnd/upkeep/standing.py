"""How the node is, in one word and in one line that says why. Only looks; knows nothing of who asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dgnd.control.api import NodeState
from dgnd.hosting.server import HopServer
from dgnd.models.local import LocalModel
from dgnd.origin.engine import Engine
from dgnd.peers.offers import OfferBook
from dgnd.upkeep.chooser import Chooser
from dgnd.upkeep.drain import Drain
from dgnd.upkeep.pausing import Pausing
from dgnd.words import counted
from dgnd.workers.handle import WorkerHandle


@dataclass(slots=True)
class Standing:
    """One node's."""

    models: Mapping[str, LocalModel]
    offers: OfferBook
    engine: Engine
    hops: HopServer
    drainer: Drain
    chooser: Chooser
    pausing: Pausing
    started: bool = False
    waits: str = ""  #: what it waits for before it begins, if that is anything but a moment

    def state(self) -> NodeState:
        """One word for how the node is."""
        if self.engine.stopping:
            return "draining"
        if self.drainer.state:
            return self.drainer.state
        if not self.started:
            return "starting"
        if self.pausing.paused:
            return "paused"
        if self.loads():
            return "loading"
        whole = all(not self.offers.missing(model) for model in self.models.values())
        return "ready" if whole and all(worker.ready for worker in self.workers()) else "degraded"

    def workers(self) -> list[WorkerHandle]:
        """Those of the configuration."""
        return [model.worker for model in self.models.values() if model.worker is not None]

    def loads(self) -> bool:
        """Whether something of what it is to serve is still on its way."""
        if self.chooser.waits or any(worker.state in ("starting", "loading") for worker in self.workers()):
            return True
        return any(model.manifest is None and not model.problem for model in self.models.values())

    def serves(self) -> bool:
        """Whether it does its part: all its blocks are loaded, and a first step was computed in each. Where
        some can't be loaded, the others count; a node without blocks of its own serves once it runs, and one
        that is paused does what it should, too."""
        if not self.started or self.engine.stopping:
            return False
        if self.pausing.paused or self.loads():
            return self.pausing.paused
        workers = self.workers()
        if all(worker.ready for worker in workers):
            return True
        return any(worker.ready for worker in workers) and all(
            worker.ready or worker.state == "failed" for worker in workers
        )

    def why(self) -> str:
        """What it serves, or why it doesn't, in one line."""
        match self.state():
            case "starting":
                return self.waits or "it has just been started"
            case "draining" if self.engine.stopping:
                return "it is stopping"
            case "draining":
                left = counted(self.drainer.left(), "session")
                return f"it is about to leave: {left} to be handed over or ended"
            case "drained":
                return "its sessions were handed over; 'dgnctl drain --undo' takes sessions again"
            case "paused":
                return f"it is {self.pausing.why}; 'dgnctl resume' ends that"
        loading = self._loading()
        # What is missing while something loads is not what will be missing.
        parts = [*loading, *self._faults(), *([] if loading else self._gaps())]
        if parts:
            return "; ".join(parts)
        return self._serving()

    def _loading(self) -> list[str]:
        parts = [f"{model.name}: making digests of its files" for model in self.models.values()
                 if model.manifest is None and not model.problem]  # fmt: skip
        if self.chooser.waits:
            parts.append("choosing its blocks")
        return parts + [
            f"{worker.model} {','.join(worker.request.spans)}: {worker.detail or worker.state}"
            for worker in self.workers()
            if worker.state in ("starting", "loading")
        ]

    def _faults(self) -> list[str]:
        problems = [model.problem for model in self.models.values() if model.problem]
        return problems + [
            f"worker of {worker.model} is {worker.state}: {worker.detail}"
            for worker in self.workers()
            if not worker.ready and worker.state not in ("starting", "loading")
        ]

    def _gaps(self) -> list[str]:
        missing = {name: self.offers.missing(model) for name, model in self.models.items()}
        return [f"nobody in reach serves {units} of {name}" for name, units in missing.items() if units]

    def _serving(self) -> str:
        if not self.models:
            return "no model is configured"
        parts = [
            f"{worker.model} {','.join(worker.request.spans)}" for worker in self.workers() if worker.ready
        ]
        sessions = {(key.origin, key.session) for key in self.hops.hops}
        own = {item.driver.session.id for item in self.engine.conversations}
        count = len(sessions | {(self.offers.me, session) for session in own})
        return f"serves {', '.join(parts) or 'no blocks of its own'}; {counted(count, 'session')}"
