"""A backend whose compute is simulated: right numbers, after a fixed time for each position. It sleeps
meanwhile, so several of them are several machines, also on one. Knows nothing of who measures."""

from __future__ import annotations

from pathlib import Path

from plugin_site import Site

NAME = "slow"
_SOURCE = """
import time
from dgn_backends.reference import ReferenceBackend

class Slow:
    name = "slow"
    def devices(self): return ["cpu"]
    def load(self, request, progress):
        runner = ReferenceBackend().load(request, progress)
        forward = runner.forward
        def slow(steps):
            begun = time.perf_counter()
            outputs = forward(steps)
            rest = sum(step.inputs.shape[0] for step in steps) * RATE - (time.perf_counter() - begun)
            time.sleep(max(rest, 0.0))
            return outputs
        if request.span.stop > request.span.start:  # an embedding alone takes no time
            runner.forward = slow
        return runner
"""


def slow_site(folder: Path, rate_s: float) -> dict[str, str]:
    """Installs it in `folder`, with `rate_s` for a position; the environment for processes that are to find
    it."""
    site = Site(folder)
    source = _SOURCE.replace("RATE", repr(rate_s))
    site.add("slow-backend", {NAME: "slow_backend_plugin:Slow"}, {"slow_backend_plugin": source})
    return site.environment
