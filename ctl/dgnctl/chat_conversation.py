"""One chat: lines in, answers out. Between the conversation as values, dgnd, and the place it is held in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import click

from dgnctl import chat_line
from dgnctl.answer_state import AnswerState
from dgnctl.chat_link import Link
from dgnctl.chat_settings import SETTINGS
from dgnctl.chat_talk import Talk
from dgnctl.chat_watch import AnswerWatch
from dgnctl.follow import Interrupts, follow, interrupts
from dgnctl.output import emit, printable
from dgnctl.run import EXIT_INTERRUPTED, check_text
from dgnctl.screen import Answering, Hints, Screen
from dgnd.control import api
from dgnd.control.client import GenerateStream
from dgnd.errors import (
    BadRequest,
    Cancelled,
    ContextExceeded,
    DgnError,
    NoDaemon,
    ProtocolError,
    ShuttingDown,
)

_WORDS: Final = {"set": [f"{name} " for name in SETTINGS]}
#: Carries out a command other than help and exit; may name a text to begin the next line with.
Commands = Callable[["Conversation", str, str], None]


class Kept(Protocol):
    """Where the conversation is kept."""

    def changed(self, chat: Conversation) -> None:
        """Something was answered."""
        ...

    def ended(self) -> str:
        """Another one begins; returns under which id the old one is kept, or nothing."""
        ...


class Conversation:
    """Errors of a turn are shown in a line, and the chat goes on."""

    def __init__(
        self, link: Link, screen: Screen, talk: Talk, commands: Commands, kept: Kept | None = None
    ) -> None:
        self.link = link
        self.screen = screen
        self.talk = talk
        self.state = AnswerState()
        self.models: Sequence[api.ModelInfo] = ()
        self.last: api.GenerateResult | None = None
        self.begin_with = ""  #: the next line, to be changed
        self.editing = False  #: what is said next takes the place of the last exchange
        self.synced = True  #: dgnd's session holds the conversation's token ids
        self.kept = kept
        self._commands = commands
        self._cut_off = False  #: nodes were lacking in the middle of the last answer
        self._unanswered: str | None = None  #: what was said, where they were lacking before it began
        self._asked = ""  #: what the last answer is to
        self._hints = Hints()
        self._code = 0

    def hold(self) -> int:
        """Until `exit` or the end of input; returns the exit code: of the last failed turn, over pipes."""
        try:
            if self.screen.interactive:
                self._greet()
            while self._step():
                pass
        finally:
            self.link.close()
        return 0 if self.screen.interactive else self._code

    def _greet(self) -> None:
        status: api.Status = self.link.client().call("status")
        emit(f"{status.name} is {status.state}. Type help for commands; space stops an answer.\n")
        for model, span in status.missing.items():
            emit(f"{model}: nobody in reach serves {span}\n")
        self.look_at_models()

    def look_at_models(self) -> None:
        """Asks which there are."""
        self.models = self.link.client().call("models.list")
        self.state.of(self.models, self.talk.params.model)

    @property
    def model(self) -> api.ModelInfo | None:
        """The one that is talked with, as far as it is known."""
        name = self.talk.params.model
        found = [model for model in self.models if name == model.name or name is None]
        return found[0] if len(found) == 1 else None

    def _step(self) -> bool:
        """One line; False to leave."""
        try:
            return self._line() and (self._code != EXIT_INTERRUPTED or self.screen.interactive)
        except (NoDaemon, ProtocolError, ShuttingDown) as error:
            self.link.lose()
            if self._cut_off:  # what had begun is gone with dgnd, and is not to be said twice where it is not
                self._cut_off, self._unanswered, self.synced = False, self._asked, False
            self._show(error, self._advice() if self.screen.interactive else "")
        except ContextExceeded as error:
            self._show(error, "; type clear to start anew" if self.screen.interactive else "")
        except Cancelled as error:
            self.link.hang_up()
            self._show(error)
        except DgnError as error:
            self._show(error, self._advice() if self.screen.interactive else "")
        except KeyboardInterrupt:  # a second one, or one while waiting for something else than an answer
            self.link.hang_up()
            self._show(Cancelled("interrupted"))
        return self._code != EXIT_INTERRUPTED or self.screen.interactive

    def _line(self) -> bool:
        begin, self.begin_with = self.begin_with, ""
        editing, self.editing = self.editing, False
        self._hints.status = self.state.line()
        self._hints.words = {"model": [model.name for model in self.models], **_WORDS}
        line = self.screen.ask(begin, self._hints)
        if line is None:
            return False
        match chat_line.parse(line):
            case None if self._cut_off and not editing:
                return self._resume()
            case None if self._unanswered is not None and self.screen.interactive and not editing:
                return self.say(self._unanswered)
            case None:
                pass
            case chat_line.Plain("exit"):
                return False
            case chat_line.Plain("help"):
                emit(chat_line.HELP)
            case chat_line.Plain(name):
                self._commands(self, name, "")
            case chat_line.WithArgument(name, argument):
                self._commands(self, name, argument)
            case chat_line.Mistake(text):
                raise BadRequest(text)
            case chat_line.Say(text) if editing:
                return self.say_instead(text)
            case chat_line.Say(text):
                return self.say(text)
        return True

    def _advice(self) -> str:
        """What an empty line does now."""
        if self._cut_off:
            return "; an empty line goes on with the answer"
        return "; an empty line asks again" if self._unanswered is not None else ""

    def _show(self, error: DgnError, advice: str = "") -> None:
        self._code = error.exit_code
        click.echo(f"dgnctl: {printable(error.message)}{advice}", err=True)

    # --- answers

    @property
    def pending(self) -> str | None:
        """What was said and has no whole answer, as nodes were lacking."""
        return self._asked if self._cut_off else self._unanswered

    def forget_pending(self) -> None:
        """It is not gone on with."""
        self._cut_off, self._unanswered = False, None

    def say(self, text: str) -> bool:
        """Asks, and shows the answer; False to leave."""
        check_text(text)
        self.forget_pending()
        try:
            self.catch_up()  # first: it may be another dgnd now, to which everything is new
        except DgnError as error:
            self._unanswered = text if error.retryable else None
            raise
        return self._stream(self.talk.request(text, self.link.session), text)

    def say_instead(self, text: str | None) -> bool:
        """In place of the last exchange; None: the same again. Where it fails the old one stays."""
        before, pending = self.talk.copy(), self.pending
        if pending is None:
            last = self.talk.take_back()
            self.synced = False
            text = last.said if text is None else text
        try:
            return self.say(pending if text is None and pending is not None else text or "")
        except BaseException:
            if not self._cut_off and pending is None:
                self.talk, self.synced = before, False
                self.forget_pending()
            raise

    def catch_up(self) -> None:
        """dgnd's session holds the conversation's token ids, where they are known."""
        if self.talk.ids and self.link.forgotten():
            self.synced = False
            self.screen.note("(dgnd has forgotten the conversation, and is told it again)")
        if not self.synced and self.talk.ids is not None:
            self.link.put(self.talk.ids, self.talk.params.model)
            self.synced = True

    def _resume(self) -> bool:
        params = api.GenerateParams(
            model=self.talk.params.model,
            session=self.link.session,
            resume=True,
            wait=self.talk.params.wait,
        )
        return self._stream(params, self._asked)

    def _stream(self, params: api.GenerateParams, text: str) -> bool:
        client = self.link.client()
        begun = params.resume
        self.forget_pending()
        self._asked = text
        self.state.begin()

        def show(piece: str) -> None:
            nonlocal begun
            begun = True
            self.state.token()
            answer.add(piece)

        try:
            with interrupts() as noted, self.screen.answering(self.state.line) as answer:
                result = self._follow(client.start_generate(params), show, noted, answer)
        except DgnError as error:
            self._cut_off = begun and error.retryable
            self._unanswered = text if error.retryable and not begun else None
            raise
        finally:
            self.state.stop()
        self.state.end(result)
        self.talk.answered(text, result)
        self.synced, self.last = True, result
        go_on = self._after(result)
        if self.kept is not None:
            self.kept.changed(self)
        return go_on

    def _follow(
        self, stream: GenerateStream, show: Callable[[str], None], noted: Interrupts, answer: Answering
    ) -> api.GenerateResult:
        if not answer.tells:
            return follow(stream, show, noted, answer.watch, answer.pause)
        news = AnswerWatch(self.link.another, self.link.session, self.state, answer.note)
        route = None
        try:
            result = follow(
                stream,
                show,
                noted,
                {**answer.watch, **news.watch},
                lambda: min(answer.pause(), news.pause()),
            )
            route = result.route
        finally:
            news.end(route)
        return result

    def _after(self, result: api.GenerateResult) -> bool:
        if result.finish_reason == "cancelled":
            if not self.screen.interactive:
                self._code = EXIT_INTERRUPTED
                return False
            self.screen.note("(stopped)")
        elif result.finish_reason == "length":
            limit = self.talk.params.max_tokens
            if limit is not None and result.usage.completion_tokens >= limit:
                self.screen.note(f"(stopped after {limit} tokens, as max_tokens says)")
            else:
                used = result.usage.prompt_tokens + result.usage.completion_tokens
                self.screen.note(f"(the context is full with {used} tokens; type clear to start anew)")
        return True
