"""Probabilities of tokens in OpenAI's forms. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from dgnd.control import api
from dgnd.http.openai import answers

_PART = "\N{REPLACEMENT CHARACTER}"


def chat_logprobs(told: Sequence[api.TokenLogprobs]) -> answers.ChatLogprobs:
    """As `/v1/chat/completions` has them."""
    return answers.ChatLogprobs(
        [
            answers.TokenLogprob(
                each.picked.token,
                each.picked.logprob,
                _bytes(each.picked.token),
                [answers.TopLogprob(item.token, item.logprob, _bytes(item.token)) for item in each.likeliest],
            )
            for each in told
        ]
    )


class TextOffsets:
    """Where the tokens of one continuation begin, in its text or in all the pieces of a stream."""

    def __init__(self, begin: int) -> None:
        self._at = begin

    def logprobs(self, told: Sequence[api.TokenLogprobs]) -> answers.TextLogprobs:
        """As `/v1/completions` has them, of the next tokens."""
        offsets = []
        for each in told:
            offsets.append(self._at)
            self._at += len(each.picked.token)
        return answers.TextLogprobs(
            tokens=[each.picked.token for each in told],
            token_logprobs=[each.picked.logprob for each in told],
            top_logprobs=[{item.token: item.logprob for item in each.likeliest} for each in told],
            text_offset=offsets,
        )


def _bytes(token: str) -> list[int] | None:
    return None if _PART in token else list(token.encode())
