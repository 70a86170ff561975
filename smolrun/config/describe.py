"""What the classes of the configuration allow, in words.

For error messages and for docs/configuration.md.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

PLAIN = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}
NOT_BUILT: dict[str, tuple[str, ...]] = {
    "algorithm": ("diloco",),
    "mesh.backend": ("nccl",),
}
"""Group or key -> choices that are planned, so that the error says so."""
RANGES = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that a user may write, of a class and of the classes inside it, by its dotted path.

    An entry of a list is written `[]`, as in `hosts[].ssh`.
    """
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        inner = list(_sections(field.annotation))
        if not inner or type(None) in get_args(field.annotation):  # a group that may be null
            yield path, field
        for section, is_entry in inner:
            yield from keys_of(section, f"{path}[]." if is_entry else f"{path}.")


def sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The classes one of which the value of this field is."""
    return [section for section, _ in _sections(field.annotation)]


def choices_of(field: FieldInfo) -> tuple[Any, ...]:
    """The values of a field that is one of a few words; empty for any other field."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def allowed_values(field: FieldInfo) -> str:
    """What a field allows, as a phrase: `auto or an integer >= 1`.

    The field itself may say it better.
    """
    if isinstance(field.json_schema_extra, dict) and "allowed" in field.json_schema_extra:
        return str(field.json_schema_extra["allowed"])
    return phrase(field.annotation, field.metadata)


def absent_hint(field: FieldInfo | None) -> str:
    """How to ask for a field that has not been given; empty where no words of its own exist."""
    extra = field.json_schema_extra if field is not None else None
    return str(extra["absent"]) if isinstance(extra, dict) and "absent" in extra else ""


def phrase(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type and its limits as a phrase."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return phrase(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return " or ".join(_plain(value) for value in arguments)
    if origin in (Union, types.UnionType):
        members = dict.fromkeys(phrase(member, metadata) for member in arguments)
        return " or ".join(members)
    if origin is list:
        entry = re.sub(r"^an? (number|integer)", r"\1s", phrase(arguments[0]))
        return f"a list of {_size(metadata)}{entry}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return PLAIN.get(annotation, "a value") + _limits(metadata)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _limits(metadata: Sequence[Any]) -> str:
    words = []
    for item in _flat(metadata):
        for attribute, sign in RANGES:
            if getattr(item, attribute, None) is not None:
                words.append(f"{sign} {getattr(item, attribute):g}")
    return f" {' and '.join(words)}" if words else ""


def _size(metadata: Sequence[Any]) -> str:
    for item in _flat(metadata):
        if getattr(item, "max_length", None) is not None:
            return f"{item.max_length} "
    return ""


def _sections(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """The classes inside a type, and whether they are entries of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, False
    elif get_origin(annotation) is list:
        yield from ((section, True) for section, _ in _sections(get_args(annotation)[0]))
    elif get_origin(annotation) is Annotated:
        yield from _sections(get_args(annotation)[0])
    elif get_origin(annotation) is not Literal:
        for member in get_args(annotation):
            yield from _sections(member)
