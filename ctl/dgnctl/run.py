"""`dgnctl run`: one prompt, one answer, on stdout as it comes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from dgnctl.follow import follow, interrupts
from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json, printable
from dgnctl.sampling import generation_options, template
from dgnd.control.api import GenerateParams, GenerateResult
from dgnd.errors import BadRequest, NotReady

EXIT_INTERRUPTED = 130
#: Of an answer that lost nodes in its middle; to wait before it begins would change nothing.
_LONGER = "recover_s under [sessions] says how long that is waited for; in dgnctl chat it can be gone on with"


@click.command()
@generation_options
@click.option("--raw", is_flag=True, help="Use no chat template: the prompt as it stands.")
@click.option(
    "--json-schema",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The answer is JSON of the schema in FILE.",
)
@json_option
@socket_option
@click.argument("prompt")
@click.pass_context
def run(
    ctx: click.Context, /, prompt: str, raw: bool, as_json: bool, json_schema: Path | None, **options: Any
) -> int:
    """Answer one prompt and end.

    PROMPT of - reads it from stdin. Ctrl-C stops the answer here and on all peers.
    """
    if raw and options["system"] is not None:
        raise click.UsageError("--raw uses no template, which --system needs: put its text into PROMPT")
    text = read_prompt(raw) if prompt == "-" else prompt
    params = msgspec.structs.replace(template(**options), prompt=check_text(text), raw=raw)
    if json_schema is not None:
        params = msgspec.structs.replace(params, json_schema=read_schema(json_schema))
    started = time.monotonic()
    client = connect_client(ctx, params.wait)
    params = msgspec.structs.replace(params, wait=max(0.0, params.wait - (time.monotonic() - started)))
    with client, interrupts() as noted:
        shown = _Shown(as_json)
        try:
            result = follow(client.start_generate(params), shown.add, noted, on_wait=shown.wait)
        except NotReady as error:
            advice = _LONGER if shown.begun else "" if params.wait else "to wait for it: --wait 60"
            if as_json or not advice:
                raise
            raise type(error)(f"{error.message} ({advice})", **error.data) from None
        finally:
            shown.end()
        if as_json:
            emit_json(result)
        else:
            _explain(params, result)
    return EXIT_INTERRUPTED if result.finish_reason == "cancelled" else 0


class _Shown:
    """The text on stdout, which ends with a newline, also when it was cut short."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._last = "\n"
        self._told = ""
        self.begun = False  #: something came, though it may be no text yet

    def add(self, text: str) -> None:
        self.begun = True
        if text and not self._quiet:
            self._last = text[-1]
            emit(text)

    def wait(self, words: str) -> None:
        """What the answer waits for, at a terminal, each place in the line once."""
        if words != self._told and not self._quiet and sys.stderr is not None and sys.stderr.isatty():
            self._told = words
            dim = "({})" if os.environ.get("NO_COLOR") else "\x1b[2m({})\x1b[0m"
            click.echo(("" if self._last == "\n" else "\n") + dim.format(printable(words)), err=True)
            self._last = "\n"

    def end(self) -> None:
        if self._last != "\n":
            self._last = "\n"
            emit("\n")


def _explain(params: GenerateParams, result: GenerateResult) -> None:
    if result.finish_reason == "length" and params.max_tokens is None:
        text = "the answer ends here because the context is full, or a node's KV cache (kv_bytes)"
        click.echo(f"dgnctl: {text}", err=True)
    if not result.exact:
        text = "the route does not all compute alike (quant, dtype), sends in q8, or had a part replaced"
        click.echo(f"dgnctl: {text}; one node alone may answer otherwise", err=True)


def read_prompt(raw: bool) -> str:
    """All of stdin; without `raw`, less the newline that ends its last line.

    Raises:
        BadRequest: it is not UTF-8.
    """
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the prompt on stdin is not UTF-8: {error}; iconv -t UTF-8 makes it so") from None
    return text if raw else text.removesuffix("\n")


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema from a file.

    Raises:
        BadRequest: it can't be read, or is no JSON object.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror or error}; --json-schema takes a file") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"{path}: a JSON schema is one JSON object: {error}") from None


def check_text(text: str) -> str:
    """The text, if it can be sent.

    Raises:
        BadRequest: an argument held bytes that are not text in this locale.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(
            "the prompt is not valid text in this locale; try a UTF-8 locale, or - and stdin"
        ) from None
    return text
