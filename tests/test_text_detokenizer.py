"""Ids to text: the pieces make the library's own text, and no piece holds half a character."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_models import (
    LLAMA_SPECIALS,
    byte_level,
    sentencepiece,
    trained_model,
    unigram_nfkc,
    word_level,
    write_model,
)
from tokenizers import Tokenizer, decoders

from dgnd.text.assets import TextAssets

BYTE_RUN = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
KINDS = {
    "byte-level": lambda: byte_level(LLAMA_SPECIALS),
    "llama2": lambda: sentencepiece("llama2"),
    "mistral": lambda: sentencepiece("mistral"),
    "gemma": lambda: sentencepiece("gemma"),
    "metaspace": unigram_nfkc,
    "words": word_level,
}


@pytest.fixture(scope="module", params=[*KINDS, "babyllama-105", "llama2xs"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TextAssets, Tokenizer]:
    name = request.param
    path = write_model(tmp_path_factory.mktemp("m"), KINDS[name]()) if name in KINDS else trained_model(name)
    return TextAssets.load(path), Tokenizer.from_file(str(path / "tokenizer.json"))


def pieces_of(assets: TextAssets, ids: list[int]) -> list[str]:
    detokenizer = assets.detokenizer()
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


def library_text(tokenizer: Tokenizer, ids: list[int]) -> str | None:
    """What the library decodes; None where a run of byte tokens is invalid: it then drops the whole run."""
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    spelled = "".join(token for i in ids if i not in special and (token := tokenizer.id_to_token(i)))
    for run in BYTE_RUN.findall(spelled):
        try:
            bytes(int(byte, 16) for byte in re.findall("0x(..)", run)).decode()
        except UnicodeDecodeError:
            return None
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ids_give_the_text_of_the_library(
    model: tuple[TextAssets, Tokenizer], data: st.DataObject
) -> None:
    assets, tokenizer = model
    ids = data.draw(st.lists(st.integers(0, assets.vocab_size + 3), max_size=40))
    text = "".join(pieces_of(assets, ids))
    assert text == assets.decode(ids)
    want = library_text(tokenizer, ids)
    if want is not None:
        assert text == want


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40) | st.text("aé日🙂 \n👨‍👩‍👧", max_size=20))
def test_text_comes_back_in_pieces_of_whole_characters(
    model: tuple[TextAssets, Tokenizer], text: str
) -> None:
    assets, tokenizer = model
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = pieces_of(assets, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_shown_with_its_last_byte(tmp_path: Path) -> None:
    assets = TextAssets.load(write_model(tmp_path, sentencepiece("llama2")))
    byte = {n: assets._tokenizer.token_to_id(f"<0x{n:02X}>") for n in range(256)}
    emoji = [byte[n] for n in "🙂".encode()]
    assert pieces_of(assets, emoji) == ["", "", "", "🙂", ""]
    assert pieces_of(assets, [byte[10], byte[10]]) == ["\n", "\n", ""]  # a stop at a newline need not wait


def test_invalid_bytes_are_shown_as_such_and_take_nothing_with_them(tmp_path: Path) -> None:
    assets = TextAssets.load(write_model(tmp_path, sentencepiece("llama2")))
    byte = {n: assets._tokenizer.token_to_id(f"<0x{n:02X}>") for n in range(256)}
    assert pieces_of(assets, [byte[0x41], byte[0xFF], byte[0x42]]) == ["A", "\ufffd", "B", ""]
    assert pieces_of(assets, [byte[0xE6], byte[0x97]]) == ["", "", "\ufffd\ufffd"]
    assert pieces_of(assets, [byte[0xE6], byte[0x41]]) == ["", "\ufffdA", ""]
    assert pieces_of(assets, [byte[0xF0], byte[0x9F], byte[0xE6], byte[0x97], byte[0xA5]])[2:] == [
        "\ufffd\ufffd",
        "",
        "日",
        "",
    ]


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=12))
def test_invalid_bytes_of_a_byte_level_vocabulary_are_counted_as_the_library_counts(data: bytes) -> None:
    alphabet = decoders.ByteLevel()
    from dgnd.text.byte_level import BYTE_OF_CHAR
    from dgnd.text.detokenizer import Detokenizer, Utf8Stage

    chars = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    tokens = [chars[byte] for byte in data]
    detokenizer = Detokenizer(lambda token_id: tokens[token_id], [Utf8Stage()], ())
    text = "".join([*(detokenizer.push(n) for n in range(len(tokens))), detokenizer.finish()])
    assert text == alphabet.decode(tokens)


def test_special_tokens_are_skipped_or_spelled(tmp_path: Path) -> None:
    assets = TextAssets.load(write_model(tmp_path, byte_level(LLAMA_SPECIALS)))
    ids = [*assets.encode_raw("a"), assets._tokenizer.token_to_id("</s>"), *assets.encode_raw("b")]
    assert assets.decode(ids) == "ab"
    assert assets.decode(ids, skip_special=False) == "a</s>b"
    assert assets.token_text(assets.vocab_size) == ""
    assert assets.token_text(-1) == ""
    assert assets.decode([-1, 10**12]) == ""


@pytest.mark.parametrize("name", ["llama2", "byte-level", "words"])
def test_a_token_costs_the_same_after_many(name: str, tmp_path: Path) -> None:
    assets = TextAssets.load(write_model(tmp_path, KINDS[name]()))
    ids = (assets.encode_raw("the quick brown fox 🙂\n") * 4000)[:40_000]
    detokenizer = assets.detokenizer()
    times = []
    for begin in range(0, 40_000, 10_000):
        start = time.process_time()
        for token_id in ids[begin : begin + 10_000]:
            detokenizer.push(token_id)
        times.append(time.process_time() - start)
    assert times[-1] < 5 * times[0] + 0.05
