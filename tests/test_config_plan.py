"""`dgnd check` and `dgnd init`, as commands."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dgn_backends import registry
from dgn_backends.api import LoadRequest, Quant
from dgn_backends.hf_config import read_config
from dgn_backends.quant_plan import SCHEMES
from dgn_backends.registry import load_backend
from dgn_backends.span import Span
from dgn_backends.tensor import DType, tensor_bytes
from dgn_backends.testing_models import make_tiny_llama, write_safetensors, write_tokenizer
from dgn_backends.weights import whole_model
from dgnd.config import load_config
from dgnd.errors import ConfigError, ModelError
from dgnd.main import main
from dgnd.upkeep.ledger import PROGRAM_BYTES
from dgnd.upkeep.plan import format_plan, make_plan
from dgnd.words import format_bytes

PEER = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
HIDDEN, INNER, VOCAB, BLOCKS = 8, 16, 32, 3

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": BLOCKS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def block_shapes(block: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{block}."
    return {
        prefix + "input_layernorm.weight": (HIDDEN,),
        prefix + "post_attention_layernorm.weight": (HIDDEN,),
        prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        prefix + "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
        prefix + "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
        prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        prefix + "mlp.gate_proj.weight": (INNER, HIDDEN),
        prefix + "mlp.up_proj.weight": (INNER, HIDDEN),
        prefix + "mlp.down_proj.weight": (HIDDEN, INNER),
    }


BLOCK_BYTES = 4 * sum(int(np.prod(shape)) for shape in block_shapes(0).values())
EMBED_BYTES = 4 * VOCAB * HIDDEN
SHARDS: dict[str, dict[str, tuple[int, ...]]] = {
    "model-00001-of-00003.safetensors": {"model.embed_tokens.weight": (VOCAB, HIDDEN), **block_shapes(0)},
    "model-00002-of-00003.safetensors": block_shapes(1),
    "model-00003-of-00003.safetensors": {
        **block_shapes(2),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    },
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(directory, None)
    weight_map = {name: file for file, shapes in SHARDS.items() for name in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, shapes in SHARDS.items():
        zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        write_safetensors(directory / file, zeros, "f32")
    return directory


def write_config(tmp_path: Path, *rows: tuple[str, str], quant: str = "") -> Path:
    keys = f'quant = "{quant}"\n' if quant else ""
    text = f'[models.tiny]\npath = "model"\n{keys}[peers.attic]\nid = "{PEER}"\n'
    for peer, span in rows:
        text += f'[[blocks]]\nmodel = "tiny"\npeer = "{peer}"\nspan = "{span}"\n'
    path = tmp_path / "dgn.toml"
    path.write_text(text)
    return path


def dgnd(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    monkeypatch.setattr("sys.argv", ["dgnd", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_bytes_and_files_of_every_node(tmp_path: Path, model: Path) -> None:
    (plan,) = make_plan(load_config(write_config(tmp_path, ("self", "embed,0,head"), ("attic", "1-2"))))
    own, attic = plan.nodes
    assert (own.node, own.weights_bytes) == ("self", BLOCK_BYTES + 2 * EMBED_BYTES + 4 * HIDDEN)
    assert own.files == ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    assert (attic.node, attic.weights_bytes) == ("attic", 2 * BLOCK_BYTES)
    assert attic.files == ("model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")
    assert plan.small_files == (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
    )
    assert (plan.missing, plan.absent) == ("", ())


@pytest.mark.parametrize("quant", list(SCHEMES))
def test_quantised_weights_count_as_they_are_loaded(tmp_path: Path, quant: Quant) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    tiny = make_tiny_llama(tmp_path / "model", tied=True, dtype="bf16", attention_bias=True)
    rows = (("self", "embed,0-3,head"), ("attic", "2-3"))
    (plan,) = make_plan(load_config(write_config(tmp_path, *rows, quant=quant)))
    config = read_config(tiny)
    for node, span in zip(plan.nodes, (whole_model(config), Span(2, 4)), strict=True):
        request = LoadRequest(path=tiny, config=config, span=span, quant=quant)
        loaded = load_backend("onnx").load(request, lambda done, total: None)
        assert node.weights_bytes == loaded.weights_bytes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_torch_holds_a_tied_embedding_once(tmp_path: Path, tied: bool, dtype: DType) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    tiny = make_tiny_llama(tmp_path / "model", tied=tied, dtype=dtype)
    (plan,) = make_plan(load_config(write_config(tmp_path, ("self", "embed,0-3,head"))))
    config = read_config(tiny)
    request = LoadRequest(path=tiny, config=config, span=whole_model(config), dtype=dtype)
    loaded = load_backend("torch").load(request, lambda done, total: None)
    norms = (2 * config.n_blocks + 1) * config.block.hidden_size  # are f32 in torch
    more = tensor_bytes("f32", (norms,)) - tensor_bytes(dtype, (norms,))
    assert plan.nodes[0].weights_bytes + more == loaded.weights_bytes


def test_check_names_the_quantisation(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, ("self", "embed,0-2,head"), quant="int4")
    code, out, _ = dgnd(capsys, monkeypatch, "check", "--config", str(path))
    assert code == 0
    assert re.search(r"  self  embed,0-2,head: [\d.]+ KiB of weights in int4\n", out)


@pytest.mark.parametrize("command", [["--help"], ["check", "--config"]])
def test_a_stdout_that_can_not_be_written_is_one_line(
    tmp_path: Path, model: Path, command: list[str]
) -> None:
    path = write_config(tmp_path, ("self", "embed,0-2,head"))
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dgnd", *command, *([str(path)] if command[1:] else [])],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "dgnd: stdout can't be written: No space left on device\n")


def test_check_prints_the_plan(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, ("self", "embed,0"), ("attic", "2"))
    code, out, err = dgnd(capsys, monkeypatch, "check", "--config", str(path))
    assert (code, err) == (0, "")
    assert out.startswith(f"tiny: 3 blocks, in {model}\n")
    assert "  self   embed,0: 3.3 KiB of weights\n" in out
    assert "warning: no row of this file serves 1,head" in out
    assert re.search(r"^  this node needs [\d.]+ KiB, [\d.]+ [MG]iB free$", out, re.MULTILINE)


def test_check_says_what_does_not_fit_and_what_would(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, ("self", "embed,0-2,head"))
    kv = 3 * 256 * 2 * 4 * 4
    whole = 3 * BLOCK_BYTES + 2 * EMBED_BYTES + 4 * HIDDEN + kv
    free = whole - BLOCK_BYTES
    budget = (free + 2 * PROGRAM_BYTES) * 16 // 15
    path.write_text(f'{path.read_text()}[limits]\nmemory = "{budget}B"\n')
    code, out, err = dgnd(capsys, monkeypatch, "check", "--config", str(path))
    assert (code, err) == (0, "")
    numbers = f"needs {format_bytes(whole)}, {format_bytes(free)} free"
    assert f"  warning: this node {numbers}: embed,0-1 fit\n" in out


def auto_config(tmp_path: Path, row: str, quant: str = "") -> Path:
    path = write_config(tmp_path, ("attic", "2"), quant=quant)
    path.write_text(f'{path.read_text()}[[blocks]]\nmodel = "tiny"\npeer = "self"\nspan = "auto"\n{row}')
    return path


def test_check_says_what_a_node_may_choose(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "model-00002-of-00003.safetensors").unlink()
    path = auto_config(tmp_path, f"max_bytes = {2 * BLOCK_BYTES + 1}")
    code, out, err = dgnd(capsys, monkeypatch, "check", "--config", str(path))
    assert (code, err) == (0, "")
    assert f"  self  auto: up to {format_bytes(2 * BLOCK_BYTES + 1)} of weights\n" in out
    assert "    2 of 3 blocks fit; it takes those that its peers lack most\n" in out
    assert "    its files here are those of embed,0,2,head\n" in out
    assert "  no row of this file serves embed,0-1,head: it chooses among that first\n" in out
    (plan,) = make_plan(load_config(auto_config(tmp_path, "")))
    assert plan.auto is not None
    assert (plan.auto.by_memory, plan.auto.blocks) == (True, 3)
    assert "of weights, 70% of the memory that is free now" in format_plan((plan,))


def test_too_few_bytes_to_choose_with_are_named(tmp_path: Path, model: Path) -> None:
    path = auto_config(tmp_path, f"max_bytes = {BLOCK_BYTES - 1}")
    needs = f'max_bytes is {BLOCK_BYTES - 1:,}, and a block of "tiny" needs {BLOCK_BYTES:,}; raise it'
    with pytest.raises(ConfigError) as caught:
        make_plan(load_config(path))
    assert caught.value.message == f"{path}:13:1: {needs}"


def test_a_node_without_weights_chooses_nothing(tmp_path: Path, model: Path) -> None:
    for file in SHARDS:
        (model / file).unlink()
    with pytest.raises(ConfigError, match=r"dgn.toml:9:3: none of the weight files of .*model are here"):
        make_plan(load_config(auto_config(tmp_path, "")))


def test_shards_of_others_may_be_absent(tmp_path: Path, model: Path) -> None:
    (model / "model-00002-of-00003.safetensors").unlink()
    (plan,) = make_plan(load_config(write_config(tmp_path, ("self", "embed,0"), ("attic", "1-2,head"))))
    assert plan.absent == ()


def test_own_files_that_are_absent_are_all_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 3):
        (model / f"model-0000{number}-of-00003.safetensors").unlink()
    path = write_config(tmp_path, ("self", "embed,0-2,head"))
    code, out, err = dgnd(capsys, monkeypatch, "check", "--config", str(path))
    assert code == ConfigError.exit_code
    assert "model-00001-of-00003" in out
    assert err.count("\n") == 1
    assert "model-00001-of-00003" in err
    assert "model-00002-of-00003" not in err
    assert "model-00003-of-00003" in err


def test_a_node_that_holds_nothing_needs_no_weights(tmp_path: Path, model: Path) -> None:
    for path in (*model.glob("*.safetensors"), model / "model.safetensors.index.json"):
        path.unlink()
    (plan,) = make_plan(load_config(write_config(tmp_path, ("attic", "embed,0-2,head"))))
    assert plan.nodes[0].files == ()
    assert plan.nodes[0].weights_bytes == 3 * BLOCK_BYTES + 2 * EMBED_BYTES + 4 * HIDDEN


def test_a_damaged_own_file_is_found_without_loading(tmp_path: Path, model: Path) -> None:
    shard = model / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelError, match="model-00002-of-00003"):
        make_plan(load_config(write_config(tmp_path, ("self", "1"))))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("self", "3")], ':8:1: model "tiny": block 3 in span "3" is beyond the model'),
        ([("attic", "0-1"), ("attic", "1")], ':12:1: an earlier row gives 1 of "tiny" to "attic" already'),
        ([("self", "x")], ':8:1: "x" in span "x" is none of'),
    ],
)
def test_errors_are_one_line_that_begins_with_the_place(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[str, str]],
    expected: str,
) -> None:
    path = write_config(tmp_path, *rows)
    code, _, err = dgnd(capsys, monkeypatch, "check", "--config", str(path))
    assert code == ConfigError.exit_code
    assert err.startswith(f"{path}{expected}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("tokenizer.json", "{", "tokenizer.json:1:2"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", '{"chat_template": 3}', "tokenizer_config.json"),
        ("generation_config.json", "[1]", "generation_config.json"),
    ],
)
def test_check_finds_what_would_keep_prompts_from_being_answered(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: str,
    where: str,
) -> None:
    (model / name).write_text(text)
    config = write_config(tmp_path, ("self", "embed,0-2,head"))
    code, out, err = dgnd(capsys, monkeypatch, "check", "--config", str(config))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert where in err


def test_check_says_that_a_tokenizer_is_missing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning: a node that only serves blocks needs none."""
    (model / "tokenizer.json").unlink()
    config = write_config(tmp_path, ("self", "embed,0-2,head"))
    code, out, err = dgnd(capsys, monkeypatch, "check", "--config", str(config))
    assert (code, err) == (0, "")
    assert f"warning: {model / 'tokenizer.json'} is missing" in out


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", *list(SHARDS)[:1]],
)
def test_check_does_not_wait_for_a_pipe(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    config = write_config(tmp_path, ("self", "embed,0-2,head"))
    code, _, err = dgnd(capsys, monkeypatch, "check", "--config", str(config))
    assert code == 2
    assert f"{model / name}: is no regular file" in err


def test_check_finds_a_library_that_is_not_installed(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._NEEDS, "reference", "no_such_module")
    config = write_config(tmp_path, ("self", "embed,0-2,head"))
    config.write_text(config.read_text().replace('path = "model"', 'path = "model"\nbackend = "reference"'))
    code, _, err = dgnd(capsys, monkeypatch, "check", "--config", str(config))
    assert code == 2
    assert "it needs the Python module no_such_module" in err


def test_a_missing_model_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, ("self", "0"))
    code, _, err = dgnd(capsys, monkeypatch, "check", "--config", str(path))
    assert code == ModelError.exit_code
    assert str(tmp_path / "model") in err
    assert err.count("\n") == 1


