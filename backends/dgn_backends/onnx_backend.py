"""The backend "onnx": ONNX Runtime on the CPU, or on an NVIDIA GPU where its build has the CUDA provider.
Chooses device and dtype, and loads a span.

The CPU's operators compute in f32, so every dtype does; bf16 and f16 are what hidden states have at the
span's edges. On a GPU the dtype is what is computed in, but attention, and with it the KV, is in f16 where
that is f32: the provider has no other. Knows nothing of sequences; those are the runner's.
"""

from __future__ import annotations

import os
from typing import ClassVar

import onnxruntime as ort

from dgn_backends.api import LoadRequest, Progress
from dgn_backends.cpu_digest import cpu_digest
from dgn_backends.errors import BackendUnavailable, LimitError
from dgn_backends.onnx_block import padded_head_dim
from dgn_backends.onnx_cuda import BF16_CAPABILITY, Cuda, find_cuda
from dgn_backends.onnx_device import Device
from dgn_backends.onnx_device_kv import Copier
from dgn_backends.onnx_graph import Numbers
from dgn_backends.onnx_load import SpanFiles
from dgn_backends.onnx_pools import DevicePools, HostPools, KvShape, Pools
from dgn_backends.onnx_runner import OnnxRunner
from dgn_backends.onnx_segments import Segments
from dgn_backends.quant_plan import loaded_bytes
from dgn_backends.tensor import DType


class OnnxBackend:
    """See `dgn_backends.api.Backend`."""

    name: ClassVar[str] = "onnx"

    def devices(self) -> list[str]:
        """CUDA devices, where ONNX Runtime can use them, then the CPU."""
        return _usable(find_cuda())

    def loaded_bytes(self, request: LoadRequest) -> int:
        """See `CountsWeights`."""
        if _cuda_index(request.device, find_cuda()) is not None:
            return 0
        return loaded_bytes(request.quant, request.config, [request.span], "f32")

    def load(self, request: LoadRequest, progress: Progress) -> OnnxRunner:
        """See the protocol. `threads` are those of the span's own pool; None takes one for each core."""
        cuda = find_cuda()
        index = _cuda_index(request.device, cuda)
        if index is None:
            dtype = _dtype(request.dtype, "f32")
            machine = f"cpu-{cpu_digest()}-threads{request.threads or os.cpu_count()}"
            return load_on(Device(), dtype, _numerics(request, dtype, machine), request, progress)
        capability = cuda.capabilities[index]
        dtype = _cuda_dtype(request, capability)
        device = Device("cuda", index, cuda_numbers(dtype), is_apart=True)
        numerics = _numerics(request, dtype, "cuda-sm{}{}".format(*capability), device.numbers.attention)
        return load_on(device, dtype, numerics, request, progress)


def cuda_numbers(dtype: DType) -> Numbers:
    """What a graph for CUDA computes in where `dtype` was asked for."""
    return Numbers(rows=dtype, attention="f16" if dtype == "f32" else dtype)


def load_on(
    device: Device, dtype: DType, numerics: str, request: LoadRequest, progress: Progress
) -> OnnxRunner:
    """The request's span on `device`; `dtype` is that of its edges. Raises as `Backend.load` does."""
    try:
        copier = Copier(device) if device.is_apart else None  # refuses before anything large is read
        files = SpanFiles(request, device.numbers.rows, progress, for_cpu=not device.is_apart)
        segments = Segments(request, files, device)
    except MemoryError as error:
        raise LimitError(
            f'span "{request.span}" of {request.path} does not fit in memory of {device}'
        ) from error
    files.finish()
    block, span = request.config.block, request.span
    shape = KvShape(
        span.stop - span.start,
        block.n_kv_heads,
        padded_head_dim(block.head_dim),
        request.config.max_positions,
    )
    pools: Pools = DevicePools(device, copier, shape) if copier else HostPools(shape)
    return OnnxRunner(segments, pools, dtype, numerics)


def _usable(cuda: Cuda) -> list[str]:
    return [f"cuda:{index}" for index in range(len(cuda.capabilities))] + ["cpu"]


def _cuda_index(wanted: str, cuda: Cuda) -> int | None:
    """The number of the CUDA device that `wanted` stands for; None for the CPU."""
    usable = _usable(cuda)
    name = {"auto": usable[0], "cuda": "cuda:0"}.get(wanted, wanted)
    if name in usable:
        return None if name == "cpu" else int(name.removeprefix("cuda:"))
    why = f" ({cuda.reason})" if cuda.reason and name.startswith("cuda") else ""
    raise BackendUnavailable(
        f'device "{wanted}" is not usable by onnx here{why}; usable: {", ".join(usable)}'
    )


def _dtype(wanted: str, auto: DType) -> DType:
    match wanted:
        case "f32" | "bf16" | "f16" as named:
            return named
        case "auto":
            return auto
    raise BackendUnavailable(f'dtype "{wanted}" is unknown to onnx here; usable: auto, f32, bf16, f16')


def _cuda_dtype(request: LoadRequest, capability: tuple[int, int]) -> DType:
    """The dtype asked for; "auto" is the model's own, or f16 on a GPU without bf16."""
    has_bf16 = capability >= BF16_CAPABILITY
    auto = request.config.dtype if has_bf16 or request.config.dtype != "bf16" else "f16"
    dtype = _dtype(request.dtype, auto)
    if dtype == "bf16" and not has_bf16:
        raise BackendUnavailable(
            'dtype "bf16" needs a GPU of compute capability 8.0 or newer; this one has '
            "{}.{}; use f16 or f32".format(*capability)
        )
    return dtype


def _numerics(request: LoadRequest, dtype: DType, machine: str, kv: DType = "f32") -> str:
    """Everything that shapes rounding, in one line."""
    return f"onnxruntime-{ort.__version__}/{dtype}/kv-{kv}/{request.quant}/{machine}"
