"""The class that the entry point names: it knows the machine and how to load, and nothing of running.

A worker makes one instance without arguments, asks for `devices()`, and calls `load()` once for each span it
serves.
"""

from __future__ import annotations

from typing import ClassVar

from dgn_backend_example.block import F64
from dgn_backend_example.runner import ExampleRunner
from dgn_backends.api import LoadRequest, Progress
from dgn_backends.errors import BackendUnavailable
from dgn_backends.tensor import tensor_bytes
from dgn_backends.weights import ModelFiles, span_tensors


class ExampleBackend:
    """See `dgn_backends.api.Backend`."""

    #: The entry point's name; the registry refuses a class that says another.
    name: ClassVar[str] = "example"

    def devices(self) -> list[str]:
        """Usable devices, best first. A backend for an accelerator asks its driver here."""
        return ["cpu"]

    def load(self, request: LoadRequest, progress: Progress) -> ExampleRunner:
        """Reads the span's tensors, and no others: a node that serves blocks 14-27 may not have the rest.

        What this backend can't do is refused with one line that says what it can.
        """
        if request.device not in ("auto", *self.devices()):
            raise BackendUnavailable(f'the example backend runs on "cpu", not on "{request.device}"')
        if request.dtype not in ("auto", "f32"):
            raise BackendUnavailable(
                f'the example backend hands on f32, not "{request.dtype}"; set dtype = "f32"'
            )
        if request.quant != "none":
            raise BackendUnavailable(
                f'the example backend has no quant "{request.quant}"; set quant = "none"'
            )
        files = ModelFiles(request.path)
        files.check(request.config, request.span)  # every name and shape, before the long work begins
        shapes = span_tensors(request.config, request.span)
        total = sum(tensor_bytes("f32", shape) for shape in shapes.values())
        weights: dict[str, F64] = {}
        done = 0
        progress(0, total)
        for name, shape in shapes.items():
            weights[name] = files.tensor(name, shape).to_f32().astype("f8")
            done += tensor_bytes("f32", shape)
            progress(done, total)  # a worker that reports progress is known to be alive
        return ExampleRunner(request.config, request.span, weights)
