"""Answers of a given form: which tokens may come next, so that the whole is JSON of a schema.

The form is followed by a matcher of the library llguidance, whose state depends on the tokens so far alone.
Sizes and the work of each step are bounded, since schemas come from users. Knows nothing of sampling, of
sessions or of models.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import llguidance
import msgspec

from dgnd.errors import BadRequest, LimitError, ModelError, one_line
from dgnd.text.schema_places import place_of
from dgnd.text.tokenizer import Tokenizer
from dgnd.text.tools import Function, ToolStyle, calls_grammar

#: A form as JSON, at most.
MAX_BYTES = 64 << 10
#: What a matcher may do: about 0.1 s and 50 MB where a form is made to be dear, and for most 0.1 ms a token.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=100_000, step_lexer_fuel=50_000, max_lexer_states=20_000, verbose_errors=False
)
#: The library wants an end. Where the model has none, this token is never picked in an answer of a form.
_NO_END = 0
#: White space between JSON's parts. Without a bound a model may write it for ever.
_SPACE = r"[ \n]{1,16}"
#: How the library names keywords that it does not know.
_UNKNOWN = re.compile(r'Unimplemented keys: \["([^"]+)"')


class Form:
    """One answer's form, and how far it is. Not for two threads at once."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab: int, ends: Collection[int]) -> None:
        self._matcher, self._vocab, self._ends = matcher, vocab, frozenset(ends)
        self.bits = self._next_bits()  #: of the tokens that may come next, as `dgnd.wire.allowed` has them

    @property
    def complete(self) -> bool:
        """Whether nothing but an end can follow."""
        return self._matcher.is_stopped()

    def takes(self, token: int) -> bool:
        """Whether `token` may come next."""
        return bool(self.bits[token // 8] >> token % 8 & 1)

    def push(self, token: int) -> None:
        """Goes on by a token that may come next. Raises LimitError where the form is too complex to go on."""
        if token in self._ends:
            return
        self._matcher.consume_token(token)
        self.bits = self._next_bits()

    def _next_bits(self) -> bytes:
        size = (self._vocab + 7) // 8
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return bytes(size)
        bits = bytearray(self._matcher.compute_bitmask()[:size].ljust(size, b"\0"))
        if self._matcher.is_error():
            raise LimitError(f"the answer's form is too complex: {_reason(self._matcher.get_error())}")
        if self._vocab % 8:
            bits[-1] &= (1 << self._vocab % 8) - 1
        ended = bool(self._ends) and self._matcher.is_accepting()
        for end in self._ends or (_NO_END,):
            bits[end // 8] = bits[end // 8] & ~(1 << end % 8) | ended << end % 8
        if not any(bits):
            raise LimitError("no token of the model's vocabulary continues the answer in its form")
        return bytes(bits)


class Forms:
    """Makes the forms of one model's answers. vocab: ids that the model knows; ends: those that end an
    answer."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Collection[int]) -> None:
        self.vocab = vocab
        self._ends = frozenset(end for end in ends if end < vocab)
        most = max(vocab, tokenizer.vocab_size)
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer.description(), n_vocab=most, eos_token=sorted(self._ends) or [_NO_END]
            )
        except ValueError as error:
            raise ModelError(
                f"answers of a given form can't be had of this model's tokenizer: {_reason(str(error))}"
            ) from None

    def json(self, schema: dict[str, Any]) -> Form:
        """JSON of `schema`. Raises BadRequest for one that is none, is too long, or has what is not known."""
        try:
            if len(msgspec.json.encode(schema)) > MAX_BYTES:
                raise _refused(f"it has more than {MAX_BYTES} bytes")
            made = llguidance.LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": _SPACE}
            )
            return self._form(made)
        except (ValueError, LimitError) as error:
            raise _refused(_in_words(schema, _reason(str(error)))) from None

    def calls(self, style: ToolStyle, functions: Sequence[Function], several: bool) -> Form:
        """Calls of these functions. Raises BadRequest where their parameters can't be used."""
        grammar = calls_grammar(style, functions, several)
        try:
            return self._form(llguidance.LLMatcher.grammar_from_lark(grammar))
        except (ValueError, LimitError) as error:
            why = f"the tools' parameters can't be used: {_reason(str(error))}"
            raise BadRequest(why, setting="tools") from None

    def _form(self, grammar: str) -> Form:
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return Form(matcher, self.vocab, self._ends)


def _in_words(schema: dict[str, Any], reason: str) -> str:
    """The library's reason; where it names keywords that it does not know, the place of the first one."""
    if reason.startswith("oneOf "):
        keyword, cure = "oneOf", "its branches may overlap; use anyOf, or tell them apart by a type or const"
    elif unknown := _UNKNOWN.match(reason):
        keyword, cure = unknown[1], "no answer can be held to that; leave it out, and check it afterwards"
    else:
        return reason
    place = place_of(schema, keyword)
    return f'"{keyword}"{f" at {place}" if place else ""}: {cure}'


def _refused(why: str) -> BadRequest:
    return BadRequest(f"the JSON schema can't be used: {why}", setting="json_schema")


def _reason(text: str) -> str:
    return one_line(text.replace("<non-verbose/>", "").strip())[:300]
