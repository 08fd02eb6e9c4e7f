"""What `/set` and `/stop` in a chat mean for the parameters of `generate`. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Final

import msgspec

from dgnd.control.api import GenerateParams
from dgnd.errors import BadRequest

_BIG: Final = 2**63 - 1


@dataclass(frozen=True)
class Setting:
    """A number between two others; `above`: it must be more than `low`."""

    kind: type[int] | type[float]
    low: float
    high: float
    unset: str = "the model's own"
    above: bool = False


SETTINGS: Final[dict[str, Setting]] = {
    "temperature": Setting(float, 0, 100),
    "top_p": Setting(float, 0, 1, above=True),
    "top_k": Setting(int, 0, 2**31 - 1),
    "min_p": Setting(float, 0, 1),
    "repetition_penalty": Setting(float, 0, 1e6, above=True),
    "presence_penalty": Setting(float, -1e6, 1e6),
    "frequency_penalty": Setting(float, -1e6, 1e6),
    "seed": Setting(int, 0, 2**64 - 1, "chosen by dgnd"),
    "max_tokens": Setting(int, 1, _BIG, "as many as the context holds"),
}
UNSET: Final = ("none", "default")


def describe(params: GenerateParams) -> str:
    """All settings, a line each."""
    lines = []
    for name, setting in SETTINGS.items():
        value = getattr(params, name)
        shown = setting.unset if value is None else f"{value:g}" if setting.kind is float else str(value)
        lines.append(f"{name:<18} {shown}\n")
    stops = ", ".join(json.dumps(text, ensure_ascii=False) for text in params.stop)
    lines.append(f"{'stop':<18} {stops or 'only where the model ends'}\n")
    return "".join(lines)


def changed(params: GenerateParams, argument: str) -> GenerateParams:
    """With one setting as `NAME VALUE` (or `NAME=VALUE`) says; the value `none` gives it back to the model.

    Raises:
        BadRequest: says which there are, or what the value must be.
    """
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, value = name.strip().lower().replace("-", "_"), value.strip()
    setting = SETTINGS.get(name)
    if setting is None:
        raise BadRequest(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}")
    if value.lower() in UNSET:
        return msgspec.structs.replace(params, **{name: None})
    try:
        number = setting.kind(value)
    except ValueError:
        number = math.nan
    fits = setting.low < number <= setting.high or (not setting.above and number == setting.low)
    if not fits:
        whole = "a whole number" if setting.kind is int else "a number"
        low, high = (f"{int(bound):,}" for bound in (setting.low, setting.high))
        between = f"above {low}, to {high}" if setting.above else f"from {low} to {high}"
        raise BadRequest(f"{name} takes {whole} {between}, or none; not {value!r}")
    return msgspec.structs.replace(params, **{name: number})


def stopping(params: GenerateParams, argument: str) -> GenerateParams:
    r"""With one more text to stop before; in double quotes it may hold \n and other escapes.

    Raises:
        BadRequest: it begins with a quote and is no such text.
    """
    text = argument
    if argument.startswith('"') and len(argument) > 1:
        try:
            text = json.loads(argument)
        except ValueError:
            raise BadRequest(
                rf'{argument} is no text in quotes; write it like "\n\n", or without them'
            ) from None
    if not isinstance(text, str) or not text:
        raise BadRequest("a text to stop before must not be empty")
    return msgspec.structs.replace(params, stop=[*params.stop, text])
