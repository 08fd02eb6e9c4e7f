"""A Jinja2 sandbox in which a template can neither run for ever nor fill the memory.

Jinja's own sandbox keeps a template from Python's internals, but not from `range` in `range`, from doubling a
string forty times, or from a macro that calls itself. Here every rendering has an allowance:

* `MAX_STEPS` iterations and calls, of all loops, macros, methods and filters together;
* `MAX_TEXT` characters and `MAX_ITEMS` items of any one value, and `MAX_HANDLED` characters of all that are
  made, put out or passed on;
* `MAX_RANGE` for one range and for any whole number that is passed to a function or filter;
* `MAX_SECONDS` of time, looked at whenever something is charged.

The syntax tree is changed before it is compiled so that loops, literal text and `~` are charged too.
Knows nothing of chat or tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
from jinja2.exceptions import SecurityError

from dgnd.text.jinja_allowance import (
    MAX_RANGE,
    MAX_STEPS,
    TemplateLimit,
    bits,
    check_bits,
    check_format,
    check_numbers,
    current_allowance,
    result_size,
    weight,
)

#: Filters that look at what they get without making anything of its size.
_LOOKING = frozenset({
    "length", "count", "first", "last", "default", "d", "min", "max", "random", "attr", "abs", "int",
    "float", "round",
})  # fmt: skip
#: Filters that give the items they get, or some of them, perhaps in another order.
_CHOOSING = frozenset({
    "list", "select", "selectattr", "reject", "rejectattr", "map", "items", "sort", "reverse", "unique",
    "groupby", "dictsort",
})  # fmt: skip


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with the allowance built in."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_measured, **options)
        self.globals["range"] = _range
        self.globals["dict"] = _dict
        self.globals["namespace"] = TemplateNamespace
        self.globals.pop("lipsum", None)
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.filters["_counted"] = _counted
        self.filters["_measured"] = _measured_late

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """A filter that is charged for what it is given."""
        self.filters[name] = _bounded_filter(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = _filtered(loop.iter, "_counted")
        for concat in tree.find_all(jinja2.nodes.Concat):
            concat.nodes = [_filtered(node, "_measured") for node in concat.nodes]
        for output in tree.find_all(jinja2.nodes.Output):
            output.nodes = [
                _filtered(jinja2.nodes.Const(node.data, lineno=node.lineno), "_measured")
                if isinstance(node, jinja2.nodes.TemplateData) and node.data
                else node
                for node in output.nodes
            ]
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """One of the operators that can make something large."""
        allowance = current_allowance()
        if operator == "+":
            if not isinstance(left, int | float):
                allowance.take_text(weight(left) + weight(right))
        elif operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(times, int):
                    allowance.take_text(len(one) * max(times, 0))
            check_bits(bits(left) + bits(right))
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                check_bits(bits(left) * abs(right))
        elif isinstance(left, str):
            check_format(left)
            allowance.take_text(weight(left) + weight(right) + 10_000 * left.count("%"))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A function, macro or method; named like this in jinja2, so that templates may use any keyword."""
        allowance = current_allowance()
        allowance.take_steps(1)
        check_numbers((*args, *kwargs.values()))
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            name = getattr(method, "__name__", "")
            allowance.take_text(result_size(owner, name, args))
            if name in ("split", "rsplit", "splitlines"):
                by = args[0] if args and isinstance(args[0], str) else None
                allowance.take_steps((owner.count(by) if by else len(owner) // 2) // 4)
        return super().call(__context, __obj, *args, **kwargs)


class TemplateNamespace(jinja2.utils.Namespace):
    """`namespace(…)`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja2 has it: `self` may be a keyword
        self, given = args[0], args[1:]
        values = dict(*given, **kwargs)
        for name in values:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace can't hold {name!r}")


def _filtered(node: Any, name: str) -> jinja2.nodes.Expr:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _range(*args: int) -> range:
    found = range(*args)
    if len(found) > MAX_RANGE:
        raise TemplateLimit(f"a range has more than {MAX_RANGE} numbers")
    return found


@jinja2.pass_context
def _counted(_context: Any, iterable: Any) -> Any:
    """What a loop runs over, charged beforehand."""
    if isinstance(iterable, jinja2.Undefined):
        return iterable
    items = list(itertools.islice(iterable, MAX_STEPS + 1))
    current_allowance().take_steps(len(items) + 1)
    return items


def _measured(value: Any) -> Any:
    """What is put out, charged beforehand."""
    current_allowance().take_text(weight(value))
    return value


@jinja2.pass_context
def _measured_late(_context: Any, value: Any) -> Any:
    """The same as a filter; with the context, so that it is never folded into a constant."""
    return _measured(value)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, charged for what it is given. jinja2 marks on a function which context it wants first."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        allowance = current_allowance()
        given = (*args[first:], *kwargs.values())
        check_numbers(given[1:])
        if name in _LOOKING:
            allowance.take_steps(1)
        elif name in _CHOOSING:
            allowance.take_steps(1 + (len(given[0]) // 4 if given and hasattr(given[0], "__len__") else 0))
        else:
            value = given[0] if given else ""
            size = weight(given)
            if isinstance(value, str):
                size += result_size(value, name, given[1:])
            elif name == "join":
                size += weight(value) * max(
                    (len(arg) for arg in given[1:] if isinstance(arg, str)), default=0
                )
            allowance.take_text(size)
        return function(*args, **kwargs)

    return bounded
