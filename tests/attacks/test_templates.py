"""Chat templates of other people's folders, built to run for ever or to fill the memory."""

from __future__ import annotations

import pytest

from smolrun.data.template_limits import MAX_TEMPLATE, MAX_WORK, LimitedTemplate
from smolrun.foreign_files import LimitPassed

NAMESPACE = "{% set n = namespace(x='a', i=7, s=['a']) %}{% for i in range(60) %}"
BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
    ),
    "loops that keep nothing": (
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "text of a loop": "{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}",
    "product": "{{ 'x' * 10**10 }}",
    "product of a list": "{{ [1] * 10**10 }}",
    "sum": NAMESPACE + "{% set n.x = n.x + n.x %}{% endfor %}",
    "concatenation": NAMESPACE + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "list": NAMESPACE + "{% set n.s = n.s + n.s %}{% endfor %}",
    "squares": NAMESPACE + "{% set n.i = n.i * n.i %}{% endfor %}",
    "power": "{{ 7 ** (10 ** 8) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "format": "{{ '{:>1000000000}'.format('a') }}",
    "format with a width": "{{ '{:>{w}}'.format('a', w=10**9) }}",
    "ljust": "{{ 'a'.ljust(3 * 10**9) }}",
    "center filter": "{{ 'a' | center(3000000000) }}",
    "indent filter": "{{ ('a\\n' * 50000) | indent(90000) }}",
    "replace": "{% set x = 'ab' * 9000 %}{{ x.replace('a', x) }}",
    "replace filter": "{% set x = 'ab' * 9000 %}{{ x | replace('a', x) }}",
    "join of what is made on the way": "{{ range(99999) | map('string') | join('x' * 90000) }}",
    "shared parts": (
        "{% set x = ['a' * 1000] * 1000 %}{% for i in range(99999) %}{{ x }}{% endfor %}"
    ),
    "filters in a loop": "{% set x = range(99999) %}{% for i in x %}{{ x | sum }}{% endfor %}",
    "set block": (
        "{% set x %}{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}{% endset %}{{ x }}"
    ),
}

IN_TURNS = [
    *(
        "nested loops",
        "loops that keep nothing",
        "macros",
        "text of a loop",
        "sum",
        "concatenation",
    ),
    *("list", "shared parts", "filters in a loop", "set block"),
]


def render(text: str) -> str:
    messages = [{"role": "user", "content": "hi"}]
    return LimitedTemplate(text).render(MAX_WORK, messages=messages)


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_ends_within_its_budget(name: str):
    # What one operation would make is refused before it is made.
    words = "does more work" if name in IN_TURNS else "larger than|by more than"
    with pytest.raises(LimitPassed, match=words):
        render(BOMBS[name])


def test_a_long_template_is_not_compiled():
    with pytest.raises(LimitPassed, match="longer than"):
        render("x" * (MAX_TEMPLATE + 1))


def test_usual_templates_are_not_touched():
    text = (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages if m.content -%}"
        "{%- set ns.n = ns.n + 1 -%}{{ '<' ~ m.role | upper + '> ' + m['content'].strip() }}"
        "{%- if loop.last %} {{ '%d of %d' % (ns.n, messages | length) }}"
        "{{ ' {}'.format(m.content.replace('h', 'H')) }}{{ ', '.join(['a', 'b']) * 2 }}"
        "{%- endif -%}{%- endfor -%}{{ messages | tojson(indent=1) }}"
    )
    assert render(text) == (
        '<USER> hi 1 of 1 Hia, ba, b[\n {\n  "role": "user",\n  "content": "hi"\n }\n]'
    )
