"""The conformance suite for backends: `check_backend`, for plugin authors as much as for the built-in ones.

    from dgn_backends.testing import CHECKS, check_backend

    @pytest.mark.parametrize("name", CHECKS)
    def test_conformance(name):
        check_backend(MyBackend(), dtype="f32", checks=[name])

It makes its own tiny models, needs no network and no test framework, and takes some seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from dgn_backends.api import Backend, Quant
from dgn_backends.testing_checks import (
    check_batch,
    check_chunks,
    check_description,
    check_interleaved,
    check_kept_weights,
    check_large_values,
    check_reference,
    check_rollback,
    check_row_invariance,
    check_split,
)
from dgn_backends.testing_kit import Bench, ConformanceError
from dgn_backends.testing_limits import check_kv_accounting, check_limits
from dgn_backends.testing_memory import check_kv_in_place, check_no_repeat, check_small_masks
from dgn_backends.testing_memory_meter import MemoryMeter

__all__ = ["CHECKS", "QUANT_TOLERANCE", "TOLERANCE", "ConformanceError", "check_backend"]

Check = Callable[[Bench], None]

#: Every check by its name, in a good order to read failures in.
CHECKS: Mapping[str, Check] = {
    "description": check_description,
    "reference": check_reference,
    "split": check_split,
    "chunks": check_chunks,
    "batch": check_batch,
    "interleaved": check_interleaved,
    "rollback": check_rollback,
    "row-invariance": check_row_invariance,
    "large-values": check_large_values,
    "kept-weights": check_kept_weights,
    "limits": check_limits,
    "kv-accounting": check_kv_accounting,
    "kv-in-place": check_kv_in_place,
    "no-repeat": check_no_repeat,
    "small-masks": check_small_masks,
}

_ON_CPU_MEMORY = ("kv-in-place", "no-repeat", "small-masks")

#: The tolerance used for each dtype unless another is given: root-mean-square difference of a row from what
#: it should be, as a share of its size.
TOLERANCE: Mapping[str, float] = {"f32": 1e-4, "f16": 0.01, "bf16": 0.06}

#: The same for quantised weights, where it is larger: that of the weights is in the reference as well, but a
#: backend may round the inputs of a linear layer to 8 bits, each row (or a part of it) for itself.
QUANT_TOLERANCE = 0.05


def check_backend(
    backend: Backend,
    *,
    dtype: str = "f32",
    device: str = "cpu",
    tolerance: float | None = None,
    quant: Quant = "none",
    checks: Iterable[str] = tuple(CHECKS),
) -> None:
    """Runs `checks`, names in CHECKS, on `backend` loaded with `dtype`, `device` and `quant`.

    With `quant`, results are compared with those of the reference backend on the same quantised weights.
    `tolerance` is for backends that round more than TOLERANCE and QUANT_TOLERANCE have it. The three
    checks of memory are passed over where memory can't be counted: on other devices than the CPU, or on
    other systems than Linux. Raises ConformanceError, naming the check and what was found, at the first
    promise that is broken."""
    if tolerance is None:
        tolerance = TOLERANCE[dtype] if quant == "none" else max(TOLERANCE[dtype], QUANT_TOLERANCE)
    with Bench(backend, dtype, device, tolerance, quant) as bench:
        for name in checks:
            if name in _ON_CPU_MEMORY and (device != "cpu" or not MemoryMeter.is_usable()):
                continue
            bench.check = name
            try:
                CHECKS[name](bench)
            except ConformanceError:
                raise
            except Exception as error:
                # Whatever foreign code raises where it should not is a failure of this check.
                raise ConformanceError(name, f"raised {type(error).__name__}: {error}") from error
