"""A chat template that cannot run for ever or fill the memory: each rendering has a budget.

Templates are programs of other people. The sandbox of transformers keeps them away from the
machine, and here every turn of a loop, call of a macro, operator, filter, method and printed value
is charged with the size of what it makes, so a rendering ends after a fixed amount of work on every
machine alike. What could grow by itself in one operation (`'x' * 10**9`) is refused before it runs.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from string import Formatter
from typing import Any

from jinja2 import Template, nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from smolrun.files import LimitPassed

MAX_WORK = 10_000_000  # about characters; a turn of a loop counts 50 and what stands in it
MAX_TEMPLATE = 1_000_000  # the longest that are in use have 30,000
_TURN = 50
_MAX_NUMBER = 100_000  # widths, repetitions; jinja's own limit for range()
# Widths of a format that are large, or arguments.
_WIDTHS = {"%": re.compile(r"\d{5,}|\*"), "{": re.compile(r"\d{5,}|\{")}
_ARITHMETIC = ("+", "-", "/", "//", "%")
_FORMATS = ("%", "format", "format_map")
_MULTIPLY = ("indent", "tojson", "expandtabs")
_REFER = ("length", "count", "first", "last")  # they make nothing, however large their argument


class _Turns(NodeTransformer):
    """Charges each turn of a loop and each call of a macro, with the text that stands in it."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  (jinja2 calls it so)
        self.generic_visit(node)
        charge = _charge(node)
        node.body.insert(0, nodes.ExprStmt(charge))
        if node.test is not None:
            node.test = nodes.And(nodes.Not(charge), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_charge(node)))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None)


def _charge(node: nodes.Node) -> nodes.Expr:
    texts = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
    work = texts + _TURN + sum(1 for _ in node.find_all(nodes.Node))
    return nodes.Call(nodes.EnvironmentAttribute("charge"), [nodes.Const(work)], [], None, None)


class LimitedTemplate:
    """A template as transformers would compile it, with every operation charged."""

    def __init__(self, text: str) -> None:
        """Nothing of the text runs here but constants, which are charged too. Raises LimitPassed,
        and what jinja2 raises."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if len(text) > MAX_TEMPLATE:
            raise LimitPassed(f"the template is longer than {MAX_TEMPLATE:,} characters")
        self._left = MAX_WORK
        env: Any = _compile_jinja_template("").environment.overlay()
        self._env, self._original_call = env, env.call
        env.intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])
        env.call_binop, env.call, env.finalize = self._binop, self._call, self._printed
        env.charge, env.joined = self._charge, self._joined
        env.filters = {name: self._filter(name, apply) for name, apply in env.filters.items()}
        env.globals = dict(env.globals)
        self._template: Template = env.from_string(_Turns().visit(env.parse(text)))

    def render(self, work: int, **names: Any) -> str:
        """The text; LimitPassed where it takes more than `work`."""
        self._left = work
        return self._template.render(**names)

    def _charge(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise LimitPassed("the template does more work than any conversation needs")

    def _binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _refuse_growth(operator, left, (right,))
        return self._printed(
            SandboxedEnvironment.call_binop(self._env, context, operator, left, right)
        )

    def _call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if function in (self._charge, self._joined):
            return function(*args)
        args = _listed(args)
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        value, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        _refuse_growth(name, value, (*args, *kwargs.values()))
        self._charge(_size(value) + _size(args))
        return self._printed(self._original_call(context, function, *args, **kwargs))

    def _filter(self, name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(apply)  # keeps the mark of a filter that gets the context first
        def charged(*args: Any, **kwargs: Any) -> Any:
            at = int(hasattr(apply, "jinja_pass_arg"))
            if name in _REFER and not _is_lazy(args[at]):
                self._charge(_TURN)
                return apply(*args, **kwargs)
            args = _listed(args)
            # As replace takes them, if it gets them by name: old, new, count.
            named = [kwargs[key] for key in sorted(kwargs, reverse=True)]
            is_percent = name == "format" and isinstance(args[at], str)  # unlike str.format
            _refuse_growth("%" if is_percent else name, args[at], (*args[at + 1 :], *named))
            self._charge(_size(args) + _size(tuple(kwargs.values())))
            return self._printed(apply(*args, **kwargs))

        return charged

    def _joined(self, *parts: Any) -> str:
        self._charge(_size(parts))
        return "".join(map(str, parts))

    def _printed(self, value: Any) -> Any:
        self._charge(_size(value))
        return value


def _refuse_growth(name: str, value: Any, others: tuple[Any, ...]) -> None:
    """Raises LimitPassed for an operation whose result could be far larger than what goes in."""
    numbers = [abs(item) for item in others if isinstance(item, int)]
    size = 0
    if name == "**":
        size = _size(value) * sum(numbers)
    elif name == "*" and numbers and isinstance(value, int):
        size = value.bit_length() * numbers[0].bit_length()
    elif name == "replace" and len(others) > 1:
        old, new, *_ = others
        times = _size(value) // max(1, len(old) if isinstance(old, str) else 1) + 1
        size = _size(value) + times * _size(new)
    elif name == "join":
        lengths = [len(item) for item in (value, *others) if isinstance(item, Collection)]
        size = _size([value, *others]) + math.prod(lengths)
    elif name in _FORMATS and isinstance(value, str):
        widest = max(map(int, re.findall(r"\d{1,5}", value)), default=0)
        fields = value.count("%" if name == "%" else "{")
        size = _size(value) + fields * (widest + _size(others))
    elif name == "format":
        raise LimitPassed("format of what is not text")
    elif name == "*" or name in _MULTIPLY:
        # Every text by every other and by every count: more than any of these makes.
        factors = [item if isinstance(item, int) else _size(item) for item in (value, *others)]
        size = math.prod(max(1, abs(factor)) for factor in factors)
    elif name not in _ARITHMETIC and any(number > _MAX_NUMBER for number in numbers):
        raise LimitPassed(f"{name} by more than {_MAX_NUMBER:,}")
    if size > MAX_WORK or (name in _FORMATS and isinstance(value, str) and _is_wide(name, value)):
        raise LimitPassed(f"what {name} makes is larger than {MAX_WORK:,} characters")


def _is_wide(name: str, text: str) -> bool:
    """Whether a format may make a value longer than a few thousand characters by padding it."""
    if name == "%":
        return bool(_WIDTHS["%"].search(text))
    return any(_WIDTHS["{"].search(spec or "") for _, _, spec, _ in Formatter().parse(text))


def _listed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lists for iterators, whose size is not known."""
    return tuple(list(item) if _is_lazy(item) else item for item in args)


def _is_lazy(value: Any) -> bool:
    """Whether it makes its items when they are taken, as what most filters return."""
    return isinstance(value, Iterator) and not isinstance(value, LoopContext)


def _size(value: Any) -> int:
    """Characters, and values in lists and dicts, at most a little more than MAX_WORK."""
    total, level = 0, [value]
    while level and total <= MAX_WORK:
        item = level.pop()
        if isinstance(item, str | bytes | range):
            total += len(item)
        elif isinstance(item, Mapping):
            level += [*item.keys(), *item.values()]
        elif isinstance(item, Collection):
            level += item
        elif isinstance(item, Namespace):
            level.append(item._Namespace__attrs)  # str() shows them
        elif isinstance(item, int):
            total += item.bit_length() // 8
        total += 1
    return total
