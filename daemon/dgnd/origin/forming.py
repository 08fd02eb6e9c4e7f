"""An answer's form followed in threads, so that the daemon goes on answering whatever a schema takes.

Knows nothing of sessions or hops; what forms are, `dgnd.text.grammar` knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from dgnd.control import api
from dgnd.errors import BadRequest
from dgnd.text.assets import TextAssets
from dgnd.text.tools import functions_of
from dgnd.wire.allowed import pack

if TYPE_CHECKING:
    from dgnd.text.grammar import Form

#: For a schema to be understood; the tokenizer is read for it once, which may take a second.
MAKE_S: Final = 20.0
#: Schemas that are worked on at once; others wait.
_AT_ONCE: Final = trio.CapacityLimiter(2)


class Forming:
    """The form of an answer that grows. `allowed`: the tokens that may come next, packed."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self.allowed = pack(form.bits)

    @property
    def complete(self) -> bool:
        """Whether the answer can't go on."""
        return self._form.complete

    def takes(self, token: int) -> bool:
        """Whether `token` may come next."""
        return self._form.takes(token)

    async def push(self, token: int) -> None:
        """Goes on by a token that may come next. Raises LimitError."""

        def work() -> bytes:
            self._form.push(token)
            return pack(self._form.bits)

        self.allowed = await trio.to_thread.run_sync(work)


def wanted_form(params: api.GenerateParams, text: TextAssets, vocab: int) -> Callable[[], Form] | None:
    """What makes the form that a request asks for; None where its answer may be any text. `vocab`: ids that
    the model knows. Raises BadRequest for tools that are none, or not there."""
    schema = params.json_schema
    if schema is not None:
        return lambda: text.forms(vocab).json(schema)
    functions = functions_of(params.tools)
    if params.tool_choice == "auto":
        return None
    style = text.tool_style
    if params.tool_name is not None:
        functions = [each for each in functions if each.name == params.tool_name]
    if style is None or not functions:
        there = f"there is no tool {params.tool_name!r}" if params.tool_name else "there are no tools"
        raise BadRequest(f"tool_choice: a call is required, and {there}", setting="tool_choice")
    return lambda: text.forms(vocab).calls(style, functions, params.parallel_tool_calls)


async def make_forming(make: Callable[[], Form]) -> Forming:
    """What `make` makes in a thread. Raises its errors, and BadRequest when it takes too long."""
    with trio.move_on_after(MAKE_S):
        work = trio.to_thread.run_sync
        return await work(lambda: Forming(make()), abandon_on_cancel=True, limiter=_AT_ONCE)
    raise BadRequest(f"the JSON schema was not understood within {MAKE_S:.0f} s", setting="json_schema")
