"""`POST /v1/completions`: bare text continued, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from dgnd.control import api
from dgnd.http.desk import Desk
from dgnd.http.exchange import Exchange
from dgnd.http.forms import answered, json_answer
from dgnd.http.openai import answers
from dgnd.http.openai.logprobs import TextOffsets
from dgnd.http.openai.params import text_params
from dgnd.http.openai.requests import TextRequest
from dgnd.http.openai.stream import EventStream, finish_reason, usage
from dgnd.http.reading import read_body


async def texts(exchange: Exchange, desk: Desk) -> None:
    """One request, which may have several prompts."""
    request = read_body(await exchange.body(), TextRequest)
    echoes, asked = text_params(request)
    choices = request.n or 1
    maker = _Maker(
        identity=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=request.model,
        with_usage=bool(request.stream_options and request.stream_options.include_usage),
        echoes=echoes,
        offsets=[TextOffsets(len(echo)) for echo in echoes],
    )
    if request.stream:
        stream = EventStream(exchange, maker, choices)
        await stream.finish(await answered(exchange, desk, asked, stream.delta, stream.waits))
        return
    results = await answered(exchange, desk, asked)
    completion = answers.TextCompletion(
        id=maker.identity,
        created=maker.created,
        model=maker.model,
        choices=[
            answers.TextChoice(
                index,
                echo + result.text,
                finish_reason(result),
                None if request.logprobs is None else TextOffsets(len(echo)).logprobs(result.logprobs),
            )
            for index, (echo, result) in enumerate(zip(echoes, results, strict=True))
        ],
        usage=usage(results, choices),
    )
    await json_answer(exchange, completion)


@dataclass(frozen=True, slots=True)
class _Maker:
    """The events of one response."""

    identity: str
    created: int
    model: str
    with_usage: bool
    echoes: list[str]
    offsets: list[TextOffsets]

    def begin(self, index: int) -> object | None:
        """The prompt, where it is to be echoed."""
        return self.piece(index, self.echoes[index], []) if self.echoes[index] else None

    def piece(self, index: int, text: str, logprobs: list[api.TokenLogprobs]) -> object:
        """A piece of the text."""
        told = self.offsets[index].logprobs(logprobs) if logprobs else None
        return self._chunk([answers.TextChoice(index, text, None, told)])

    def end(self, index: int, result: api.GenerateResult) -> Sequence[object]:
        """Why the text ends."""
        return [self._chunk([answers.TextChoice(index, "", finish_reason(result))])]

    def counts(self, usage: answers.Usage) -> object | None:
        """The counts, if they were asked for."""
        return self._chunk([], usage) if self.with_usage else None

    def _chunk(self, choices: list[answers.TextChoice], usage: answers.Usage | None = None) -> object:
        return answers.TextCompletion(
            id=self.identity,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage if self.with_usage else msgspec.UNSET,
        )
