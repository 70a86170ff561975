"""The reference of the HTTP API, made from its OpenAPI description: one page, for a browser
(/docs) or as Markdown (docs/serving_api.md). It needs no script and no network."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

Schema = dict[str, Any]


def markdown(schema: Schema) -> str:
    """Every path with its request, and every request with its fields."""
    lines: list[str] = []
    for title, text, rows in _sections(schema):
        lines += ["", f"## {title}", "", text]
        if rows:
            lines += ["", "| field | type | meaning |", "| --- | --- | --- |"]
            lines += [
                f"| `{name}` | {_cell(kind)} | {_cell(meaning)} |" for name, kind, meaning in rows
            ]
    return "\n".join(lines) + "\n"


def html(schema: Schema) -> str:
    """The same as a page."""
    style = "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    style += "table{border-collapse:collapse}td,th{border:1px solid #999;padding:.2rem .5rem;"
    style += "text-align:left;vertical-align:top}@media(prefers-color-scheme:dark){"
    style += "body{background:#111;color:#ddd}a{color:#8cf}}"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>smolrun: API</title>",
        f"<style>{style}</style><h1>smolrun: HTTP API</h1>",
        "<p>For programs: <a href=/openapi.json>openapi.json</a></p>",
    ]
    for title, text, rows in _sections(schema):
        parts.append(f"<h2>{escape(title)}</h2><p>{escape(text)}</p>")
        if rows:
            cells = "".join(
                f"<tr><td><code>{escape(name)}</code><td>{escape(kind)}<td>{escape(meaning)}"
                for name, kind, meaning in rows
            )
            parts.append(f"<table><tr><th>field<th>type<th>meaning{cells}</table>")
    return "".join(parts) + "</html>"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _sections(schema: Schema) -> Iterator[tuple[str, str, list[tuple[str, str, str]]]]:
    """(title, sentence, rows of (field, type, meaning)) of every path and type."""
    schemas = schema.get("components", {}).get("schemas", {})
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            rows = _rows(_resolved(body.get("schema", {}), schemas))
            text = " ".join(operation.get("description", "").split())
            yield f"{method.upper()} {path}", text, rows
    shown = [name for name in schemas if name in _SHOWN]
    for name in shown:
        text = " ".join(schemas[name].get("description", "").split())
        yield name, text, _rows(schemas[name])


def _resolved(schema: Schema, schemas: Schema) -> Schema:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Schema = schemas.get(name, schema)
    return found


def _rows(schema: Schema) -> list[tuple[str, str, str]]:
    required = set(schema.get("required", ()))
    rows = []
    for name, field in schema.get("properties", {}).items():
        kind = _type(field)
        if name in required:
            kind += ", required"
        rows.append((name, kind, field.get("description", "")))
    return rows


def _type(field: Schema) -> str:
    """A type and its limits in words."""
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if "anyOf" in field:
        kinds = [_type(kind) for kind in field["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field:
        return " or ".join(f'"{value}"' for value in field["enum"] if value is not None)
    if "const" in field:
        return f'"{field["const"]}"'
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    limits = [
        f"{sign} {field[key]:g}" for key, sign in _LIMITS if abs(field.get(key, 2**31)) < _ANY
    ]
    return " ".join([str(field.get("type", "any")), *limits])


_SHOWN = ("ChatMessage", "TextPart", "StreamOptions", "InputItem", "ItemPart", "ErrorDetail")
_ANY = 2**31 - 1  # a limit as large as this one is none
_LIMITS = (
    ("minimum", ">="),
    ("exclusiveMinimum", ">"),
    ("maximum", "<="),
    ("exclusiveMaximum", "<"),
)
