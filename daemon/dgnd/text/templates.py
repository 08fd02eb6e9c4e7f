"""The built-in chat templates, for models that have none of their own, and how one of them is chosen.

Each is the form that its model family was trained with, as far as the family says (`docs/sampling.md`). A
system message goes where the family has a place for it, else before the first user message. Every template
begins with `bos_token` and names it nowhere else. Knows tokenizers only by the texts of their special tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dgnd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BuiltinTemplate:
    """A template and how it is recognised."""

    name: str
    source: str
    markers: tuple[str, ...] = ()  #: tokens of which a vocabulary must have all for it to be chosen by itself
    hints: tuple[tuple[str, ...], ...] = ()  #: else: words, of which all are in the model's name
    ends: tuple[str, ...] = ()  #: tokens that end an answer
    stop_texts: tuple[str, ...] = ()  #: texts that end an answer where no token does


#: Sets `turns` to the messages after a system message and `first` to what goes before the first user message.
_FOLD_SYSTEM = """\
{%- if messages[0].role == 'system' -%}
{%- set first = messages[0].content | trim ~ '\n\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}
{{- bos_token -}}"""

_CHATML = """\
{{- bos_token -}}
{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

_TAGS = """\
{{- bos_token -}}
{%- set tags = {'system': '<|system|>', 'user': '<|user|>', 'assistant': '<|assistant|>'} -%}
{%- for m in messages -%}{{- tags[m.role] ~ '\n' ~ m.content ~ end_token ~ '\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""

_LLAMA2 = """\
{%- if messages[0].role == 'system' -%}
{%- set first = '<<SYS>>\n' ~ messages[0].content | trim ~ '\n<</SYS>>\n\n' -%}{%- set turns = messages[1:]
-%} {%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}
{{- bos_token -}}
{%- for m in turns -%}
{%- if m.role == 'assistant' -%}{{- ' ' ~ m.content | trim ~ ' ' ~ eos_token -}}
{%- else -%}{{- lead ~ '[INST] ' ~ (first if loop.first else '') ~ m.content | trim ~ ' [/INST]' -}}{%- endif
-%} {%- endfor -%}"""

#: Where `[INST]` is a token (version 3), its vocabulary writes no space of its own around it.
_MISTRAL = (
    _FOLD_SYSTEM
    + """\
{%- for m in turns -%}
{%- set text = (first if loop.first else '') ~ m.content -%}
{%- if inst_tokens -%}
{%- if m.role == 'assistant' -%}{{- lead ~ text ~ eos_token -}}
{%- else -%}{{- '[INST]' ~ lead ~ text ~ '[/INST]' -}}{%- endif -%}
{%- else -%}
{%- if m.role == 'assistant' -%}{{- ' ' ~ text ~ eos_token -}}
{%- else -%}{{- lead ~ '[INST] ' ~ text ~ ' [/INST]' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}"""
)

_GEMMA = (
    _FOLD_SYSTEM
    + """\
{%- for m in turns -%}
{%- set role = 'model' if m.role == 'assistant' else 'user' -%}
{{- '<start_of_turn>' ~ role ~ '\n' ~ (first if loop.first else '') ~ m.content | trim ~ '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"""
)

_ALPACA = """\
{{- bos_token ~ lead -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content | trim -}}{%- set turns = messages[1:] -%}
{%- else -%}
{{- 'Below is an instruction that describes a task. ' -}}
{{- 'Write a response that appropriately completes the request.' -}}{%- set turns = messages -%}
{%- endif -%}
{%- for m in turns -%}
{%- if m.role == 'assistant' -%}{{- '\n\n### Response:' ~ m.content ~ eos_token -}}
{%- else -%}{{- '\n\n### Instruction:\n' ~ m.content | trim -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\n\n### Response:' -}}{%- endif -%}"""

_PLAIN = """\
{{- bos_token ~ lead -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content | trim ~ '\n\n' -}}
{%- elif m.role == 'user' -%}{{- 'User: ' ~ m.content | trim ~ '\n' -}}
{%- else -%}{{- 'Assistant: ' ~ m.content | trim ~ '\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""

#: In the order in which they are tried; the last is the fallback.
BUILTIN: tuple[BuiltinTemplate, ...] = (
    BuiltinTemplate("chatml", _CHATML, ("<|im_start|>",), ends=("<|im_end|>",)),
    BuiltinTemplate("llama3", _LLAMA3, ("<|start_header_id|>",), ends=("<|eot_id|>", "<|eom_id|>")),
    BuiltinTemplate("gemma", _GEMMA, ("<start_of_turn>",), ends=("<end_of_turn>",)),
    BuiltinTemplate("tags", _TAGS, ("<|user|>", "<|assistant|>"), ends=("<|end|>",)),
    BuiltinTemplate("mistral", _MISTRAL, ("[INST]",), (("mistral", "instruct"), ("mixtral", "instruct"))),
    BuiltinTemplate("llama2", _LLAMA2, ("<<SYS>>",), (("llama-2", "chat"), ("llama2", "chat"))),
    BuiltinTemplate("alpaca", _ALPACA, hints=(("alpaca",),), stop_texts=("\n\n### Instruction:",)),
    BuiltinTemplate("plain", _PLAIN, stop_texts=("\nUser:",)),
)
NAMES = ("auto", *sorted(template.name for template in BUILTIN))


def check_name(name: str) -> None:
    """ConfigError, with the names there are, for one that there is not."""
    if name not in NAMES:
        raise ConfigError(f"chat_template is {name!r}; it must be one of {', '.join(NAMES)}")


def builtin(name: str) -> BuiltinTemplate:
    """The template of that name; ConfigError when there is none."""
    check_name(name)
    return next(template for template in BUILTIN if template.name == name)


def choose(tokens: Collection[str], hints: str) -> BuiltinTemplate:
    """The template for a model without one. tokens: its added tokens; hints: its names, lower case."""
    for template in BUILTIN:
        if template.markers and all(marker in tokens for marker in template.markers):
            return template
    for template in BUILTIN:
        if any(all(word in hints for word in words) for words in template.hints):
            return template
    return BUILTIN[-1]


def variables(bos: str, eos: str, lead: str, tokens: Collection[str]) -> dict[str, str]:
    """What the built-in templates refer to.

    bos: "" where none is to be written; lead: what has to stand after a special token so that the text there
    begins with a space, as the families' SentencePiece writes it. An absent flag is "".
    """
    return {
        "bos_token": bos,
        "eos_token": eos,
        "lead": lead,
        "end_token": "<|end|>" if "<|end|>" in tokens or not eos else eos,
        "inst_tokens": "yes" if "[INST]" in tokens else "",
    }
