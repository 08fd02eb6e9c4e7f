"""Embeddings in torch: rows picked by token id. Knows nothing of files."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dgn_backends.quant import Quantised, dequantise

Ids = npt.NDArray[np.int64]


class Embedding(Protocol):
    """A vector for each token id."""

    n_bytes: int

    def rows(self, ids: Ids) -> torch.Tensor:
        """The vectors of `ids`, [len(ids), hidden_size], on the device, in any float dtype."""


class DenseEmbedding:
    """`weight` [vocab_size, hidden_size] in the file's dtype, wherever it is; on a CPU it is the mapped file
    itself. The rows go to `device`."""

    def __init__(self, weight: torch.Tensor, device: torch.device) -> None:
        self.n_bytes = weight.numel() * weight.itemsize
        self._weight = weight
        self._device = device

    def rows(self, ids: Ids) -> torch.Tensor:
        """See the protocol."""
        index = torch.from_numpy(ids).to(self._weight.device)
        return torch.nn.functional.embedding(index, self._weight).to(self._device)


class QuantisedEmbedding:
    """A quantised weight; where it is mapped, only the pages of rows that were picked take memory. It stays
    on the CPU, and the rows go to `device`."""

    def __init__(self, weight: Quantised, hidden_size: int, device: torch.device) -> None:
        self.n_bytes = weight.n_bytes
        self._weight = weight
        self._hidden_size = hidden_size
        self._device = device

    def rows(self, ids: Ids) -> torch.Tensor:
        """See the protocol; f32."""
        return torch.from_numpy(dequantise(self._weight.rows(ids), self._hidden_size)).to(self._device)
