"""Models of real shapes with random weights, as Hugging Face directories; nothing is ever downloaded.

Written tensor by tensor, a slice of rows at a time, so that a model may be larger than memory. Values are
normal, of a size that keeps hidden states and logits in a usual range. Speed and the error of a quantisation
don't depend on more than that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dgn_backends.hf_config import read_config
from dgn_backends.tensor import STORAGE, DType, f32_to_bf16
from dgn_backends.testing_models import CHATML, write_tokenizer
from dgn_backends.weights import span_tensors, whole_model

_FORMAT_NAMES = {"f32": "F32", "bf16": "BF16", "f16": "F16"}
_CONFIG_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_SLICE_VALUES = 1 << 24

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
#: Shapes by name, as keys of config.json; rotary scaling is left out, it changes no cost.
REAL_SHAPES: dict[str, dict[str, object]] = {
    "Llama-3.2-1B": {
        **_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "rope_theta": 500000.0, "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6,
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip


def make_real_shape(
    directory: Path,
    shape: str,
    dtype: DType = "bf16",
    blocks: int | None = None,
    context: int = 8192,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Writes a random model of the shape named to `directory` and returns it. No token ends an answer.

    `blocks` takes the first so many of the model's; `progress` hears the name of each tensor.
    """
    config = {
        **REAL_SHAPES[shape],
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": _CONFIG_NAMES[dtype],
    }
    if blocks is not None:
        config["num_hidden_layers"] = blocks
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    vocabulary = config["vocab_size"]
    assert isinstance(vocabulary, int)
    write_tokenizer(directory, CHATML, vocabulary)
    read = read_config(directory)
    _write_weights(
        directory / "model.safetensors", span_tensors(read, whole_model(read)), dtype, seed, progress
    )
    return directory


def _write_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: DType,
    seed: int,
    progress: Callable[[str], None],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * STORAGE[dtype].itemsize
        header[name] = {"dtype": _FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            progress(name)
            scale = 1.0 if name.endswith("embed_tokens.weight") else _gain(name) / math.sqrt(shape[-1])
            left = math.prod(shape)
            while left:
                values = rng.standard_normal(min(left, _SLICE_VALUES), dtype=np.float32)
                left -= len(values)
                values = 1.0 + 0.1 * values if len(shape) == 1 else values * np.float32(scale)
                file.write((f32_to_bf16(values) if dtype == "bf16" else values.astype(STORAGE[dtype])).data)


def _gain(name: str) -> float:
    """Queries and keys larger than the rest, so that attention picks some positions."""
    return 1.6 if "q_proj" in name or "k_proj" in name else 0.8
