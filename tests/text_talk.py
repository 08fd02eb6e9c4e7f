"""Conversations and models to have them with: with templates of their own, and with the built-in ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from text_families import FAMILY_TEXTS
from text_models import byte_level, sentencepiece, unigram_nfkc, write_model
from tokenizers import Tokenizer

from dgnd.control.api import ChatMessage
from dgnd.text.assets import TextAssets

CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
OWN_CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
OWN_LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def say(*contents: str, system: str | None = None) -> list[ChatMessage]:
    first = [ChatMessage("system", system)] if system is not None else []
    roles = ("user", "assistant")
    return first + [ChatMessage(roles[n % 2], text) for n, text in enumerate(contents)]  # type: ignore[arg-type]


#: Writes a model with a template of its own into a directory.
OWN: dict[str, Callable[[Path], Path]] = {
    **FAMILY_TEXTS,
    "byte-level": lambda path: write_model(
        path, byte_level(CHATML_SPECIALS), OWN_CHATML, eos_token="<|im_end|>", bos_token=None
    ),
    "llama2": lambda path: write_model(
        path, sentencepiece("llama2"), OWN_LLAMA2, bos_token="<s>", eos_token="</s>"
    ),
    "mistral": lambda path: write_model(
        path, sentencepiece("mistral"), OWN_LLAMA2, bos_token="<s>", eos_token="</s>"
    ),
    "unigram": lambda path: write_model(
        path,
        unigram_nfkc(),
        OWN_LLAMA2,
        bos_token={"content": "<s>", "__type": "AddedToken"},
        eos_token="</s>",
    ),
}


TALK = say("Hello", "Hi", "Bye", system="Be kind")
BUILTIN: dict[str, tuple[Callable[[], Tokenizer], dict[str, str], str]] = {
    "chatml": (
        lambda: byte_level(CHATML_SPECIALS),
        {"eos_token": "<|im_end|>"},
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        "Hi<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        lambda: byte_level(LLAMA3_SPECIALS, bos="<|begin_of_text|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": (
        lambda: sentencepiece("gemma", ("<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>"),
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        "<bos><start_of_turn>user\nBe kind\n\nHello<end_of_turn>\n<start_of_turn>model\nHi<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    ),
    "tags": (
        lambda: sentencepiece("gemma", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s><|system|>\nBe kind<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n",
    ),
    "mistral": (
        lambda: sentencepiece("mistral", ("[INST]", "[/INST]")),
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s>[INST] Be kind\n\nHello[/INST] Hi</s>[INST] Bye[/INST]",
    ),
    "llama2": (
        lambda: sentencepiece("llama2"),
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s> [INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHello [/INST] Hi </s> [INST] Bye [/INST]",
    ),
    "alpaca": (
        lambda: sentencepiece("llama2"),
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s> Be kind\n\n### Instruction:\nHello\n\n### Response:Hi</s> \n\n### Instruction:\nBye"
        "\n\n### Response:",
    ),
    "plain": (
        lambda: byte_level(("<s>", "</s>")),
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s>Be kind\n\nUser: Hello\nAssistant: Hi\nUser: Bye\nAssistant:",
    ),
}  # fmt: skip


def builtin(path: Path, name: str, template: str = "auto") -> TextAssets:
    make, config, _ = BUILTIN[name]
    return TextAssets.load(write_model(path, make(), **config), template)