def test_a_model_without_path_that_does_not_come_along(tmp_path: Path) -> None:
    path = tmp_path / "dgn.toml"
    path.write_text("[models.dgn-dmeo]\n")
    with pytest.raises(ConfigError, match=r"dgn.toml:1:2: .*dgn-dmeo"):
        make_plan(load_config(path))


def test_init_prints_the_same_id_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "a" / "state"
    code, first, err = dgnd(capsys, monkeypatch, "init", "--state-dir", str(state))
    assert (code, err) == (
        0,
        f"wrote {state}/dgn.toml; edit it, then: dgnd check --config {state}/dgn.toml\n",
    )
    assert first.startswith("12D3KooW")
    written = (state / "dgn.toml").read_text()
    assert f"# The peer id of this node: {first}" in written
    assert written.count("#") > 30
    assert load_config(state / "dgn.toml").config.node.state_dir == state
    assert load_config(state / "dgn.toml").config.control.socket is None
    assert dgnd(capsys, monkeypatch, "check", "--config", str(state / "dgn.toml"))[0] == 0
    (state / "dgn.toml").write_text("# mine\n")
    assert dgnd(capsys, monkeypatch, "init", "--state-dir", str(state)) == (0, first, "")
    assert (state / "dgn.toml").read_text() == "# mine\n"
    assert stat.S_IMODE((state / "identity.key").stat().st_mode) == 0o600
    config = tmp_path / "dgn.toml"
    config.write_text('[node]\nstate_dir = "a/state"\n')
    assert dgnd(capsys, monkeypatch, "init", "--config", str(config))[1] == first
    assert dgnd(capsys, monkeypatch, "--config", str(config), "init")[1] == first


def test_init_where_no_directory_can_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = dgnd(capsys, monkeypatch, "init", "--state-dir", "/proc/nowhere/dgn")
    assert code == ConfigError.exit_code
    assert err.startswith("dgnd: /proc/nowhere/dgn: ")


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")],
)
def test_format_bytes(count: int, expected: str) -> None:
    assert format_bytes(count) == expected
