"""Reading a model's text files: what is found, and what is said when they can't be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from text_models import LLAMA_SPECIALS, byte_level, sentencepiece, trained_model, write_model
from tokenizers import Tokenizer

from dgnd.control.api import ChatMessage
from dgnd.errors import BadRequest, ContextExceeded, ModelError
from dgnd.text.assets import TextAssets
from dgnd.text.special_text import SpecialAliases
from dgnd.text.tokenizer import MAX_PROMPT_BYTES

DEMO = Path(__file__).parents[1] / "backends" / "dgn_backends" / "models" / "dgn-demo"


def model(path: Path, **config: object) -> Path:
    return write_model(
        path, byte_level(LLAMA_SPECIALS, bos="<s>"), bos_token="<s>", eos_token="</s>", **config
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "there is no such file"),
        ("tokenizer.json", "{", "tokenizer.json:1:2: broken JSON"),
        ("tokenizer.json", "[]", "must hold a JSON object, not list"),
        ("tokenizer.json", '{"model": {}}', "not a tokenizer: "),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8 text at byte 0"),
        ("tokenizer_config.json", "{]", "tokenizer_config.json:1:2: broken JSON"),
        (
            "tokenizer_config.json",
            '{"chat_template": 5}',
            "chat_template must be a string or a list, not int",
        ),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "needs a name and a template"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "x", "template": "y"}]}',
            "no entry named default, only x",
        ),
        ("special_tokens_map.json", "1", "must hold a JSON object"),
        (
            "generation_config.json",
            '{"eos_token_id": "</s>"}',
            "eos_token_id must be a token id or a list of them",
        ),
        ("config.json", '{"bos_token_id": true}', "bos_token_id must be a token id"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(
    file: str, content: str | bytes | None, message: str, tmp_path: Path
) -> None:
    path = model(tmp_path)
    (path / file).unlink(missing_ok=True)
    if content is not None:
        (path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as caught:
        TextAssets.load(path)
    assert message in caught.value.message
    assert str(path / file) in caught.value.message
    assert "\n" not in caught.value.message


def test_every_eos_that_the_files_name_ends_an_answer(tmp_path: Path) -> None:
    path = model(tmp_path)
    ids = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab()
    assert TextAssets.load(path).eos_token_ids == {ids["</s>"]}
    (path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert TextAssets.load(path).eos_token_ids == {ids["</s>"], 7}
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert TextAssets.load(path).eos_token_ids == {ids["</s>"], 8, 9}
    assert TextAssets.load(path, eos_token_ids=(11,)).eos_token_ids == {ids["</s>"], 8, 9, 11}


def test_raw_text_has_the_bos_that_the_tokenizer_or_its_config_adds(tmp_path: Path) -> None:
    path = model(tmp_path / "a")
    bos = TextAssets.load(path).bos_token_id
    assert TextAssets.load(path).encode_raw("a b")[0] == bos
    assert TextAssets.load(path).encode_raw("") == [bos]
    assert TextAssets.load(path).encode_raw("<s>").count(bos) == 1  # type: ignore[arg-type]
    without = model(tmp_path / "b", add_bos_token=False)
    assert TextAssets.load(without).encode_raw("a b")[0] != bos
    plain = write_model(tmp_path / "c", byte_level(LLAMA_SPECIALS), bos_token="<s>", add_bos_token=True)
    assert TextAssets.load(plain).encode_raw("a b")[0] == bos
    assert TextAssets.load(plain).encode_raw("a <s> b").count(bos) == 1  # type: ignore[arg-type]


def test_ids_beyond_the_models_own_vocabulary_count(tmp_path: Path) -> None:
    assets = TextAssets.load(model(tmp_path))
    assert assets.vocab_size == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    assert assets.token_text(assets.vocab_size - 1) == "</s>"


def test_the_twin_of_a_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    for tokenizer in (byte_level(LLAMA_SPECIALS), sentencepiece("llama2"), sentencepiece("mistral")):
        added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        twin = SpecialAliases(tokenizer.to_str(), added)
        for text in ("", "Hello  there\n🙂", "<s>a</s> b", "日本<unk>語"):
            assert twin.encode(text, {}) == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_without_a_twin_refuses_special_texts_and_takes_all_others(tmp_path: Path) -> None:
    assets = TextAssets.load(model(tmp_path))
    broken = SpecialAliases(assets._tokenizer._inner.to_str(), {**assets._tokenizer.added, 10**6: "<never>"})
    assets._tokenizer._aliases = broken
    assert assets.encode_raw("hello")
    with pytest.raises(BadRequest, match="can't take '<s>' as text"):
        assets.encode_chat([ChatMessage("user", "a <s> b")])


def test_the_longest_text_is_tokenised_in_bounded_time(tmp_path: Path) -> None:
    for tokenizer in (byte_level(LLAMA_SPECIALS), sentencepiece("llama2")):
        assets = TextAssets.load(write_model(tmp_path, tokenizer, bos_token="<s>", eos_token="</s>"))
        for text in ("a" * (MAX_PROMPT_BYTES // 4), "the quick <s> fox " * (MAX_PROMPT_BYTES // 80)):
            assert len(assets.encode_raw(text)) > 1000


def test_of_a_text_far_beyond_the_context_not_all_tokens_are_made(tmp_path: Path) -> None:
    """The library takes 300 bytes for each character: 4 MiB would be more than a gigabyte."""
    for tokenizer in (byte_level(LLAMA_SPECIALS), sentencepiece("llama2")):
        write_model(tmp_path, tokenizer, bos_token="<s>", eos_token="</s>")
        short, free = TextAssets.load(tmp_path, context=512), TextAssets.load(tmp_path)
        for text in ("x y " * (MAX_PROMPT_BYTES // 4), "the <s> fox " * (MAX_PROMPT_BYTES // 12)):
            with pytest.raises(ContextExceeded, match=r"more than \d{4,7} tokens.* context is 512"):
                short.encode_raw(text)
            with pytest.raises(ContextExceeded, match=r"more than \d{4,7} tokens.* context is 512"):
                short.encode_chat([ChatMessage("user", text)])
        with pytest.raises(ContextExceeded, match="513 messages"):
            short.encode_chat([ChatMessage("user", "x")] * 513)
        text = "the quick fox " * 20_000
        enough = TextAssets.load(tmp_path, context=len(free.encode_raw(text)))
        assert enough.encode_raw(text) == free.encode_raw(text)


def test_what_goes_on_with_a_text_keeps_the_space_before_its_first_word(tmp_path: Path) -> None:
    for tokenizer in (byte_level(LLAMA_SPECIALS), sentencepiece("llama2"), sentencepiece("mistral")):
        assets = TextAssets.load(write_model(tmp_path, tokenizer, bos_token="<s>", eos_token="</s>"))
        prompt, both = assets.encode_raw("the quick"), assets.encode_raw("the quick fox")
        assert both[: len(prompt)] == prompt
        answer = both[len(prompt) :]
        going_on = assets.detokenizer(after=prompt)
        assert "".join([*map(going_on.push, answer), going_on.finish()]) == " fox"
        begun = assets.detokenizer(after=[0])  # BOS alone is no text
        assert "".join([*map(begun.push, answer), begun.finish()]) == assets.decode(answer)


@pytest.mark.parametrize("name", ["babyllama-105", "llama2xs"])
def test_trained_models_work_as_in_transformers(name: str) -> None:
    path = trained_model(name)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path)
    assets = TextAssets.load(path)
    assert assets.eos_token_ids == {1, 2}
    assert assets.template_name == "plain"
    for text in ("Once upon a time", "a\nb", "", "  Grüße 🙂 "):
        assert assets.encode_raw(text) == theirs(text).input_ids
        assert assets.decode(assets.encode_raw(text)) == theirs.decode(
            theirs(text).input_ids, skip_special_tokens=True
        )
    assert assets.encode_chat([ChatMessage("user", "Hi")]).count(1) == 1


def test_the_demo_model_speaks_chatml() -> None:
    if not (DEMO / "tokenizer.json").exists():
        pytest.skip("the demo model is not trained yet")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(DEMO)
    assets = TextAssets.load(DEMO)
    talk = [{"role": "user", "content": "How do I connect a peer?"}]
    want = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    first = assets.encode_chat([ChatMessage("user", talk[0]["content"])])
    assert first == want
    assert assets.decode(assets.encode_raw("Grüße 🙂")) == "Grüße 🙂"
    answer = assets.encode_raw("Like this.")
    eos = assets.encode_turn(first + answer, "And then?")[0]
    assert eos in assets.eos_token_ids
    talk += [{"role": "assistant", "content": "Like this."}, {"role": "user", "content": "And then?"}]
    whole = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert first + answer + assets.encode_turn(first + answer, "And then?") == whole
    assert first + answer + [eos] + assets.encode_turn([*first, *answer, eos], "And then?") == whole
