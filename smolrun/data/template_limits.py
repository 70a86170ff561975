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
from collections.abc import Callable, Mapping
from inspect import isgenerator
from typing import Any

from jinja2 import Template, nodes
from jinja2.sandbox import SandboxedEnvironment
from jinja2.visitor import NodeTransformer

from smolrun.foreign_files import LimitPassed

MAX_WORK = 10_000_000  # about characters; a turn of a loop counts 50 and what stands in it
MAX_TEMPLATE = 1_000_000  # the longest that are in use have 30,000
_TURN = 50
_MAX_NUMBER = 100_000  # widths, repetitions; jinja's own limit for range()
_WIDTH = re.compile(r"\d{5,}|\*")  # in a format
_ARITHMETIC = ("+", "-", "/", "//", "%")
_MULTIPLY = ("replace", "join", "indent", "tojson", "expandtabs", "format", "format_map")


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
            args = _listed(args)
            value, *others = args[1:] if hasattr(apply, "jinja_pass_arg") else args
            _refuse_growth(name, value, (*others, *kwargs.values()))
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
    elif name == "*" or name in _MULTIPLY:
        # Every text by every other and by every count: more than any of these makes.
        factors = [item if isinstance(item, int) else _size(item) for item in (value, *others)]
        size = math.prod(max(1, abs(factor)) for factor in factors)
    elif name not in _ARITHMETIC and any(number > _MAX_NUMBER for number in numbers):
        raise LimitPassed(f"{name} by more than {_MAX_NUMBER:,}")
    is_format = name in ("%", "format", "format_map") and isinstance(value, str)
    if size > MAX_WORK or (is_format and _WIDTH.search(value)):
        raise LimitPassed(f"what {name} makes is larger than {MAX_WORK:,} characters")


def _listed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lists for generators, whose size is not known."""
    return tuple(list(item) if isgenerator(item) else item for item in args)


def _size(value: Any) -> int:
    """Characters, and values in lists and dicts, at most a little more than MAX_WORK."""
    total, level = 0, [value]
    while level and total <= MAX_WORK:
        item = level.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            level += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            level += item
        elif isinstance(item, range):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 8
        total += 1
    return total
