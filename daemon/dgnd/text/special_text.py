"""Keeping what users typed from becoming special tokens.

A twin of the tokenizer is made in which every added token goes by a secret name: a few random private-use
characters. In a text for the twin, the special tokens that the template wrote are replaced by their secret
names; what the user typed stays as typed, and there is nothing in it that the twin could take for special. So
text and special tokens are still encoded together, with the same merges and the same spaces as always.

Knows nothing of templates or of messages.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

from dgnd.errors import BadRequest, ContextExceeded

_PRIVATE_FIRST, _PRIVATE_LAST = 0x100000, 0x10FFFD  # plane 16, for private use
#: Tails of secret names come from plane 15: so no placeholder, from plane 16, is ever found inside a name.
_TAIL_FIRST, _TAIL_CHARS = 0xF0000, 0xFFFE
_NAME_LENGTH = 6
_WHOLE_CHARS = 1 << 16  #: texts up to this length are encoded at once
_SEAM = 64  #: tokens at the end of a text's beginning that may be others in the whole text


def token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest where several begin at one place."""
    longest_first = sorted({token for token in tokens if token}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def encode_fast(
    tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool, most: int | None = None
) -> list[int]:
    """The ids alone, without the places in the text: several times faster than `encode`.

    Raises ContextExceeded for a long text once its beginning alone has more than `most`: the library takes up
    to 300 bytes for each character of what it is given.
    """

    def ids_of(part: str) -> list[int]:
        ids: list[int] = tokenizer.encode_batch_fast([part], add_special_tokens=add_special_tokens)[0].ids
        return ids

    size = len(text) if most is None else max(_WHOLE_CHARS, 4 * most)
    while most is not None and size < len(text):
        sure = len(ids_of(text[:size])) - _SEAM
        if sure > most:
            raise ContextExceeded(
                f"the prompt has more than {sure} tokens, the model's context is {most}; "
                "shorten it, or begin a new conversation",
                context=most,
            )
        size *= 2
    return ids_of(text)


class Placeholders:
    """One private-use character, found in none of the user's texts, for each token text that is only text."""

    def __init__(self, texts: Iterable[str], pattern: re.Pattern[str]) -> None:
        self._pattern = pattern
        self._used = {ord(char) for text in texts for char in text if ord(char) >= _PRIVATE_FIRST}
        self._next = _PRIVATE_FIRST
        self._by_text: dict[str, str] = {}
        self.meaning: dict[str, str] = {}  #: placeholder to the text that it stands for

    def new(self, text: str) -> str:
        """A fresh placeholder for `text`."""
        while self._next in self._used:
            self._next += 1
        if self._next > _PRIVATE_LAST:
            raise BadRequest("the text uses every private-use character; it can't be encoded safely")
        char = chr(self._next)
        self._next += 1
        self.meaning[char] = text
        return char

    def hide(self, text: str) -> str:
        """The text with every token text in it replaced by its placeholder."""
        return self._pattern.sub(self._placeholder, text)

    def _placeholder(self, match: re.Match[str]) -> str:
        found = match.group()
        if found not in self._by_text:
            self._by_text[found] = self.new(found)
        return self._by_text[found]


class SpecialAliases:
    """The twin tokenizer and its secret names."""

    def __init__(self, description: str, added: Mapping[int, str], most: int | None = None) -> None:
        self._most = most
        self._name: dict[str, str] = {}
        first_chars = iter(range(_PRIVATE_LAST - len(added), _PRIVATE_LAST + 1))
        for content in added.values():
            tail = (chr(_TAIL_FIRST + secrets.randbelow(_TAIL_CHARS)) for _ in range(_NAME_LENGTH))
            self._name[content] = chr(next(first_chars)) + "".join(tail)
        self._pattern = token_pattern(self._name)
        self._secret = token_pattern(self._name.values())
        renamed = _rename(json.loads(description), self._name)
        self._twin: tokenizers.Tokenizer | None
        try:
            self._twin = tokenizers.Tokenizer.from_str(json.dumps(renamed))
        except Exception:  # noqa: BLE001  the library raises bare Exception for whatever it can't build
            self._twin = None
        if self._twin is not None and any(
            self._twin.token_to_id(self._name[content]) != token_id for token_id, content in added.items()
        ):
            self._twin = None

    def encode(
        self, rendered: str, meaning: Mapping[str, str], add_special_tokens: bool = False
    ) -> list[int]:
        """Ids of `rendered`: token texts are tokens, and each placeholder is the text that it means."""
        if self._twin is None:
            hidden = next(iter(meaning.values()), "a special token")
            raise BadRequest(f"this model's tokenizer can't take {hidden!r} as text; leave it out")
        clean = self._secret.sub("\ufffd", rendered)
        named = self._pattern.sub(lambda match: self._name[match.group()], clean)
        if meaning:
            places = token_pattern(meaning)
            pieces = places.split(named)
            texts = [self._secret.sub("\ufffd", meaning[place]) for place in places.findall(named)]
            named = pieces[0] + "".join(text + piece for text, piece in zip(texts, pieces[1:], strict=True))
        return encode_fast(self._twin, named, add_special_tokens, self._most)


def _rename(description: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The description with the tokens under their new names, and without the merges that make one."""
    for token in description.get("added_tokens", []):
        token["content"] = names[token["content"]]
    model = description["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
        ]
        model["merges"] = [
            list(pair) for pair in pairs if not any(part in names for part in (*pair, "".join(pair)))
        ]
    return description
