"""Small tokenizers of the kinds that Llama-like models have, written into directories as models are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog and says hello to the world",
    "user assistant system model instruction response hello there how are you",
    "What is a peer? A peer is another node. How do I connect a peer?\n\nRun the command.\n",
    "Grüße aus München, 日本語のテキスト, эмодзи 🙂🎉 and numbers 1234567890",
] * 4

LLAMA_SPECIALS = ("<unk>", "<s>", "</s>")


def byte_level(specials: tuple[str, ...], bos: str | None = None) -> Tokenizer:
    """Byte-level BPE, as Llama 3 and Qwen have; `bos` is added by the post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    _add_bos(tokenizer, bos)
    return tokenizer


def sentencepiece(
    kind: str = "llama2", more: tuple[str, ...] = (), bos: str | None = "<s>", eos: str = "</s>"
) -> Tokenizer:
    """BPE with byte fallback. llama2: a space before every segment; mistral: before a text; gemma: never."""
    specials = ("<unk>", bos or "<s>", eos)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*specials, *(f"<0x{n:02X}>" for n in range(256))], show_progress=False
    )
    # trained word by word, though used on whole texts: so it learns merges that users of it can meet
    words = [piece for line in CORPUS[:3] for piece in (line.replace(" ", " ▁").split(" "))]
    tokenizer.train_from_iterator(words, trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [
        token for token in description["added_tokens"] if token["id"] < len(specials)
    ]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in more])
    _add_bos(tokenizer, bos)
    return tokenizer


def unigram_nfkc() -> Tokenizer:
    """Unigram with its special tokens in the vocabulary; the normaliser can make one of other characters."""
    chars = sorted({char for line in CORPUS for char in line.replace(" ", "▁")} | set("<>|s/_▁"))
    vocab = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *((char, -5.0 - n / 100) for n, char in enumerate(chars)),
    ]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(text, normalized=True, special=True) for text in LLAMA_SPECIALS])
    return tokenizer


def word_level() -> Tokenizer:
    """A vocabulary of whole words, with a decoder that no stage of ours knows."""
    words = sorted({word for line in CORPUS for word in line.split()})
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(["<unk>", *words])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.WordPiece("##", cleanup=False)
    return tokenizer


def write_model(
    path: Path, tokenizer: Tokenizer, chat_template: object = None, **tokenizer_config: object
) -> Path:
    """A model directory with the files that are about text."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def _add_bos(tokenizer: Tokenizer, bos: str | None) -> None:
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )


def trained_model(name: str) -> Path:
    """The directory of a small trained model that is kept beside the repository; skips where it is absent."""
    root = os.environ.get("DGN_TEST_MODELS") or Path(__file__).parents[1] / ".." / "shared" / "models"
    path = Path(root) / name
    if not path.exists():
        pytest.skip(f"the trained model {name} is not here")
    return path
