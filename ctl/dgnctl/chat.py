"""`dgnctl chat`: a conversation, line by line. Its context is a session of dgnd; here is only its name."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from dgnctl import chat_line
from dgnctl.answer_state import AnswerState
from dgnctl.follow import follow, interrupts
from dgnctl.options import connect_client, socket_option
from dgnctl.output import emit, printable
from dgnctl.peers import describe_connected, describe_peers
from dgnctl.run import EXIT_INTERRUPTED, check_text
from dgnctl.sampling import generation_options, template
from dgnctl.terminal import Hints, Screen, ending_signals, hang_ups, kept_settings, open_screen
from dgnctl.token_file import read_ids, write_ids
from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import (
    BadRequest,
    Cancelled,
    ContextExceeded,
    DgnError,
    NoDaemon,
    NotFound,
    ProtocolError,
    ShuttingDown,
)


@click.command()
@generation_options
@click.option(
    "--session", metavar="NAME", help="Keep the context in dgnd under this name; go on with it later."
)
@socket_option
@click.pass_context
def chat(ctx: click.Context, /, session: str | None, **options: Any) -> int:
    """Chat with the model in this terminal.

    Type help there for what can be typed. Space or Ctrl-C stops an answer. Where stdin is no terminal, each
    line of it is answered on stdout.
    """
    screen = open_screen()
    params = template(**options)
    conversation = Conversation(lambda: connect_client(ctx, params.wait), screen, params, session)
    with (
        ending_signals(),
        kept_settings(sys.stdin.fileno()) if screen.interactive else contextlib.nullcontext(),
        hang_ups(screen),
    ):
        return conversation.hold()


class Conversation:
    """One chat. Errors of a turn are shown in a line, and the chat goes on."""

    def __init__(
        self,
        connect: Callable[[], ControlClient],
        screen: Screen,
        params: api.GenerateParams,
        session: str | None,
    ) -> None:
        self._connect = connect
        self._screen = screen
        self._params = params
        self._tied = not session  #: dgnd forgets it with the connection, however this program ends
        self._session = session or f"chat-{os.getpid()}-{os.urandom(4).hex()}"
        self._fresh = True  #: nothing was said yet
        self._cut_off = False  #: nodes were lacking in the middle of the last answer
        self._unanswered: str | None = None  #: what was said, where they were lacking before it began
        self._client = self._open()
        self._lost = False
        self._code = 0
        self._hints = Hints()
        self._state = AnswerState()

    def hold(self) -> int:
        """Until `exit` or the end of input; returns the exit code: of the last failed turn, over pipes."""
        try:
            if self._screen.interactive:
                self._greet()
            while self._step():
                pass
        finally:
            self._client.close()
        return 0 if self._screen.interactive else self._code

    def _greet(self) -> None:
        status: api.Status = self._client.call("status")
        emit(f"{status.name} is {status.state}. Type help for commands; space stops an answer.\n")
        for model, span in status.missing.items():
            emit(f"{model}: nobody in reach serves {span}\n")
        models: list[api.ModelInfo] = self._client.call("models.list")
        self._state.of(models, self._params.model)
        self._hints.status = self._state.line()
        self._hints.words["model"] = [model.name for model in models]

    def _step(self) -> bool:
        """One line; False to leave."""
        try:
            line = self._screen.ask("", self._hints)
            return line is not None and self._do(chat_line.parse(line))
        except (NoDaemon, ProtocolError, ShuttingDown) as error:
            self._lost = True
            self._client.close()
            self._show(error)
        except ContextExceeded as error:
            self._show(error, "; type clear to start anew" if self._screen.interactive else "")
        except Cancelled as error:
            self._hang_up()
            self._show(error)
        except DgnError as error:
            self._show(error, self._advice() if self._screen.interactive else "")
        except KeyboardInterrupt:  # a second one, or one while waiting for something else than an answer
            self._hang_up()
            self._show(Cancelled("interrupted"))
        return self._code != EXIT_INTERRUPTED or self._screen.interactive

    def _advice(self) -> str:
        """What an empty line does now."""
        if self._cut_off:
            return "; an empty line goes on with the answer"
        return "; an empty line asks again" if self._unanswered is not None else ""

    def _show(self, error: DgnError, advice: str = "") -> None:
        self._code = error.exit_code
        click.echo(f"dgnctl: {printable(error.message)}{advice}", err=True)

    def _do(self, line: chat_line.Line | None) -> bool:
        match line:
            case None if self._cut_off:
                return self._resume()
            case None if self._unanswered is not None and self._screen.interactive:
                return self._say(self._unanswered)
            case None:
                pass
            case chat_line.Plain("exit"):
                return False
            case chat_line.Plain("help"):
                emit(chat_line.HELP)
            case chat_line.Plain("peers"):
                emit(describe_peers(self._daemon().call("peers.list")))
            case chat_line.Plain("clear"):
                self._clear()
            case chat_line.WithArgument("connect", addr):
                emit(describe_connected(self._daemon().call("peers.connect", api.ConnectParams(addr=addr))))
            case chat_line.WithArgument("save", name):
                self._save(Path(name).expanduser())
            case chat_line.WithArgument("load", name):
                self._load(Path(name).expanduser())
            case chat_line.Mistake(text):
                raise BadRequest(text)
            case chat_line.Say(text):
                return self._say(text)
        return True

    def _say(self, text: str) -> bool:
        self._daemon()  # first: it may be another one now, to which everything is new
        system = self._params.system if self._fresh else None
        params = msgspec.structs.replace(
            self._params, prompt=check_text(text), session=self._session, system=system
        )
        return self._stream(params)

    def _resume(self) -> bool:
        params = api.GenerateParams(
            model=self._params.model, session=self._session, resume=True, wait=self._params.wait
        )
        return self._stream(params)

    def _stream(self, params: api.GenerateParams) -> bool:
        """Shows the answer as it comes."""
        client = self._daemon()
        begun = params.resume
        self._cut_off, self._unanswered = False, None
        self._state.begin()

        def show(piece: str) -> None:
            nonlocal begun
            begun = True
            self._state.token()
            answer.add(piece)

        try:
            with interrupts() as noted, self._screen.answering(self._state.line) as answer:
                result = follow(client.start_generate(params), show, noted, answer.watch, answer.pause)
        except DgnError as error:
            self._cut_off = begun and error.retryable
            self._unanswered = params.prompt if error.retryable and not begun else None
            raise
        finally:
            self._state.stop()
            self._hints.status = self._state.line()
        self._state.end(result)
        self._hints.status = self._state.line()
        self._fresh = False
        return self._after(result)

    def _after(self, result: api.GenerateResult) -> bool:
        if result.finish_reason == "cancelled":
            if not self._screen.interactive:
                self._code = EXIT_INTERRUPTED
                return False
            self._note("(stopped)")
        elif result.finish_reason == "length":
            limit = self._params.max_tokens
            if limit is not None and result.usage.completion_tokens >= limit:
                self._note(f"(stopped after {limit} tokens, as --max-tokens says)")
            else:
                used = result.usage.prompt_tokens + result.usage.completion_tokens
                self._note(f"(the context is full with {used} tokens; type clear to start anew)")
        return True

    def _note(self, text: str) -> None:
        self._screen.note(text)

    # --- commands ---

    def _clear(self) -> None:
        self._cut_off, self._unanswered = False, None
        with contextlib.suppress(NotFound):
            self._daemon().call("cache.clear", api.CacheClearParams(session=self._session))
        self._fresh = True
        self._note("(the conversation is forgotten)")

    def _save(self, path: Path) -> None:
        found: api.SessionTokens = self._daemon().call(
            "session.export", api.SessionParams(session=self._session)
        )
        write_ids(path, found.token_ids)
        self._note(f"({len(found.token_ids)} token ids written to {path})")

    def _load(self, path: Path) -> None:
        ids = read_ids(path)
        self._cut_off, self._unanswered = False, None
        params = api.SessionImportParams(session=self._session, token_ids=ids, model=self._params.model)
        self._daemon().call("session.import", params)
        self._fresh = False
        self._note(f"({len(ids)} token ids read from {path}; the conversation goes on from there)")

    # --- the daemon ---

    def _open(self) -> ControlClient:
        client = self._connect()
        if self._tied:
            client.call("session.tie", api.SessionTieParams(session=self._session))
        return client

    def _hang_up(self) -> None:
        """Ends and frees what dgnd was doing; the session goes over to a new connection first."""
        before = self._client
        try:
            self._client = self._open()
        except DgnError:
            self._lost = True
        finally:
            before.close()

    def _daemon(self) -> ControlClient:
        """The connection, made anew after it was lost; says so if dgnd has forgotten the conversation."""
        if self._client.fileno() >= 0:
            return self._client
        self._client = self._open()
        if self._lost and not self._fresh:
            try:
                self._client.call("session.export", api.SessionParams(session=self._session))
            except NotFound:
                self._fresh = True
                self._note("(dgnd was restarted and has forgotten the conversation; this is a new one)")
        self._lost = False
        return self._client
