"""The config variations of every family that every backend must get right, and what transformers computes for
each.

`llama_case(name)` writes the model and runs transformers once in a process; both are kept until the process
ends.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tiny_llama import TinyLlama, make_tiny_llama

from dgn_backends.api import LoadRequest, SpanRunner, Step
from dgn_backends.hf_config import read_config
from dgn_backends.model import ModelConfig
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor
from dgn_backends.weights import whole_model

F32 = npt.NDArray[np.float32]

#: Positions in every case, beyond the original window of every scaled rotary kind below.
POSITIONS = 330
#: How prompts are cut in the comparisons.
CHUNKS: tuple[Sequence[int] | int, ...] = ((230, 1), 5, 128, 129, 300)
#: Largest difference of any logit from transformers, in f32.
F32_BOUND = 1e-4

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_PAD = {"pad_token_id": 0}  # transformers' own default for SmolLM3 lies beyond these small vocabularies
_YARN_WINDOW = {"factor": 8.0, "original_max_position_embeddings": 64}
_YARN = {"rope_type": "yarn", **_YARN_WINDOW}

CASES: dict[str, TinyLlama] = {
    "plain": TinyLlama(),
    "old-spelling": TinyLlama(spelling="old", theta=5000.0, rope=None),
    "missing-kv-heads": TinyLlama(n_kv_heads=None),
    "one-kv-head": TinyLlama(n_kv_heads=1),
    "all-kv-heads": TinyLlama(n_kv_heads=4),
    "wide-head-dim": TinyLlama(head_dim=16),
    "narrow-head-dim": TinyLlama(head_dim=4, n_heads=6, hidden_size=48),
    "attention-bias": TinyLlama(attention_bias=True),
    "mlp-bias": TinyLlama(mlp_bias=True, attention_bias=True, n_kv_heads=1),
    "tied": TinyLlama(tied=True),
    "linear": TinyLlama(rope={"rope_type": "linear", "factor": 4.0}),
    "linear-old": TinyLlama(spelling="old", rope={"type": "linear", "factor": 2.5}),
    "dynamic": TinyLlama(rope={"rope_type": "dynamic", "factor": 4.0}, max_positions=128),
    "dynamic-old": TinyLlama(
        spelling="old", rope={"type": "dynamic", "factor": 8.0}, max_positions=64, tied=True
    ),
    "llama3": TinyLlama(rope=_LLAMA3, head_dim=16),
    "llama3-old": TinyLlama(spelling="old", rope=_LLAMA3, theta=500000.0, head_dim=16, n_kv_heads=1),
    "yarn": TinyLlama(rope=_YARN, head_dim=16),
    "yarn-old": TinyLlama(
        spelling="old",
        rope={"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 16},
    ),
    "yarn-mscale": TinyLlama(
        rope={**_YARN, "mscale": 0.9, "mscale_all_dim": 0.4, "truncate": False}, head_dim=16
    ),
    "yarn-attention-factor": TinyLlama(rope={**_YARN, "attention_factor": 1.3, "beta_slow": 2.0}),
    "bf16-weights": TinyLlama(dtype="bf16"),
    "f16-weights": TinyLlama(dtype="f16", tied=True, spelling="old"),
    "sharded": TinyLlama(shards=3),
    # Windows shorter than the prompt, across the pages of every backend, and as short as one position.
    "mistral": TinyLlama(family="mistral", extra={"sliding_window": 100}),
    "mistral-short-window": TinyLlama(
        family="mistral", extra={"sliding_window": 7}, n_kv_heads=1, n_heads=8, head_dim=16
    ),
    "mistral-one-position": TinyLlama(family="mistral", extra={"sliding_window": 1}, n_blocks=3),
    "mistral-page-window": TinyLlama(family="mistral", extra={"sliding_window": 256}, dtype="bf16"),
    "mistral-no-window": TinyLlama(family="mistral", extra={"sliding_window": None}, spelling="old"),
    "mistral-mixed": TinyLlama(
        family="mistral",
        head_dim=16,
        extra={
            "sliding_window": 64,
            "layer_types": [
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
        },
    ),
    "qwen2": TinyLlama(family="qwen2", tied=True, theta=1e6, extra={"attention_bias": None}),
    "qwen2-window": TinyLlama(
        family="qwen2",
        n_kv_heads=4,
        extra={"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 2},
    ),
    "qwen2-yarn": TinyLlama(
        family="qwen2", spelling="old", rope={"type": "yarn", **_YARN_WINDOW}, max_positions=64
    ),
    "qwen3": TinyLlama(family="qwen3", head_dim=16, tied=True, theta=1e6),
    "qwen3-window": TinyLlama(
        family="qwen3",
        head_dim=16,
        n_kv_heads=1,
        attention_bias=True,
        extra={
            "use_sliding_window": True,
            "sliding_window": 90,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen3-f16": TinyLlama(family="qwen3", head_dim=8, dtype="f16", spelling="old", theta=1e6),
    "smollm2": TinyLlama(
        tied=True, theta=130000.0, n_heads=3, n_kv_heads=1, hidden_size=48, extra={"rope_interleaved": False}
    ),
    "smollm3": TinyLlama(family="smollm3", tied=True, theta=5e6, max_positions=1024, extra=_PAD),
    "smollm3-listed": TinyLlama(
        family="smollm3",
        attention_bias=True,
        mlp_bias=True,
        extra={"no_rope_layers": [0, 1, 1, 0], "no_rope_layer_interval": 2, **_PAD},
    ),
    "smollm3-window": TinyLlama(
        family="smollm3",
        extra={"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 50, **_PAD},
    ),
}
#: Those of four blocks that are not all alike, or have what a Llama has not: for tests of spans and of bits.
VARYING_CASES = ("mistral", "mistral-mixed", "qwen2-window", "qwen3-window", "smollm3-window")


@dataclass(frozen=True, slots=True, eq=False)
class LlamaCase:
    """A written model; `ids` i32 [POSITIONS] and the logits that transformers gives for them in one shot, in
    f32, [POSITIONS, vocab_size]."""

    name: str
    path: Path
    config: ModelConfig
    ids: npt.NDArray[np.int32]
    logits: F32

    def load_request(self, span: Span | None = None, dtype: str = "f32", device: str = "cpu") -> LoadRequest:
        """To load `span`, or the whole model."""
        return LoadRequest(self.path, self.config, span or whole_model(self.config), device, dtype)


@functools.cache
def llama_case(name: str) -> LlamaCase:
    """The case called `name` in CASES."""
    path = make_tiny_llama(_directory() / name, CASES[name])
    config = read_config(path)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, POSITIONS).astype(np.int32)
    return LlamaCase(name, path, config, ids, transformers_logits(path, ids))


def transformers_logits(path: Path, ids: npt.NDArray[np.int32]) -> F32:
    """The logits [len(ids), vocab_size] that transformers computes for the model in `path`, in f32 and at
    once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, not ours
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    array: F32 = logits.numpy()
    return array


def run_chunked(
    runner: SpanRunner, ids: npt.NDArray[np.int32], chunks: Sequence[int] | int, sequence: int = 1
) -> F32:
    """The logits [len(ids), vocab_size] of a new sequence of a whole model, prefilled in `chunks` (their
    sizes; the last one repeats)."""
    sizes = [chunks] if isinstance(chunks, int) else list(chunks)
    runner.open(sequence, runner.span, len(ids))
    parts: list[F32] = []
    start = 0
    while start < len(ids):
        part = ids[start : start + sizes[0]]
        step = Step(sequence, start, Tensor.from_numpy(part, "i32"), tuple(range(len(part))))
        (output,) = runner.forward([step])
        assert output.logits is not None
        parts.append(output.logits.to_f32())
        start += len(part)
        if len(sizes) > 1:
            sizes.pop(0)
    runner.close(sequence)
    return np.concatenate(parts)


@functools.cache
def _directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="dgn-llama-cases-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
