"""A Hugging Face directory as GGUF, for llama.cpp: the same weights, written tensor by tensor and quantised
by llama.cpp itself. Needs `gguf` and `llama_cpp` (the extra `bench`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from dgn_backends.hf_config import read_config
from dgn_backends.model import BlockSpec, ModelConfig
from dgn_backends.tensor import bf16_to_f32
from dgn_backends.weights import EMBEDDING, FINAL_NORM, HEAD, ModelFiles, span_tensors, whole_model

FORMATS = ("q4_0", "q8_0", "bf16")
#: Names of tensors within a block.
_BLOCK_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
_NAMES = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}


def write_gguf(directory: Path, path: Path) -> None:
    """Writes the model in `directory`, whose weights are bf16, to `path`, matrices in bf16, vectors in f32.

    Llama and Qwen3 only, without rotary scaling. The file has no vocabulary, only its size.
    """
    import gguf

    config = read_config(directory)
    files = ModelFiles(directory)
    shapes = span_tensors(config, whole_model(config))
    architecture = "qwen3" if config.block.qk_norm else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    _add_keys(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    bf16, f32 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32
    for name, shape in shapes.items():
        matrix = len(shape) == 2
        stored = (shape[0], shape[1] * 2) if matrix else shape
        dtype = np.dtype(np.uint8) if matrix else np.dtype(np.float32)
        size = int(np.prod(stored)) * dtype.itemsize
        writer.add_tensor_info(_gguf_name(name), stored, dtype, size, bf16 if matrix else f32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        raw = files.tensor(name, shape).to_numpy()
        if len(shape) == 1:
            writer.write_tensor_data(bf16_to_f32(raw))
            continue
        if architecture == "llama":
            raw = _interleave(name, raw, config.block)
        writer.write_tensor_data(np.ascontiguousarray(raw).view(np.uint8))
    writer.close()


def quantise_gguf(source: Path, target: Path, kind: str, output: str | None, threads: int) -> None:
    """Has llama.cpp quantise `source`; `output` is the type of the output tensor, None leaves it to it."""
    import llama_cpp

    types = {"q4_0": llama_cpp.GGML_TYPE_Q4_0, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}[
        kind
    ]
    if output is not None:
        params.output_tensor_type = types[output]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise SystemExit(f"llama.cpp could not quantise {source} to {kind}")


def output_type(path: Path) -> str:
    """The type of the tensor that a file's head multiplies with: `output.weight`, else the embedding."""
    import gguf

    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}
    return types.get("output.weight", types["token_embd.weight"])


def _add_keys(writer: object, config: ModelConfig) -> None:
    block = config.block
    for name, value in (
        ("block_count", config.n_blocks),
        ("context_length", config.max_positions),
        ("embedding_length", block.hidden_size),
        ("feed_forward_length", block.intermediate_size),
        ("head_count", block.n_heads),
        ("head_count_kv", block.n_kv_heads),
        ("key_length", block.head_dim),
        ("value_length", block.head_dim),
        ("rope_dimension_count", block.head_dim),
        ("rope_freq_base", block.rope.theta),
        ("layer_norm_rms_eps", block.norm_eps),
        ("vocab_size", config.vocab_size),
        ("tokenizer_model", "none"),
    ):
        getattr(writer, f"add_{name}")(value)


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{_BLOCK_NAMES[rest]}"


def _interleave(name: str, raw: npt.NDArray[np.generic], block: BlockSpec) -> npt.NDArray[np.generic]:
    """Rows of Q and K in the order of llama.cpp's rotation for Llama: pairs beside each other."""
    heads = {"q_proj": block.n_heads, "k_proj": block.n_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return raw
    return raw.reshape(heads, 2, block.head_dim // 2, -1).swapaxes(1, 2).reshape(raw.shape)
