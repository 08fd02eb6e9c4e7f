"""Random tiny models of every family as Hugging Face directories, for tests of backends and of daemons: every
config variation, in well under a second.

Written without transformers. Weights are scaled so that logits spread over a few units, attention is far
from uniform, and positions matter: an error in any part of a block shows in the logits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from dgn_backends.hf_config import read_config
from dgn_backends.hf_families import FAMILIES
from dgn_backends.tensor import STORAGE, DType, f32_to_bf16
from dgn_backends.weights import HEAD, span_tensors, whole_model

_FORMAT_NAMES = {"f32": "F32", "bf16": "BF16", "f16": "F16"}
_CONFIG_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}

#: The first ids of the tokenizer; the 256 bytes follow.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyLlama:
    """What to write. `rope` is the dict of `rope_scaling` (old) or `rope_parameters` (new), without theta;
    what only some families have goes into `extra`."""

    family: str = "llama"  #: the model_type of one of `hf_families.FAMILIES`
    seed: int = 0
    hidden_size: int = 32
    intermediate_size: int = 48
    n_blocks: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = 2  #: None leaves the key out
    head_dim: int | None = None  #: None leaves the key out
    vocab_size: int = VOCAB_SIZE
    max_positions: int = 512
    norm_eps: float = 1e-5
    theta: float = 10000.0
    rope: Mapping[str, object] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    dtype: DType = "f32"
    spelling: Literal["old", "new"] = "new"
    shards: int = 1  #: more than 1 writes an index; a border may lie within a block
    eos: int | list[int] | None = 2  #: in generation_config.json; None writes no such file
    chat_template: str | None = CHATML
    tokenizer: bool = True
    extra: Mapping[str, object] = field(
        default_factory=dict
    )  #: further keys of config.json; None removes one

    def config_json(self) -> dict[str, object]:
        """The content of config.json."""
        (architecture,) = (name for name, known in FAMILIES.items() if known.model_type == self.family)
        config: dict[str, object] = {
            "architectures": [architecture],
            "model_type": self.family,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.n_blocks,
            "num_attention_heads": self.n_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.n_kv_heads is not None:
            config["num_key_value_heads"] = self.n_kv_heads
        if self.head_dim is not None:
            config["head_dim"] = self.head_dim
        if self.spelling == "old":
            config |= {"rope_theta": self.theta, "rope_scaling": self.rope and dict(self.rope)}
            config["torch_dtype"] = _CONFIG_NAMES[self.dtype]
        else:
            config["rope_parameters"] = {
                "rope_type": "default",
                "rope_theta": self.theta,
                **(self.rope or {}),
            }
            config["dtype"] = _CONFIG_NAMES[self.dtype]
        config.update(self.extra)
        return {key: value for key, value in config.items() if key not in self.extra or value is not None}


def make_tiny_llama(directory: Path, base: TinyLlama | None = None, **overrides: object) -> Path:
    """Writes a random model to `directory` (made if need be) and returns it. `overrides` are fields of
    TinyLlama."""
    tiny = replace(base or TinyLlama(), **overrides)  # type: ignore[arg-type]  # names are checked by replace
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", tiny.config_json())
    if tiny.eos is not None:
        _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": tiny.eos})
    if tiny.tokenizer:
        write_tokenizer(directory, tiny.chat_template)
    write_weights(directory, random_weights(directory, tiny), tiny.dtype, tiny.shards)
    return directory


def random_weights(directory: Path, tiny: TinyLlama) -> dict[str, npt.NDArray[np.float32]]:
    """Random values for every tensor that the config in `directory` asks for."""
    config = read_config(directory)
    rng = np.random.default_rng(tiny.seed)
    weights: dict[str, npt.NDArray[np.float32]] = {}
    for name, shape in span_tensors(config, whole_model(config)).items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            values = 1.6 + 0.16 * values  # as large as the other families' queries and keys become, see below
        elif name.endswith("norm.weight"):
            values = 1.0 + 0.1 * values
        elif name.endswith(".bias"):
            values *= 0.1
        elif name != "model.embed_tokens.weight":
            # Queries and keys larger than the rest, so that attention picks some positions.
            gain = 1.6 if "q_proj" in name or "k_proj" in name else 0.8
            values *= gain / np.sqrt(shape[-1])
        weights[name] = values.astype(np.float32)
    return weights


def write_weights(
    directory: Path, weights: Mapping[str, npt.NDArray[np.float32]], dtype: DType = "f32", shards: int = 1
) -> None:
    """Writes `weights` as one safetensors file, or as `shards` files with an index."""
    if shards == 1:
        write_safetensors(directory / "model.safetensors", weights, dtype)
        return
    names = list(weights)
    if HEAD in names:  # beside the last block, as exporters do
        names.append(names.pop(names.index(HEAD)))
    size = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file_name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[index * size : (index + 1) * size]}
        write_safetensors(directory / file_name, part, dtype)
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(array.size * STORAGE[dtype].itemsize for array in weights.values())
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index_json)


def write_safetensors(path: Path, weights: Mapping[str, npt.NDArray[np.float32]], dtype: DType) -> None:
    """Writes one file: the header's length, the header padded to 8 bytes, the tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    offset = 0
    for name, array in weights.items():
        raw = (f32_to_bf16(array) if dtype == "bf16" else array.astype(STORAGE[dtype])).tobytes()
        header[name] = {
            "dtype": _FORMAT_NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        offset += len(raw)
        parts.append(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def write_tokenizer(directory: Path, chat_template: str | None, vocab_size: int = VOCAB_SIZE) -> None:
    """Writes a byte-level tokenizer: one token a byte, so that any text has ids and any ids have bytes; BOS
    in front, as a Llama tokenizer adds it. Tokens beyond these, up to `vocab_size`, stand for no text that
    is ever encoded."""
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for byte, letter in enumerate(_byte_letters()):
        vocab[letter] = len(SPECIAL_TOKENS) + byte
    vocab.update({f"<{index}>": index for index in range(VOCAB_SIZE, vocab_size)})
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    tokenizer_config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 1_000_000,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    _write_json(directory / "tokenizer_config.json", tokenizer_config)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE: itself where printable, else one above
    U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters: list[str] = []
    moved = 0
    for byte in range(256):
        letters.append(chr(byte) if byte in printable else chr(0x100 + moved))
        moved += byte not in printable
    return letters


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
