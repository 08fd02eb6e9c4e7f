"""The built-in templates: each in its family's form, and chosen as it should be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from text_models import byte_level, sentencepiece, write_model
from text_talk import BUILTIN, CHATML_SPECIALS, LLAMA3_SPECIALS, OWN_CHATML, TALK, builtin, say

from dgnd.errors import ConfigError
from dgnd.text.assets import TextAssets
from dgnd.text.templates import NAMES


@pytest.mark.parametrize("name", BUILTIN)
def test_each_family_has_its_form_and_one_bos(name: str, tmp_path: Path) -> None:
    assets = builtin(tmp_path, name, name)
    ids = assets.encode_chat(TALK)
    assert spelled(assets, ids) == BUILTIN[name][2]
    assert assets.template_name == name
    bos = BUILTIN[name][1].get("bos_token")
    if bos:
        assert spelled(assets, ids).count(bos) == 1
        assert ids[0] == assets.bos_token_id
        assert ids[1] != assets.bos_token_id


def spelled(assets: TextAssets, ids: Sequence[int]) -> str:
    """Every token written out, with the space that SentencePiece has before a segment."""
    return "".join(map(assets.token_text, ids)) if len(ids) else ""


@pytest.mark.parametrize("name", [name for name in BUILTIN if name not in ("llama2", "alpaca")])
def test_the_form_is_chosen_by_the_vocabulary(name: str, tmp_path: Path) -> None:
    assert builtin(tmp_path, name).template_name == name


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("Llama-2-7b-chat-hf", "llama2"),
        ("Mistral-7B-Instruct-v0.1", "mistral"),
        ("alpaca-7b", "alpaca"),
        ("x", "plain"),
    ],
)
def test_or_by_the_name_of_the_model(directory: str, name: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / directory, sentencepiece("llama2"), bos_token="<s>", eos_token="</s>")
    assert TextAssets.load(path).template_name == name


def test_an_explicit_name_wins_over_the_models_own_template(tmp_path: Path) -> None:
    path = write_model(tmp_path, byte_level(LLAMA3_SPECIALS), OWN_CHATML, bos_token="<|begin_of_text|>")
    assets = TextAssets.load(path, "llama3")
    assert assets.template_name == "llama3"
    assert assets.decode(assets.encode_chat(say("a")), skip_special=False).startswith(
        "<|begin_of_text|><|start_header"
    )
    assert assets.eos_token_ids == {assets._tokenizer.token_to_id("<|eot_id|>")}


def test_an_unknown_name_lists_the_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'vicuna'") as caught:
        TextAssets.load(tmp_path, "vicuna")
    assert all(name in caught.value.message for name in NAMES)
    assert set(NAMES) == {"auto", *BUILTIN}


def test_a_bos_that_is_also_eos_or_marks_turns_is_not_put_before_a_chat(tmp_path: Path) -> None:
    tokenizer = byte_level(CHATML_SPECIALS)
    gpt2 = TextAssets.load(
        write_model(tmp_path / "a", tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    )
    smol = TextAssets.load(
        write_model(tmp_path / "b", tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    )
    for assets in (gpt2, smol):
        assert assets.decode(assets.encode_chat(say("a")), skip_special=False).startswith("<|im_start|>user")
