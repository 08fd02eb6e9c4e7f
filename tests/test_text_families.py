"""The text of Qwen, Mistral and SmolLM: their kinds of template, of tokenizer and of settings. What holds for
every model's own template is tested in `test_text_chat`, on these too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from text_families import FAMILY_TEXTS, MISTRAL_TEMPLATE, QWEN_TEMPLATE, SMOLLM3_TEMPLATE
from text_talk import say

from dgnd.control.api import ChatMessage
from dgnd.errors import BadRequest
from dgnd.text.assets import TextAssets
from dgnd.text.jinja_sandbox import ChatTemplate

THOUGHT = "<think>\nBecause of this.\n</think>\n\nSo it is."
TALKS = [
    say("Hello"),
    say("Hello", "Hi", "And you?", system="Be kind."),
    say("Why?", THOUGHT, "And?", THOUGHT, "Really?", system="Be brief. /no_think"),
    say("Call it", THOUGHT, "<tool_response>4</tool_response>"),
    say("Call it", "<think></think>", "<tool_response>4</tool_response>", THOUGHT),
]


@pytest.mark.parametrize("talk", TALKS, ids=range(len(TALKS)))
@pytest.mark.parametrize("source", [QWEN_TEMPLATE, MISTRAL_TEMPLATE, SMOLLM3_TEMPLATE])
def test_their_templates_render_as_with_transformers(source: str, talk: list[ChatMessage]) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": message.role, "content": message.content} for message in talk]
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "lead": ""}
    (want,), _ = utils.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, **tokens
    )
    assert ChatTemplate(source, "the file").render(messages, tokens) == want
    assert "Hello" in want or "Why?" in want or "Call it" in want


def test_earlier_reasoning_is_left_out_as_the_template_says() -> None:
    messages = [{"role": message.role, "content": message.content} for message in TALKS[2]]
    text = ChatTemplate(QWEN_TEMPLATE, "the file").render(messages, {})
    assert "Because" not in text
    assert text.count("So it is.") == 2


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize("name", FAMILY_TEXTS)
def test_a_turn_appended_is_the_turn_of_the_whole_conversation(
    name: str, system: str | None, tmp_path: Path
) -> None:
    assets = TextAssets.load(FAMILY_TEXTS[name](tmp_path))
    assert assets.template_name == "model"
    whole = assets.encode_chat(say("Hello", "Hi there", "And <s> <|im_end|> you?", system=system))
    first = assets.encode_chat(say("Hello", system=system))
    if system and name.startswith("mistral"):
        # The system message moves to the last question: what is in the context stays where it was written.
        assert whole[: len(first)] != first
        return
    assert whole[: len(first)] == first
    end = next(n for n in range(len(first), len(whole)) if whole[n] in assets.eos_token_ids)
    for context in (whole[: end + 1], whole[:end]):
        assert context + assets.encode_turn(context, "And <s> <|im_end|> you?") == whole


def test_a_template_that_takes_no_later_system_message_gets_it_with_the_question(tmp_path: Path) -> None:
    assets = TextAssets.load(FAMILY_TEXTS["mistral-tekken"](tmp_path))
    context = [*assets.encode_chat(say("a")), 70]
    turn = assets.decode(assets.encode_turn(context, "b", system="Be kind."), skip_special=False)
    assert turn == "</s>[INST]Be kind.\n\nb[/INST]"
    with pytest.raises(BadRequest, match="must alternate"):
        assets.encode_chat([*say("a"), *say("b")])


def test_qwen_writes_no_bos_though_its_config_names_one(tmp_path: Path) -> None:
    path = FAMILY_TEXTS["qwen"](tmp_path)
    tokenizer = TextAssets.load(path)._tokenizer
    end_of_text, end_of_turn = (tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|im_end|>"))
    assert end_of_text is not None
    (path / "config.json").write_text(json.dumps({"bos_token_id": end_of_text, "eos_token_id": end_of_turn}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end_of_turn, end_of_text]}))
    assets = TextAssets.load(path)
    assert assets.bos_token_id == end_of_text
    assert assets.decode(assets.encode_raw("Hello"), skip_special=False) == "Hello"
    assert end_of_text not in assets.encode_chat(say("Hello"))
    assert {end_of_text, end_of_turn} <= assets.eos_token_ids


def test_mistral_writes_one_bos(tmp_path: Path) -> None:
    for name in ("mistral-v3", "mistral-tekken"):
        assets = TextAssets.load(FAMILY_TEXTS[name](tmp_path / name))
        bos = assets.bos_token_id
        for ids in (assets.encode_raw("Hello"), assets.encode_chat(say("Hello", "Hi", "Bye"))):
            assert ids[0] == bos
            assert ids.count(bos) == 1


def test_ids_beyond_the_tokenizer_have_no_text(tmp_path: Path) -> None:
    """Qwen's embedding has more rows than its tokenizer has tokens."""
    assets = TextAssets.load(FAMILY_TEXTS["qwen"](tmp_path))
    hello = assets.encode_raw("Hello")
    assert assets.decode([*hello, assets.vocab_size, assets.vocab_size + 100, *hello]) == "HelloHello"
