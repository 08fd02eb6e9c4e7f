"""The tiny models of the conformance checks. Knows nothing of what is checked on them."""

from __future__ import annotations

from dgn_backends.testing_models import TinyLlama

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SMALL = TinyLlama(vocab_size=96, tokenizer=False)

#: The models that checks use, by name; together they have every part that a block can have. The last three
#: are narrow, but for what they are to make large.
MODELS: dict[str, TinyLlama] = {
    "grouped": _SMALL,
    "biased": TinyLlama(
        seed=1,
        hidden_size=40,
        intermediate_size=56,
        n_blocks=3,
        n_heads=3,
        n_kv_heads=1,
        head_dim=12,
        vocab_size=70,
        attention_bias=True,
        mlp_bias=True,
        tied=True,
        rope=_LLAMA3,
        dtype="bf16",
        tokenizer=False,
    ),
    "dynamic": TinyLlama(
        seed=2,
        vocab_size=96,
        n_kv_heads=4,
        max_positions=64,
        rope={"rope_type": "dynamic", "factor": 8.0},
        tokenizer=False,
    ),
    "windowed": TinyLlama(
        family="qwen2",
        seed=3,
        n_blocks=3,
        vocab_size=96,
        tied=True,
        theta=1e6,
        extra={"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
        tokenizer=False,
    ),
    "head-norms": TinyLlama(
        family="qwen3",
        seed=4,
        n_blocks=3,
        n_kv_heads=1,
        head_dim=16,
        vocab_size=96,
        extra={
            "use_sliding_window": True,
            "sliding_window": 100,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        tokenizer=False,
    ),
    "part-rotary": TinyLlama(
        family="smollm3",
        seed=5,
        n_blocks=3,
        vocab_size=96,
        extra={"no_rope_layers": [1, 0, 1]},
        tokenizer=False,
    ),
    "much-kv": TinyLlama(
        hidden_size=32,
        n_blocks=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=1024,
        max_positions=8192,
        tokenizer=False,
    ),
    "many-heads": TinyLlama(
        hidden_size=32, n_blocks=1, n_heads=8, n_kv_heads=1, head_dim=128, max_positions=8192, tokenizer=False
    ),
    "long-prompt": TinyLlama(
        hidden_size=16,
        intermediate_size=16,
        n_blocks=1,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        max_positions=8192,
        tokenizer=False,
    ),
}
