"""The next turn, appended to a context, makes the conversation that the template would write."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_models import byte_level, sentencepiece, write_model
from text_talk import CHATML_SPECIALS, builtin, say

from dgnd.text.assets import TextAssets


@pytest.mark.parametrize("system", [None, "Be kind"])
@pytest.mark.parametrize("with_eos", [True, False])
@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "tags", "mistral", "llama2"])
def test_a_turn_appended_equals_the_whole_conversation(
    name: str, with_eos: bool, system: str | None, tmp_path: Path
) -> None:
    assets = builtin(tmp_path, name, name)
    whole = assets.encode_chat(say("Hello", "Hi there", "And <s> <|im_end|> you?", system=system))
    first = assets.encode_chat(say("Hello", system=system))
    assert whole[: len(first)] == first
    end = next(i for i in range(len(first), len(whole)) if whole[i] in assets.eos_token_ids)
    if name == "llama2" and not with_eos:
        end -= 1  # the space before </s> is of the template, not of the answer
    context = whole[: end + 1] if with_eos else whole[:end]
    assert context + assets.encode_turn(context, "And <s> <|im_end|> you?") == whole


def test_an_answer_that_ended_with_another_eos_is_not_ended_twice(tmp_path: Path) -> None:
    assets = builtin(tmp_path, "llama3")
    end_of_text = assets._tokenizer.token_to_id("<|end_of_text|>")
    assets = TextAssets.load(tmp_path, eos_token_ids=(end_of_text,))
    turn = assets.encode_turn([*assets.encode_chat(say("a")), 70, end_of_text], "b")
    assert assets.decode(turn, skip_special=False).startswith("<|start_header_id|>user")


def test_a_text_template_goes_on_without_the_space_of_a_new_text(tmp_path: Path) -> None:
    path = write_model(tmp_path, sentencepiece("llama2"), bos_token="<s>", eos_token="</s>")
    assets = TextAssets.load(path, "plain")
    whole = assets.encode_chat(say("Hello", "Hi", "Bye"))
    first = assets.encode_chat(say("Hello"))
    end = next(n for n in range(len(first), len(whole)) if assets.decode(whole[:n]).endswith("Hi"))
    context = whole[:end]
    assert assets.encode_turn(context, "Bye") == whole[len(context) :]


def test_private_use_characters_are_text_like_any_other(tmp_path: Path) -> None:
    assets = builtin(tmp_path, "plain")
    for char in ("\U00100000", "\U00100001", "\U0010fffd", "\U000ffff0", "\ue000"):
        text = f"a{char}b"
        assert assets.decode(assets.encode_turn([70], text)).endswith(f"User: {text}\nAssistant:")
        assert assets.decode(assets.encode_turn([70], text + "<s>")).endswith(f"User: {text}<s>\nAssistant:")
        assert assets.decode(assets.encode_raw(text + "<s>")) == text + "<s>"


def test_an_empty_context_is_a_first_turn(tmp_path: Path) -> None:
    assets = builtin(tmp_path, "chatml")
    assert assets.encode_turn([], "a", "s") == assets.encode_chat(say("a", system="s"))


def test_a_system_text_in_a_later_turn_is_its_own_message_or_goes_before_the_users(tmp_path: Path) -> None:
    chatml = builtin(tmp_path / "a", "chatml")
    turn = chatml.decode(chatml.encode_turn([1], "b", "s"), skip_special=False)
    assert turn.endswith(
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    refusing = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    path = write_model(tmp_path / "b", byte_level(CHATML_SPECIALS), refusing + "|{{ m.content }}{% endfor %}")
    assets = TextAssets.load(path)
    assert assets.decode(assets.encode_turn([1], "b", "s")) == "|s\n\nb"


def test_a_template_that_hides_earlier_answers_gets_a_new_conversation_after_the_end(tmp_path: Path) -> None:
    source = "{{ bos_token }}<|im_start|>user\n{{ messages[-1].content }}<|im_end|>\n<|im_start|>assistant"
    tokenizer = byte_level((*CHATML_SPECIALS, "<s>"))
    path = write_model(tmp_path, tokenizer, source, bos_token="<s>", eos_token="<|im_end|>")
    assets = TextAssets.load(path)
    first = assets.encode_chat(say("a"))
    eos = tokenizer.token_to_id("<|im_end|>")
    assert assets.decode(assets.encode_turn([*first, 70], "b"), skip_special=False) == (
        "<|im_end|><|im_start|>user\nb<|im_end|>\n<|im_start|>assistant"
    )
    assert assets.encode_turn([*first, 70, eos], "b") == assets.encode_turn([*first, 70], "b")[1:]


def test_a_template_that_rewrites_earlier_answers_still_gives_the_next_turn(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant"
    )
    assets = TextAssets.load(
        write_model(tmp_path, byte_level(CHATML_SPECIALS), source, eos_token="<|im_end|>")
    )
    assert assets.decode(assets.encode_turn([70], "b"), skip_special=False) == (
        "<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant"
    )
