"""The config variations of Llama that every backend must get right, and what transformers computes for each.

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
CHUNKS = (1, 5, 128, 129, 300)
#: Largest difference of any logit from transformers, in f32.
F32_BOUND = 1e-4

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}

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
}


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
