"""Small models whose tokenizers and templates do what those of Qwen, Mistral and SmolLM do.

The templates are ours, made of what the families' own are made of: namespaces, reversed messages, string
methods, checks of roles, the date, `{% generation %}`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from text_models import byte_level, sentencepiece, write_model
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

#: Qwen's: earlier reasoning is left out, the system message is optional, an empty thought can be prescribed.
QWEN_TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set state = namespace(searching=true, question=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if state.searching and message.role == "user"
        and not (message.content.startswith('<tool_response>')
        and message.content.endswith('</tool_response>')) %}
        {%- set state.searching = false %}
        {%- set state.question = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n') %}
            {%- set thoughts = thoughts.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > state.question and (loop.last or thoughts) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thoughts.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

#: Mistral's: roles must alternate, the system message stands before the last question, BOS is written.
MISTRAL_TEMPLATE = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set questions = rest | selectattr("role", "equalto", "user") | list %}
{%- set shown = [] %}
{%- for message in rest %}
    {%- if message["role"] not in ["tool", "tool_results"] and not message.get("tool_calls") %}
        {%- set shown = shown + [message] %}
    {%- endif %}
{%- endfor %}
{%- for message in rest %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("after an optional system message, user and assistant must alternate") }}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == questions[-1]) %}{{- "[AVAILABLE_TOOLS]" }}{%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + lead + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + lead + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- lead + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

#: SmolLM3's: a system turn that is always there, with the date and a mode that may be asked for in the text.
SMOLLM3_TEMPLATE = """\
{%- if messages[0].role == "system" %}
    {%- set told = messages[0].content %}
    {%- set mode = "/no_think" if "/no_think" in told else "/think" %}
    {%- set told = told.replace("/no_think", "").replace("/think", "").rstrip() %}
{%- else %}
    {%- set told = "You are a small model." %}{%- set mode = "/think" %}
{%- endif %}
{%- set ns = namespace(first=true) %}
{%- macro turn(role, text) -%}
{{- "<|im_start|>" + role + "\\n" + text + "<|im_end|>\\n" -}}
{%- endmacro %}
{{- turn("system", "Year: " + strftime_now("%Y") + "\\nMode: " + mode + "\\n\\n" + told) -}}
{%- for message in messages if message.role != "system" -%}
    {%- if message.role == "assistant" -%}
        {%- generation -%}{{- turn("assistant", message.content.lstrip("\\n")) -}}{%- endgeneration -%}
    {%- else -%}
        {{- turn(message.role, message.content) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
    {%- if mode == "/no_think" -%}{{- "<think>\\n\\n</think>\\n" -}}{%- endif -%}
{%- endif -%}"""


def qwen_tokenizer() -> Tokenizer:
    """Byte-level with its own pattern and NFC; the markup of reasoning is added, but not called special."""
    tokenizer = byte_level(QWEN_SPECIALS)
    tokenizer.normalizer = normalizers.NFC()
    pattern = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False, special=False)
            for text in ("<think>", "</think>", "<tool_response>", "</tool_response>")
        ]
    )
    return tokenizer


#: Writes a model with the family's kind of tokenizer, its settings and template into a directory.
FAMILY_TEXTS: dict[str, Callable[[Path], Path]] = {
    "qwen": lambda path: write_model(
        path,
        qwen_tokenizer(),
        QWEN_TEMPLATE,
        add_bos_token=False,
        add_prefix_space=False,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    ),
    "mistral-v3": lambda path: write_model(
        path,
        sentencepiece("mistral", ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]")),
        MISTRAL_TEMPLATE.replace("lead", "' '"),
        add_bos_token=True,
        add_eos_token=False,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ),
    "mistral-tekken": lambda path: write_model(
        path,
        byte_level(("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), bos="<s>"),
        MISTRAL_TEMPLATE.replace("lead", "''"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ),
    "smollm3": lambda path: write_model(
        path,
        byte_level(("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"), None),
        SMOLLM3_TEMPLATE,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    ),
}
