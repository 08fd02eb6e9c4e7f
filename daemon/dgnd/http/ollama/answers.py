"""What Ollama's clients are answered, as types. The published document is made from these."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

DoneReason = Literal["stop", "length", "load", "unload"]


class CalledFunction(msgspec.Struct, frozen=True):
    """What a call says."""

    name: str
    arguments: dict[str, Any]


class ToolCall(msgspec.Struct, frozen=True):
    """A tool that the model calls."""

    function: CalledFunction


class AnswerMessage(msgspec.Struct, frozen=True):
    """The model's message, or a piece of it."""

    content: str
    role: Literal["assistant"] = "assistant"
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class Logprob(msgspec.Struct, frozen=True, omit_defaults=True):
    """How likely a token was, and the likeliest in its place. `bytes`: null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[Logprob] = []


class Counts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the last line of a response has beside. Durations in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: DoneReason | None = None
    logprobs: list[Logprob] = []
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class ChatLine(Counts, frozen=True, kw_only=True):
    """One line of a response of `/api/chat`, or all of it."""

    message: AnswerMessage


class TextLine(Counts, frozen=True, kw_only=True):
    """One line of a response of `/api/generate`, or all of it."""

    response: str


class Details(msgspec.Struct, frozen=True):
    """What kind of model it is."""

    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    format: str = "safetensors"
    parent_model: str = ""


class Tag(msgspec.Struct, frozen=True):
    """One model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(msgspec.Struct, frozen=True):
    """All models."""

    models: list[Tag]


class Shown(msgspec.Struct, frozen=True):
    """One model, with more."""

    modified_at: str
    details: Details
    model_info: dict[str, Any]
    template: str
    parameters: str
    capabilities: list[str]
    modelfile: str = ""
    license: str = ""


class Version(msgspec.Struct, frozen=True):
    """dgn's version, not that of an Ollama."""

    version: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    """What went wrong; also a line of a response that fails in mid-answer."""

    error: str
