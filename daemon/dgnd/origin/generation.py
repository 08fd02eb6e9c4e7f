"""One answer as it grows: tokens in, text out, and why it ended. Also the sampling that a request asks for.

Knows nothing of sessions, hops or time.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from dgnd.control import api
from dgnd.models.sampling import check_sampling
from dgnd.routing.exactness import Exactness
from dgnd.text.assets import TextAssets
from dgnd.text.stops import StopMatcher
from dgnd.wire.messages import Sampling, TokenFrame


def requested_sampling(params: api.GenerateParams, defaults: Sampling) -> Sampling:
    """The request's settings over the model's own (greedy where it has none), with a seed fixed now.

    Raises BadRequest naming the setting and its range.
    """

    def chosen(name: str) -> float | int:
        value: float | int | None = getattr(params, name)
        default: float | int = getattr(defaults, name)
        return default if value is None else value

    sampling = Sampling(
        temperature=float(chosen("temperature")),
        top_k=int(chosen("top_k")),
        top_p=float(chosen("top_p")),
        min_p=float(chosen("min_p")),
        repetition_penalty=float(chosen("repetition_penalty")),
        presence_penalty=float(chosen("presence_penalty")),
        frequency_penalty=float(chosen("frequency_penalty")),
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        logprobs=params.logprobs,
    )
    check_sampling(sampling)
    return sampling


class Answer:
    """The tokens of one answer and the text shown for them."""

    def __init__(
        self,
        text: TextAssets,
        stop: Sequence[str],
        stop_ids: Sequence[Sequence[int]],
        limit: int,
        marks: bool = False,
        after: Sequence[int] = (),
    ) -> None:
        """`marks`: those of tools' calls are text. `after`: ids of the text that it goes on with."""
        self.token_ids: list[int] = []
        self.finish_reason: api.FinishReason | None = None
        self.exactness = Exactness()
        self.logprobs: list[api.TokenLogprobs] = []
        self._text = text
        self._detokenizer = text.detokenizer(marks=marks, after=after)
        self._stops = StopMatcher(stop, stop_ids, text.eos_token_ids)
        self._limit = limit
        self._shown: list[str] = []

    @property
    def done(self) -> bool:
        """Whether no more tokens are wanted."""
        return self.finish_reason is not None or len(self.token_ids) >= self._limit

    @property
    def limit(self) -> int:
        """Tokens that it may have."""
        return self._limit

    def end_within(self, tokens: int | None) -> None:
        """It has no more than `tokens`, as if the request had said so."""
        if tokens is not None:
            self._limit = min(self._limit, tokens)

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that may be shown now."""
        self.token_ids.append(token)
        text, stopped, _ = self._stops.push(token, self._detokenizer.push(token))
        if stopped:
            self.finish_reason = "stop"
        self._shown.append(text)
        return text

    def complete(self) -> None:
        """Nothing can follow what it has."""
        self.finish_reason = self.finish_reason or "stop"

    def tell(self, picked: TokenFrame) -> list[api.TokenLogprobs]:
        """What its head said of the probabilities of the token that was pushed last, as reported."""
        if not picked.logprobs or picked.token_id in self._text.eos_token_ids:
            return []
        first, *others = [
            api.Logprob(each, self._text.token_text(each), min(value, 0.0)) for each, value in picked.logprobs
        ]
        told = api.TokenLogprobs(first, others)
        self.logprobs.append(told)
        return [told]

    def finish(self, otherwise: api.FinishReason) -> str:
        """Ends the answer, for `otherwise` if nothing ended it yet; returns the text held back until now."""
        rest = self._stops.flush(self._detokenizer.finish())
        self._shown.append(rest)
        self.finish_reason = self.finish_reason or otherwise
        return rest

    def result(
        self, prompt: Sequence[int], route: list[api.RouteHop], timings: api.Timings
    ) -> api.GenerateResult:
        """The whole, as reported."""
        assert self.finish_reason is not None
        return api.GenerateResult(
            text="".join(self._shown),
            token_ids=list(self.token_ids),
            prompt_token_ids=list(prompt),
            finish_reason=self.finish_reason,
            exact=self.exactness.holds,
            usage=api.Usage(prompt_tokens=len(prompt), completion_tokens=len(self.token_ids)),
            timings=timings,
            route=route,
            logprobs=self.logprobs,
        )
