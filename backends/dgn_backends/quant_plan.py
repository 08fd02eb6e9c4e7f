"""What each value of `quant` means: the scheme in which a tensor of a model is stored.

The default schemes are no further from the weights than llama.cpp's q4_0 and q8_0, in groups as large as that
allows: fewer scales are fewer bytes to read, and less work. In 4 bits the matrices that every token passes
through whole keep the smaller groups. The faster scheme of 8 bits has one scale a row, so that sums are of
integers from end to end. Knows nothing of how weights are quantised, or of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dgn_backends.model import ModelConfig
from dgn_backends.quant import Scheme
from dgn_backends.span import Span
from dgn_backends.tensor import DType, tensor_bytes
from dgn_backends.weights import EMBEDDING, HEAD, Shape, span_tensors

#: The scheme of a model's matrices, for every quantisation.
SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(8, 64),
    "int4": Scheme(4, 64),
    "int8-fast": Scheme(8, None),
    "int4-fast": Scheme(4, 128),
}
#: That of the embedding, the head and attention's output projection, where it is another.
FINE_SCHEMES: Mapping[str, Scheme] = {"int4": Scheme(4, 32)}
_FINE_NAMES = (EMBEDDING, HEAD, ".self_attn.o_proj.weight")


def scheme_of(quant: str, tensor: str) -> Scheme | None:
    """The scheme of the matrix `tensor`; None for "none"."""
    if quant in FINE_SCHEMES and tensor.endswith(_FINE_NAMES):
        return FINE_SCHEMES[quant]
    return SCHEMES.get(quant)


def stored_bytes(quant: str, tensor: str, shape: Shape, dtype: DType) -> int:
    """Bytes of a tensor in memory: matrices are quantised, and what isn't is then in f32; everything is in
    `dtype` where nothing is quantised."""
    scheme = scheme_of(quant, tensor)
    if scheme is None:
        return tensor_bytes(dtype, shape)
    return scheme.n_bytes(shape[0], shape[1]) if len(shape) == 2 else tensor_bytes("f32", shape)


def loaded_bytes(quant: str, config: ModelConfig, spans: Iterable[Span], dtype: DType | None = None) -> int:
    """Bytes of the weights of `spans` in one worker, which holds a tensor once that two of them need.
    `dtype`: of what is not quantised; None: as in the files."""
    tensors = {name: shape for span in spans for name, shape in span_tensors(config, span).items()}
    return sum(stored_bytes(quant, name, shape, dtype or config.dtype) for name, shape in tensors.items())
