"""Everything the origin needs of a model to turn text into ids and ids into text, read from its directory.

Knows nothing of sessions, weights or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dgnd.control.api import ChatMessage
from dgnd.errors import ModelError
from dgnd.text import templates
from dgnd.text.chat import ChatEncoder
from dgnd.text.detokenizer import Detokenizer, make_stages
from dgnd.text.jinja_sandbox import ChatTemplate
from dgnd.text.model_files import TextConfig, read_text_config
from dgnd.text.special_text import Placeholders, token_pattern
from dgnd.text.tokenizer import Tokenizer, check_text


class TextAssets:
    """A model's tokenizer, chat template and ends. Immutable; may be shared by all sessions."""

    def __init__(self, tokenizer: Tokenizer, config: TextConfig, chat_template: str, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        added = frozenset(tokenizer.added.values())
        self.vocab_size = tokenizer.vocab_size  #: one more than the largest id
        bos = tokenizer.token_to_id(config.named_tokens.get("bos_token", ""))
        self.bos_token_id: int | None = config.bos_id if bos is None else bos
        if chat_template == "auto" and config.chat_template is not None:
            chosen = None
            source, where = config.chat_template, str(config.template_file)
        else:
            templates.check_name(chat_template)
            named = chat_template != "auto"
            chosen = templates.builtin(chat_template) if named else templates.choose(added, config.hints)
            source, where = chosen.source, f"built-in template {chosen.name}"
        #: "model" for the model's own, else the name of the built-in one
        self.template_name: str = chosen.name if chosen else "model"
        #: texts that end an answer in this template where no token does
        self.stop_texts: tuple[str, ...] = chosen.stop_texts if chosen else ()
        ends = [config.named_tokens.get("eos_token"), *(chosen.ends if chosen else ())]
        end_ids = [tokenizer.token_to_id(end) for end in ends if end]
        self.eos_token_ids: frozenset[int] = frozenset(
            [*eos_ids, *config.eos_ids, *(end_id for end_id in end_ids if end_id is not None)]
        )
        variables = dict(config.named_tokens)
        if chosen:
            eos = config.named_tokens.get("eos_token", "")
            v3 = "[INST]" in added
            variables = {
                "bos_token": config.named_tokens.get("bos_token", ""),
                "eos_token": eos,
                "end_token": "<|end|>" if "<|end|>" in added or not eos else eos,
                "user_space": "" if v3 else " ",
                "answer_space": " " if v3 else "",
            }
        special = {tokenizer.added[token_id] for token_id in tokenizer.special_ids}
        control = frozenset(special | {t for t in added if t in source and not t.isspace()})
        self._raw_pattern = token_pattern(special)
        self._chat = ChatEncoder(tokenizer, ChatTemplate(source, where), variables, control)

    @classmethod
    def load(
        cls, model_dir: Path, chat_template: str = "auto", eos_token_ids: tuple[int, ...] = ()
    ) -> TextAssets:
        """Reads the directory. ModelError names the file that can't be used; ConfigError an unknown template name."""
        templates.check_name(chat_template)
        config = read_text_config(model_dir)
        return cls(Tokenizer.load(model_dir / "tokenizer.json"), config, chat_template, eos_token_ids)

    def encode_raw(self, text: str) -> list[int]:
        """Ids of bare text, with BOS as the tokenizer adds it; special tokens written in it stay text."""
        check_text(text)
        places = Placeholders([text], self._raw_pattern)
        hidden = places.hide(text)
        if not places.meaning:
            return self._tokenizer.encode(text, add_special_tokens=True)
        return self._tokenizer.aliases.encode(hidden, places.meaning, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Ids of a conversation in the model's template, ready for the model to answer."""
        return self._chat.encode(messages)

    def encode_turn(self, context: Sequence[int], text: str, system: str | None = None) -> list[int]:
        """Ids to append to `context`, which ends with an answer, so that `text` is the next user turn."""
        if not context:
            first = [ChatMessage("system", system)] if system else []
            return self.encode_chat([*first, ChatMessage("user", text)])
        ids = self._chat.encode_turn(text, system)
        if ids and context[-1] in self.eos_token_ids and ids[0] in self.eos_token_ids:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of the ids; those that are not of the vocabulary have none."""
        detokenizer = self.detokenizer(skip_special)
        return "".join([*map(detokenizer.push, ids), detokenizer.finish()])

    def token_text(self, token_id: int) -> str:
        """The text of one token as in the middle of a text; "" for an id that is not of the vocabulary."""
        detokenizer = self._detokenizer(frozenset(), whole=False)
        return detokenizer.push(token_id) + detokenizer.finish()

    def detokenizer(self, skip_special: bool = True) -> Detokenizer:
        """For one answer."""
        return self._detokenizer(self._tokenizer.special_ids if skip_special else frozenset(), whole=True)

    def _detokenizer(self, skipped: frozenset[int], whole: bool) -> Detokenizer:
        stages = make_stages(self._tokenizer.decoder, self._tokenizer.decode_tokens, whole)
        return Detokenizer(self._tokenizer.id_to_token, stages, skipped)


__all__ = ["ModelError", "TextAssets"]
