"""Chat templates of other people's folders, built to run for ever or to fill the memory."""

from __future__ import annotations

import pytest

from smolrun.data.template_limits import MAX_TEMPLATE, MAX_WORK, LimitedTemplate
from smolrun.files import LimitPassed

NAMESPACE = "{% set n = namespace(x='a', i=7, s=['a']) %}{% for i in range(60) %}"
LONG = "{% set x = 'x' * 90000 %}{% set y = range(9999) %}"
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
    "join of an iterator": (
        "{{ ('x' * 90000).join(range(99999) | map('string') | list | reverse) }}"
    ),
    "format of a list": "{{ ['%999999999d'] | format(1) }}",
    "shared parts": (
        "{% set x = ['a' * 1000] * 1000 %}{% for i in range(99999) %}{{ x }}{% endfor %}"
    ),
    "filters in a loop": "{% set x = range(99999) %}{% for i in x %}{{ x | sum }}{% endfor %}",
    "replace filter by name": (
        "{% set x = 'ab' * 90000 %}{{ ('a' * 90000) | replace(new=x, old='a') }}"
    ),
    "percent of a dict": "{{ ('%(a)s' * 90000) % {'a': 'x' * 90000} }}",
    "many widths": "{{ ('%(a)9999d' * 9000) % {'a': 1} }}",
    "many fields": "{{ ('{0}' * 90000).format('x' * 90000) }}",
    "width in an argument": "{{ '{:{w}}'.format('a', w='999999999') }}",
    "namespace": LONG + "{% set n = namespace(x=x) %}{% for i in y %}{{ n }}{% endfor %}",
    "values": LONG + "{% set v = {1: x}.values() %}{% for i in y %}{{ v }}{% endfor %}",
    "bytes": LONG + "{% set b = x.encode() %}{% for i in y %}{{ b }}{% endfor %}",
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
    *("namespace", "values", "bytes"),
]


def render(text: str) -> str:
    return render_all(text, [{"role": "user", "content": "hi"}], MAX_WORK)


def render_all(text: str, messages: list[dict[str, str]], work: int) -> str:
    return LimitedTemplate(text).render(work, messages=messages)


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_ends_within_its_budget(name: str):
    # What one operation would make is refused before it is made.
    words = "does more work" if name in IN_TURNS else "larger than|by more than|format of"
    with pytest.raises(LimitPassed, match=words):
        render(BOMBS[name])


def test_items_that_are_made_to_be_counted_are_charged():
    text = "{% for i in range(99) %}{{ messages | slice(9999) | length }}{% endfor %}"
    with pytest.raises(LimitPassed, match="does more work"):
        render_all(text, [], 500_000)


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


# As Qwen's: the last question is looked for from the end.
LAST_QUESTION = """{%- set n = namespace(last=messages|length - 1, open=true) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if n.open and m.role == 'user' and not m.content.startswith('<tool_response>') %}
        {%- set n.open = false %}{%- set n.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- set is_last = (messages|last).content == m.content and loop.index == messages|count %}
    {%- if is_last %}{{ n.last }}{% endif %}
{%- endfor %}"""


@pytest.mark.parametrize("length", [1, 1000])
def test_a_long_conversation_is_not_refused(length: int):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": str(i % 10) * length} for i in range(1000)]
    text = render_all(LAST_QUESTION, messages, MAX_WORK + 100 * 1000 * length)
    expected = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    assert text == "".join(expected) + "998"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("x | replace('<|im_start|>', '<im_start>')", "words and <im_start> "),
        ("x.replace('<|im_start|>', '')", "words and  "),
        ("x | replace(new='', old='words')", " and <|im_start|> "),
        ("[x, ''] | join('<|im_end|>' * 9)", None),
        ("'**{}**: {}'.format('user', x)", None),
        ('\'{"a": {"%s": "%s"}}\' | format(\'user\', x)', None),
    ],
)
def test_a_megabyte_of_content_is_not_refused(expression: str, expected: str | None):
    times = 1_000_000 // len("words and <|im_start|> ")
    content = "words and <|im_start|> " * times
    text = "{% set x = messages[0].content %}{{ " + expression + " }}"
    made = render_all(text, [{"role": "user", "content": content}], MAX_WORK + 100 * len(content))
    if expected is None:
        assert content in made
    else:
        assert made == expected * times
