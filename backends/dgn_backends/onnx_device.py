"""Where a span runs and in which numbers; the sessions of ONNX Runtime there.

On the CPU, sessions work on the memory that they are given. On an accelerator weights, KV and tables lie in
its memory, and what a run is given is copied there. Knows nothing of what a graph computes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as raised

from dgn_backends.errors import BackendError, BackendUnavailable, LimitError
from dgn_backends.onnx_graph import Array, Numbers

#: What a session may raise that was asked for something its device does not have. They share no base.
_REFUSALS = (raised.EPFail, raised.Fail, raised.InvalidGraph, raised.NotImplemented, raised.RuntimeException)
_NO_ROOM = ("allocate memory", "out of memory")


@dataclass(frozen=True, slots=True)
class Device:
    """`memory` is the kind of its memory in ONNX Runtime's words, "cpu" or "cuda", and `index` which one.
    `numbers` are those of every graph. `is_apart`: whether its memory is another than ours; a CPU that says
    so does all that an accelerator needs, which is how that is tested."""

    memory: str = "cpu"
    index: int = 0
    numbers: Numbers = Numbers()  # noqa: RUF009 - frozen
    is_apart: bool = False

    def __str__(self) -> str:
        return self.memory if self.memory == "cpu" else f"{self.memory}:{self.index}"

    def copy_of(self, array: Array) -> ort.OrtValue:
        """A copy of `array` in the device's memory. Raises MemoryError."""
        try:
            # On the CPU the value would share the array's memory.
            source = array.copy() if self.memory == "cpu" else array
            return ort.OrtValue.ortvalue_from_numpy(source, self.memory, self.index)
        except _REFUSALS as error:
            raise _translated(self, error) from error

    def zeros(self, shape: Sequence[int]) -> ort.OrtValue:
        """Zeros of 16 bits each, of `shape`. Raises MemoryError."""
        return self.copy_of(np.zeros(shape, np.float16))

    def session(self, model: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        """A session of `model` here. Raises MemoryError, and BackendUnavailable where ONNX Runtime can't use
        the device or has no kernel for something of the model."""
        if self.memory == "cpu":
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()  # those that pip installed are in no path of the system
        try:
            session = ort.InferenceSession(
                model, options, providers=[self._cuda(), "CPUExecutionProvider"], enable_fallback=False
            )
        except _REFUSALS as error:
            raise _translated(self, error) from error
        if session.get_providers()[0] != self._cuda()[0]:
            # ONNX Runtime goes on with the CPU alone, and says why on stderr.
            raise BackendUnavailable(
                f'device "{self}" is not usable by onnx here: ONNX Runtime can not start its CUDA provider; '
                f"the CUDA and cuDNN libraries that onnxruntime-gpu {ort.__version__} was built for must be "
                "installed (pip install 'onnxruntime-gpu[cuda,cudnn]')"
            )
        return session

    def run(self, session: ort.InferenceSession, binding: ort.IOBinding) -> None:
        """Runs a session on what is bound. Raises LimitError where an accelerator's memory ends, BackendError
        for whatever else happens there."""
        if self.memory == "cpu":
            session.run_with_iobinding(binding)
            return
        try:
            session.run_with_iobinding(binding)
        except _REFUSALS as error:
            if isinstance(refused := _translated(self, error), MemoryError):
                raise LimitError(str(refused)) from error
            raise BackendError(f"a run on {self} failed: {_line(error)}") from error

    def _cuda(self) -> tuple[str, dict[str, str]]:
        options = {
            "device_id": str(self.index),
            # Grows by what is needed, not by doubling: other processes use the device too. It is the
            # session's; `zeros` takes from ONNX Runtime's own of the process.
            "arena_extend_strategy": "kSameAsRequested",
            # Who picks f32 wants all of it, not the 10 bits of TF32.
            "use_tf32": "0",
        }
        return "CUDAExecutionProvider", options


def _translated(device: Device, error: Exception) -> Exception:
    line = _line(error)
    if any(words in line.lower() for words in _NO_ROOM):
        return MemoryError(f"no memory on {device}: {line}")
    return BackendUnavailable(f'device "{device}" is not usable by onnx here: {line}')


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
