"""Chat templates of models, run as transformers runs them, but bounded: they come from strangers.

Knows nothing of tokens; gives text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from dgnd.errors import BadRequest, ModelError

MAX_OUTPUT = 16 << 20  #: characters that one rendering may have


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks answers for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateRefusal(BadRequest):
    """The template itself refused the messages (raise_exception)."""

    kind = "template_refused"


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, where: str) -> None:
        self._where = where
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            raise ModelError(f"{where}: chat_template{f', line {line}' if line else ''}: {error.message}") from None

    def render(self, messages: Sequence[dict[str, str]], variables: dict[str, str]) -> str:
        """The conversation as text, with the generation prompt."""
        try:
            pieces: list[str] = []
            size = 0
            for piece in self._template.generate(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **variables
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise ModelError(f"{self._where}: chat_template makes more than {MAX_OUTPUT} characters")
            return "".join(pieces)
        except TemplateRefusal:
            raise
        except jinja2.TemplateError as error:
            raise ModelError(f"{self._where}: chat_template: {error.message}") from None


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(f"the model's chat template refuses these messages: {message}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
