"""The tiny Llamas of `dgn_backends.testing_models`, under the name that the tests here use."""

from __future__ import annotations

import json
from pathlib import Path

from dgn_backends.testing_models import (
    CHATML,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    TinyLlama,
    make_tiny_llama,
    random_weights,
    write_safetensors,
    write_tokenizer,
    write_weights,
)

__all__ = [
    "CHATML",
    "SPECIAL_TOKENS",
    "VOCAB_SIZE",
    "TinyLlama",
    "make_endless_llama",
    "make_tiny_llama",
    "random_weights",
    "write_safetensors",
    "write_tokenizer",
    "write_weights",
]


def make_endless_llama(path: Path, n_blocks: int) -> Path:
    """A random model that knows no end of an answer, so that each is as long as asked for, up to 4,096
    positions."""
    make_tiny_llama(path, n_blocks=n_blocks, max_positions=4096, eos=None)
    for name, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        values = json.loads((path / name).read_text())
        values[key] = None
        (path / name).write_text(json.dumps(values))
    return path
