"""Which form of a quantised weight makes products fastest here. Knows nothing of blocks or of files."""

from __future__ import annotations

import torch

from dgn_backends.quant import Quantised
from dgn_backends.torch_dequant import DequantisedMatrix
from dgn_backends.torch_int4 import Int4Matrix, can_use_int4
from dgn_backends.torch_linear import Matrix


def quantised_matrix(weight: Quantised, in_features: int, dtype: torch.dtype, device: torch.device) -> Matrix:
    """`weight` [out, in_features] for rows in `dtype` on `device`."""
    if can_use_int4(weight, in_features, dtype, device):
        return Int4Matrix(weight, in_features)
    return DequantisedMatrix(weight, in_features, dtype, device)
