"""The backend "onnx": ONNX Runtime on the CPU. Chooses device and dtype, and loads a span.

The CPU's operators compute in f32, so every dtype does; bf16 and f16 are what hidden states have at the
span's edges. Knows nothing of sequences; those are the runner's.
"""

from __future__ import annotations

import os
from typing import ClassVar

import onnxruntime as ort

from dgn_backends.api import LoadRequest, Progress
from dgn_backends.cpu_digest import cpu_digest
from dgn_backends.errors import BackendUnavailable, LimitError
from dgn_backends.onnx_load import SpanFiles
from dgn_backends.onnx_release import trim
from dgn_backends.onnx_runner import OnnxRunner
from dgn_backends.onnx_segments import Segments
from dgn_backends.tensor import DType


class OnnxBackend:
    """See `dgn_backends.api.Backend`."""

    name: ClassVar[str] = "onnx"

    def devices(self) -> list[str]:
        """The CPU."""
        return ["cpu"]

    def load(self, request: LoadRequest, progress: Progress) -> OnnxRunner:
        """See the protocol. `threads` are those of the span's own pool; None takes one for each core."""
        if request.device not in ("auto", *self.devices()):
            raise BackendUnavailable(
                f'device "{request.device}" is not usable by onnx here; usable: {", ".join(self.devices())}'
            )
        dtype = _dtype(request.dtype)
        try:
            files = SpanFiles(request, progress)
            segments = Segments(request, files)
        except MemoryError as error:
            raise LimitError(f'span "{request.span}" of {request.path} does not fit in memory') from error
        files.finish()
        trim()
        return OnnxRunner(segments, dtype, _numerics(request, dtype))


def _dtype(wanted: str) -> DType:
    match wanted:
        case "f32" | "bf16" | "f16" as named:
            return named
        case "auto":
            return "f32"
    raise BackendUnavailable(f'dtype "{wanted}" is unknown to onnx here; usable: auto, f32, bf16, f16')


def _numerics(request: LoadRequest, dtype: DType) -> str:
    """Everything that shapes rounding, in one line."""
    threads = request.threads or os.cpu_count()
    return f"onnxruntime-{ort.__version__}/{dtype}/kv-f32/{request.quant}/cpu-{cpu_digest()}-threads{threads}"
