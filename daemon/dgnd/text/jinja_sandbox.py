"""Chat templates of models, run as transformers runs them, within the bounds of `dgnd.text.jinja_bounds`.

What a template sees: `messages` (role, content, calls of tools), `add_generation_prompt`, `tools`,
`documents` (none), the special tokens by role (`bos_token`, …), `raise_exception`, `strftime_now`, the
filter `tojson` without HTML escapes, `{% generation %}`, `break` and `continue`. Knows nothing of tokens;
gives text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from dgnd.errors import BadRequest, LimitError, ModelError
from dgnd.text.jinja_allowance import MAX_TEXT, TemplateLimit, with_allowance
from dgnd.text.jinja_bounds import BoundedEnvironment

MAX_TEMPLATE = 1 << 20  #: characters of a template's source
#: Messages beyond which a template may run into its bounds without being at fault.
LONG_CONVERSATION = 1000


class TemplateRefused(BadRequest):
    """The template itself refused these messages (raise_exception)."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks answers for training; here only its body matters."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body's statements."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template; `where` is named in its errors."""

    def __init__(self, source: str, where: str) -> None:
        self._where = where
        if len(source) > MAX_TEMPLATE:
            raise ModelError(f"{where}: chat_template has {len(source)} characters, more than {MAX_TEMPLATE}")
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.add_filter("tojson", _tojson)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # noqa: BLE001  a stranger's template can make the compiler raise anything
            raise self._fault(error) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The conversation as text, with the prompt for an answer.

        TemplateRefused when the template refuses the messages; ModelError, in one line, for a faulty template
        or one that goes beyond its bounds; LimitError where that is because there are very many messages.
        """
        try:
            return with_allowance(lambda: self._pieces(messages, variables, tools))
        except TemplateRefused:
            raise
        except TemplateLimit as error:
            if len(messages) > LONG_CONVERSATION:  # not the template is at fault
                raise LimitError(
                    f"{len(messages)} messages are too much for the model's chat template: {error}; "
                    "shorten the conversation, or begin a new one"
                ) from None
            raise self._fault(error) from None
        except Exception as error:  # noqa: BLE001  a stranger's template can raise anything, also from Python's core
            raise self._fault(error) from None

    def _pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]],
    ) -> str:
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(
            {
                "messages": [dict(message) for message in messages],
                "tools": list(tools) or None,
                "documents": None,
                "add_generation_prompt": True,
                **variables,
            }
        ):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_TEXT:
                raise TemplateLimit(f"it puts out more than {MAX_TEXT} characters")
        return "".join(pieces)

    def _fault(self, error: Exception) -> ModelError:
        line = getattr(error, "lineno", None)
        place = f"chat_template, line {line}" if line else "chat_template"
        what = " ".join(str(error).split())[:300] or type(error).__name__
        return ModelError(f"{self._where}: {place}: {what}")


def _raise_exception(message: object) -> None:
    text = " ".join(str(message).split())[:300]
    raise TemplateRefused(f"the model's chat template refuses these messages: {text}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
