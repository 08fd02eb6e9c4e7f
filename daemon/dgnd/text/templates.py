"""The built-in chat templates, for models that have none of their own, and how one of them is chosen.

Each is the form that its model family was trained with; system messages go where the family has them, or before the
first user message where it has none. `docs/sampling.md` is about sampling; the forms are listed in `docs/templates.md`.
Knows nothing of tokenizers but the texts of their special tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dgnd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BuiltinTemplate:
    """A template and what it needs. The first of `markers` that a vocabulary lacks rules it out."""

    name: str
    source: str
    markers: tuple[str, ...] = ()  #: tokens that the vocabulary must have for it to be chosen by itself
    hints: tuple[tuple[str, ...], ...] = ()  #: else: words of which all are in the model's name
    ends: tuple[str, ...] = ()  #: tokens that end an answer
    stop_texts: tuple[str, ...] = ()  #: texts that end an answer where no token does


#: Folds a system message into the first user message: `first` is what goes before it.
_FOLD_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content | trim ~ '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
)

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TAGS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ end_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0].role == 'system' %}"
    "{% set first = '<<SYS>>\n' ~ messages[0].content | trim ~ '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}{{ bos_token }}"
    "{% for m in turns %}{% if m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}[INST] {{ first if loop.first else '' }}{{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
_MISTRAL = (
    _FOLD_SYSTEM + "{{ bos_token }}{% for m in turns %}"
    "{% if m.role == 'assistant' %}{{ answer_space }}{{ m.content | trim }}{{ eos_token }}"
    "{% else %}[INST] {{ first if loop.first else '' }}{{ m.content }}{{ user_space }}[/INST]{% endif %}{% endfor %}"
)
_GEMMA = (
    _FOLD_SYSTEM + "{{ bos_token }}{% for m in turns %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_ALPACA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set turns = messages[1:] %}{% else %}"
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "{% set turns = messages %}{% endif %}\n\n{% for m in turns %}"
    "{% if m.role == 'assistant' %}### Response:\n{{ m.content | trim }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ m.content | trim }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
_PLAIN = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content | trim }}\n\n"
    "{% elif m.role == 'user' %}User: {{ m.content | trim }}\n{% else %}Assistant: {{ m.content | trim }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

#: In the order in which they are tried; the last is the fallback.
BUILTIN: tuple[BuiltinTemplate, ...] = (
    BuiltinTemplate("chatml", _CHATML, ("<|im_start|>", "<|im_end|>"), ends=("<|im_end|>",)),
    BuiltinTemplate("llama3", _LLAMA3, ("<|start_header_id|>", "<|eot_id|>"), ends=("<|eot_id|>", "<|eom_id|>")),
    BuiltinTemplate("gemma", _GEMMA, ("<start_of_turn>", "<end_of_turn>"), ends=("<end_of_turn>",)),
    BuiltinTemplate("tags", _TAGS, ("<|user|>", "<|assistant|>"), ends=("<|end|>",)),
    BuiltinTemplate(
        "mistral", _MISTRAL, ("[INST]", "[/INST]"), (("mistral", "instruct"), ("mixtral", "instruct"))
    ),
    BuiltinTemplate("llama2", _LLAMA2, (), (("llama-2", "chat"), ("llama2", "chat"), ("codellama", "instruct"))),
    BuiltinTemplate("alpaca", _ALPACA, (), (("alpaca",),), stop_texts=("\n### Instruction:",)),
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
