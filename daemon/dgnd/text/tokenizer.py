"""The tokenizer of a model: `tokenizer.json` through the library `tokenizers`, with bounds and typed errors.

`encode` lets special tokens that are written in the text become special tokens: it is for text that a
template made. `aliases.encode` takes text in which it was decided beforehand what is special and what is only
text (see `dgnd.text.special_text`). Knows nothing of templates.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dgnd.errors import BadRequest, LimitError, ModelError
from dgnd.text.model_files import MAX_TOKENIZER_BYTES, parse_object, read_text
from dgnd.text.special_text import SpecialAliases, encode_fast

#: UTF-8 bytes of text that are tokenised at most; a longer prompt is refused before any work.
MAX_PROMPT_BYTES = 4 << 20


def check_text(text: str, limit: int = MAX_PROMPT_BYTES) -> None:
    """Raises BadRequest when the text is not Unicode, LimitError with both numbers when it is too long."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise BadRequest(f"the text has half a surrogate pair at character {error.start}") from None
    if size > limit:
        raise LimitError(
            f"the text has {size} bytes, more than the {limit} that are tokenised", bytes=size, limit=limit
        )


class Tokenizer:
    """Text to ids and ids to token strings. `most`: of a text that has more ids, not all are made."""

    def __init__(
        self, inner: tokenizers.Tokenizer, decoder: dict[str, Any] | None, most: int | None = None
    ) -> None:
        # a batch of one gains nothing from threads, and the library warns in every child once it used them
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.most = most
        self._aliases: SpecialAliases | None = None
        self.decoder = decoder  #: the decoder's description as in tokenizer.json
        added = inner.get_added_tokens_decoder()
        self.added: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocab = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1  #: one more than the largest id

    @classmethod
    def load(cls, path: Path, most: int | None = None) -> Tokenizer:
        """Reads `tokenizer.json`; ModelError in one line when it is absent or broken."""
        text = read_text(path, MAX_TOKENIZER_BYTES)
        description = parse_object(path, text)
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001  the library raises bare Exception for every fault of the file
            raise ModelError(f"{path}: not a tokenizer: {str(error).splitlines()[0]}") from None
        found = cls(inner, description.get("decoder"), most)
        if found.vocab_size == 0:
            raise ModelError(f"{path}: the vocabulary is empty")
        return found

    @property
    def unk_id(self) -> int | None:
        """The id that stands for what the vocabulary can't say."""
        unk = getattr(self._inner.model, "unk_token", None)
        return self.token_to_id(unk) if isinstance(unk, str) else None

    def token_to_id(self, token: str) -> int | None:
        """The id of a whole token, or None."""
        found: int | None = self._inner.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The token's string in the vocabulary's own spelling; None for an id that is not of it."""
        if not 0 <= token_id < self.vocab_size:
            return None
        found: str | None = self._inner.id_to_token(token_id)
        return found

    def description(self) -> str:
        """What `tokenizer.json` says, as text."""
        found: str = self._inner.to_str()
        return found

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of text that may name special tokens. `add_special_tokens`: those around a text.

        Raises ContextExceeded for a long text that has more than `most`.
        """
        return encode_fast(self._inner, text, add_special_tokens, self.most)

    def decode_tokens(self, tokens: Sequence[str]) -> str:
        """The library's own decoding of token strings."""
        decoder = self._inner.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    def lead_after(self, special: str) -> str:
        """What to write after the special token so that the text there begins with a space as SentencePiece
        has it.

        "" where the tokenizer puts that space itself, or knows none; " " where it only does so when told.
        """
        if "▁" not in "".join(map(str, map(self.id_to_token, self.encode("a a")))):
            return ""
        after = self.encode(special + "a")[1 if special else 0 :]
        return "" if after and str(self.id_to_token(after[0])).startswith("▁") else " "

    @property
    def aliases(self) -> SpecialAliases:
        """The twin in which special tokens go by secret names; made when first needed."""
        if self._aliases is None:
            self._aliases = SpecialAliases(self._inner.to_str(), self.added, self.most)
        return self._aliases
