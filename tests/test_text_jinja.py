"""Templates of strangers: what transformers' environment offers, and what a template can't do."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from dgnd.errors import LimitError, ModelError
from dgnd.text import jinja_allowance
from dgnd.text.jinja_allowance import MAX_TEXT
from dgnd.text.jinja_sandbox import MAX_TEMPLATE, ChatTemplate

MESSAGES = [{"role": "user", "content": "a<b & 'ü'"}, {"role": "assistant", "content": "x"}]


def render(source: str, **variables: str) -> str:
    return ChatTemplate(source, "the file").render(MESSAGES, variables)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n    {% if loop.first %}\n  A\n    {% endif %}\n"
        "{{ loop.length }}{% endfor %}\n",
        "{{ messages[0] | tojson }} {{ messages | tojson(indent=2) }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}"
        "{{ i }}{{ loop.last }}{% endfor %}",
        "{% generation %}{{ messages[1].content }}{% endgeneration %}{{ bos_token }}{{ pad_token }}",
        "{% set ns = namespace(n=0, s='') %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.s = ns.s ~ m['role'] + '|' %}{% endfor %}{{ ns.n }}{{ ns.s }}",
        "{% macro show(m, tail='!') -%} {{ m.role | upper }}"
        "{{ caller() if caller }}{{ tail }} {%- endmacro %}"
        "{{ show(messages[0]) }}{% call show(messages[1], tail='?') %}body{% endcall %}",
        "{{ messages | map(attribute='role') | join(', ') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
        "{{ messages[0].content.split('<')[0].strip() }} {{ '%s-%d' % ('a', 3) }} {{ '{:>4}'.format(7) }}",
        "{% if tools %}tools{% elif not documents and messages[0]['content'] is string %}none{% endif %}",
        "{%- for m in messages -%} {{- m.content | trim | replace('a', 'b') | indent -}} {%- endfor -%} \n\n",
        "{{ dict(a=1) }} {{ {'k': [1, none, true]} }} {{ 7 // 2 }} {{ messages[5] is defined }}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ add_generation_prompt }}",
        "{% for k in messages[0] | dictsort %}{{ k[0] }}{% endfor %}"
        "{% for c in 'abc' %}{{ loop.cycle('1', '2') }}{{ c }}{% endfor %}",
    ],
)
def test_it_renders_as_transformers_does(source: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    want, _ = utils.render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(source, bos_token="<s>") == want[0]


def test_the_time_of_day_is_there() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


X = "('x' * 99999)"


def loop(times: int, start: str, change: str) -> str:
    """A template that changes `n.s` so many times."""
    body = f"{{% for i in range({times}) %}}{{% set n.s = {change} %}}{{% endfor %}}"
    return f"{{% set n = namespace(s={start}) %}}{body}"


RUNAWAY = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a list": "{% set a = [1] * 99999 %}{% for i in a %}{% for j in a %}{% endfor %}{% endfor %}",
    "a long range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1] * 99) }}{{ loop([1] * 99) }}{% endfor %}",
    "a long string": "{{ 'x' * 10 ** 10 }}",
    "a product of strings": "{{ " + X + " * 99999 }}",
    "a long list": "{{ [1] * 10 ** 9 }}",
    "doubling with ~": loop(60, "'x' * 99", "n.s ~ n.s"),
    "doubling with +": loop(60, "'x' * 99", "n.s + n.s"),
    "many parts": "{% set a = " + X + " * 99 %}{% set b = " + " ~ ".join(["a"] * 999) + " %}",
    "nested lists put out": loop(60, "[1]", "[n.s, n.s]") + "{{ n.s }}",
    "nested lists as JSON": loop(60, "[1]", "[n.s, n.s]") + "{{ n.s | tojson }}",
    "nested lists kept": loop(99999, "[]", "[n.s, range(99999) | list]"),
    "many words kept": loop(99999, "[]", "[n.s, ('xx ' * 99999).split()]"),
    "a namespace in itself": "{% set n = namespace(s=1) %}{% set n.s = n %}{{ n }}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "a width with %": "{{ '%10000000000d' % 1 }}",
    "a width in a filter": "{{ '%10000000000d' | format(1) }}",
    "a width with format": "{{ '{:10000000000}'.format(1) }}",
    "a large number": "{{ (10 ** 1000) ** 1000 }}",
    "squaring": loop(90, "3", "n.s * n.s"),
    "replace": "{{ " + X + ".replace('x', 'y' * 99999) }}",
    "the filter replace": "{{ " + X + " | replace('x', 'y' * 99999) }}",
    "join": "{{ " + X + ".join(['x'] * 99999) }}",
    "the filter join": "{{ (['x'] * 99999) | join(" + X + ") }}",
    "indent": "{{ ('\\n' * 99999) | indent(99999) }}",
    "tabs": "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "wordwrap": "{{ " + X + " | wordwrap(1, wrapstring=" + X + ") }}",
    "translate": "{{ " + X + ".translate({120: " + X + "}) }}",
    "batch": "{{ [1] | batch(10 ** 10, 0) | list }}",
    "slice": "{{ [1] | slice(10 ** 10) | list }}",
    "map": "{{ ['x'] | map('center', 10 ** 10) | list }}",
    "sum": "{{ ([[1] * 9999] * 9999) | sum(start=[]) }}",
    "literal text in a loop": "{% for a in range(99999) %}" + "y" * 99999 + "{% endfor %}",
    "literal text set aside": (
        "{% set x %}{% for a in range(99999) %}" + "y" * 99999 + "{% endfor %}{% endset %}"
    ),
    "filler text": "{{ lipsum(99999) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", RUNAWAY)
def test_a_runaway_template_ends_soon_with_little_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_allowance, "MAX_SECONDS", 1.0)
    template = ChatTemplate(RUNAWAY[name], "the file")
    tracemalloc.start()
    begin = time.monotonic()
    try:
        with pytest.raises(ModelError, match=r"^the file: chat_template"):
            template.render(MESSAGES, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begin < 30
    assert peak < 16 * MAX_TEXT


def test_slow_work_ends_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_allowance, "MAX_SECONDS", 0.5)
    slow = "{% set a = 'x' * 9999999 %}{% for i in range(99999) %}{{ 'xxxxxxxy' in a }}{% endfor %}"
    begin = time.monotonic()
    with pytest.raises(ModelError, match=r"more than 0\.5 s"):
        render(slow)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{% include 'a' %}",
        "{{ open('/etc/passwd') }}",
        "{{ self._TemplateReference__context.environment }}",
    ],
)
def test_python_is_out_of_reach(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        render(source)
    assert "\n" not in caught.value.message


def test_a_long_conversation_is_within_bounds() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content | trim + '\n' }}{% endfor %}",
        "the file",
    )
    messages = [{"role": "user", "content": "word " * 300}] * 2500
    assert len(template.render(messages, {})) > 3_500_000


def test_far_too_many_messages_are_not_the_templates_fault() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role | trim + m.content | trim }}{% endfor %}", "x")
    with pytest.raises(LimitError, match="300000 messages are too much"):
        template.render([{"role": "user", "content": "x"}] * 300_000, {})


def test_sources_that_cannot_be_compiled_are_refused() -> None:
    with pytest.raises(ModelError, match="line 2: "):
        ChatTemplate("a\n{% if %}", "the file")
    with pytest.raises(ModelError, match=f"more than {MAX_TEMPLATE}"):
        ChatTemplate("x" * (MAX_TEMPLATE + 1), "the file")
    with pytest.raises(ModelError):
        ChatTemplate("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "the file")
    with pytest.raises(ModelError):
        ChatTemplate("{% for a in b %}" * 50 + "{% endfor %}" * 50, "the file")
