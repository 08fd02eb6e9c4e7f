"""What is to be measured, made definite: which directory, which backend, how long prompts are.

Knows nothing of time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from dgn_backends.bundled import bundled_model
from dgn_backends.hf_config import read_config
from dgn_backends.model import ModelConfig
from dgn_backends.registry import choose_backend
from dgn_backends.weights import whole_model
from dgnd.control.bench import BenchRequest, Source
from dgnd.errors import ContextExceeded, NotFound
from dgnd.wire.messages import LoadSpans

DEFAULT_PROMPT = 512


@dataclass(frozen=True, slots=True)
class Plan:
    """A request that can be carried out. Prompts and answers are of `prompt_tokens` and `tokens` ids."""

    load: LoadSpans
    source: Source
    config: ModelConfig
    prompt_tokens: int
    tokens: int
    sessions: int
    rounds: int

    def prompt(self, seed: int) -> list[int]:
        """A random prompt, the same for the same seed."""
        return random.Random(seed).choices(range(self.config.vocab_size), k=self.prompt_tokens)


def make_plan(request: BenchRequest, cache: Path) -> Plan:
    """The plan for a request; quantised weights are kept in `cache`.

    Raises NotFound, ModelError, BackendUnavailable, ContextExceeded.
    """
    path = find_model(request.model)
    config = read_config(path)
    prompt_tokens = request.prompt_tokens or max(
        1, min(DEFAULT_PROMPT, config.max_positions - request.tokens)
    )
    if prompt_tokens + request.tokens > config.max_positions:
        raise ContextExceeded(
            f"{request.model}: {prompt_tokens} tokens of prompt and {request.tokens} of answer don't fit its "
            f"context of {config.max_positions}; give fewer with --prompt-tokens or --tokens"
        )
    load = LoadSpans(
        model=path.name,
        path=str(path),
        spans=(str(whole_model(config)),),
        backend=choose_backend(request.backend, request.quant),
        device="auto",
        dtype=request.dtype,
        threads=request.threads,
        quant=request.quant,
        cache_dir=str(cache),
    )
    return Plan(load, request.source, config, prompt_tokens, request.tokens, request.sessions, request.rounds)


def find_model(name: str) -> Path:
    """The directory that `name` means; NotFound where there is none."""
    path = Path(name)
    if path.is_dir():
        return path.resolve()
    bundled = bundled_model(name)
    if bundled is None:
        raise NotFound(
            f"{name}: no such directory, no model of a running dgnd, and none that comes along; "
            "give the path of a Hugging Face directory"
        )
    return bundled
