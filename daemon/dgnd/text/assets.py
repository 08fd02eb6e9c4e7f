"""Everything the origin needs of a model to turn text into ids and ids into text, read from its directory.

Knows nothing of sessions, weights or sampling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgnd.control.api import ChatMessage
from dgnd.errors import BadRequest
from dgnd.text import templates
from dgnd.text.chat import ChatEncoder
from dgnd.text.detokenizer import Detokenizer, make_stages
from dgnd.text.jinja_sandbox import ChatTemplate
from dgnd.text.model_files import TextConfig, read_text_config
from dgnd.text.tokenizer import Tokenizer
from dgnd.text.tools import MARKS, ToolStyle, style_of

if TYPE_CHECKING:
    from dgnd.text.grammar import Forms

#: An added token that looks like this marks something up, whether or not the tokenizer calls it special.
_MARKUP = re.compile(r"<\S+>|\[\S+\]")


class TextAssets:
    """A model's tokenizer, chat template and ends. All sessions and threads may share it.

    vocab_size: one more than the largest id. eos_token_ids: every id that ends an answer. template_name:
    "model" for the model's own template, else the name of the built-in one. stop_texts: what ends an answer
    in a template whose family has no token for it; give them to the StopMatcher together with the user's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: TextConfig,
        chat_template: str = "auto",
        eos_ids: Iterable[int] = (),
    ) -> None:
        self._tokenizer, self._config = tokenizer, config
        named = config.named_tokens
        added = frozenset(tokenizer.added.values())
        bos_id = tokenizer.token_to_id(named.get("bos_token", ""))
        self.vocab_size: int = tokenizer.vocab_size
        self.bos_token_id: int | None = config.bos_id if bos_id is None else bos_id
        chosen = _choose(config, chat_template, added)
        source, where = (
            (chosen.source, f"built-in template {chosen.name}")
            if chosen
            else (config.chat_template or "", str(config.template_file))
        )
        self.template_name: str = chosen.name if chosen else "model"
        self.stop_texts: tuple[str, ...] = chosen.stop_texts if chosen else ()
        ends = [
            tokenizer.token_to_id(end)
            for end in (named.get("eos_token", ""), *(chosen.ends if chosen else ()))
        ]
        self._close_id = next((end for end in reversed(ends) if end is not None), None)
        self.eos_token_ids: frozenset[int] = frozenset(
            [*eos_ids, *config.eos_ids, *(end for end in ends if end is not None)]
        )
        control = frozenset(
            text
            for token_id, text in tokenizer.added.items()
            if token_id in tokenizer.special_ids
            or text in named.values()
            or _MARKUP.fullmatch(text)
            or (text in source and not text.isspace())
        )
        variables = self._builtin_variables(source) if chosen else named
        self._forms: Forms | None = None
        self.tool_style: ToolStyle | None = style_of(source)  #: None: the template knows no tools
        self._mark_ids = {i for i, text in tokenizer.added.items() if text in MARKS}
        self._chat = ChatEncoder(tokenizer, ChatTemplate(source, where), variables, control)

    @classmethod
    def load(
        cls,
        model_dir: Path,
        chat_template: str = "auto",
        eos_token_ids: tuple[int, ...] = (),
        context: int | None = None,
    ) -> TextAssets:
        """Reads the directory; takes up to seconds for a large vocabulary.

        chat_template: "auto", or the name of a built-in template, which then wins over the model's own.
        eos_token_ids: further ids that end an answer. context: ids that the model takes; a much longer text
        is refused with ContextExceeded before all of its ids are made. ModelError names the file that can't
        be used; ConfigError an unknown name.
        """
        templates.check_name(chat_template)
        config = read_text_config(model_dir)
        return cls(
            Tokenizer.load(model_dir / "tokenizer.json", context), config, chat_template, eos_token_ids
        )

    def forms(self, vocab: int) -> Forms:
        """Forms of answers of a model with so many token ids; made once, which takes up to a second.

        Raises ModelError for a tokenizer for which there are none.
        """
        from dgnd.text.grammar import Forms  # its library takes 0.1 s to load, and few ask for forms

        if self._forms is None or self._forms.vocab != vocab:
            self._forms = Forms(self._tokenizer, vocab, self.eos_token_ids)
        return self._forms

    def encode_raw(self, text: str) -> list[int]:
        """Ids of bare text, with BOS as the tokenizer adds it; special tokens written in it stay text."""
        add_bos = self._config.add_bos  # where tokenizer_config.json says it, it decides, as in transformers
        ids = self._chat.encode_text(text, around=add_bos is None)
        return [self.bos_token_id, *ids] if add_bos and self.bos_token_id is not None else ids

    def encode_chat(self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of a conversation in the model's template, ready for the model to answer, perhaps by calling
        tools.

        BadRequest when the template refuses the messages or knows no tools, ModelError when it is faulty,
        LimitError when the text is too long.
        """
        if self.tool_style is None and (
            tools or any(each.role == "tool" or each.tool_calls for each in messages)
        ):
            raise BadRequest("the model's chat template knows no tools", setting="tools")
        return self._chat.encode(messages, tools)

    def encode_turn(self, context: Sequence[int], text: str, system: str | None = None) -> list[int]:
        """Ids to append to `context`, which ends with an answer, so that `text` is the next user turn.

        The answer may end with an eos id or not; its end is written once. A model's template may write
        earlier turns differently once they are earlier (drop their reasoning, say); the context stays as it
        is then. Where a template doesn't show earlier answers at all, or refuses them, the turn is that of a
        new conversation, without BOS, after the end of the answer.
        """
        if not context:
            first = [ChatMessage("system", system)] if system else []
            return self.encode_chat([*first, ChatMessage("user", text)])
        ids = self._chat.encode_turn(text, system)
        if ids is None:
            ids = self.encode_chat([ChatMessage("user", f"{system}\n\n{text}" if system else text)])
            if ids and ids[0] == self.bos_token_id:
                ids = ids[1:]
            if self._close_id is not None:
                ids = [self._close_id, *ids]
        if context[-1] not in self.eos_token_ids:
            return ids
        for index, token_id in enumerate(ids[:4]):
            if token_id in self.eos_token_ids and not self.decode(ids[:index]).strip():
                return ids[index + 1 :]
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the ids; those that are not of the vocabulary have none."""
        detokenizer = self.detokenizer(skip_special)
        return "".join([*map(detokenizer.push, ids), detokenizer.finish()])

    def token_text(self, token_id: int) -> str:
        """The text of one token as in the middle of a text; "" for an id that is not of the vocabulary."""
        detokenizer = self._detokenizer(frozenset(), whole=False)
        return detokenizer.push(token_id) + detokenizer.finish()

    def detokenizer(
        self, skip_special: bool = True, *, marks: bool = False, after: Iterable[int] = ()
    ) -> Detokenizer:
        """For one answer; its pieces concatenate to `decode`. `marks`: those of tools' calls are shown.

        after: ids that it goes on with. Where they have a text, a space before its first word stays.
        """
        special = self._tokenizer.special_ids
        skipped = special if skip_special else frozenset()
        whole = all(token_id in special for token_id in after)
        return self._detokenizer(skipped - self._mark_ids if marks else skipped, whole)

    def _detokenizer(self, skipped: frozenset[int], whole: bool) -> Detokenizer:
        stages = make_stages(self._tokenizer.decoder, self._tokenizer.decode_tokens, whole)
        return Detokenizer(self._tokenizer.id_to_token, stages, skipped)

    def _builtin_variables(self, source: str) -> dict[str, str]:
        """Whether and how a built-in template writes BOS, and the rest that it refers to.

        BOS is written when the model has one of its own: not one that also ends answers (GPT-2) or marks
        turns.
        """
        named, tokenizer = self._config.named_tokens, self._tokenizer
        bos = named.get("bos_token") or tokenizer.added.get(
            -1 if self.bos_token_id is None else self.bos_token_id, ""
        )
        eos = named.get("eos_token") or next(
            (tokenizer.added[eos_id] for eos_id in self._config.eos_ids if eos_id in tokenizer.added), ""
        )
        if bos == eos or (bos and bos in source) or self._config.add_bos is False:
            bos = ""
        return templates.variables(bos, eos, tokenizer.lead_after(bos), tokenizer.added.values())


def _choose(config: TextConfig, name: str, added: frozenset[str]) -> templates.BuiltinTemplate | None:
    """The built-in template to use; None for the model's own."""
    templates.check_name(name)
    if name != "auto":
        return templates.builtin(name)
    return None if config.chat_template is not None else templates.choose(added, config.hints)
