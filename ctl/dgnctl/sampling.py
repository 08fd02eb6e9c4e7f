"""The options of `run` and `chat` that say how to generate, and the parameters that they become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from dgnctl.completion import model_names
from dgnctl.options import Finite
from dgnd.control.api import GenerateParams

F = TypeVar("F", bound=Callable[..., Any])


def token_ids(value: str) -> list[int]:
    """Decimal token ids separated by commas. Raises click.BadParameter naming what is none."""
    ids = []
    for part in value.split(","):
        digits = part.strip()
        if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
            raise click.BadParameter(f"{part!r} in {value!r} is not a token id; write them like 13,2")
        ids.append(int(digits))
    return ids


_SHARE = Finite(min=0, max=1)
_NUCLEUS = Finite(min=0, max=1, min_open=True)
_SEED = click.IntRange(min=0, max=2**64 - 1)

_OPTIONS = (
    click.option(
        "--model",
        metavar="NAME",
        shell_complete=model_names,
        help="Which; needed only where dgnd has several.",
    ),
    click.option("--system", metavar="TEXT", help="The system message."),
    click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Stop after N tokens."),
    click.option("--temperature", type=Finite(min=0), metavar="T", help="0 is greedy."),
    click.option("--top-p", type=_NUCLEUS, metavar="P", help="Keep the likeliest tokens with this share."),
    click.option(
        "--top-k", type=click.IntRange(min=0), metavar="K", help="Keep the K likeliest; 0 keeps all."
    ),
    click.option("--min-p", type=_SHARE, metavar="P", help="Drop what is below P times the likeliest."),
    click.option("--repetition-penalty", type=Finite(min=0, min_open=True), metavar="R", help="1 is none."),
    click.option("--presence-penalty", type=Finite(), metavar="X", help="0 is none."),
    click.option("--frequency-penalty", type=Finite(), metavar="X", help="0 is none."),
    click.option("--seed", type=_SEED, metavar="S", help="Makes sampling repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated."),
    click.option("--stop-ids", multiple=True, type=token_ids, metavar="IDS", help="Stop at ids like 13,2."),
    click.option(
        "--wait",
        type=Finite(min=0, max=86400),
        default=0.0,
        metavar="S",
        help="Wait S s for a node to be ready.",
    ),
    click.option("--exact", is_flag=True, help="Rather no answer than an inexact one."),
)


def generation_options(function: F) -> F:
    """Adds them all; the command gets them as keywords for `template`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def template(**options: Any) -> GenerateParams:
    """The parameters of `generate` that the options say, still without a prompt."""
    options["stop"] = list(options["stop"])
    options["stop_ids"] = list(options["stop_ids"])
    return GenerateParams(**options)
