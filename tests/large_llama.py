"""A random bf16 Llama as large as a test wants, one file a block, written as fast as a disk takes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tiny_llama import TinyLlama, write_tokenizer

from dgn_backends.hf_config import read_config
from dgn_backends.span import Span
from dgn_backends.tensor import f32_to_bf16
from dgn_backends.weights import INDEX_FILE, span_bytes, span_tensors, whole_model

#: Random numbers that all weights are cut from, each from another place: a prime number of them.
_POOL = 16_777_213


def make_large_llama(directory: Path, tiny: TinyLlama) -> Path:
    """Writes the model that `tiny` describes, in bf16, without an end of an answer; returns its directory."""
    directory.mkdir(parents=True)
    config_json = {**tiny.config_json(), "eos_token_id": None}
    (directory / "config.json").write_text(json.dumps(config_json))
    write_tokenizer(directory, tiny.chat_template)
    tokenizer = directory / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "eos_token": None}))
    config = read_config(directory)
    pool = np.random.default_rng(tiny.seed).standard_normal(_POOL, dtype=np.float32)
    weight_map: dict[str, str] = {}
    done: set[str] = set()
    parts = [
        Span(0, 0, embed=True, head=False),
        Span(config.n_blocks, config.n_blocks, embed=False, head=True),
    ]
    parts += [Span(block, block + 1, embed=False, head=False) for block in range(config.n_blocks)]
    for number, span in enumerate(parts):
        shapes = {name: shape for name, shape in span_tensors(config, span).items() if name not in done}
        file_name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        _write(directory / file_name, shapes, pool, number)
        weight_map.update(dict.fromkeys(shapes, file_name))
        done |= set(shapes)
    total = span_bytes(config, whole_model(config))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index))
    return directory


def _write(
    path: Path, shapes: dict[str, tuple[int, ...]], pool: npt.NDArray[np.float32], number: int
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (name, shape) in enumerate(shapes.items()):
            for piece in _values(name, shape, pool, 1_000_003 * number + 101 * index):
                file.write(f32_to_bf16(piece).tobytes())


def _values(
    name: str, shape: tuple[int, ...], pool: npt.NDArray[np.float32], begin: int
) -> Iterator[npt.NDArray[np.float32]]:
    """As `random_weights` has them, in pieces."""
    left, at = math.prod(shape), begin % _POOL
    gain = 1.6 if "q_proj" in name or "k_proj" in name else 0.8
    while left:
        piece = pool[at : at + left]
        left, at = left - piece.size, 0
        if name.endswith("norm.weight"):
            yield np.float32(1.0) + np.float32(0.1) * piece
        elif name == "model.embed_tokens.weight":
            yield piece
        else:
            yield piece * np.float32(gain / math.sqrt(shape[-1]))
