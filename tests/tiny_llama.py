"""The tiny Llamas of `dgn_backends.testing_models`, under the name that the tests here use."""

from __future__ import annotations

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
    "make_tiny_llama",
    "random_weights",
    "write_safetensors",
    "write_tokenizer",
    "write_weights",
]
