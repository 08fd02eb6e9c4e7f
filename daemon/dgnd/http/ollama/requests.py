"""What Ollama's clients may ask for, as types. The published document is made from these.

Fields that are not named here are ignored: most of them concern how Ollama loads a model. Knows nothing of
models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Penalty = Annotated[float, Meta(ge=-100, le=100)]
Probability = Annotated[float, Meta(ge=0, le=1)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of an answer. `num_predict` below 1: as many tokens as the context has room for."""

    num_predict: Int64 | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Int64 | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=16)] | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of requests have in common."""

    model: Annotated[str, Meta(min_length=1)]
    stream: bool | None = None  #: null: true
    options: Options | None = None
    format: str | dict[str, Any] | None = None
    keep_alive: str | float | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """What a call says."""

    name: str
    arguments: dict[str, Any] = {}


class ToolCall(msgspec.Struct, frozen=True):
    """A tool that an earlier message called."""

    function: CalledFunction


class Message(msgspec.Struct, frozen=True):
    """One message of the conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None


class ChatRequest(Asked, frozen=True, kw_only=True):
    """`POST /api/chat`. Without messages nothing is answered."""

    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(Asked, frozen=True, kw_only=True):
    """`POST /api/generate`: one user turn; with `raw` bare text. Without a prompt nothing is answered."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[Any] | None = None


class ShowRequest(msgspec.Struct, frozen=True):
    """`POST /api/show`. Some clients write `name` for `model`."""

    model: str | None = None
    name: str | None = None
