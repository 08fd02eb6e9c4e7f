"""What each unit of a model takes in this node's memory, and which units' files are here.

Reads the index of the weights and looks which files exist. Knows nothing of who serves what.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dgn_backends.model import ModelConfig
from dgn_backends.quant_plan import loaded_bytes
from dgn_backends.span import span_of_units
from dgn_backends.weights import ModelFiles, span_tensors, whole_model


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model with one `quant`, in bytes of weights."""

    of_unit: tuple[int, ...]  #: [n_blocks + 2]
    shared: int  #: of an embedding tied to the head: counted at both ends, held once by one worker
    present: frozenset[int]  #: units whose files are here

    def of(self, units: Collection[int]) -> int:
        """What one worker with `units` takes."""
        both = 0 in units and len(self.of_unit) - 1 in units
        return sum(self.of_unit[unit] for unit in units) - (self.shared if both else 0)

    @property
    def of_block(self) -> int:
        """The largest block."""
        return max(self.of_unit[1:-1])


def read_sizes(path: Path, config: ModelConfig, quant: str) -> Sizes:
    """The sizes of the model in `path` as loaded with `quant`. Raises ModelError where the index of its
    weights can't be read."""
    files = ModelFiles(path)
    units = range(config.n_blocks + 2)
    spans = [span_of_units(range(unit, unit + 1), config.n_blocks) for unit in units]
    of_unit = tuple(loaded_bytes(quant, config, [span]) for span in spans)
    present = frozenset(
        unit for unit in units if all(files.is_present(name) for name in span_tensors(config, spans[unit]))
    )
    return Sizes(of_unit, sum(of_unit) - loaded_bytes(quant, config, [whole_model(config)]), present)
