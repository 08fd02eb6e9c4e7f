"""Which CUDA devices ONNX Runtime can use here, and why it can't. Asks the driver itself, since ONNX Runtime
names its CUDA provider wherever that was built, GPU or not. Knows nothing of graphs or of sessions."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

import onnxruntime as ort

PROVIDER = "CUDAExecutionProvider"
#: The first ONNX Runtime whose attention takes steps of different lengths in one run.
_LEAST_VERSION = (1, 32)
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
#: The first compute capability with bf16.
BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Cuda:
    """`capabilities` are the compute capabilities of the devices, in the order of their numbers; `reason` is
    why there are none."""

    capabilities: tuple[tuple[int, int], ...] = ()
    reason: str = ""


def find_cuda() -> Cuda:
    """The CUDA devices that ONNX Runtime can use."""
    if PROVIDER not in ort.get_available_providers():
        return Cuda(
            reason=f"onnxruntime {ort.__version__} was built without CUDA; "
            "install onnxruntime-gpu in place of onnxruntime"
        )
    if _version(ort.__version__) < _LEAST_VERSION:
        least = ".".join(map(str, _LEAST_VERSION))
        return Cuda(reason=f"onnxruntime-gpu {ort.__version__} is too old; {least} or newer is needed")
    found = _capabilities()
    return Cuda(found, "" if found else "the NVIDIA driver finds no GPU")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _capabilities() -> tuple[tuple[int, int], ...]:
    """Of every device that the driver shows to this process."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found: list[tuple[int, int]] = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
        found.append((major.value, minor.value))
    return tuple(found)
